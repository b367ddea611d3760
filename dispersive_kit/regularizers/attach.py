"""`Dispersive`: Dispersive Loss on any module inside any `nn.Module`, by a forward hook."""

from dataclasses import fields
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dispersive_kit.errors import DispersiveError
from dispersive_kit.regularizers.losses import LossOptions, check_choice, check_number, measure, preset_settings
from dispersive_kit.regularizers.stats import Record, Stats, Watch
from dispersive_kit.regularizers.taps import At, Attached, Schedule, Select


class Dispersive(Attached):
    """Dispersive Loss on the outputs of one or several modules of `model`.

        reg = Dispersive(model, "blocks.2", weight=0.5, tau=0.5)
        with reg:                                                   # armed: each tap's first call is captured
            loss, aux = objective(model, x, y)
        (loss + reg.loss(t=aux.t, y=y, step=step)).backward()

    at: a dotted path, one with `*` in place of a name ("blocks.*"), a module of the model, or a list of these.
        None: from the list named `blocks`, block max(1, int(depth * n)) of n, counted from 1.
    weight: lambda; with 0 the loss is measured and adds no gradient. schedule: factor on the weight, by step.
    select: which part of a tuple or dict output is z (B, ...): an index, a key, or a function of the output.
    gather: the batches of all processes form one dispersion batch; otherwise each has its own, as published.
    group_size: number of consecutive images that form one dispersion batch; the loss is the mean over these groups.
    memory: how many rows of earlier micro-batches of the same `step` are kept, detached, and paired with new rows.
    options: those of `dispersive_loss`.

    With several taps the loss is the mean over them. Errors are raised by `loss()`, never by the hook. One error is not
    detected: if the tapped module is compiled, alone or in its model, a later layer that overwrites its output.
    Raises DispersiveError: unknown path or option, or options that contradict each other.
    """

    def __init__(
        self,
        model: nn.Module,
        at: At = None,
        *,
        weight: float = 0.5,
        depth: float = 1 / 4,
        select: Select = None,
        gather: bool = False,
        group_size: int | None = None,
        memory: int = 0,
        schedule: Schedule | None = None,
        **options: Any,
    ) -> None:
        for name in options:
            check_choice("option", name, [field.name for field in fields(LossOptions)])
        self.options = LossOptions(**options)
        check_choice("gather", gather, (True, False))
        check_number("memory", memory, at_least=0, whole=True)
        if group_size is not None:
            check_number("group_size", group_size, at_least=2, whole=True)
        if group_size and (gather or memory):
            raise DispersiveError("group_size splits a batch, gather and memory join batches: leave out one of the two")
        super().__init__(model, at, depth=depth, select=select, weight=weight, schedule=schedule)
        self.gather, self.group_size, self.memory = gather, group_size, memory
        self._forget_all()

    def _forget_all(self) -> None:
        self._records: list[Record] = []
        self._watch = Watch()
        self._kept: dict[str, tuple[Tensor | None, ...]] = {}
        self._step: int | None = None

    @classmethod
    def from_preset(cls, model: nn.Module, name: str, at: At = None, **overrides: Any) -> "Dispersive":
        """Attach with `PRESETS[name]` and `overrides`. A changed kind uses its own default tau, unless tau is given."""
        return cls(model, at, **preset_settings(name, overrides))

    @property
    def stats(self) -> Stats:
        """Statistics of the last `loss()` in training mode. Raises DispersiveError: there was none yet."""
        if not self._records:
            raise DispersiveError(f"no statistics of {self.where} yet: call loss() in training first")
        return Stats(self._records)

    def _loss(self, features: list[Tensor], weight: float, x0: Any, t: Any, y: Any, step: Any) -> Tensor:
        if self.memory and step is None:
            raise DispersiveError(f"the memory of {self.where} lasts one step, and step is None: call loss(step=step)")
        if step != self._step:
            self._kept.clear()
        self._step, self._records = step, []
        losses = []
        for path, z in zip(self.paths, features, strict=True):
            try:
                groups = self._groups(z if weight else z.detach(), t, y)
                losses += [self._one(path, rows, own_t, own_y, weight) for rows, own_t, own_y in groups]
            except DispersiveError as error:
                raise DispersiveError(f"tap {path!r}: {error}") from error
        self._watch.look(self._records)
        return weight * torch.stack(losses).mean() if weight else self._zero()

    def _groups(self, z: Tensor, t: Tensor | None, y: Tensor | None) -> list[tuple[Any, ...]]:
        """(z, t, y) of each dispersion batch; shapes that do not fit are not split, and `measure` raises."""
        size, labels = self.group_size, [label for label in (t, y) if label is not None]
        if not (size and z.ndim) or any(getattr(label, "shape", None) != z.shape[:1] for label in labels):
            return [(z, t, y)]
        if len(z) % size:
            raise DispersiveError(f"a batch of {len(z)} cannot be split into groups of {size}: change one of the two")
        parts = [[None] * max(1, len(z) // size) if one is None else one.split(size) for one in (z, t, y)]
        return list(zip(*parts, strict=True))

    def _one(self, path: str, z: Tensor, t: Tensor | None, y: Tensor | None, weight: float) -> Tensor:
        if self.gather:
            z, t, y = all_gather(z), *(None if label is None else all_gather(label) for label in (t, y))
        if z.ndim and len(z) == 1:
            raise DispersiveError("a batch of one has no pairs: give at least 2 images, or gather=True over processes")
        if self.memory:
            z, t, y = self._remember(path, z, t, y)
        measured = measure(z, self.options, t=t, y=y)
        self._records.append(Record.of(path, z, measured, self.options, weight))
        return measured.loss

    def _remember(self, path: str, *new: Any) -> tuple[Any, ...]:
        """z, t, y, followed by the rows kept from earlier micro-batches, which carry no gradient."""
        old = self._kept.get(path, (None,) * len(new))
        if old[0] is not None and old[0].shape[1:] != new[0].shape[1:]:
            raise DispersiveError(
                f"the features are {tuple(new[0].shape)}, and those in memory {tuple(old[0].shape)}: memory needs "
                "micro-batches of one image size"
            )
        new = tuple(a if a is None or b is None else torch.cat([a, b]) for a, b in zip(new, old, strict=True))
        self._kept[path] = tuple(None if a is None else a[: self.memory].detach() for a in new)
        return new


class _AllGather(torch.autograd.Function):
    """Rows of all processes in the order of rank; backward sums all processes' gradients of this process's rows."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        ctx.rows = len(z)
        out = z.new_empty(dist.get_world_size() * len(z), *z.shape[1:])
        dist.all_gather_into_tensor(out, z.contiguous())
        return out  # (W B, ...)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        # Every process computes the same loss, and DDP and FSDP average the gradients. The average of these sums is
        # the gradient of one process with the whole batch; without the sum it would be 1 / W of that.
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        start = dist.get_rank() * ctx.rows
        return grad[start : start + ctx.rows]


def all_gather(z: Tensor) -> Tensor:
    """z (B, ...) of all W processes as (W B, ...), differentiable; z itself if there is one process.

    Raises DispersiveError: no process group; different shapes or dtypes, which are compared on a CPU only.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise DispersiveError(
            "gather=True outside a process group: call torch.distributed.init_process_group first (accelerate and "
            "torchrun scripts do), or leave gather=False"
        )
    if dist.get_world_size() == 1:
        return z
    if z.device.type == "cpu":
        forms: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(forms, (tuple(z.shape), str(z.dtype)))
        if len(set(forms)) > 1:
            raise DispersiveError(
                f"gather=True over processes with features {forms}: all need one shape and dtype; where the last batch "
                "is smaller, set drop_last=True"
            )
    return _AllGather.apply(z)
