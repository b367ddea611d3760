"""Images from a trained run, one seed an image: the same image whatever the batch it is drawn in."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dispersive_kit.data import to_uint8
from dispersive_kit.data.autoencoders import AutoencoderCard, load_named
from dispersive_kit.diffusion.guidance import ClassifierFree
from dispersive_kit.errors import ConfigError, KitError
from dispersive_kit.evaluation.processes import shared_out
from dispersive_kit.training.sampling import sample_batch


def balanced_labels(n: int, num_classes: int) -> Tensor:
    """Labels 0, 1, ..., K - 1, 0, 1, ... (n,)."""
    return torch.arange(n) % num_classes


@torch.no_grad()
def generate(
    model: Any,
    labels: Tensor,
    *,
    objective: str = "flow",
    num_steps: int = 25,
    cfg_scale: float = 1.0,
    guidance_low: float = 0.0,
    guidance_high: float = 1.0,
    first_seed: int = 0,
    batch_size: int = 256,
    decode: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Draw one uint8 image (N, C, H, W) for each label (N,); image i has the seed first_seed + i.

    objective: of the training (flow, ddpm, meanflow), which decides on the sampler; flow is Heun's method.
    Guidance of `cfg_scale` acts where t is in [guidance_low, guidance_high] (t = 1 is noise). Under a launcher the
    processes take batches in turn, and each gets all images.

    decode: turns what a model of latents draws into images in [-1, 1], see `decoder_of`.

    Raises:
        ConfigError: a label outside the classes; seeds beyond 64 bits; guidance asked of a model without a null class,
            or not finite.
        KitError: the model draws NaN or infinity, which as an image would be black.
    """
    num_classes = model.num_classes
    if len(labels) and (int(labels.min()) < 0 or int(labels.max()) >= num_classes):
        raise ConfigError(f"labels must lie in 0..{num_classes - 1}, got {int(labels.min())}..{int(labels.max())}")
    if not -(2**63) <= first_seed < 2**63 - len(labels):
        raise ConfigError(f"seeds from {first_seed} on are no numbers of 64 bits")
    if not math.isfinite(cfg_scale):
        raise ConfigError(f"cfg_scale must be a number, got {cfg_scale}")
    if cfg_scale != 1.0 and model.null_label is None:
        raise ConfigError("this model has no null class (class_dropout_prob was 0), so cfg_scale must be 1")
    device = next(model.parameters()).device

    def draw(rows: slice) -> Tensor:
        y = labels[rows].to(device)
        seeds = range(first_seed + rows.start, first_seed + rows.stop)
        guidance = ClassifierFree(y, model.null_label, scale=cfg_scale, low=guidance_low, high=guidance_high)
        x = sample_batch(model, y, seeds, objective=objective, num_steps=num_steps, guidance=guidance)
        images = decode(x) if decode else x
        if not images.isfinite().all():
            raise KitError(f"the model drew NaN or infinity, among the images with seeds {seeds[0]} to {seeds[-1]}")
        return to_uint8(images).cpu()

    return torch.cat(shared_out(draw, len(labels), batch_size))


def decoder_of(
    card: dict[str, Any], *, device: torch.device | str = "cpu", path: str | None = None
) -> Callable[[Tensor], Tensor] | None:
    """From the card of `load_run`: the decoder its latents were made with, and no other; None for a model of images.

    Raises:
        DataError: the autoencoder is not here, or its weights, scale or shift are others. ConfigError: a `path`, and
            no latents.
    """
    if "autoencoder" not in card["data"]:
        if path:
            raise ConfigError(f"an autoencoder ({path}) is for runs on latents, and {card['run']} has images")
        return None
    return load_named(AutoencoderCard(**card["data"]["autoencoder"]), device=device, path=path).images
