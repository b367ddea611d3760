"""The record beside every number: what it was measured with, and what it may be called.

FID is the name of one protocol, and everything else says what it is.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from dispersive_kit.data import ImageSet
from dispersive_kit.errors import ConfigError

INCEPTION = "inception-pool3"
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
PROTOCOL_N = 50_000


def _unmet(extractor: Mapping[str, Any], n: int, reference: Mapping[str, Any]) -> list[str]:
    """The conditions of FID that do not hold, in words; see `FeatureExtractor.card` and `describe_set`."""
    part = f"the reference is {reference.get('n', 0):,} of the {reference.get('drawn_from') or 0:,} images of "
    conditions = {
        f"the features are {extractor.get('name')}, not {INCEPTION}": extractor.get("name") == INCEPTION,
        "the weights are not the TensorFlow Inception of 2015 by their sha256": extractor.get("weights_sha256")
        == INCEPTION_SHA256,
        f"there are {n:,} images, not {PROTOCOL_N:,}": n == PROTOCOL_N,
        f"{part}{reference.get('data')}": not reference.get("drawn_from"),
        "the reference set has no name": bool(reference.get("data")),
    }
    return [fault for fault, holds in conditions.items() if not holds]


def refuse_fid(extractor: Mapping[str, Any], n: int, reference: Mapping[str, Any]) -> None:
    """Raises ConfigError: the number may not be called FID; the message names every condition that is not met."""
    if faults := _unmet(extractor, n, reference):
        raise ConfigError(f"this is not FID: {'; '.join(faults)}. Call it FD[...], which names its extractor")


def number_name(metric: str, extractor: Mapping[str, Any], n: int, reference: Mapping[str, Any]) -> str:
    """ "FD[digits-classifier48, N=500]"; FID where, and only where, its conditions hold.

    FID names the split of its reference too: to the training images and to the test images are two numbers.
    """
    if metric != "FD" or _unmet(extractor, n, reference):
        return f"{metric}[{extractor['name']}, N={n}]"
    return f"FID[{' '.join(filter(None, (reference['data'], reference.get('split'))))}, N={n}]"


@dataclass(frozen=True)
class Record:
    """One measured number.

    name: e.g. "FD[digits-classifier48, N=500]". low, high: its 95 % interval. floor: what real images of another split
    get: the lowest or, for `better="higher"`, highest to hope for. protocol: everything else.

    Raises:
        ConfigError: the name is FID and the protocol is another.
    """

    name: str
    value: float
    low: float
    high: float
    floor: float
    n: int
    n_reference: int
    protocol: dict[str, Any] = field(default_factory=dict)
    better: Literal["lower", "higher", "about 1"] = "lower"

    def __post_init__(self) -> None:
        if self.name.partition("[")[0].strip() == "FID":
            refuse_fid(self.protocol.get("extractor", {}), self.n, self.protocol.get("reference", {}))

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2)

    def __str__(self) -> str:
        value, low, high = map(_digits, (self.value, self.low, self.high))
        return f"{self.name} = {value} [{low}, {high}], real against real {self.floor_in_words()}"

    def floor_in_words(self) -> str:
        """With its own N where there were fewer real images than generated ones: it is then too high."""
        of = self.protocol.get("floor", {}).get("n", self.n)
        return _digits(self.floor) + (f" (N={of})" if of < self.n else "")


def _digits(value: float) -> str:
    return f"{value:.4g}"


def describe_set(data: ImageSet) -> dict[str, Any]:
    """Of a set of real images, for a record."""
    card = {"data": data.name, "split": data.split, "n": len(data), "sha256": data.sha256, "resize": data.resize}
    return card | ({"drawn_from": data.drawn_from} if data.drawn_from else {})


def weights_sha256(state_dict: Mapping[str, Tensor]) -> str:
    """Of names and values, in their order."""
    digest = hashlib.sha256()
    for name, tensor in state_dict.items():
        digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def table(records: Sequence[Record]) -> str:
    """One line a number: name, value, interval, what real images get, which way is better."""
    head = ("", "value", "95 % interval", "real", "better")
    rows = [head] + [
        (r.name, _digits(r.value), f"[{_digits(r.low)}, {_digits(r.high)}]", r.floor_in_words(), r.better)
        for r in records
    ]
    first, *widths = (max(map(len, column)) for column in zip(*rows, strict=True))
    lines = [[row[0].ljust(first), *(c.rjust(w) for c, w in zip(row[1:], widths, strict=True))] for row in rows]
    return "\n".join("  ".join(line).rstrip() for line in lines)


def to_json(records: Sequence[Record]) -> str:
    """All numbers of one evaluation: the first one's protocol, and beside a number what is otherwise in its own."""
    shared, numbers = records[0].protocol, []
    for number in map(dataclasses.asdict, records):
        own = {key: value for key, value in number.pop("protocol").items() if shared.get(key) != value}
        numbers.append({**number, "protocol": own} if own else number)
    return json.dumps({"protocol": shared, "numbers": numbers}, indent=2)
