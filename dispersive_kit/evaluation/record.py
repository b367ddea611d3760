"""The record beside every number: what it was measured with, so that it can be measured again."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from dispersive_kit.data import ImageSet
from dispersive_kit.evaluation.features import FeatureExtractor
from dispersive_kit.evaluation.naming import WORDS, refuse
from dispersive_kit.evaluation.reference import Part

UINT8_RULE = "round(127.5 x + 127.5), clamped to 0..255"


@dataclass(frozen=True)
class Record:
    """One measured number.

    Attributes:
        name: e.g. "FD[digits-classifier48, N=500]". low, high: 95 % interval over resamples of the generated set.
        floor: what real images of another split get: the lowest or, for `better="higher"`, highest to hope for.
        protocol: everything else.

    Raises:
        ConfigError: the name is FID or IS and the protocol is another.
    """

    name: str
    value: float
    low: float
    high: float
    floor: float
    n: int
    n_reference: int | None  # None: a file of statistics does not say
    protocol: dict[str, Any] = field(default_factory=dict)
    better: Literal["lower", "higher", "about 1"] = "lower"

    def __post_init__(self) -> None:
        word = self.name.partition("[")[0].strip()
        if word in WORDS.values():
            refuse(word, self.protocol.get("extractor", {}), self.n, self.protocol.get("reference", {}))

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2)

    def __str__(self) -> str:
        value, low, high = map(_digits, (self.value, self.low, self.high))
        return f"{self.name} = {value} [{low}, {high}], real against real {self.floor_in_words()}"

    def floor_in_words(self) -> str:
        """The floor, with its own N where there were fewer real images than generated ones: it is then too high."""
        of = self.protocol.get("floor", {}).get("n", self.n)
        return _digits(self.floor) + (f" (N={of})" if of < self.n else "")


def describe_extractor(extractor: FeatureExtractor) -> dict[str, Any]:
    keys = ("name", "version", "dim", "weights_sha256", "preprocess", "note")
    return {key: getattr(extractor, key) for key in keys}


def describe_set(data: ImageSet) -> dict[str, Any]:
    card = {"data": data.name, "split": data.split, "n": len(data), "sha256": data.sha256, "resize": data.resize}
    return {**card, "drawn_from": data.drawn_from} if isinstance(data, Part) else card


def table(records: Sequence[Record]) -> str:
    """One line a number: name, value, interval, what real images get, which way is better."""
    head = ("", "value", "95 % interval", "real", "better")
    rows = [
        (r.name, _digits(r.value), f"[{_digits(r.low)}, {_digits(r.high)}]", r.floor_in_words(), r.better)
        for r in records
    ]
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    lines = [[row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]
             for row in (head, *rows)]  # fmt: skip
    return "\n".join("  ".join(line).rstrip() for line in lines)


def _digits(value: float) -> str:
    return f"{value:.4g}"


def to_json(records: Sequence[Record]) -> str:
    """All numbers of one evaluation: the first one's protocol, and beside a number what is otherwise in its own."""
    shared = records[0].protocol
    return json.dumps({"protocol": shared, "numbers": [_without(shared, r) for r in records]}, indent=2)


def _without(shared: Mapping[str, Any], record: Record) -> dict[str, Any]:
    number = dataclasses.asdict(record)
    own = {key: value for key, value in number.pop("protocol").items() if shared.get(key) != value}
    return {**number, "protocol": own} if own else number
