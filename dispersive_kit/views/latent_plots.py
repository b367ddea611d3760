"""Figures of latents: what an autoencoder gives back, what its channels hold, and the way between two images."""

from collections.abc import Mapping
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from dispersive_kit.data import to_uint8
from dispersive_kit.views.plots import same_noise_grid


def reconstructions(originals: Tensor, decoded: Tensor, *, columns: int = 8) -> Figure:
    """Originals above, what came back below, and their difference, grey where there is none; uint8 (N, 3, H, W)."""
    difference = ((decoded.int() - originals.int()) // 2 + 128).clamp(0, 255).to(torch.uint8)
    rows = {"original": originals, "decoded": decoded, "difference": difference}
    figure = same_noise_grid(rows, columns=min(columns, len(originals)))
    assert isinstance(figure, Figure)
    return figure


def latent_channels(images: Tensor, x0: Tensor, *, limit: float = 3.0) -> Figure:
    """Images uint8 (N, 3, H, W) and beside each the channels of its scaled latents (N, C, h, w), on one scale."""
    N, C = x0.shape[:2]
    figure, axes = plt.subplots(N, 1 + C, figsize=(1.5 * (1 + C), 1.5 * N), squeeze=False)
    for row, image, latent in zip(axes, images, x0, strict=True):
        row[0].imshow(image.permute(1, 2, 0).numpy())
        for axis, channel in zip(row[1:], latent, strict=True):
            drawn = axis.imshow(channel.numpy(), vmin=-limit, vmax=limit, cmap="cividis")
    for number, axis in enumerate(axes[0]):
        axis.set_title(f"channel {number - 1}" if number else "image")
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.grid(False)
    figure.colorbar(drawn, ax=axes, shrink=0.6, label="scaled latent")
    return figure


@torch.no_grad()
def between(autoencoder: Any, x0: Tensor, share: float, other: int) -> Figure:
    """The way from image 0 to image `other`: mixed as pixels, and mixed as latents x0 (N, C, h, w), then decoded."""
    ends = autoencoder.images(x0[[0, other]])
    pixels = to_uint8((1 - share) * ends[0] + share * ends[1])
    latents = to_uint8(autoencoder.images((1 - share) * x0[:1] + share * x0[other : other + 1]))[0]
    return _in_a_row({
        "image 0": to_uint8(ends[0]), "pixels mixed": pixels, "latents mixed": latents,
        f"image {other}": to_uint8(ends[1]),
    })  # fmt: skip


@torch.no_grad()
def posterior_draw(autoencoder: Any, originals: Tensor, posterior: Tensor, image: int, spread: float) -> Figure:
    """Image `image` of `originals` uint8 (N, 3, H, W), and decoded: mean + spread * std * eps of its posterior
    (N, 2, C, h, w), with the same eps at every spread, and what the draw changed against the mean.
    """
    mean, std = posterior[image].float()
    eps = torch.randn(mean.shape, generator=torch.Generator().manual_seed(image))
    x0 = autoencoder.card.to_model(torch.stack([mean, mean + spread * std * eps]))  # (2, C, h, w)
    at_mean, drawn = autoencoder.images(x0)
    return _in_a_row({
        f"image {image}": originals[image], "mean, decoded": to_uint8(at_mean),
        f"draw, {spread:g} $\\sigma$": to_uint8(drawn), "what it changed": to_uint8((drawn - at_mean) / 2),
    })  # fmt: skip


def _in_a_row(panels: Mapping[str, Tensor]) -> Figure:
    """uint8 (3, H, W) each, with its name."""
    figure, axes = plt.subplots(1, len(panels), figsize=(2 * len(panels), 2.3))
    for axis, (name, image) in zip(axes, panels.items(), strict=True):
        axis.imshow(np.asarray(image.permute(1, 2, 0)))
        axis.set(title=name, xticks=[], yticks=[])
        axis.grid(False)
    return figure
