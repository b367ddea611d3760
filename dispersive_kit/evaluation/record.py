"""The record beside every number: what it was measured with, so that it can be measured again."""

import dataclasses
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

from dispersive_kit.data import ImageSet
from dispersive_kit.evaluation.features import FeatureExtractor
from dispersive_kit.evaluation.naming import WORDS, refuse

UINT8_RULE = "round(127.5 x + 127.5), clamped to 0..255"
LIBRARIES = ("torch", "torchvision", "numpy", "scipy", "torch-fidelity", "dispersive-kit")


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
            reference = self.protocol.get("reference", {}).get("data")
            refuse(word, self.protocol.get("extractor", {}), self.n, reference)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2)

    def __str__(self) -> str:
        return f"{self.name} = {self.value:.2f} [{self.low:.2f}, {self.high:.2f}], real against real {self.floor:.2f}"


def describe_extractor(extractor: FeatureExtractor) -> dict[str, Any]:
    keys = ("name", "version", "dim", "weights_sha256", "preprocess", "note")
    return {key: getattr(extractor, key) for key in keys}


def describe_set(data: ImageSet) -> dict[str, Any]:
    return {"data": data.name, "split": data.split, "n": len(data), "sha256": data.sha256}


def library_versions() -> dict[str, str | None]:
    """Of what computes the numbers; None where it is not installed."""
    return {"python": platform.python_version(), **{name: _version(name) for name in LIBRARIES}}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def table(records: Sequence[Record]) -> str:
    """One line a number: name, value, interval, what real images get, which way is better."""
    head = ("", "value", "95 % interval", "real", "better")
    rows = [
        (r.name, _digits(r.value), f"[{_digits(r.low)}, {_digits(r.high)}]", _digits(r.floor), r.better)
        for r in records
    ]
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    lines = [[row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]
             for row in (head, *rows)]  # fmt: skip
    return "\n".join("  ".join(line).rstrip() for line in lines)


def _digits(value: float) -> str:
    return f"{value:.4g}"


def to_json(records: Sequence[Record]) -> str:
    """All numbers of one evaluation: what they share once, then each without it."""
    numbers = [{k: v for k, v in dataclasses.asdict(r).items() if k != "protocol"} for r in records]
    shared: Mapping[str, Any] = records[0].protocol
    return json.dumps({"protocol": shared, "numbers": numbers}, indent=2)
