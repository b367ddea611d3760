"""Features of images at a level of noise: the same images and the same noise for every network, block and level.

The class is always the null class: a probe would find a given label again in the features (notebook 10 shows it).
The pooling of a block's tokens into one row is always stated, and is the same for networks and controls.
"""

import copy
import math
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dispersive_kit.analysis.geometry import finite
from dispersive_kit.data import ImageSet, to_float
from dispersive_kit.diffusion.paths import LINEAR, Path
from dispersive_kit.errors import ConfigError, DataError
from dispersive_kit.evaluation.features import principal_axes
from dispersive_kit.evaluation.generate import load_reference
from dispersive_kit.models.dit import DiT
from dispersive_kit.training import load_run
from dispersive_kit.training.batches import stream

LEVELS = (math.inf, 4.0, 2.0, 0.0, -2.0, -4.0)  # log-SNR: the clean image and five levels of noise
POOLS = {  # of the tokens (N, D) of a block, in words; Dispersive Loss itself acts on all tokens
    "tokens": "all tokens in one row, projected on its first 256 principal components where it is longer",
    "mean": "mean over tokens",
    "patch": "the token in the middle of the grid",
}
WIDTH, FITTED = 256, 512  # components that are kept of a long row, and images that they are fitted to

# x_t (B, C, H, W), t (B,), which of the images these are -> tokens (blocks, B, N, D)
Encoder = Callable[[Tensor, Tensor, slice], Tensor]
Pooling = Callable[[Tensor, int], Tensor]  # tokens (blocks, B, N, D), index of the level -> rows (blocks, B, E)


def load_with_images(run: str | pathlib.Path) -> tuple[DiT, dict[str, Any], ImageSet, ImageSet]:
    """Model and card of a run (as `load_run`), and the training and held-out images of the data it was trained on.

    run: a folder, or the name of a shipped run; of digits, MNIST, CIFAR-10 or a folder of images.
    Raises CheckpointError: no run. ConfigError: a run on points or latents, or of ddpm. DataError: the images are not
        here, or have other classes than the run.
    """
    model, card = load_run(run)
    if not isinstance(model, DiT) or "autoencoder" in card["data"] or card["config"].objective == "ddpm":
        raise ConfigError(f"{run} was trained on points or latents, or by ddpm: give a flow or meanflow run on images")
    train, held_out = load_reference(card["config"])
    if list(train.classes) != card["data"]["classes"]:
        raise DataError(f"{train.source} has the classes {', '.join(train.classes)}, and {run} was trained on others")
    return model, card, train, held_out


def time_of(log_snr: float, path: Path = LINEAR) -> float:
    """The time at which a path has this log-SNR, by bisection; 0 for infinity, the clean image."""
    low, high = 0.0, 0.0 if log_snr == math.inf else 1.0
    for _ in range(60):
        middle = (low + high) / 2
        above = float(path.log_snr(torch.tensor(middle, dtype=torch.float64))) > log_snr
        low, high = (middle, high) if above else (low, middle)
    return (low + high) / 2


def noisy(
    images: Tensor,
    levels: Sequence[float] = LEVELS,
    *,
    draw: int = 0,
    seed: int = 0,
    path: Path = LINEAR,
    batch_size: int = 250,
) -> Iterator[tuple[slice, int, Tensor, Tensor]]:
    """One pass over uint8 images (N, C, H, W); yields (slice, level's index, x_t (B, C, H, W), t (B,)).

    Each batch comes at all levels in turn. Image i has one noise for each `draw`, at all levels and batch sizes.
    """
    times = [time_of(level, path) for level in levels]
    for start in range(0, len(images), batch_size):
        x0 = to_float(images[start : start + batch_size])
        where = slice(start, start + len(x0))
        own = (stream(seed, f"analysis/{draw}", i) for i in range(where.start, where.stop))
        eps = torch.stack([torch.randn(x0.shape[1:], generator=generator) for generator in own])
        for level, time in enumerate(times):
            t = torch.full((len(x0),), time)
            yield where, level, path.x_t(x0, eps, t) if time else x0, t


def tokens(model: DiT, x: Tensor, t: Tensor, y: Tensor | None = None) -> list[Tensor]:
    """Output (B, N, D) of every block, in one forward pass without gradient; y: None is the null class.

    Raises ConfigError: the model has classes and no null class, so that any label would leak into its features.
    """
    if y is None and model.num_classes:
        if model.null_label is None:
            raise ConfigError("the model has no null class (class_dropout_prob was 0): features would hold the label")
        y = torch.full((len(x),), model.null_label, device=x.device)
    with torch.no_grad():
        return model(x, t, y, taps=range(len(model.blocks)))[1]


def encoder(model: DiT, *, y: Tensor | None = None) -> Encoder:
    """The encoder for `extract`: it returns the residual stream after each block.

    y: labels (N,) of all images; only to show how labels leak into features.
    """
    return lambda x, t, where: torch.stack(tokens(model, x, t, None if y is None else y[where]))


def raw_pixels(patch_size: int) -> Encoder:
    """An encoder without a network, as a control: the patches of x_t as tokens, (1, B, N, C p p)."""
    return lambda x, t, where: F.unfold(x, patch_size, stride=patch_size).mT[None]


def pooling(pool: str, encode: Encoder, images: Tensor, levels: Sequence[float] = LEVELS, **how: Any) -> Pooling:
    """The pooling of a name in `POOLS`. At each level, components are fitted to the first of uint8 images (N, C, H, W).

    Raises ConfigError: no pooling has this name.
    """
    if pool not in POOLS:
        raise ConfigError(f"unknown pooling {pool!r}; there are: {', '.join(POOLS)}")
    if pool == "mean":
        return lambda z, level: finite(z).mean(2)
    if pool == "patch":
        return lambda z, level: finite(z)[:, :, (side := math.isqrt(z.shape[2])) // 2 * (side + 1)]
    seen = noisy(images[:FITTED], levels, **{**how, "batch_size": FITTED})
    axes = [_axes(encode(x, t, where).flatten(2)) for where, _, x, t in seen]  # of each level
    return lambda z, level: finite(z).flatten(2) @ axes[level]


def _axes(rows: Tensor) -> Tensor:
    """First principal axes (blocks, D, k) of long rows (blocks, B, D), turned by a fixed rotation. Every column then
    has about the same variance, so a probe that standardises columns does not amplify the last components.
    """
    if rows.shape[2] <= WIDTH:
        return torch.eye(rows.shape[2], device=rows.device)  # short rows stay as they are
    k = min(WIDTH, rows.shape[1] - 1)
    if not k:
        raise ConfigError("one image has no principal components: give more images, or another pooling than tokens")
    turn = torch.linalg.qr(torch.randn(k, k, generator=stream(0, "turn"), dtype=torch.double)).Q
    return torch.stack([principal_axes(finite(block))[1][:, :k] @ turn for block in rows]).float()


def extract(
    encode: Encoder,
    images: Tensor,
    levels: Sequence[float] = LEVELS,
    *,
    pool: str | Pooling = "tokens",
    draws: int = 1,
    **how: Any,
) -> list[Tensor]:
    """For each level the rows (draws, blocks, N, E) of uint8 images (N, C, H, W); `how` as of `noisy`.

    pool: a name in `POOLS`, whose components are fitted to these images, or a `pooling` fitted to others. The clean
    image has one draw, since it has no noise.
    """
    pooled = pooling(pool, encode, images, levels, **how) if isinstance(pool, str) else pool
    parts: list[list[list[Tensor]]] = [[[] for _ in range(draws)] for _ in levels]
    for draw in range(draws):
        wanted = [i for i, level in enumerate(levels) if draw == 0 or level != math.inf]
        for where, i, x, t in noisy(images, [levels[i] for i in wanted], draw=draw, **how):
            parts[wanted[i]][draw].append(pooled(encode(x, t, where), wanted[i]))
    return [torch.stack([torch.cat(batches, 1) for batches in level if batches]) for level in parts]


def random_network(model: DiT, seed: int = 0) -> DiT:
    """The first null: the same architecture with random weights.

    With initial weights, every block is the identity (its gates are zero) and the output is zero. So the zero layers
    are random here too, and the gates are 1 plus what the condition adds, as in a plain transformer.
    """
    network = copy.deepcopy(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network.initialize_weights()
        for layer in (*network.blocks, network.final_layer):
            torch.nn.init.xavier_uniform_(layer.adaLN_modulation[-1].weight)
        torch.nn.init.xavier_uniform_(network.final_layer.linear.weight)
    for block in network.blocks:
        bias = block.get_submodule("adaLN_modulation.1").get_parameter("bias")
        bias.data.view(6, -1)[[2, 5]] = 1.0  # of attention and of the MLP
    return network.eval()
