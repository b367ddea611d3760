"""From paired runs to verdicts: exact sign-flip test, Holm, interval, equivalence within a margin; shipped verdicts.

Everything acts on log-ratios x_k = log(value of the arm / value of the reference), one for each seed: 0 is no
difference, log 2 is twice the value.
"""

import functools
import itertools
import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

from dispersive_kit.errors import DataError
from dispersive_kit.study.notebook import read_form
from dispersive_kit.study.plan import DIRECTION, LEVEL, Contrast, Plan, load_plan, shipped_plans, studies_folder

CRASH = math.log(10)  # a run that crashed counts as ten times worse than its pair
_INACTIVE = 1e-3  # median ratio of the gradients below which the regulariser did nothing
WORDS = """
What the words mean:

- **role**: a study is planned to answer its primary and co-primary contrasts. All others are secondary.
- **base, arm's**: geometric mean over the runs that ended. **ratio**: arm divided by base, over pairs of runs with one
  seed, with Student's 95 % interval. Lower is better for FD, held-out loss and copies, higher for the accuracy of the
  probe (ridge regression, on the mean over tokens; in studies 6 and 7 on all tokens).
- **p**: exact two-sided sign-flip test on the log-ratios of the pairs. **p adjusted**: Holm's correction over the
  secondary contrasts of a study. Primary and co-primary contrasts are not corrected.
- **margin**: the largest difference that counts as none, fixed before the runs. It is on the log-ratio: 0.05 is a
  factor of 1.05.
- **equivalent**: the 90 % interval lies within the margin, even if the difference is significant. **better**,
  **worse**: not equivalent, and the adjusted p is below 0.05. **inconclusive**: none of these.
- **crashed**: a run that broke down counts as ten times worse than its pair. **inactive**: at the median step the
  gradient of the loss is less than a thousandth of the gradient of denoising.
"""
_IMAGES = {"digits": 1297, "mnist": 60_000, "cifar10": 50_000}  # to train on
_MEASURES = {"held_out": "held-out loss", "copies": "share of copies", "probe": "probe accuracy"}

Run = dict[str, Any]


def _log_ratios(arm: Sequence[float | None], reference: Sequence[float | None], better: int) -> NDArray[np.float64]:
    """Paired log-ratios (n,); None is a crashed run, which counts as `CRASH` against its own side. If both runs of a
    pair crashed, the value is 0; give the number of such pairs to `judge_pairs`.
    """
    return np.array([
        math.log(a / b) if a is not None and b is not None else -better * CRASH * ((a is None) - (b is None))
        for a, b in zip(arm, reference, strict=True)
    ])  # fmt: skip


def _sign_flip_p(x: NDArray[np.float64]) -> float:
    """Exact two-sided p that the mean of x (n,) is 0, over all 2^n signs. It assumes only symmetry about 0."""
    from scipy.stats import permutation_test

    how: dict[str, Any] = {"permutation_type": "samples", "n_resamples": np.inf, "vectorized": True, "batch": 2**14}
    return float(permutation_test((x,), np.mean, **how).pvalue)


def _holm(p: Sequence[float]) -> list[float]:
    """Holm's adjusted p of a family: max over the smaller ones of (m - rank) p, at most 1."""
    order, adjusted = np.argsort(p, kind="stable"), np.empty(len(p))
    adjusted[order] = np.maximum.accumulate(np.minimum(1.0, np.arange(len(p), 0, -1) * np.asarray(p)[order]))
    return adjusted.tolist()


def _tost_p(x: NDArray[np.float64], margin: float) -> float:
    """Larger p of the two one-sided t-tests: is the mean of x (n,) above -margin, and below margin?"""
    from scipy.stats import ttest_1samp

    if np.ptp(x) == 0:  # no spread, no t
        return 0.0 if abs(x[0]) < margin else 1.0
    sides = ((-margin, "greater"), (margin, "less"))
    return max(float(ttest_1samp(x, bound, alternative=side).pvalue) for bound, side in sides)


def judge_pairs(
    x: NDArray[np.float64], *, better: int, margin: float, p_adjusted: float | None = None, empty: int = 0
) -> dict[str, Any]:
    """The verdict on paired log-ratios x (n,).

    "equivalent" if the 90 % interval lies within +-margin, even if the difference is significant: by the plan,
    such a difference counts as none. Else "better" or "worse" if the adjusted p is below 0.05; else "inconclusive".

    better: -1 if less of the measure is better, 1 if more is. p_adjusted: by Holm; None: alone in its family.
    empty: number of pairs in which both runs crashed. If there are any, the verdict is not "equivalent".
    Gives the word; n; mean of the log-ratios with its 95 % t-interval, low to high; p of the sign-flip test,
    p_adjusted; p_equivalent, of the two one-sided t-tests against +-margin; margin.
    """
    from scipy.stats import sem, t

    p, mean, equivalent = _sign_flip_p(x), float(x.mean()), _tost_p(x, margin)
    adjusted = p if p_adjusted is None else p_adjusted
    half = float(t.ppf(1 - LEVEL / 2, len(x) - 1) * sem(x))
    word = "inconclusive"
    if equivalent < LEVEL and not empty:
        word = "equivalent"
    elif adjusted < LEVEL:
        word = "better" if mean * better > 0 else "worse"
    interval = {"mean": mean, "low": mean - half, "high": mean + half}
    return {"word": word, "n": len(x), **interval, "p": p, "p_adjusted": adjusted, "p_equivalent": equivalent,
            "margin": margin}  # fmt: skip


def verdicts(plan: Plan, runs: Sequence[Run]) -> list[dict[str, Any]]:
    """One verdict for each contrast of the plan. Only the p-values of secondaries are adjusted, as one family."""
    sides = [(_values(runs, c, c.arm), _values(runs, c, c.against)) for c in plan.contrasts]
    pairs = [_log_ratios(*side, DIRECTION[c.kind]) for side, c in zip(sides, plan.contrasts, strict=True)]
    adjusted = [None, None, *_holm([_sign_flip_p(x) for x in pairs[2:]])]
    roles = ["primary", "co-primary", *["secondary"] * len(plan.secondaries)]
    found = []
    for role, c, (own, other), x, p in zip(roles, plan.contrasts, sides, pairs, adjusted, strict=True):
        empty = sum(pair == (None, None) for pair in zip(own, other, strict=True))
        judged = judge_pairs(x, better=DIRECTION[c.kind], margin=plan.margin[c.kind], p_adjusted=p, empty=empty)
        ended = [run for run in _of(runs, c.arm, c.condition) if run["status"] == "ok"]
        pull = statistics.median(run["described"]["gradient_ratio"] for run in ended) if ended else None
        crashes = {"crashes": own.count(None), "reference_crashes": other.count(None)}
        flags = {**crashes, "gradient_ratio": pull, "inactive": pull is not None and pull < _INACTIVE}
        named = c.model_dump(exclude={"against"} if c.against == plan.reference else None)
        found.append({"role": role, **named, **judged, **flags})
    return found


def _values(runs: Sequence[Run], contrast: Contrast, arm: str) -> list[float | None]:
    """The values of an arm, one for each seed; None for a crashed run."""
    chosen = sorted(_of(runs, arm, contrast.condition), key=lambda run: run["seed"])
    return [run["values"].get(contrast.measure) for run in chosen]


def _of(runs: Sequence[Run], arm: str, condition: str) -> list[Run]:
    return [run for run in runs if (run["arm"], run["condition"]) == (arm, condition)]


def summary(plan: Plan, runs: Sequence[Run]) -> list[dict[str, Any]]:
    """For each condition and arm: geometric mean and spread between seeds of each value, medians of the rest."""
    rows = []
    for condition, arm in itertools.product(plan.conditions, plan.arms):
        ended = [run for run in _of(runs, arm, condition) if run["status"] == "ok"]
        first = ended[0] if ended else {"values": {}, "described": {}}
        logs = {name: [math.log(run["values"][name]) for run in ended] for name in first["values"]}
        known = [name for name in first["described"] if all(name in run["described"] for run in ended)]
        rows.append({
            "condition": condition, "arm": arm, "n": len(ended),
            "values": {name: {"mean": math.exp(statistics.fmean(x)), "sd_log": statistics.stdev(x) if x[1:] else None}
                       for name, x in logs.items()},
            "described": {name: statistics.median(run["described"][name] for run in ended) for name in known},
        })  # fmt: skip
    return rows


class _Results(BaseModel, extra="allow"):
    """The form of a results.json: all runs of a plan, and what follows from them."""

    plan_sha256: str
    title: str
    question: str
    reference: str
    cpu_hours: dict[str, float]
    verdicts: list[dict[str, Any]]
    summary: list[dict[str, Any]]
    record: dict[str, Any]
    environments: list[dict[str, Any]]
    runs: list[Run]
    tuning: list[Run]


def load_results(plan: Plan, out: Path | None = None) -> dict[str, Any]:
    """Results of a plan: those in `out`, if it is given; else those of the study run on this machine; else those that
    come with the kit. Raises DataError: there are none, they are damaged, or the plan was changed after them.
    """
    here, shipped = (out or plan.folder) / "results.json", studies_folder() / f"{plan.name}.results.json"
    return _read_results(plan, shipped if out is None and not here.is_file() and shipped.is_file() else here)


def _read_results(plan: Plan, file: Path) -> dict[str, Any]:
    missing = f"{plan.name} has no results yet, {file} is not there: dispersive-kit study run {plan.called} writes it"
    results = read_form(file, _Results, missing, DataError).model_dump()
    try:
        verdict_rows(results), [(run["id"], run["values"].items(), run["described"]) for run in results["runs"]]
    except (LookupError, TypeError, ValueError) as fault:
        raise DataError(f"{file} is damaged, a verdict or run is of another form: {fault!r}") from fault
    if results["plan_sha256"] != plan.sha256:
        raise DataError(
            f"{file} holds results of plan {results['plan_sha256'][:8]}, and {plan.file} is now {plan.sha256[:8]}: "
            "a plan is not changed after its runs; give the new one another name"
        )
    return results


@functools.cache
def shipped_results() -> dict[str, dict[str, Any]]:
    """The results that come with the kit, by the name of their plan. Do not modify them. Raises DataError: some are
    damaged, or their plan was changed after them.
    """
    files = {name: studies_folder() / f"{name}.results.json" for name in shipped_plans()}
    return {name: _read_results(load_plan(name), file) for name, file in files.items() if file.is_file()}


def all_verdicts() -> list[dict[str, Any]]:
    """The verdicts of all studies that come with the kit, each with its `study`, the `runs` it rests on by id, and how
    many `epochs` its base was trained: how often it saw each training image.
    """
    found = []
    for name, results in shipped_results().items():
        plan = load_plan(name)
        bases = {c.condition: plan.config(c) for c in plan.cells() if c.arm == plan.reference}
        for v in results["verdicts"]:
            arms, base = (v.get("against", results["reference"]), v["arm"]), bases[v["condition"]]
            runs = [run["id"] for arm in arms for run in _of(results["runs"], arm, v["condition"])]
            epochs = base.steps * base.batch_size / (base.data_share * _IMAGES[base.data])
            found.append({**v, "study": name, "epochs": epochs, "runs": runs})
    return found


def verdict_rows(results: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """A row for each verdict, under a header."""
    columns = ("measure", results["reference"], "arm's", "ratio [95 %]", "p", "p adjusted", "margin", "verdict", "note")
    rows: list[tuple[str, ...]] = [("role", "arm", "condition", *columns)]
    for v in results["verdicts"]:
        means = {row["arm"]: row["values"].get(v["measure"], {}).get("mean")
                 for row in results["summary"] if row["condition"] == v["condition"]}  # fmt: skip
        base = v.get("against", results["reference"])
        low, ratio, high = (math.exp(v[end]) for end in ("low", "mean", "high"))
        digits = 3 if high - low < 0.1 else 2
        kind, _, guidance = v["measure"].partition(" ")  # "frechet cfg 2" is the number of the record, guided
        title = results["record"].get("name", "FD") if kind == "frechet" else _MEASURES[kind]
        of_base, own = (_three_digits(means[arm]) if means[arm] else "crashed" for arm in (base, v["arm"]))
        rows.append((
            v["role"], v["arm"], v["condition"], f"{title}, {guidance.upper()}" if guidance else title,
            of_base if base == results["reference"] else f"{of_base} ({base})", own,
            f"{ratio:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]", f"{v['p']:.3f}", f"{v['p_adjusted']:.3f}",
            f"{v['margin']:g}", v["word"], "; ".join(_notes(v, base, means)),
        ))  # fmt: skip
    return rows


def _three_digits(value: float) -> str:
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}"


def _notes(v: Mapping[str, Any], base: str, means: Mapping[str, float | None]) -> list[str]:
    crashes = {v["arm"]: v["crashes"], base: v["reference_crashes"]}
    notes = [f"{n} of {v['n']} runs of {arm} crashed, counted as ten times worse" for arm, n in crashes.items() if n]
    own, other = means[v["arm"]], means[base]
    if notes and own and other:
        notes.append(f"the means of the runs that ended differ by a factor of {own / other:.1f}")
    if v["word"] in ("better", "worse") and v["low"] <= 0 <= v["high"]:
        notes.append("the interval includes 1: the word follows the sign-flip test")
    return [*notes, *([f"inactive at the median step: gradient {v['gradient_ratio']:.2g}"] if v["inactive"] else [])]


def evidence_page() -> str:
    """All verdicts that come with the kit as Markdown: a line that counts them, what holds over all, a row for each."""
    from scipy.stats import false_discovery_control

    found = all_verdicts()
    counts = Counter(row["word"] for row in found)
    holm, fdr = _holm([v["p"] for v in found]), false_discovery_control([v["p"] for v in found])
    kept = [sum(p < LEVEL for p in adjusted) for adjusted in (holm, fdr)]
    header, *_ = map(verdict_rows, shipped_results().values())
    lines = [("study", *header[0]), ["---"] * (1 + len(header[0]))]
    lines += [(f"`{name}`", *row) for name, one in shipped_results().items() for row in verdict_rows(one)[1:]]
    n, needed = len(found), math.ceil(1 + math.log2(len(found) / LEVEL))  # 2 / 2^pairs below LEVEL / n
    return "\n".join([
        f"{counts.total()} contrasts in {len(shipped_results())} studies: **{counts['better']} for** the arm (better "
        f"than the other), **{counts['worse']} against** it (worse), {counts['equivalent']} with no difference within "
        f"a margin fixed beforehand, {counts['inconclusive']} left open.",
        "",
        f"- **By chance**: if no two arms differed, on average at most {LEVEL * n:.1f} of {n} would be called better "
        "or worse, half of them better.",
        f"- **All {n} taken together**, by the plain p: {kept[0]} are significant by Holm's method, and {kept[1]} by "
        f"Benjamini-Hochberg's, at a false discovery rate of {LEVEL:g}. Holm's needs at least {needed} pairs.",
        WORDS,
        *(f"| {' | '.join(map(str, line))} |" for line in lines),
        "",
        *(f"- `{name}`: {one['title']}" for name, one in shipped_results().items()),
        "",
    ])  # fmt: skip
