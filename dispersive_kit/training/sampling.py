"""Samples from a model in training or trained, by the sampler that fits its objective."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dispersive_kit.data import to_uint8
from dispersive_kit.diffusion.guidance import ClassifierFree
from dispersive_kit.diffusion.samplers import ddim, heun, initial_noise, meanflow, time_grid
from dispersive_kit.training.parallel import keep_freed_memory

# The sampler of each objective: Heun's method for velocities, DDIM for DDPM's noise, MeanFlow's own.
SAMPLERS: dict[str, Callable[..., Tensor]] = {
    "flow": heun,
    "ddpm": partial(ddim, prediction="eps"),
    "meanflow": meanflow,
}
SAMPLER_NAMES = {"flow": "heun", "ddpm": "ddim", "meanflow": "meanflow"}
PREVIEW_STEPS = 20


@torch.no_grad()
def sample_batch(
    model: Any,
    labels: Tensor,
    seeds: Sequence[int],
    *,
    objective: str = "flow",
    num_steps: int = 25,
    guidance: Any = None,
) -> Tensor:
    """x0 (B, ...) on the model's device for labels (B,), one seed a sample; guidance: None is none."""
    device = labels.device
    keep_freed_memory(device)
    x = initial_noise(seeds, model.sample_shape).to(device)
    guidance = guidance or ClassifierFree(labels, model.null_label, scale=1.0)
    return SAMPLERS[objective](model, x, time_grid(num_steps), guidance=guidance, seeds=seeds)


def preview(model: Any, n: int, *, objective: str, device: torch.device) -> Tensor:
    """n samples, classes in turn, always from the same noise; images as uint8, other samples as they are."""
    labels = torch.arange(n, device=device) % max(model.num_classes, 1)
    x = sample_batch(model, labels, range(n), objective=objective, num_steps=PREVIEW_STEPS).cpu()
    return to_uint8(x) if x.ndim == 4 and x.shape[1] in (1, 3) else x


def save_preview(samples: Tensor, file: Path) -> None:
    """A grid of images as PNG; points, and latents that only a decoder can show, as safetensors."""
    file.parent.mkdir(exist_ok=True)
    if samples.ndim == 4 and samples.shape[1] in (1, 3):
        from torchvision.utils import save_image  # slow to import, and a run without pictures does not need it

        save_image(samples.float() / 255, file.with_suffix(".png"), nrow=8, padding=1)
        return
    from safetensors.torch import save_file

    save_file({"samples": samples}, file.with_suffix(".safetensors"))
