"""`Dispersive`: Dispersive Loss on any block of any `nn.Module`, by a forward hook."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DispersiveError
from .gather import all_gather
from .losses import PRESETS, LossOptions, check_choice, check_number, measure
from .schedules import Schedule
from .stats import Record, Stats, Watch
from .taps import find_taps

Select = Callable[[Any], Tensor] | int | str | None


class Dispersive:
    """Puts Dispersive Loss on the outputs of one or several modules inside `model`.

        reg = Dispersive(model, "blocks.2", weight=0.5, tau=0.5)
        with reg:                                        # armed: the first call of each tap is captured
            loss, aux = objective(model, x, y)
        (loss + reg.loss(t=aux.t, y=y, step=step)).backward()

    at: a dotted path, one with `*` in a segment ("blocks.*"), a module of the model, or several; left
        out, `depth` picks from the only list named `blocks`: block max(1, int(depth * n)), counted from 1.
    weight: lambda; 0 measures without touching the gradient. schedule: factor on it over `step`.
    select: which part of a tuple or dict output is z (B, ...): an index, a key, or a function of the output.
    gather: the batch of all processes is one dispersion batch (default: each process its own, as published).
    memory: rows of earlier micro-batches of the same `step` to keep, detached, and repel too.
    options: those of `dispersive_loss` (kind, tau, diagonal, pool, normalize, norm_penalty, t_window,
        ignore_same_class).

    With several taps the loss is their mean. The hook never raises; `loss()` does.

    Raises DispersiveError: unknown path or option; in `loss()` whatever keeps the loss from having an effect.
    """

    def __init__(
        self,
        model: nn.Module,
        at: str | nn.Module | Sequence[str | nn.Module] | None = None,
        *,
        weight: float = 0.5,
        depth: float = 1 / 4,
        select: Select = None,
        gather: bool = False,
        memory: int = 0,
        schedule: Schedule | None = None,
        **options: Any,
    ) -> None:
        check_number("weight", weight, at_least=0.0)
        check_number("memory", memory, at_least=0)
        self.options = LossOptions.of(options)
        self.model, self.weight, self.select = model, weight, select
        self.gather, self.memory, self.schedule = gather, int(memory), schedule or Schedule()
        self.taps = find_taps(model, at, depth)
        self._records: list[Record] = []
        self._watch = Watch()
        self._kept: dict[str, tuple[Any, ...]] = {}
        self._step: int | None = None
        self._was_armed = self._removed = False

    @classmethod
    def from_preset(cls, model: nn.Module, name: str, at: Any = None, **overrides: Any) -> "Dispersive":
        """With the settings of `PRESETS[name]`; a kind of your own comes with its own default tau."""
        check_choice("preset", name, tuple(PRESETS))
        settings = dict(PRESETS[name])
        if overrides.get("kind", settings["kind"]) != settings["kind"]:
            del settings["tau"]  # temperatures are not comparable across kinds
        return cls(model, at, **{**settings, **overrides})

    @property
    def paths(self) -> list[str]:
        return [tap.path for tap in self.taps]

    def __enter__(self) -> "Dispersive":
        if self._removed:
            raise DispersiveError(f"Dispersive on {self._names} was removed: attach a new one")
        for tap in self.taps:
            tap.output, tap.armed = None, self.model.training
        self._was_armed = True
        return self

    def __exit__(self, *_: Any) -> None:
        for tap in self.taps:
            tap.armed = False

    @property
    def captured(self) -> list[Tensor]:
        """Features z (B, ...) of the last armed call, one a tap, until `loss()` takes them."""
        return [pick(tap.output, self.select) for tap in self.taps if tap.output is not None]

    def loss(
        self,
        *,
        t: Tensor | None = None,
        y: Tensor | None = None,
        step: int | None = None,
        taps: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """Weighted loss of the last captured batch, a 0-d tensor; zero in eval.

        t (B,), y (B,): for `t_window`, `ignore_same_class`. step: the optimizer step, for `schedule`, `memory`.
        taps: features (B, ...) the model returned itself, in the order of `paths`, instead of the captured.
        """
        outputs = self._outputs(taps)
        if not self.model.training:
            return torch.zeros((), device=next((p.device for p in self.model.parameters()), None))
        factor = self.schedule.factor(step) * self.weight
        self._forget(step)
        records = []
        for tap, output in zip(self.taps, outputs, strict=True):
            try:
                records.append(self._measure(tap.path, self._features(output, tap.path), t, y, factor))
            except DispersiveError as error:
                raise DispersiveError(f"tap {tap.path!r}: {error}") from error
        self._records = records
        self._watch.look(records)
        if factor == 0:
            return torch.zeros((), device=records[0].loss.device)
        return factor * torch.stack([record.loss for record in records]).mean()

    @property
    def stats(self) -> Stats:
        """What the last `loss()` saw; nothing is copied from the device before a number is read."""
        if not self._records:
            raise DispersiveError(f"no statistics of {self._names} yet: call loss() in training first")
        return Stats(self._records)

    def remove(self) -> None:
        """Takes the hooks off the model."""
        for tap in self.taps:
            tap.handle.remove()
        self._removed = True

    @property
    def _names(self) -> str:
        return ", ".join(repr(path) for path in self.paths)

    def _outputs(self, taps: Sequence[Tensor] | None) -> list[Any]:
        if self._removed:
            raise DispersiveError(f"Dispersive on {self._names} was removed: attach a new one")
        captured = [tap.take() for tap in self.taps]
        if not self.model.training:
            return captured
        if taps is not None:
            if isinstance(taps, Tensor) or len(taps) != len(self.taps):
                raise DispersiveError(
                    f"taps= has {'one tensor' if isinstance(taps, Tensor) else len(taps)} for {self._names}: "
                    "give a list with one tensor per tap, in this order"
                )
            return list(taps)
        for tap, output in zip(self.taps, captured, strict=True):
            if output is None:
                raise DispersiveError(f"tap {tap.path!r} {self._why_empty()}")
        return captured

    def _why_empty(self) -> str:
        if not self._was_armed:
            return "has captured nothing: call the model inside `with reg:` before loss()"
        return (
            "has captured nothing since the last loss(). Either the model was not called in training mode "
            "inside "
            "`with reg:`, or this module was not called by it, or torch.compile had compiled the model "
            "before "
            "Dispersive was attached and does not see the hook. Cure for the last: attach before the first "
            "call, "
            "call torch._dynamo.reset() after attaching, or compile the blocks one by one."
        )

    def _features(self, output: Any, path: str) -> Tensor:
        z = pick(output, self.select)
        if torch._C._functorch.is_functorch_wrapped_tensor(z):
            raise DispersiveError(
                "its output left torch.func.jvp or grad by the hook and carries no gradient: return the "
                "taps from "
                "the transformed function (has_aux=True) and pass them as loss(taps=...)"
            )
        if z.ndim and len(z) == 1 and not self.gather:
            raise DispersiveError("a batch of one has no pairs: use a batch of at least 2, or gather=True")
        if not z.requires_grad and self.weight:
            raise DispersiveError(
                "the captured features carry no gradient, so the loss would do nothing. They were computed "
                "under "
                "no_grad, inside a reentrant checkpoint (use use_reentrant=False), or by frozen parameters "
                "only "
                "(tap a later block); weight=0 measures without a gradient"
            )
        return z

    def _measure(self, path: str, z: Tensor, t: Tensor | None, y: Tensor | None, factor: float) -> Record:
        if factor == 0:
            z = z.detach()
        if self.gather:
            z = all_gather(z)
            t, y = (None if label is None else all_gather(label) for label in (t, y))
        if self.memory:
            z, t, y = self._remember(path, z, t, y)
        return Record(path, measure(z, self.options, t=t, y=y), self.options, factor)

    def _remember(self, path: str, z: Tensor, t: Any, y: Any) -> tuple[Tensor, Any, Any]:
        old = self._kept.get(path)
        new = (z, t, y)
        if old is not None:
            new = tuple(  # type: ignore[assignment]
                None if a is None or b is None else torch.cat([a, b]) for a, b in zip(new, old, strict=True)
            )
        self._kept[path] = tuple(None if a is None else a[: self.memory].detach() for a in new)
        return new

    def _forget(self, step: int | None) -> None:
        if self.memory and step is None:
            raise DispersiveError(
                f"memory of {self._names} is cleared at each optimizer step: pass loss(step=step)"
            )
        if step != self._step:
            self._kept.clear()
        self._step = step


def pick(output: Any, select: Select) -> Tensor:
    """z of a module's output: the tensor, the only tensor of a tuple, or what `select` says."""
    try:
        if callable(select):
            output = select(output)
        elif select is not None:
            output = output[select]
    except Exception as error:
        raise DispersiveError(
            f"select={select!r} failed on its output of type {type(output).__name__}: {error}"
        ) from error
    if select is None and isinstance(output, tuple | list):
        tensors = [part for part in output if isinstance(part, Tensor)]
        output = tensors[0] if len(tensors) == 1 else output
    if not isinstance(output, Tensor):
        raise DispersiveError(
            f"its output is a {type(output).__name__}, not a tensor: say which part with select= (an "
            "index, a key "
            "or a function)"
        )
    return output
