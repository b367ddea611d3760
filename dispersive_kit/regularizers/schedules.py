"""Weight of a regulariser over training."""

import math
import operator
from dataclasses import dataclass

from ..errors import DispersiveError
from .options import check_choice

SHAPES = ("constant", "warmup", "cosine-to-zero", "stop-at")


@dataclass(frozen=True)
class Schedule:
    """Factor on the weight at an optimizer step counted from 0.

    constant: 1. warmup: min(1, (step + 1) / steps). cosine-to-zero: (1 + cos(pi min(1, step / steps))) / 2.
    stop-at: 1 before `steps`, then 0 (HASTE: stop once it hurts).
    """

    shape: str = "constant"
    steps: int = 0

    def __post_init__(self) -> None:
        check_choice("schedule", self.shape, SHAPES)
        if self.shape != "constant" and (not isinstance(self.steps, int) or self.steps < 1):
            raise DispersiveError(f"schedule {self.shape!r} over {self.steps!r} steps: give a whole number above 0")

    def factor(self, step: int | None) -> float:
        """Raises DispersiveError: no step where the schedule needs one, or a negative one."""
        if self.shape == "constant":
            return 1.0
        try:
            done = operator.index(step) / self.steps  # type: ignore[arg-type]
        except TypeError as error:
            raise DispersiveError(f"schedule {self.shape!r} got step {step!r}: call loss(step=step)") from error
        if done < 0:
            raise DispersiveError(f"schedule {self.shape!r} got step {step}: steps are counted from 0")
        if self.shape == "warmup":
            return min(1.0, done + 1 / self.steps)
        if self.shape == "stop-at":
            return float(done < 1)
        return (1 + math.cos(math.pi * min(1.0, done))) / 2
