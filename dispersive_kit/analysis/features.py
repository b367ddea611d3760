"""Features of images at a level of noise: the same images and the same noise for every network, block and level.

Always of the null class: a label given to the network would be read back from its features (notebook 10 shows it).
"""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dispersive_kit.data import to_float
from dispersive_kit.diffusion.paths import LINEAR, Path
from dispersive_kit.errors import ConfigError
from dispersive_kit.models.dit import DiT
from dispersive_kit.training.batches import stream

LEVELS = (math.inf, 4.0, 2.0, 0.0, -2.0, -4.0)  # log-SNR: the clean image and five levels of noise
POOLS = {"mean": lambda z: z.mean(1), "none": lambda z: z}  # of the tokens (B, N, D) of a block

# x_t (B, C, H, W), t (B,), which of the images these are -> features (blocks, B, D), or with tokens (blocks, B, N, D)
Encoder = Callable[[Tensor, Tensor, slice], Tensor]


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
    """One pass over uint8 images (N, C, H, W): (which, level, x_t (B, C, H, W), t (B,)), all levels of a batch in turn.

    Image i has one noise for each `draw`, at all levels, whatever the batch size.
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

    Raises:
        ConfigError: the model has classes and no null class, so that any label would leak into its features.
    """
    if y is None and model.num_classes:
        if model.null_label is None:
            raise ConfigError("the model has no null class (class_dropout_prob was 0): features would hold the label")
        y = torch.full((len(x),), model.null_label, device=x.device)
    with torch.no_grad():
        return model(x, t, y, taps=range(len(model.blocks)))[1]


def encoder(model: DiT, *, pool: str = "mean", y: Tensor | None = None) -> Encoder:
    """What `extract` applies: the residual stream after each block, pooled ("mean" over tokens, or "none").

    y: labels (N,) of all images, for showing the leak and nothing else.
    """

    def encode(x: Tensor, t: Tensor, where: slice) -> Tensor:
        return torch.stack([POOLS[pool](z) for z in tokens(model, x, t, None if y is None else y[where])])

    return encode


def raw_pixels(x: Tensor, t: Tensor, where: slice) -> Tensor:
    """An encoder too, the control without any network: x_t flattened, (1, B, C H W)."""
    return x.flatten(1)[None]


def patch_pca(images: Tensor, patch_size: int, k: int) -> Encoder:
    """Another: first k principal components of patches, and their squares, each as the mean over patches, (1, B, 2 k).

    Fitted on clean uint8 training images (N, C, H, W). Without the squares it would tell the mean patch and no more.
    """

    def cut(x: Tensor) -> Tensor:
        return F.unfold(x, patch_size, stride=patch_size).mT.double()  # (B, patches, C p p)

    patches = cut(to_float(images)).flatten(0, 1)  # (N patches, C p p)
    mean = patches.mean(0)
    basis = torch.linalg.eigh((patches - mean).T @ (patches - mean))[1][:, -k:]  # (C p p, k)

    def encode(x: Tensor, t: Tensor, where: slice) -> Tensor:
        found = (cut(x) - mean) @ basis  # (B, patches, k)
        return torch.cat([found.mean(1), found.square().mean(1)], 1)[None]

    return encode


def extract(
    encode: Encoder, images: Tensor, levels: Sequence[float] = LEVELS, *, draws: int = 1, **how: Any
) -> list[Tensor]:
    """For each level the features (draws, blocks, N, ...) of uint8 images (N, C, H, W); `how` as of `noisy`.

    The clean image has one draw, there being no noise in it.
    """
    parts: list[list[list[Tensor]]] = [[[] for _ in range(draws)] for _ in levels]
    for draw in range(draws):
        wanted = [i for i, level in enumerate(levels) if draw == 0 or level != math.inf]
        for where, i, x, t in noisy(images, [levels[i] for i in wanted], draw=draw, **how):
            parts[wanted[i]][draw].append(encode(x, t, where))
    return [torch.stack([torch.cat(batches, 1) for batches in level if batches]) for level in parts]


def random_network(model: DiT, seed: int = 0) -> DiT:
    """The first null: the same architecture with random weights.

    As initialised for training every block is the identity (its gates are zero) and the output is zero. So the zero
    layers are drawn too, and the gates are 1 before the condition moves them, as in a plain transformer.
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
