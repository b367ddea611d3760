"""Kinds, presets and options of Dispersive Loss, checked before anything is computed."""

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from ..errors import DispersiveError


class Kind(NamedTuple):
    tau: float | None  # default of the one scale; None: the kind has none
    diagonal: bool  # default
    unit: bool = False  # rows are put on the unit sphere
    log: bool = False  # a log-mean-exp of -D / tau, rather than a mean


KINDS = {
    "infonce_l2": Kind(0.5, True, log=True),
    "infonce_cosine": Kind(0.5, True, unit=True, log=True),
    "sphere": Kind(0.5, False, unit=True, log=True),
    "angular": Kind(0.5, False, unit=True, log=True),
    "hinge": Kind(1.0, False),
    "covariance": Kind(None, True),
    "vicreg": Kind(1.0, False),
}

PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"kind": "infonce_l2", "weight": 0.5, "tau": 0.5, "depth": 1 / 4},  # JAX, local batch 16
    "official-pytorch": {"kind": "infonce_l2", "weight": 0.25, "tau": 1.0, "depth": 1.0},  # local batch 32
    # For small models and short runs: of the eleven forms in study 3-why, tuned alike on 8 x 8 digits, the one with the
    # least mean, and not shown to be better than no loss: Frechet distance 0.96 times as large, [0.90, 1.02], over nine
    # seeds; 5.1 times with `paper`. At one learning rate for all it is equivalent to no loss at weights of 0.003 and
    # below, and worse from 0.03 on (study 3b-dose).
    "small": {"kind": "infonce_cosine", "weight": 0.01, "tau": 0.5, "pool": "mean", "depth": 1 / 4},
}


def preset_settings(name: str, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """`PRESETS[name]`, changed by `overrides`; another kind comes with its own tau, unless given."""
    check_choice("preset", name, tuple(PRESETS))
    settings = dict(PRESETS[name])
    if overrides.get("kind", settings["kind"]) != settings["kind"]:
        del settings["tau"]  # not comparable across kinds
    return {**settings, **overrides}


@dataclass(frozen=True)
class LossOptions:
    """The options of `dispersive_loss`, checked. Raises DispersiveError: unknown, out of range, or at odds."""

    kind: str = "infonce_l2"
    tau: float | str | None = None
    diagonal: bool | None = None
    pool: str = "none"
    normalize: str = "none"
    norm_penalty: float = 0.0
    t_window: float | None = None
    ignore_same_class: bool = False

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, tuple(KINDS))
        check_choice("diagonal", self.diagonal, (True, False, None))
        check_choice("pool", self.pool, ("none", "mean", "tokens"))
        check_choice("normalize", self.normalize, ("none", "layer", "unit"))
        check_choice("ignore_same_class", self.ignore_same_class, (True, False))
        check_number("norm_penalty", self.norm_penalty, at_least=0.0)
        if self.t_window is not None:
            check_number("t_window", self.t_window, above=0.0)
        if self.tau is not None and (self.tau != "auto" or self.kind == "vicreg"):
            check_number("tau", self.tau, above=0.0)
        self._check_fit()

    def _check_fit(self) -> None:
        kind, why = KINDS[self.kind], ""
        if kind.tau is None and self.tau is not None:
            why = f"has no scale: leave out tau (it was {self.tau!r})"
        elif self.kind in ("covariance", "vicreg") and (self.t_window or self.ignore_same_class):
            why = "compares channels, not pairs of images: leave out t_window and ignore_same_class"
        elif self.norm_penalty and (kind.unit or self.normalize != "none"):
            why = "sees normalised rows here, whose norm needs no penalty: leave out norm_penalty"
        if why:
            raise DispersiveError(f"kind {self.kind!r} {why}")

    @classmethod
    def of(cls, options: dict[str, Any]) -> "LossOptions":
        for name in options:
            check_choice("option", name, [f.name for f in fields(cls)])
        return cls(**options)

    @property
    def scale(self) -> float | str | None:
        return KINDS[self.kind].tau if self.tau is None else self.tau

    @property
    def with_diagonal(self) -> bool:
        return KINDS[self.kind].diagonal if self.diagonal is None else self.diagonal


def check_choice(what: str, value: Any, known: Sequence[Any]) -> None:
    if not any(value is one or (isinstance(value, str) and value == one) for one in known):
        near = difflib.get_close_matches(str(value), map(str, known), 1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise DispersiveError(f"{what} {value!r} is unknown: {hint}choose from {', '.join(map(str, known))}")


def check_number(what: str, value: Any, above: float = -math.inf, at_least: float = -math.inf) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not number or value <= above or value < at_least:
        bound = f"above {above:g}" if math.isfinite(above) else f"of at least {at_least:g}"
        raise DispersiveError(f"{what} is {value!r}: give a finite number {bound}")
