"""Images from a trained run, one seed an image: the same image whatever the batch it is drawn in."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dispersive_kit.data import to_uint8
from dispersive_kit.data.autoencoders import AutoencoderCard, load_named
from dispersive_kit.diffusion.guidance import ClassifierFree
from dispersive_kit.diffusion.samplers import heun, initial_noise, time_grid
from dispersive_kit.errors import ConfigError


def balanced_labels(n: int, num_classes: int) -> Tensor:
    """Labels 0, 1, ..., K - 1, 0, 1, ... (n,)."""
    return torch.arange(n) % num_classes


@torch.no_grad()
def generate(
    model: Any,
    labels: Tensor,
    *,
    num_steps: int = 25,
    cfg_scale: float = 1.0,
    first_seed: int = 0,
    batch_size: int = 256,
    decode: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Draw one uint8 image (N, C, H, W) for each label (N,) with Heun's method; image i has the seed first_seed + i.

    decode: turns what a model of latents draws into images in [-1, 1], see `decoder_of`.

    Raises:
        ConfigError: a label outside the classes; guidance asked of a model without a null class.
    """
    num_classes = model.num_classes
    if len(labels) and (int(labels.min()) < 0 or int(labels.max()) >= num_classes):
        raise ConfigError(f"labels must lie in 0..{num_classes - 1}, got {int(labels.min())}..{int(labels.max())}")
    if cfg_scale != 1.0 and model.null_label is None:
        raise ConfigError("this model has no null class (class_dropout_prob was 0), so cfg_scale must be 1")
    device = next(model.parameters()).device
    shape, ts = (model.in_channels, model.input_size, model.input_size), time_grid(num_steps).to(device)
    parts = []
    for start in range(0, len(labels), batch_size):
        y = labels[start : start + batch_size].to(device)
        seeds = list(range(first_seed + start, first_seed + start + len(y)))
        guidance = ClassifierFree(y, model.null_label, scale=cfg_scale)
        x = heun(model, initial_noise(seeds, shape).to(device), ts, guidance=guidance, seeds=seeds)
        parts.append(to_uint8(decode(x) if decode else x).cpu())
    return torch.cat(parts)


def decoder_of(
    card: dict[str, Any], *, device: torch.device | str = "cpu", path: str | None = None
) -> Callable[[Tensor], Tensor] | None:
    """From the card of `load_run`: the decoder its latents were made with, and no other; None for a model of images.

    Raises:
        DataError: the autoencoder is not here, or its weights, scale or shift are others.
    """
    if "autoencoder" not in card["data"]:
        return None
    return load_named(AutoencoderCard(**card["data"]["autoencoder"]), device=device, path=path).images
