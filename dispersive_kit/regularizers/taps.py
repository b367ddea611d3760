"""Taps on modules found by path, and a schedule of the weight: the base of every regulariser of activations."""

import copy
import difflib
import fnmatch
import math
import threading
import warnings
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, is_dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from dispersive_kit.errors import DispersiveError
from dispersive_kit.regularizers.losses import check_choice, check_number

At = str | nn.Module | Sequence[str | nn.Module] | None
Select = Callable[[Any], Tensor] | int | str | None

CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)  # never called
LAYERS = nn.TransformerEncoderLayer, nn.TransformerDecoderLayer
SEQUENCES = (nn.RNNBase, nn.MultiheadAttention, nn.Transformer, nn.TransformerEncoder, nn.TransformerDecoder, *LAYERS)
WRAPPERS = ("_orig_mod", "module", "_fsdp_wrapped_module")  # torch.compile, DDP, FSDP1
Captured = tuple[Any, list[tuple[Tensor, int]]]  # an output, and its tensors with their version counters
UNSEEN = (
    "has captured nothing since the last loss(): call the model in training mode inside `with`. If you did, the model "
    "does not call this module, or torch.compile compiled it before the hook was set: attach before the first call, or "
    "call torch.compiler.reset() after attaching, or compile block by block. A compiled copy of the model (an average) "
    "that is called with gradients on also hides the hook: call it under no_grad"
)


@dataclass(frozen=True)
class Schedule:
    """Factor on the weight of a regulariser at an optimizer step counted from 0.

    constant: 1. warmup: min(1, (step + 1) / steps). cosine-to-zero: (1 + cos(pi min(1, step / steps))) / 2.
    stop-at: 1 before `steps`, then 0 (early stopping, as in HASTE, arXiv 2505.16792).
    """

    shape: str = "constant"
    steps: int = 0

    def __post_init__(self) -> None:
        check_choice("schedule", self.shape, ("constant", "warmup", "cosine-to-zero", "stop-at"))
        if self.shape != "constant" and (not isinstance(self.steps, int) or self.steps < 1):
            raise DispersiveError(f"schedule {self.shape!r} over {self.steps!r} steps: give a whole number above 0")

    def factor(self, step: int | None) -> float:
        if self.shape == "constant":
            return 1.0
        if not isinstance(step, int) or step < 0:
            raise DispersiveError(f"schedule {self.shape!r} got step {step!r}: call loss(step=step), counted from 0")
        done = step / self.steps
        if self.shape == "warmup":
            return min(1.0, done + 1 / self.steps)
        if self.shape == "stop-at":
            return float(done < 1)
        return (1 + math.cos(math.pi * min(1.0, done))) / 2


class _Tap:
    """A forward hook that keeps the first output of its module while armed, and never raises.

    A copy of the model (an EMA by deepcopy) has the same hook. The check `module is not self.module` ignores calls of
    the copy.
    """

    def __init__(self, path: str, module: nn.Module) -> None:
        self.path, self.module = path, module
        self.armed, self.thread = False, threading.get_ident()
        self.output: Captured | None = None
        self.handle = module.register_forward_hook(self)

    def __call__(self, module: nn.Module, _args: Any, output: Any) -> None:
        if not self.armed or self.output is not None or module is not self.module:
            return
        versions = []
        if not torch.compiler.is_compiling():
            if torch._C._current_graph_task_id() != -1 or threading.get_ident() != self.thread:
                return  # recomputed in backward by activation checkpointing, or evaluated in another thread
            output = tree_map(lambda x: copy.copy(x) if is_dataclass(x) else x, output)  # a decoder may pop its parts
            parts = [one for x in tree_leaves(output) for one in (x, *tree_leaves(object.__getstate__(x)))]
            versions = [(x, x._version) for x in parts if isinstance(x, Tensor) and not x.is_inference()]
        self.output = output, versions

    def __deepcopy__(self, _memo: Any) -> Self:
        return self


class Attached:
    """Taps on a model: armed by `with`, read by `loss()`, removed by `remove()`."""

    def __init__(
        self,
        model: nn.Module,
        at: At,
        *,
        depth: float = 1 / 4,
        select: Select = None,
        weight: float = 0.5,
        schedule: Schedule | None = None,
    ) -> None:
        check_number("weight", weight, at_least=0.0)
        if not isinstance(schedule, Schedule | None):
            raise DispersiveError(f"schedule is a {type(schedule).__name__}: give a Schedule, or None")
        self.model, self.select, self.weight, self.schedule = model, select, weight, schedule or Schedule()
        self.taps = _find_taps(model, at, depth, select)
        self._thread: threading.Thread | None = None  # the one that armed the taps, until loss()
        self._removed = self._told = False  # told: warned that it is 0 in eval mode

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Attached to the copy of the model; copied taps would still be hooks of the original."""
        twin = memo[id(self)] = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, nn.Module):
                setattr(twin, name, copy.deepcopy(value, memo))
        twin.taps = [] if self._removed else [_Tap(tap.path, copy.deepcopy(tap.module, memo)) for tap in self.taps]
        twin._thread = None
        twin._forget_all()
        return twin

    def _forget_all(self) -> None:
        """Clear what a subclass has measured: a copy starts without it."""

    @property
    def paths(self) -> list[str]:
        return [tap.path for tap in self.taps]

    @property
    def where(self) -> str:
        return ", ".join(self.paths)

    @property
    def captured(self) -> list[Tensor]:
        """Features z (B, ...) of the last armed call, one for each tap, until `loss()` takes them."""
        return [_pick(tap.output[0], self.select) for tap in self.taps if tap.output is not None]

    def __enter__(self) -> Self:
        self._require_hooks()
        self._thread = threading.current_thread() if self.model.training else None
        for tap in self.taps:
            tap.output, tap.armed, tap.thread = None, self.model.training, threading.get_ident()
        return self

    def __exit__(self, error: type[BaseException] | None, *_: Any) -> None:
        for tap in self.taps:
            tap.armed = False
        if error:
            self._let_go()

    def _let_go(self) -> list[Captured | None]:
        """Clear the captured outputs, and return them."""
        outputs, self._thread = [tap.output for tap in self.taps], None
        for tap in self.taps:
            tap.output = None
        return outputs

    def remove(self) -> None:
        """Remove the hooks from the model."""
        for tap in self.taps:
            tap.armed = False
            tap.handle.remove()
        self._let_go()
        self._removed = True

    def _require_hooks(self) -> None:
        if self._removed:
            raise DispersiveError(f"the taps {self.where} were removed: attach again")
        if self._thread not in (None, threading.current_thread()) and self._thread.is_alive():
            why = "were armed by another thread, which has not called loss() yet"
            raise DispersiveError(f"the taps {self.where} {why}: give each thread a model and regulariser of its own")

    def loss(
        self,
        *,
        x0: Tensor | None = None,
        t: Tensor | None = None,
        y: Tensor | None = None,
        step: int | None = None,
        taps: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """Weighted loss (0-d) of what was captured last; zero in eval mode, with one warning if gradients are on.

        x0: clean images, for REPA and CleanPatch. t, y: (B,), for t_window and ignore_same_class. step: the optimizer
        step, for schedule and memory. taps: features (B, ...) that the model returned itself, in the order of `paths`,
        used instead of the captured ones.
        Raises DispersiveError: nothing captured or given; no gradient; a batch of one; NaN (on an accelerator one step
            late); shapes or labels that do not fit. The message names the tap and the cure.
        """
        self._require_hooks()
        if not self.model.training:
            if torch.is_grad_enabled() and not self._told:
                self._told = True
                what = f"{type(self).__name__} on {self.where} is 0 in eval mode, and gradients are on"
                warnings.warn(f"{what}: call model.train() (from_pretrained leaves a model in eval mode)", stacklevel=2)
            return self._zero()
        features = self._take(taps)
        try:
            factor = self.schedule.factor(step)
        except DispersiveError as error:
            raise DispersiveError(f"taps {self.where}: {error}") from error
        return self._loss(features, self.weight * factor, x0, t, y, step)

    @abstractmethod
    def _loss(self, features: list[Tensor], weight: float, x0: Any, t: Any, y: Any, step: Any) -> Tensor: ...

    def _zero(self) -> Tensor:
        return torch.zeros((), device=next((p.device for p in self.model.parameters()), None))

    def _take(self, taps: Sequence[Tensor] | None) -> list[Tensor]:
        """One z (B, ...) for each tap, with gradient, captured or given."""
        outputs, select = self._let_go(), self.select
        if taps is not None:
            if not isinstance(taps, list | tuple) or len(taps) != len(self.taps):
                raise DispersiveError(f"taps= does not fit: give a list of one tensor each for {self.where}")
            outputs, select = [(z, []) for z in taps], lambda z: z
        return [self._checked(tap, output, select) for tap, output in zip(self.taps, outputs, strict=True)]

    def _checked(self, tap: _Tap, output: Captured | None, select: Select) -> Tensor:
        if output is None:
            raise DispersiveError(f"tap {tap.path!r} {UNSEEN}")
        try:
            z = _pick(output[0], select)
        except DispersiveError as error:
            raise DispersiveError(f"tap {tap.path!r}: {error}") from error
        why = ""
        if z.ndim == 2 and isinstance(tap.module, SEQUENCES) and not callable(select):
            why = f"its output is {tuple(z.shape)}, of one sequence without a batch: give the model (B, T, D)"
        elif torch._C._functorch.is_functorch_wrapped_tensor(z):
            why = (
                "it was captured inside torch.func.jvp, grad or vmap, whose tensors carry no gradient outside: return "
                "the features from the function (has_aux=True) and pass them as loss(taps=...)"
            )
        elif self.weight and not z.requires_grad:
            why = (
                "the loss would do nothing, because its output has no gradient: it was computed under no_grad, in a "
                "reentrant checkpoint (use use_reentrant=False), or by frozen parameters only (tap a later block). "
                "weight=0 measures without a gradient"
            )
        elif self.weight and not torch.is_grad_enabled():
            why = "loss() was called under no_grad: call it outside. weight=0 measures without a gradient"
        elif _overwritten(z, output[1]):
            why = (
                "its output was overwritten after it returned, as by ReLU(inplace=True): tap the module that "
                "overwrites it, or set inplace=False there"
            )
        if why:
            raise DispersiveError(f"tap {tap.path!r}: {why}")
        return z


def _overwritten(z: Tensor, versions: list[tuple[Tensor, int]]) -> bool:
    """Whether an output tensor that is z, or shares memory with z, was overwritten after the module returned.

    If `select` computed z from the output, no memory is shared: then every tensor of the output is checked.
    """
    own = [one for one in versions if one[0] is z]
    if versions and not own:
        memory = z.untyped_storage().data_ptr()
        own = [one for one in versions if one[0].untyped_storage().data_ptr() == memory]
    return any(tensor._version != version for tensor, version in own or versions)


def _pick(output: Any, select: Select) -> Tensor:
    """z of a module's output: the tensor, the only tensor of a tuple, or what `select` says."""
    kind = type(output).__name__
    if isinstance(select, int | str) and isinstance(output, Tensor):
        raise DispersiveError(f"select={select!r} would index the output, which is a tensor: leave select out")
    try:
        z = select(output) if callable(select) else output if select is None else output[select]
    except Exception as error:  # a user's function may raise anything
        raise DispersiveError(f"select={select!r} fails on its output, a {kind}: {error!r}; correct select") from error
    if select is None and isinstance(output, tuple | list):
        tensors = [part for part in output if isinstance(part, Tensor)]
        z = tensors[0] if len(tensors) == 1 else output
    if not isinstance(z, Tensor):
        what = f"the loss needs one tensor, and its output, a {kind}, gives a {type(z).__name__}"
        raise DispersiveError(f"{what}: say which tensor is meant with select= (an index, a key, or a function)")
    return z


def _find_taps(model: Any, at: Any, depth: float, select: Select) -> list[_Tap]:
    """Hooks every module that `at` names, once; all names are checked before the first hook is set."""
    if not isinstance(model, nn.Module):
        raise DispersiveError(f"model is a {type(model).__name__}: give the nn.Module to attach to")
    modules = _modules_of(model)
    wanted = block_at(model, depth) if at is None else at
    found: dict[nn.Module, str] = {}
    for one in wanted if isinstance(wanted, list | tuple) else [wanted]:
        for path in _resolve(one, modules):
            found.setdefault(modules[path], path)
    if not found:
        raise DispersiveError("at= names no module: give a path such as 'blocks.2'")
    for module, path in found.items():
        if path != (first := next(name for name, one in modules.items() if one is module)):
            raise DispersiveError(f"{path!r} is the module {first!r}, and only its first call is seen: tap {first!r}")
        if isinstance(module, CONTAINERS):
            what = f"{path!r} is a {type(module).__name__}, which is never called itself"
            raise DispersiveError(f"{what}: tap a part of it ({path + '.0'!r}), or all ({path + '.*'!r})")
        if not callable(select):
            _require_batch_first(path, modules, select)
    return [_Tap(path, module) for module, path in found.items()]


def _require_batch_first(path: str, modules: dict[str, nn.Module], select: Select) -> None:
    """Raise if the module, one inside it, or a torch sequence module around it has the batch on its second axis."""
    own, around = modules[path], [modules[path[:i]] for i, letter in enumerate(path) if letter == "."]
    parts = [part for one in (own, *around) if one is own or isinstance(one, SEQUENCES) for part in one.modules()]
    late = [type(part).__name__ for part in parts if getattr(part, "batch_first", None) is False]
    if late:
        raise DispersiveError(
            f"{path!r} holds or belongs to a {late[0]} with batch_first=False, so its features are (T, B, ...) and the "
            "loss would spread the time steps: use batch_first=True, or transpose them with a function, "
            "select=lambda out: out.transpose(0, 1)"
        )
    if isinstance(own, nn.RNNBase) and select not in (None, 0):
        raise DispersiveError(
            f"{path!r}: select={select!r} takes the last state (layers, B, ...) of a {type(own).__name__}: take its "
            "output with select=0, or transpose the state, select=lambda out: out[1].transpose(0, 1)"
        )


def _modules_of(model: nn.Module) -> dict[str, nn.Module]:
    """By path. A wrapper, whose one child has a name of `WRAPPERS`, has no path: its child stands in its place."""
    named, paths = dict(model.named_modules(remove_duplicate=False)), {"": ""}
    for name in [*named][1:]:
        above, _, last = name.rpartition(".")
        wrapped = last in WRAPPERS and len(named[above]._modules) == 1
        paths[name] = paths[above] if wrapped else f"{paths[above]}.{last}".removeprefix(".")
    return {paths[name]: module for name, module in named.items() if paths[name]}


def _bare(name: str) -> str:
    """A path without the names that wrappers add: 'module.blocks.2' is 'blocks.2'."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def _resolve(one: Any, modules: dict[str, nn.Module]) -> list[str]:
    names = ", ".join(list(modules)[:8])
    paths, hint = [], f"at= holds a {type(one).__name__}: give paths such as 'blocks.2', or modules"
    if isinstance(one, nn.Module):
        compiled = getattr(one, "_orig_mod", one)  # `modules` has the block, not the wrapper of torch.compile
        paths = [path for path, module in modules.items() if module in (one, compiled)][:1]
        hint = f"at= is a {type(one).__name__} that is not inside the model: take a module from it ({names}, ...)"
    elif isinstance(one, str):
        patterns = (one if one in modules else _bare(one)).split(".")  # a * matches one name
        long = [path.split(".") for path in modules if path.count(".") + 1 == len(patterns)]
        paths = [".".join(parts) for parts in long if all(map(fnmatch.fnmatchcase, parts, patterns))]
        near = ", ".join(difflib.get_close_matches(one, list(modules), 3))
        hint = f"the model has no module {one!r}: choose from {near or names}, ..."
    if not paths:
        raise DispersiveError(hint)
    return paths


def block_list(model: nn.Module, at: str | None = None) -> dict[str, nn.Module]:
    """The blocks, by path, in the list at the path `at`, or in the one named `blocks`."""
    modules = _modules_of(model)
    named = [path for path in modules if path == at or (at is None and path.split(".")[-1] == "blocks")]
    lists = [path for path in named if isinstance(modules[path], nn.ModuleList | nn.Sequential)]
    if len(lists) != 1:
        what = f"the model has {len(lists)} lists named {at or 'blocks'!r}"
        raise DispersiveError(f"{what}: name the module with at=, from {', '.join(list(modules)[:8])}, ...")
    return {path: module for path, module in modules.items() if path.rpartition(".")[0] == lists[0]}


def block_at(model: nn.Module, depth: float) -> str:
    """Path of the block at a relative depth: 1/4 of 12 blocks is the third, `blocks.2`."""
    check_number("depth", depth, above=0.0)
    blocks = list(block_list(model))
    if depth > 1:
        raise DispersiveError(f"depth is {depth!r}, a share of the blocks: give a number above 0, up to 1")
    return blocks[max(1, int(depth * len(blocks))) - 1]
