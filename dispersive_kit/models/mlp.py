"""The toy network: a residual MLP on points, called like `DiT`, small enough to train in seconds."""

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from dispersive_kit.errors import ConfigError
from dispersive_kit.models.dit import Conditioned


class _ResidualBlock(nn.Module):
    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(hidden_size, hidden_size), nn.Linear(hidden_size, hidden_size)

    def forward(self, h: Tensor, c: Tensor) -> Tensor:
        return h + self.fc2(F.silu(self.fc1(F.silu(h) + c)))  # (B, D)


class MLP(Conditioned):
    """`forward(x, t, y=None, *, r=None, taps=())`: x (B, dim), t (B,) in [0, 1], y (B,) long; returns (B, dim).

    `taps=(i, ...)` returns `(out, [z_i, ...])`, z_i (B, hidden_size) the output of block i counted from 0.
    The class table has a null row at `null_label`; `interval=True` embeds t - r too, for MeanFlow.
    Raises ConfigError: wrong point size, t not (B,), label or tap outside its range, y missing, y or r not expected.
    """

    def __init__(
        self,
        dim: int = 2,
        hidden_size: int = 128,
        depth: int = 4,
        num_classes: int = 0,
        time_scale: float | None = None,
        interval: bool = False,
    ) -> None:
        super().__init__()
        self.sample_shape = (dim,)
        self.x_embedder = nn.Linear(dim, hidden_size)
        self._embed(hidden_size, num_classes, num_classes or None, time_scale, interval=interval)
        self.blocks = nn.ModuleList(_ResidualBlock(hidden_size) for _ in range(depth))
        self.final_layer = nn.Linear(hidden_size, dim)

    def forward(
        self, x: Tensor, t: Tensor, y: Tensor | None = None, *, r: Tensor | None = None, taps: Sequence[int] = ()
    ) -> Any:
        if x.shape[1:] != self.sample_shape:
            raise ConfigError(f"the network was built for points (B, {self.sample_shape[0]}), not {tuple(x.shape)}")
        h = self.x_embedder(x.to(self.x_embedder.weight.dtype))  # (B, D)
        h, tapped = self._through_blocks(h, self.condition(t, y, r), taps)
        out = self.final_layer(F.silu(h))
        return (out, tapped) if taps else out
