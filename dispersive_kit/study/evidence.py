"""The verdicts of all studies that come with the kit, as the README has them: no number of them is typed by hand.

`dispersive-kit study table` prints them; with --write it puts them into README.md, and draws the figure beside them.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from dispersive_kit.errors import DataError
from dispersive_kit.study.plan import Plan, load_plan
from dispersive_kit.study.results import shipped_results

SPEAKS = {"better": "**for**", "worse": "**against**", "equivalent": "no difference", "inconclusive": "open"}
BEGIN, END = "<!-- written by: dispersive-kit study table --write -->", "<!-- up to here -->"
MEASURES = {"frechet": "FD", "held_out": "held-out loss", "probe": "probe accuracy"}
HEADER = ("study", "arm against base", "measure", "base", "arm", "ratio [95 %]", "p", "speaks")


class Evidence(NamedTuple):
    """A verdict of a study as a row of the table. says: its numbers, as text, by what they are."""

    plan: Plan
    verdict: Mapping[str, Any]
    cells: tuple[str, ...]
    says: dict[str, str]

    @property
    def row(self) -> str:
        return " | ".join(self.cells)


def all_verdicts() -> list[dict[str, Any]]:
    """The verdicts of all studies that come with the kit, each with its `study`."""
    return [{**v, "study": name} for name, results in shipped_results().items() for v in results["verdicts"]]


def all_evidence() -> Iterator[Evidence]:
    """A row for each verdict of the studies that come with the kit."""
    for name, results in shipped_results().items():
        plan = load_plan(name)
        for verdict in results["verdicts"]:
            yield _evidence(plan, results, verdict)


def _evidence(plan: Plan, results: Mapping[str, Any], verdict: Mapping[str, Any]) -> Evidence:
    means = {
        row["arm"]: row["values"][verdict["measure"]]["mean"]
        for row in results["summary"]
        if row["condition"] == verdict["condition"] and verdict["measure"] in row["values"]
    }
    low, ratio, high = (math.exp(verdict[end]) for end in ("low", "mean", "high"))
    digits = 3 if high - low < 0.1 else 2
    says = {
        **{side: _three_digits(means[arm]) for side, arm in _sides(plan, verdict).items() if arm in means},
        **{end: f"{value:.{digits}f}" for end, value in (("mean", ratio), ("low", low), ("high", high))},
        "p_adjusted": f"{verdict['p_adjusted']:.3f}",
        "word": verdict["word"],
    }
    condition = f", {verdict['condition']}" if len(plan.conditions) > 1 else ""
    cells = (
        f"`{plan.name}`{condition}", verdict["arm"], _measure(verdict["measure"], results),
        says.get("base", "crashed"), says.get("arm", "crashed"), f"{says['mean']} [{says['low']}, {says['high']}]",
        says["p_adjusted"], f"{SPEAKS[verdict['word']]}: {verdict['word']}",
    )  # fmt: skip
    return Evidence(plan, verdict, cells, says)


def _sides(plan: Plan, verdict: Mapping[str, Any]) -> dict[str, str]:
    return {"base": plan.reference, "arm": verdict["arm"]}


def _measure(name: str, results: Mapping[str, Any]) -> str:
    """ "frechet cfg 2" is the number of the record, under guidance."""
    kind, _, guidance = name.partition(" ")
    title = results["record"].get("name", MEASURES[kind]) if kind == "frechet" else MEASURES[kind]
    return f"{title}, {guidance.upper()}" if guidance else title


def _three_digits(value: float) -> str:
    """Three digits that count, and no exponent."""
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}"


def evidence_markdown() -> str:
    """What stands between `BEGIN` and `END` of the README: one sentence that counts, the figure and the table."""
    rows = list(all_evidence())
    counts = Counter(one.verdict["word"] for one in rows)
    titles = {one.plan.name: one.plan.title for one in rows}
    said = (
        f"{len(rows)} contrasts in {len(titles)} studies: **{counts['better']} for** the arm (better than base), "
        f"**{counts['worse']} against** it (worse), {counts['equivalent']} with no difference within a margin fixed "
        f"beforehand, {counts['inconclusive']} left open."
    )
    figure = f"![{said.replace('*', '')}](notebooks/figures/verdicts.png)"
    lines = [" | ".join(HEADER), " | ".join(["---"] * len(HEADER)), *(one.row for one in rows)]
    studies = [f"- `{name}`: {title}" for name, title in titles.items()]
    return "\n".join(["", said, "", figure, "", *(f"| {line} |" for line in lines), "", *studies, ""])


def evidence_hash() -> str:
    """sha256 of `evidence_markdown`, which the figure carries: drawn from other verdicts it is found out."""
    return hashlib.sha256(evidence_markdown().encode()).hexdigest()


def evidence_of(readme: str) -> str:
    """What stands between the two marks.

    Raises:
        DataError: a mark is missing.
    """
    return _parts(readme)[1]


def with_evidence(readme: str) -> str:
    """The README with the verdicts as they are now.

    Raises:
        DataError: a mark is missing.
    """
    before, _, after = _parts(readme)
    return f"{before}{BEGIN}\n{evidence_markdown()}\n{END}{after}"


def _parts(readme: str) -> tuple[str, str, str]:
    before, begin, rest = readme.partition(BEGIN)
    found, end, after = rest.partition(END)
    if not (begin and end):
        raise DataError(f"the README has no lines {BEGIN!r} and {END!r}, between which the verdicts stand")
    return before, found.removeprefix("\n").removesuffix("\n"), after
