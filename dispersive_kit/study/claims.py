"""What the README says, sentence by sentence, and where it comes from: verdicts of studies, shipped runs, or a check.

notebooks/claims.yaml lists them, and each row of the table of verdicts is one. A claim's numbers are worked out again
from its source, and written with as many digits as the README has.
"""

import dataclasses
import functools
import itertools
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
FOUND = re.compile(r"^What they say so far:\n\n((?:[- ].*\n)+)", re.MULTILINE)
POINT = re.compile(r"^- (.+(?:\n  .+)*)", re.MULTILINE)
OTHERS = ("the paper's official README", "the same")  # sources of rows that are not the kit's own


@dataclasses.dataclass(frozen=True)
class Claim:
    """One sentence. It rests on one of: `verdicts` of studies, shipped `runs`, or a `check` of a notebook.

    verdicts: {study, arm, measure, word}, and `condition` where the study has several; the sentence needs that word.
    numbers: what the sentence says, and how to work it out. Of shipped runs: {says: "0.190", last: held_out, run:
    cifar10-cpu-base}, the same with `over` another run (a ratio). Of a verdict, the first or the one numbered `of` from
    0: {says: "12.9", mean: base} or {says: "0.031", verdict: p}. Of its study: {says: "0.16", described: feature_rms,
    arm: norm-matched, over: paper}, medians over seeds, or {says: "52", count: tuning}, runs.
    """

    sentence: str
    numbers: tuple[dict[str, Any], ...] = ()
    verdicts: tuple[dict[str, str], ...] = ()
    runs: tuple[str, ...] = ()
    check: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def source(self) -> str:
        if self.check:
            return f"notebook {self.check['notebook']}: {self.check['promise']}"
        if self.runs:
            return f"shipped runs {', '.join(self.runs)}"
        return f"study {', '.join(dict.fromkeys(one['study'] for one in self.verdicts))}"


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
    ground = {"study": one.plan.name, **{name: one.verdict[name] for name in ("arm", "condition", "measure", "word")}}
    arms = {"base": one.plan.reference, "arm": one.verdict["arm"]}
    numbers = [{"says": says, **({"mean": arms[k]} if k in arms else {"verdict": k})} for k, says in one.says.items()]
    return Claim(one.row, tuple(numbers), verdicts=(ground,))


def run_ids(claim: Claim) -> list[str]:
    """The runs a claim rests on: of each verdict all runs of both arms, by hash of the plan."""
    return list(dict.fromkeys((*claim.runs, *(run for ground in claim.verdicts for run in _run_ids(ground)))))


def _run_ids(ground: dict[str, str]) -> list[str]:
    verdict, results = _verdict(ground), shipped_results()[ground["study"]]
    arms, condition = (verdict["arm"], results["reference"]), verdict["condition"]
    return [run["id"] for run in results["runs"] if run["arm"] in arms and run["condition"] == condition]


def disagreements(claim: Claim) -> list[str]:
    """What a claim says and its sources do not give, in words; none if all is well."""
    words = ((ground["word"], _verdict(ground)["word"]) for ground in claim.verdicts)
    numbers = ((number["says"], worked_out(claim, number)) for number in claim.numbers)
    both = itertools.chain(words, numbers)
    return [f"{claim.sentence!r} says {says}, and its source {value}" for says, value in both if says != value]


def worked_out(claim: Claim, number: dict[str, Any]) -> str:
    """A number from its source, with the digits of `says`."""
    value = _value(claim, number)
    return value if isinstance(value, str) else f"{value:.{len(number['says'].partition('.')[2])}f}"


def _value(claim: Claim, number: dict[str, Any]) -> float | str:
    if "last" in number:
        value, key = _last(number["run"], number["last"]), number["last"]
        return value / _last(number["over"], key) if "over" in number else value
    ground = claim.verdicts[number.get("of", 0)]
    verdict, results = _verdict(ground), shipped_results()[ground["study"]]
    if "count" in number:
        return float(len(results[number["count"]]))
    arms = {row["arm"]: row for row in results["summary"] if row["condition"] == verdict["condition"]}
    if "described" in number:
        value, over = (arms[number[one]]["described"][number["described"]] for one in ("arm", "over"))
        return value / over
    if "mean" in number:
        return arms[number["mean"]]["values"][verdict["measure"]]["mean"]
    key = number["verdict"]
    if key in ("word", "p", "p_adjusted"):
        return verdict[key]
    return math.exp(verdict[key])  # mean, low, high of the log-ratio


def _last(run: str, key: str) -> float:
    return next(line[key] for line in reversed(read_metrics(shipped(run))) if key in line)


def _verdict(ground: dict[str, str]) -> dict[str, Any]:
    wanted = {name: value for name, value in ground.items() if name not in ("study", "word")}.items()
    for verdict in shipped_results()[ground["study"]]["verdicts"]:
        if wanted <= verdict.items():
            return verdict
    raise DataError(f"{ground['study']} has no verdict on {dict(wanted)}: a claim that rests on it has no ground")


def own_sentences(readme: str) -> Iterator[str]:
    """What the README says of the kit's own measurements: rows and points under "What is known", the points that sum up
    the studies, and all verdicts.

    Raises:
        DataError: one of these parts is not found.
    """
    known, found = TABLE.search(readme), FOUND.search(readme)
    if known is None or found is None:
        raise DataError('the README has no table under "What is known", or no points under "What they say so far"')
    table, below = known.groups()
    for row in table.splitlines():
        *_, source = (cell.strip() for cell in row.strip("| ").split("|"))
        if not source.startswith(OTHERS):
            yield row
    for points in (below, found[1]):
        yield from (" ".join(point.split()) for point in POINT.findall(points))
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
