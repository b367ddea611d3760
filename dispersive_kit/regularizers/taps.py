"""Finding modules by path and hooking them."""

import difflib
import fnmatch
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..errors import DispersiveError

CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)  # never called
WRAPPERS = ("_orig_mod.", "module.", "_fsdp_wrapped_module.")  # of torch.compile, DDP and FSDP1


class Tap:
    """A forward hook that keeps the first output of its module while armed.

    A copy of the model (an EMA by deepcopy) carries the same hook: `__deepcopy__` and the check of the
    module's identity keep the copy from writing here.
    """

    def __init__(self, path: str, module: nn.Module) -> None:
        self.path, self.module = path, module
        self.armed, self.output = False, None
        self.handle = module.register_forward_hook(self)

    def __call__(self, module: nn.Module, _args: Any, output: Any) -> None:
        if not self.armed or module is not self.module or self.output is not None:
            return
        if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
            return  # a checkpoint's recomputation inside backward
        self.output = output

    def __deepcopy__(self, _memo: Any) -> "Tap":
        return self

    def take(self) -> Any:
        output, self.output = self.output, None
        return output


def find_taps(model: Any, at: Any, depth: float) -> list[Tap]:
    """Hooks every module that `at` names, once; all names are checked before the first hook is set."""
    if not isinstance(model, nn.Module):
        raise DispersiveError(f"model is a {type(model).__name__}: give the nn.Module to attach to")
    modules = {bare(name): module for name, module in model.named_modules(remove_duplicate=False) if name}
    if at is None:
        at = block_at(modules, depth)
    wanted = [at] if isinstance(at, str | nn.Module) or not isinstance(at, Sequence) else at
    found: dict[nn.Module, str] = {}
    for one in wanted:
        for path in resolve(one, modules):
            found.setdefault(modules[path], path)
    if not found:
        raise DispersiveError("at= names no module: give a path such as 'blocks.2'")
    for module, path in found.items():
        if isinstance(module, CONTAINERS):
            raise DispersiveError(
                f"{path!r} is a {type(module).__name__}, which is never called itself: tap one of its "
                "parts, such "
                f"as {path + '.0'!r}, or all with {path + '.*'!r}"
            )
    return [Tap(path, module) for module, path in found.items()]


def bare(name: str) -> str:
    for wrapper in WRAPPERS:
        name = f".{name}".replace(f".{wrapper}", ".")[1:]
    return name


def resolve(one: Any, modules: dict[str, nn.Module]) -> list[str]:
    if isinstance(one, nn.Module):
        paths = [path for path, module in modules.items() if module is one][:1]
        hint = f"the module {type(one).__name__} is not a part of this model: take it from the model itself"
    elif isinstance(one, str):
        segments = bare(one).split(".")
        paths = [path for path in modules if matches(path.split("."), segments)]
        near = difflib.get_close_matches(one, list(modules), 3) or list(modules)[:8]
        hint = f"the model has no module {one!r}; it has {', '.join(near)}"
    else:
        paths, hint = [], f"at= holds a {type(one).__name__}: give paths such as 'blocks.2', or modules"
    if not paths:
        raise DispersiveError(hint)
    return paths


def matches(names: list[str], patterns: list[str]) -> bool:
    return len(names) == len(patterns) and all(map(fnmatch.fnmatchcase, names, patterns))


def block_at(modules: dict[str, nn.Module], depth: float) -> str:
    """depth 1/4 of 12 blocks is the third: `blocks.2`."""
    if not isinstance(depth, int | float) or not 0 < depth <= 1:
        raise DispersiveError(f"depth is {depth!r}: give a share of the blocks, above 0 and up to 1")
    lists = [p for p, m in modules.items() if p.split(".")[-1] == "blocks" and isinstance(m, nn.ModuleList)]
    if len(lists) != 1:
        raise DispersiveError(
            f"the model has {len(lists) or 'no'} lists named 'blocks', so depth cannot pick one: name the "
            "module with "
            f"at=; the model has {', '.join(list(modules)[:8])}, ..."
        )
    n = len(modules[lists[0]])  # type: ignore[arg-type]
    return f"{lists[0]}.{max(1, int(depth * n)) - 1}"
