"""What a denoiser is told beside x: its time or interval of time, and its class. DiT and MLP share it."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..errors import ConfigError


class TimestepEmbedder(nn.Module):
    """Sinusoids of a time, in float32 at least (bf16 cannot count to 1000), then two layers."""

    def __init__(self, hidden_size: int, frequencies: int = 256) -> None:
        super().__init__()
        self.frequencies = frequencies // 2
        self.mlp = nn.Sequential(nn.Linear(frequencies, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, t: Tensor) -> Tensor:
        t = t if t.dtype == torch.float64 else t.float()
        omega = torch.exp(
            -math.log(10000.0) / self.frequencies * torch.arange(self.frequencies, device=t.device, dtype=t.dtype)
        )
        angle = t[:, None] * omega
        return self.mlp(torch.cat([angle.cos(), angle.sin()], dim=1).to(next(self.parameters()).dtype))  # (B, D)


class LabelEmbedder(nn.Module):
    """A table of classes; the row after the last, where there is one, is the null class of guidance."""

    def __init__(self, num_classes: int, hidden_size: int, null: bool) -> None:
        super().__init__()
        self.rows = num_classes + int(null)
        self.embedding_table = nn.Embedding(self.rows, hidden_size)

    def forward(self, y: Tensor) -> Tensor:
        # On an accelerator this check would cost a synchronisation a step, and the kernel asserts by itself.
        if not torch.compiler.is_compiling() and y.device.type == "cpu" and y.numel():
            low, high = int(y.min()), int(y.max())
            if low < 0 or high >= self.rows:
                raise ConfigError(
                    f"label {low if low < 0 else high} is outside 0..{self.rows - 1}, the model's "
                    "class table (the null class included): check num_classes against the data set"
                )
        return self.embedding_table(y)  # (B, D)


def default_time_scale(interval: bool) -> float:
    """1000 as in DiT; 1 for MeanFlow, whose target holds the model's derivative along t, 1000 times larger with it.

    With 1000 a DiT-T/2 does not learn digits in 300 steps, and with 1 it does (tests/training/test_meanflow.py).
    """
    return 1.0 if interval else 1000.0


class Conditioned(nn.Module):
    """What a model is told beside x: the time t, with `r_embedder` the interval t - r, with `y_embedder` the class."""

    time_scale: float
    num_classes: int
    null_label: int | None
    t_embedder: TimestepEmbedder
    r_embedder: TimestepEmbedder | None
    y_embedder: LabelEmbedder | None

    def condition(self, t: Tensor, y: Tensor | None, r: Tensor | None) -> Tensor:
        """c (B, D) of t and r (B,) and y (B,)."""
        if t.ndim != 1:
            raise ConfigError(f"t is {tuple(t.shape)}: give one time for each image, (B,)")
        c = self.t_embedder(t * self.time_scale)
        if self.r_embedder is not None:
            c = c + self.r_embedder((torch.zeros_like(t) if r is None else t - r) * self.time_scale)
        elif r is not None:
            raise ConfigError("the model was given a second time r: build it with interval=True")
        if (self.y_embedder is None) != (y is None):
            given = "no labels" if y is None else "labels"
            raise ConfigError(
                f"the model has {self.num_classes} classes and was given {given}: one without classes takes "
                f"y=None, the others labels (null_label={self.null_label} for none)"
            )
        return c if self.y_embedder is None else c + self.y_embedder(y)


def check_taps(taps: Sequence[int], depth: int) -> None:
    if outside := [i for i in taps if not 0 <= i < depth]:
        raise ConfigError(f"there is no block {outside[0]}: taps are counted from 0 to {depth - 1}")
