"""What the README says, sentence by sentence, and where it comes from: a study's runs, shipped runs, or a check.

notebooks/claims.yaml lists them, and each row of the table of verdicts is one. A claim's numbers are worked out again
from its source, and written with as many digits as the README has.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from dispersive_kit.errors import DataError
from dispersive_kit.study.arms import read_metrics
from dispersive_kit.study.evidence import Evidence, all_evidence, evidence_of
from dispersive_kit.study.lookup import PACKAGE, notebooks_folder
from dispersive_kit.study.results import shipped_results
from dispersive_kit.study.schema import check_form
from dispersive_kit.training import shipped

TABLE = re.compile(r"^## What is known\n\n\|.*\n\|[-|]+\n((?:\|.*\n)+)((?:(?!## ).*\n)*)", re.MULTILINE)
OTHERS = ("the paper's official README", "the same")  # sources of rows that are not the kit's own


@dataclasses.dataclass(frozen=True)
class Claim:
    """One sentence. Its source is one of: `study` with a `contrast`, shipped `runs`, or a `check` of a notebook.

    numbers: what the sentence says, and how to work it out: {says: "0.190", last: held_out, run: cifar10-cpu-base},
    the same with `over` another run (a ratio), {says: "12.9", mean: base} or {says: worse, verdict: word} of a study.
    """

    sentence: str
    numbers: tuple[dict[str, Any], ...] = ()
    study: str = ""
    contrast: dict[str, str] = dataclasses.field(default_factory=dict)
    runs: tuple[str, ...] = ()
    check: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def source(self) -> str:
        if self.check:
            return f"notebook {self.check['notebook']}: {self.check['promise']}"
        return f"study {self.study}" if self.study else f"shipped runs {', '.join(self.runs)}"


@functools.cache
def load_claims() -> tuple[Claim, ...]:
    """The claims that come with the kit: those of claims.yaml, then a row of the README for each verdict.

    Raises:
        DataError: claims.yaml is not of its form.
    """
    file = notebooks_folder() / "claims.yaml"
    content = yaml.safe_load(file.read_text(encoding="utf-8"))
    check_form(content, "claims", str(file), DataError)
    return (*map(_read, content), *map(_of_verdict, all_evidence()))


def _read(one: dict[str, Any]) -> Claim:
    fields: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in one.items()}
    return Claim(**fields)


def _of_verdict(one: Evidence) -> Claim:
    contrast = {name: one.verdict[name] for name in ("arm", "condition", "measure")}
    arms = {"base": one.plan.reference, "arm": contrast["arm"]}
    numbers = [{"says": says, **({"mean": arms[k]} if k in arms else {"verdict": k})} for k, says in one.says.items()]
    return Claim(one.row, tuple(numbers), study=one.plan.name, contrast=contrast)


def run_ids(claim: Claim) -> list[str]:
    """The runs a claim rests on: of a study all runs of both arms, by hash of the plan."""
    if not claim.study:
        return list(claim.runs)
    verdict, results = _verdict(claim), shipped_results()[claim.study]
    arms, condition = (verdict["arm"], results["reference"]), verdict["condition"]
    return [run["id"] for run in results["runs"] if run["arm"] in arms and run["condition"] == condition]


def disagreements(claim: Claim) -> list[str]:
    """The numbers of a claim that its source does not give, in words; none if all is well."""
    found = ((number["says"], worked_out(claim, number)) for number in claim.numbers)
    return [f"{claim.sentence!r} says {says}, and its source {value}" for says, value in found if says != value]


def worked_out(claim: Claim, number: dict[str, Any]) -> str:
    """A number from its source, with the digits of `says`."""
    value = _value(claim, number)
    return value if isinstance(value, str) else f"{value:.{len(number['says'].partition('.')[2])}f}"


def _value(claim: Claim, number: dict[str, Any]) -> float | str:
    if "last" in number:
        value, key = _last(number["run"], number["last"]), number["last"]
        return value / _last(number["over"], key) if "over" in number else value
    if "mean" in number:
        return _mean(claim, number["mean"])
    verdict = _verdict(claim)
    key = number["verdict"]
    if key in ("word", "p", "p_adjusted"):
        return verdict[key]
    return math.exp(verdict[key])  # mean, low, high of the log-ratio


def _last(run: str, key: str) -> float:
    return next(line[key] for line in reversed(read_metrics(shipped(run))) if key in line)


def _verdict(claim: Claim) -> dict[str, Any]:
    wanted = claim.contrast.items()
    for verdict in shipped_results()[claim.study]["verdicts"]:
        if wanted <= verdict.items():
            return verdict
    raise DataError(f"{claim.study} has no verdict on {claim.contrast}: {claim.sentence!r} has no ground")


def _mean(claim: Claim, arm: str) -> float:
    """Geometric mean over the seeds of the contrast's measure, or of what describes an arm the median."""
    verdict = _verdict(claim)
    rows = shipped_results()[claim.study]["summary"]
    row = next(r for r in rows if (r["arm"], r["condition"]) == (arm, verdict["condition"]))
    return row["values"][verdict["measure"]]["mean"]


def own_sentences(readme: str) -> Iterator[str]:
    """The rows of the README's table "What is known" that are the kit's own, the points below it, and all verdicts."""
    found = TABLE.search(readme)
    if found is None:
        raise DataError('the README has no table under "What is known"')
    table, below = found.groups()
    for row in table.splitlines():
        *_, source = (cell.strip() for cell in row.strip("| ").split("|"))
        if not source.startswith(OTHERS):
            yield row
    yield from (" ".join(point.split()) for point in re.findall(r"^- (.+(?:\n  .+)*)", below, re.MULTILINE))
    yield from re.findall(r"^\| .+$", evidence_of(readme), re.MULTILINE)[2:]


def readme_text() -> str | None:
    """The README of a checkout; a wheel has none."""
    file = Path(PACKAGE.parent / "README.md")
    return file.read_text(encoding="utf-8") if file.is_file() else None


def claim_of(sentence: str) -> Claim | None:
    """The claim that stands for a sentence or a table row: it begins with its words, and holds all its numbers."""
    plain = " ".join(sentence.strip("| ").split())
    for claim in load_claims():
        if plain.startswith(claim.sentence) and all(number["says"] in plain for number in claim.numbers):
            return claim
    return None
