"""What the regulariser saw, without waiting for the device."""

import math
import warnings
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..errors import DispersiveError
from .losses import KINDS, LossOptions, Measured, floor

AT_FLOOR = 1e-3  # share of sum exp(-D / tau) held by pairs i != j under which the gradient has all but gone


@dataclass(frozen=True)
class Record:
    """One tap's measurement; tensors stay on their device."""

    path: str
    measured: Measured
    options: LossOptions
    weight: float

    @property
    def loss(self) -> Tensor:
        return self.measured.loss

    @property
    def vitals(self) -> Tensor:
        m = self.measured
        return torch.stack(
            [m.loss.detach(), m.pairs, m.off_diagonal_mass, m.tau, m.feature_rms]
        ).float()  # (5,)

    def numbers(self, vitals: list[float]) -> dict[str, float]:
        loss, pairs, mass, tau, rms = vitals
        B, dim = self.measured.rows, self.measured.dim
        scale = None if self.options.kind == "covariance" else tau
        if self.options.kind == "vicreg":
            scale = self.options.scale  # type: ignore[assignment]
        low = (
            floor(
                self.options.kind, B, scale, diagonal=self.options.with_diagonal, dim=dim, pairs=round(pairs)
            )
            if B > 1
            else loss
        )
        low += 0.0
        return {
            "loss": loss,
            "floor": low,
            "gap": loss - low,
            "off_diagonal_mass": mass,
            "feature_rms": rms,
            "effective_rank": effective_rank(self.measured.gram),
            "batch_size": B,
            "pairs": pairs,
            "tau": tau,
            "weight": self.weight,
        }


def effective_rank(gram: Tensor) -> float:
    """exp of the entropy of the singular values, normalised to sum 1, of the centred rows."""
    gram = gram.double().cpu()
    gram = gram - gram.mean(0) - gram.mean(1, keepdim=True) + gram.mean()
    singular = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    p = singular / singular.sum().clamp(min=1e-300)
    return math.exp(-float(torch.special.xlogy(p, p).sum()))


class Stats:
    """Unweighted loss, floor, gap = loss - floor, off-diagonal mass, RMS of the raw features, effective rank,
    batch size, pairs, tau and weight, as attributes: the mean over taps.

    `read()` gives all as floats with one synchronisation; `by_tap()` the same for each path.
    """

    def __init__(self, records: list[Record]) -> None:
        self._detached = [
            Record(r.path, r.measured._replace(loss=r.loss.detach()), r.options, r.weight) for r in records
        ]
        self._vitals = torch.stack([record.vitals for record in self._detached])  # (taps, 5)

    @cached_property
    def _numbers(self) -> dict[str, dict[str, float]]:
        rows = self._vitals.tolist()
        return {r.path: r.numbers(row) for r, row in zip(self._detached, rows, strict=True)}

    def by_tap(self) -> dict[str, dict[str, float]]:
        return self._numbers

    def read(self) -> dict[str, float]:
        taps = list(self._numbers.values())
        return {name: sum(tap[name] for tap in taps) / len(taps) for name in taps[0]}

    def __getattr__(self, name: str) -> float:
        if name.startswith("_"):
            raise AttributeError(name)
        try:
            return self.read()[name]
        except KeyError:
            raise AttributeError(f"Stats has no {name!r}; it has {', '.join(self.read())}") from None


class Watch:
    """Raises on NaN and warns at the floor: at once on a CPU, elsewhere one step later, not waiting."""

    def __init__(self) -> None:
        self._pending: tuple[Tensor, Any, list[str]] | None = None
        self._warned = False

    def look(self, records: list[Record]) -> None:
        vitals = torch.stack([record.vitals for record in records])
        paths = [record.path for record in records]
        if vitals.device.type == "cpu":
            return self._judge(vitals, paths, records)
        if self._pending is not None and self._pending[1].query():
            self._judge(self._pending[0], self._pending[2], records)
            self._pending = None
        if self._pending is None:
            host, done = vitals.to("cpu", non_blocking=True), torch.Event(vitals.device)
            done.record()
            self._pending = host, done, paths
        return None

    def _judge(self, vitals: Tensor, paths: list[str], records: list[Record]) -> None:
        for (loss, pairs, mass, *_), path, record in zip(vitals.tolist(), paths, records, strict=True):
            if not math.isfinite(loss):
                raise DispersiveError(
                    f"tap {path!r}: the loss is {loss}: the features hold NaN or infinity. Lower the "
                    "learning rate "
                    "or the precision of this block's inputs, or tap an earlier block"
                )
            if not self._warned and (pairs == 0 or (mass < AT_FLOOR and KINDS[record.options.kind].log)):
                self._warned = True
                warnings.warn(self._why(path, pairs), stacklevel=4)

    @staticmethod
    def _why(path: str, pairs: float) -> str:
        if pairs == 0:
            return f"tap {path!r}: ignore_same_class and t_window leave no pair; the loss is 0 for this batch"
        return (
            f"tap {path!r}: Dispersive Loss is at its floor and its gradient is all but zero. The features "
            "have "
            "grown apart beyond what tau sees: diagonal=False, tau='auto', or a scale-free kind "
            "(infonce_cosine)"
        )
