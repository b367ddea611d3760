"""Statistics of the features that were regularised, and depth use of each block, without waiting for the device."""

import contextlib
import math
import sys
import warnings
from collections.abc import Iterator
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from dispersive_kit.errors import DispersiveError
from dispersive_kit.regularizers.losses import KINDS, LossOptions, Measured, floor
from dispersive_kit.regularizers.taps import block_list

AT_FLOOR = 1e-3  # below this share of the pairs i != j in the sum of exp(-D / tau), the gradient is almost zero


class Record(NamedTuple):
    """One tap's measurement, detached, on its device."""

    path: str
    options: LossOptions
    vitals: Tensor  # (5,): loss, dropped, mass, tau, feature RMS
    gram: Tensor
    batch: int
    rows: int
    dim: int
    weight: float

    @classmethod
    def of(cls, path: str, z: Tensor, m: Measured, options: LossOptions, weight: float) -> "Record":
        rms = torch.linalg.vector_norm(z.detach(), dtype=m.loss.dtype) / math.sqrt(z.numel())
        numbers = [value.detach().to(m.gram.dtype) for value in (m.loss, m.dropped, m.mass, m.tau, rms)]
        return cls(path, options, torch.stack(numbers), m.gram, len(z), m.rows, m.dim, weight)

    def numbers(self, vitals: list[float], gram: Tensor) -> dict[str, float]:
        loss, dropped, mass, tau, rms = vitals
        R, diagonal = self.rows, self.options.with_diagonal
        scale = None if math.isnan(tau) else tau
        low = floor(self.options.kind, R, scale, diagonal=diagonal, dim=self.dim, dropped=round(dropped))
        return {
            "loss": loss,
            "floor": low,
            "gap": loss - low,
            "off_diagonal_mass": mass,
            "feature_rms": rms,
            "effective_rank": _effective_rank(gram),
            "batch_size": float(self.batch),
            "pairs": R * (R - 1) + R * diagonal - dropped,
            "tau": tau,
            "weight": self.weight,
        }


def _effective_rank(gram: Tensor) -> float:
    """exp of the entropy of the centred rows' singular values, scaled to sum 1 (Roy & Vetterli, 2007)."""
    gram = gram.float().double().view(math.isqrt(gram.numel()), -1)  # float: `noise` is of that precision
    gram = gram - gram.mean(0) - gram.mean(1, keepdim=True) + gram.mean()
    eigenvalues = torch.linalg.eigvalsh(gram)
    noise = 1e-7 * len(gram) * eigenvalues[-1]  # of a Gram product in float32
    p = torch.where(eigenvalues > noise, eigenvalues, 0.0).sqrt()
    p = p / p.sum().clamp(min=1e-300)
    return math.exp(-float(torch.special.xlogy(p, p).sum()))


class Stats:
    """Statistics of the last `loss()` as attributes, means over taps: unweighted loss, floor, gap (loss - floor),
    off_diagonal_mass, feature_rms (of the raw features), effective_rank (of the first 1,024 rows of the loss),
    batch_size (of the dispersion batch), pairs, tau, weight (lambda times schedule).

    Nothing is copied from the device until the first value is read; then all values are copied, once. `read()`
    returns them as a dict.
    """

    def __init__(self, records: list[Record]) -> None:
        self._records = records

    @cached_property
    def _means(self) -> dict[str, float]:
        parts = [part for record in self._records for part in (record.vitals, record.gram.flatten())]
        copied = torch.cat(parts).cpu().split([len(part) for part in parts])
        read = zip(self._records, copied[::2], copied[1::2], strict=True)
        taps = [record.numbers(vitals.tolist(), gram) for record, vitals, gram in read]
        return {name: sum(tap[name] for tap in taps) / len(taps) for name in taps[0]}

    def read(self) -> dict[str, float]:
        return dict(self._means)

    def __getattr__(self, name: str) -> float:
        if name.startswith("_") or name not in self._means:
            raise AttributeError(f"Stats has no {name!r}")
        return self._means[name]


class Watch:
    """Raises on NaN, warns once at the floor: at once on a CPU, on an accelerator one step later, without waiting."""

    _pending: tuple[Any, Tensor, list[Record]] | None = None
    _warned = False

    def look(self, records: list[Record]) -> None:
        vitals = torch.stack([record.vitals for record in records])  # (taps, 5)
        if vitals.device.type == "cpu":
            self._judge(vitals, records)
        elif self._pending is None or self._pending[0].query():
            if self._pending:
                self._judge(*self._pending[1:])
            host, arrived = vitals.to("cpu", non_blocking=True), torch.Event(vitals.device)
            arrived.record()
            self._pending = arrived, host, [record._replace(gram=record.vitals) for record in records]

    def _judge(self, vitals: Tensor, records: list[Record]) -> None:
        for (loss, dropped, mass, *_), record in zip(vitals.tolist(), records, strict=True):
            if not math.isfinite(loss):
                raise DispersiveError(
                    f"tap {record.path!r}: the loss is {loss}, so the features hold NaN, infinity, or values whose "
                    "square overflows: lower the learning rate, or tap an earlier block"
                )
            why = ""
            if dropped >= record.rows * (record.rows - 1):
                why = "ignore_same_class and t_window leave no pair of this batch: use a larger batch or window"
            elif KINDS[record.options.kind].log and mass < AT_FLOOR:
                why = "the distances are large compared with tau, so the gradient is almost zero: "
                why += "use diagonal=False, tau='auto', or a kind that ignores scale (infonce_cosine)"
            if why and not self._warned:
                self._warned = True
                warnings.warn(f"Dispersive Loss, tap {record.path!r}: {why}", stacklevel=5)


@contextlib.contextmanager
def depth_use(model: nn.Module, at: str | None = None) -> Iterator[dict[str, Tensor]]:
    """RMS of each block's update, divided by the RMS of the residual stream at its input.

        with torch.no_grad(), depth_use(model) as use:
            model(x, t, y)          # at the noise level of interest
        use                         # {"blocks.0": 0.4, ...}: 0-d tensors, of each block's last call

    If one value is large and those after it are small, this block dominates the stream. Compare with the same network
    at random weights. at: dotted path of the list of blocks; None: the one named `blocks`. A block's stream is the
    first tensor that it is given, and the first that it returns. A module at two places has its calls in turn.
    Compiled modules run uncompiled inside `with`.
    Raises DispersiveError: no such list; a block that was not called, or that changes the shape of its stream.
    """
    blocks, use = block_list(model, at), dict[str, Tensor]()
    with contextlib.ExitStack() as held:
        for block in {*blocks.values()}:
            measured = partial(_measure_update, use, [path for path in blocks if blocks[path] is block])
            for register in (block.register_forward_pre_hook, block.register_forward_hook):
                held.enter_context(register(measured, with_kwargs=True))
        if "torch._dynamo" in sys.modules:  # else nothing was compiled, and the call would import it (2 s)
            held.enter_context(torch.compiler.set_stance("force_eager"))
        yield use
    if left_out := ", ".join(path for path in blocks if path not in use):
        why = "the block was not called, or its output has another shape than its input"
        raise DispersiveError(f"{left_out}: {why}: call the model inside `with`, and choose residual blocks with at=")


def _measure_update(use: dict[str, Tensor], paths: list[str], _: Any, args: Any, kwargs: Any, *output: Any) -> None:
    paths.append(path := paths.pop(-1 if output else 0))  # before the call the next one; after it, the same
    given, found = use.pop(path, None), [x for x in tree_leaves(output or (args, kwargs)) if isinstance(x, Tensor)]
    if not output:  # before the block, which may change its input: a copy
        use.update((path, x.detach().clone()) for x in found[:1])
    elif found and given is not None and given.shape == found[0].shape:
        size = partial(torch.linalg.vector_norm, dtype=torch.promote_types(given.dtype, torch.float32))
        use[path] = size(found[0].detach() - given) / size(given)
