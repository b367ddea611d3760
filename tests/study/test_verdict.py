"""The statistics of a study, against closed forms, enumeration and scipy; the verdicts that come with the kit."""

import hashlib
import itertools
import json
import math
import re
import statistics

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats

from dispersive_kit.analysis import load_with_images, noisy
from dispersive_kit.cli import main
from dispersive_kit.data.files import ARTEFACTS
from dispersive_kit.errors import DataError
from dispersive_kit.regularizers import depth_use
from dispersive_kit.study import verdict
from dispersive_kit.study.plan import load_plan, studies_folder
from dispersive_kit.study.verdict import all_verdicts, evidence_page, judge_pairs, shipped_results, summary, verdicts
from dispersive_kit.training import read_metrics

rng = np.random.default_rng(0)
README = studies_folder().parents[1] / "README.md"
six = np.array([-1.0, 1.2, -0.8, 0.9, 1.1, -1.4])


@pytest.mark.parametrize("n", [2, 4, 5, 6, 7, 9])
def test_the_sign_flip_p_is_the_share_of_all_signs_at_least_as_extreme(n):
    assert verdict._sign_flip_p(np.linspace(1, 2, n)) == pytest.approx(2 / 2**n, abs=1e-12)  # the best of n pairs
    x = rng.normal(0.4, 1, n)
    means = [abs(np.mean(x * signs)) for signs in itertools.product((1, -1), repeat=n)]
    assert verdict._sign_flip_p(x) == pytest.approx(np.mean(np.array(means) >= abs(x.mean()) - 1e-12))


def test_holm_by_hand():
    # sorted .01, .02, .03, .5 times 4, 3, 2, 1 is .04, .06, .06, .5, each at least the one before
    assert verdict._holm([0.02, 0.5, 0.01, 0.03]) == pytest.approx([0.06, 0.5, 0.04, 0.06])
    assert verdict._holm([0.6, 0.7]) == [1.0, 1.0] and verdict._holm([]) == []


def test_the_interval_is_students():
    x = rng.normal(0.2, 0.3, 6)
    judged, expected = judge_pairs(x, better=-1, margin=0.1), stats.ttest_1samp(x, 0).confidence_interval(0.95)
    assert (judged["low"], judged["high"]) == pytest.approx((expected.low, expected.high))


def test_equivalence_is_the_ninety_percent_interval_within_the_margin():
    x = rng.normal(0.01, 0.05, 8)

    def p(x, margin):
        return judge_pairs(x, better=-1, margin=margin)["p_equivalent"]

    edge = max(map(abs, stats.ttest_1samp(x, 0).confidence_interval(0.90)))
    assert p(x, edge) == pytest.approx(0.05) and p(x, 1.1 * edge) < 0.05 < p(x, 0.9 * edge)
    same = np.full(6, 0.1)
    assert (p(same, 0.2), p(same, 0.05)) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("shift", "spread", "better", "word"),
    [(1.0, 0.1, -1, "worse"), (-1.0, 0.1, -1, "better"), (1.0, 0.1, 1, "better"), (0.0, 0.01, -1, "equivalent"),
     (0.05, 0.01, -1, "equivalent"), (0.0, 0.5, -1, "inconclusive"), (0.0, 0.11, -1, "inconclusive")],
)  # fmt: skip
def test_one_word_for_each_situation(shift, spread, better, word):
    assert judge_pairs(shift + spread * six, better=better, margin=0.1)["word"] == word


def test_a_difference_that_holm_does_not_let_stand_is_inconclusive():
    assert judge_pairs(1 + 0.1 * six, better=-1, margin=0.1, p_adjusted=0.06)["word"] == "inconclusive"


def test_a_crash_counts_against_its_own_side_whichever_way_is_better():
    lower = verdict._log_ratios([None, 2.0, None], [1.0, None, None], better=-1)
    assert lower == pytest.approx([verdict.CRASH, -verdict.CRASH, 0.0])
    assert verdict._log_ratios([None], [0.9], better=1) == pytest.approx([-verdict.CRASH])
    assert verdict._log_ratios([3.0], [1.5], better=-1) == pytest.approx([math.log(2)])


def test_pairs_of_which_both_runs_crashed_are_no_evidence_of_equality():
    nothing = verdict._log_ratios([None] * 6, [None] * 6, -1)
    assert judge_pairs(nothing, better=-1, margin=0.05, empty=6)["word"] == "inconclusive"
    same = np.array([0.0, 0.0, 0.0, 0.0, 0.0, 0.001])
    assert judge_pairs(same, better=-1, margin=0.05)["word"] == "equivalent"
    assert judge_pairs(same, better=-1, margin=0.05, empty=5)["word"] == "inconclusive"


# ---- the verdicts that come with the kit


@pytest.mark.parametrize("name", shipped_results())  # a plan is committed before its first run, and has none then
def test_shipped_verdicts_are_of_the_shipped_plan_whole_and_follow_from_the_shipped_runs(name):
    plan, results = load_plan(name), shipped_results()[name]
    assert results["plan_sha256"] == plan.sha256
    assert [(r["arm"], r["seed"]) for r in results["runs"]] == [(c.arm, c.seed) for c in plan.cells()]
    assert all(environment["versions"]["torch"] and environment["commit"] for environment in results["environments"])
    for again, kept in zip(verdicts(plan, results["runs"]), results["verdicts"], strict=True):
        assert again == pytest.approx(kept)
    assert summary(plan, results["runs"]) == results["summary"]


def test_every_verdict_rests_on_all_runs_of_both_its_arms():
    known = {run["id"]: run for results in shipped_results().values() for run in results["runs"]}
    for v in all_verdicts():
        plan = load_plan(v["study"])
        runs = [known[one] for one in v["runs"]]
        arms = (v.get("against", plan.reference), v["arm"])
        expected = {(arm, v["condition"], seed) for arm in arms for seed in plan.seeds}
        assert {(run["arm"], run["condition"], run["seed"]) for run in runs} == expected


def test_the_margin_of_later_studies_is_the_one_the_noise_floor_gave():
    """The rule is in the plan of study 1: the larger of 0.05 (0.01) and twice the SD of its paired log-ratios."""
    noise = shipped_results()["1-noise-floor"]["runs"]
    for measure, least in (("frechet", 0.05), ("held_out", 0.01)):
        values = {(run["arm"], run["seed"]): math.log(run["values"][measure]) for run in noise}
        ratios = [values["base-again", seed] - values["base", seed] for arm, seed in values if arm == "base"]
        margin = max(least, math.ceil(200 * statistics.stdev(ratios)) / 100)
        assert load_plan("2a-published-short").margin[measure] == margin


def test_the_repetition_of_a_study_on_another_processor_says_what_the_readme_says_of_it():
    again = json.loads((studies_folder() / "7a-rivals-digits.repeat.json").read_text())
    plan, first = load_plan("7a-rivals-digits"), shipped_results()["7a-rivals-digits"]
    assert again["plan_sha256"] == plan.sha256
    assert [run["id"] for run in again["runs"]] == [run["id"] for run in first["runs"]]
    pairs = zip(verdicts(plan, again["runs"]), first["verdicts"], strict=True)
    differ = [v for v, other in pairs if v["word"] != other["word"]]
    changed = {(v["arm"], v["measure"]): (v["word"], f"{v['p']:.3f}") for v in differ}
    assert changed.pop(("repa", "held_out")) == ("inconclusive", "0.070")
    assert {name: word for name, (word, _) in changed.items()} == {
        ("small", "held_out"): "worse",
        ("layersync", "probe"): "equivalent",
    }
    assert "on another kind of processor, left it open (p = 0.070)" in README.read_text()


def test_the_readme_counts_the_shipped_verdicts_and_the_figure_is_drawn_from_them():
    again = "the README is of other results: python data/make_artefacts.py evidence"
    assert evidence_page().splitlines()[0] in README.read_text(), again
    better = sorted(v["arm"] for v in all_verdicts() if v["word"] == "better")
    assert better == ["cosine-pooled", *["paper"] * 4, *["repa"] * 2, "small", "weight-decay"], "README: of the 9"
    with Image.open(studies_folder().parent / "figures" / "map.png") as figure:
        assert figure.text["Description"] == hashlib.sha256(evidence_page().encode()).hexdigest(), again


def test_the_readme_takes_its_findings_from_the_shipped_verdicts():
    """Each ratio, end of an interval and p, but those of the paper; mutation: a number that no verdict has."""
    told = README.read_text().partition("## What is known")[2].partition("## Notebooks")[0]
    told = re.sub(r"(?ms)<!-- written.*?up to here -->|^\|.*?$|^- \*\*The paper.*?$", "", told)
    numbers = [x for v in all_verdicts() for x in (*(math.exp(v[end]) for end in ("low", "mean", "high")), v["p"])]
    repeated = 0.070  # held by the test of the repetition
    known = {f"{x:.{digits}f}" for x in [*numbers, math.log(32), repeated] for digits in (2, 3)}
    assert {*re.findall(r"\d+\.\d{2,}", told)} - known == set()


def test_the_readme_has_what_the_studies_measured_without_a_verdict():
    """Tuning at one rate, means and floor of the distances, depth use; mutation: the gain at another rate."""
    studies, text = shipped_results(), README.read_text()
    tuned = {run["id"].split("/")[1]: run["values"]["held_out"] for run in studies["6a-overfit-digits"]["tuning"]}
    gains = sorted(round(100 * (1 - tuned[f"paper.{trial}"] / tuned[f"base.{trial}"])) for trial in (0, 1))
    assert f"at one rate the tuning seed shows {gains[0]} and {gains[1]} %" in text
    longest, mechanism = studies["2e-published-longest"], studies["8-mechanism"]["runs"]
    base = statistics.geometric_mean(r["values"]["frechet"] for r in longest["runs"] if r["arm"] == "base")
    assert f"(the base is at {base:.1f}, real training images at {longest['record']['floor_value']:.1f})" in text
    use = {arm: statistics.mean(r["described"]["depth_use_0"] for r in mechanism if r["arm"] == arm)
           for arm in ("base", "cosine", "fixed-norm")}  # fmt: skip
    assert all(3.5 < use[arm] < 4 for arm in ("cosine", "fixed-norm"))
    assert f"the first block's update is almost 4 times its input (base: {use['base']:.1f})" in text


def test_the_readme_has_the_held_out_losses_of_the_shipped_runs():
    rows = re.findall(r"(?m)^\|.*?\| ([\d.]+) \| ([\d.]+) \| shipped `([\w-]+)-base`", README.read_text())
    assert {run for *_, run in rows} == {"cifar10-cpu", "digits", "digits-long", "mnist-long"}
    for *shown, run in rows:
        last = [read_metrics(ARTEFACTS / f"{run}-{arm}")[-1]["held_out"] for arm in ("base", "paper")]
        assert shown == [f"{loss:.3f}" for loss in last]


def test_the_readme_has_the_distances_of_the_shipped_runs():
    distance = r"([\d.]+ \[.*?\])"
    rows = re.findall(rf"(?m)shipped `([\w-]+)-base`.*?FD\[.*?\] {distance} and {distance} \|$", README.read_text())
    assert len(rows) == 2
    floors = {}
    for run, *shown in rows:
        for arm, text in zip(("base", "paper"), shown, strict=True):
            (file,) = (ARTEFACTS / f"{run}-{arm}").glob("evaluation-*.json")
            fd = next(one for one in json.loads(file.read_text())["numbers"] if one["name"].startswith("FD["))
            assert text == f"{fd['value']:.2f} [{fd['low']:.2f}, {fd['high']:.2f}]"
            floors[run] = f"{fd['floor']:.1f}"
    sentence = "FD of {digits-long} on digits, which both long runs have reached, and of {mnist-long} on MNIST"
    assert sentence.format(**floors) in README.read_text()


def test_the_readme_has_the_depth_use_of_the_shipped_runs():
    """Of the first block and of the later ones, over all noise levels; mutation: a range of one level."""
    told = {}
    for arm, digits in {"paper": 0, "base": 1}.items():
        model, _, train, _ = load_with_images(f"digits-{arm}")
        by_level = []
        for _, _, x, t in noisy(train.images[:200]):
            with torch.no_grad(), depth_use(model) as use:
                model(x, t, torch.full((len(x),), model.num_classes))
            by_level.append(list(use.values()))
        first, later = torch.tensor(by_level)[:, 0], torch.tensor(by_level)[:, 1:]
        told[f"first, {arm}"] = f"{first.min():.{digits}f} to {first.max():.{digits}f}"
        told[f"later, {arm}"] = f"{later.min():.1f} to {later.max():.1f}"
    sentences = "Its update is {first, paper} times as large as its input, more with more noise; without the loss, "
    sentences += "{first, base}. Later blocks add little: {later, paper}, without the loss {later, base} "
    assert sentences.format(**told) in README.read_text()


def test_the_page_of_the_evidence_is_what_the_command_writes(capsys):
    page = studies_folder() / "README.md"
    before = page.read_text()
    main(["study", "table"])
    said = capsys.readouterr().out
    assert said.startswith("written") and evidence_page() in said  # in this order: a reader may be `| head`
    assert page.read_text() == before and before.endswith(evidence_page())
    assert len(re.findall(r"^\| `", evidence_page(), re.MULTILINE)) == len(all_verdicts()) >= 69


def test_the_page_says_of_doubtful_rows_what_they_rest_on_and_counts_what_holds_over_all():
    page = evidence_page()
    (share,) = [line for line in page.splitlines() if "share-30" in line]
    (crashed,) = [line for line in page.splitlines() if "| no-diagonal |" in line]
    assert "[1.00, 1.16]" in share and "the interval includes 1" in share
    assert "1 of 9 runs of no-diagonal crashed, counted as ten times worse" in crashed and "87.7" in crashed
    p = sorted(v["p"] for v in all_verdicts())
    m = len(p)
    holm = next((i for i in range(m) if p[i] * (m - i) >= 0.05), m)
    bh = max((i + 1 for i in range(m) if p[i] * m / (i + 1) < 0.05), default=0)
    assert f"{holm} are significant by Holm's method, and {bh} by Benjamini-Hochberg's" in page
    assert f"at most {0.05 * m:.1f} of {m} would" in page


def test_shipped_results_hold_no_path_of_a_machine():
    for file in [*studies_folder().glob("*.json"), *ARTEFACTS.glob("*/*.json")]:
        assert not re.findall(r"(?<![\w.])/(?:tmp|home|root|work|Users|mnt|data)/[^\"]*", file.read_text()), file


WHOLE = json.loads((studies_folder() / "1-noise-floor.results.json").read_text())
DAMAGED = {
    "cut off": ("{", "not JSON"),
    "a list": ("[]", "valid dictionary"),
    "too deep": ("[" * 100_000, "not JSON"),
    "runs that are none": (json.dumps({**WHOLE, "runs": 12}), "runs = 12"),
    "a run without values": (json.dumps({**WHOLE, "runs": [{"id": "x"}]}), "damaged.*'values'"),
    "a verdict without a word": (json.dumps({**WHOLE, "verdicts": [{**WHOLE["verdicts"][0], "mean": "x"}]}), "damaged"),
    "of another plan": (json.dumps({**WHOLE, "plan_sha256": "0" * 64}), "a plan is not changed after"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_results_are_refused_by_file_and_field(tmp_path, kind):
    plan, file = load_plan("1-noise-floor"), tmp_path / "results.json"
    text, said = DAMAGED[kind]
    file.write_text(text)
    with pytest.raises(DataError, match=said) as refusal:
        verdict._read_results(plan, file)
    assert str(file) in str(refusal.value)
