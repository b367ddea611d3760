"""Work dealt out to the processes of a launcher, with results that do not depend on how many there are."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from dispersive_kit.errors import KitError

if TYPE_CHECKING:
    from accelerate import PartialState

T = TypeVar("T")


def this_process() -> "PartialState":
    """Rank and number of processes; one if no launcher is at work."""
    from accelerate import PartialState

    return PartialState(cpu=not torch.accelerator.is_available())


def shared_out(work: Callable[[slice], T], n: int, batch_size: int) -> list[T]:
    """[work(rows) for the batches of n rows], the batches dealt out in turn and gathered in order in every process.

    The batches are the same ones however many processes there are, so their results are the same bits.
    """
    state, batches = this_process(), [slice(i, min(i + batch_size, n)) for i in range(0, n, batch_size)]
    own = [(rows.start, work(rows)) for rows in batches[state.process_index :: state.num_processes]]
    return [part for _, part in sorted(_gathered(own), key=lambda pair: pair[0])]


def check_equal_everywhere(what: str, value: Any) -> None:
    """Raises KitError: the processes do not hold the same `value`, so that what they gather would be a mixture."""
    if len({repr(one) for one in _gathered([value])}) > 1:
        raise KitError(f"{what} differs between the processes; start them with the same settings and threads")


def _gathered(own: list[Any]) -> list[Any]:
    from accelerate.utils import gather_object

    return own if this_process().num_processes == 1 else gather_object(own)
