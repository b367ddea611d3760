"""No sentence of the README without a ground, and no number that its ground does not give."""

import dataclasses
import json
import math
import re
import statistics

import pytest
from PIL import Image

from dispersive_kit.cli import main
from dispersive_kit.errors import DataError
from dispersive_kit.study import claims
from dispersive_kit.study.claims import claim_of, disagreements, load_claims, own_sentences, readme_text, run_ids
from dispersive_kit.study.evidence import all_evidence, evidence_hash, evidence_markdown, evidence_of, with_evidence
from dispersive_kit.study.lookup import notebooks_folder
from dispersive_kit.study.plan import load_plan, shipped_plans, studies_folder
from dispersive_kit.study.results import shipped_results, summary, verdicts
from dispersive_kit.training import shipped

README = readme_text()
SENTENCES = list(own_sentences(README))
RESULTS = sorted(file.name.removesuffix(".results.json") for file in studies_folder().glob("*.results.json"))


@pytest.mark.parametrize("sentence", SENTENCES, ids=lambda s: s[:50])
def test_every_own_sentence_of_the_readme_has_a_claim(sentence):
    assert claim_of(sentence), f"no claim in notebooks/claims.yaml stands for: {sentence}"


def test_a_sentence_or_a_number_without_a_claim_is_noticed():
    row = next(sentence for sentence in SENTENCES if sentence.startswith("|"))
    assert claim_of(row) and not claim_of(f"| DiT-XL/2, everything {row}")
    digit = re.search(r"\d\.\d", row)[0]
    says = next(number["says"] for number in claim_of(row).numbers)
    assert digit and not claim_of(row.replace(says, says[:-1] + ("1" if says[-1] != "1" else "2")))


def test_rows_of_the_paper_are_not_the_kits_own():
    assert len(SENTENCES) >= 5 and not [s for s in SENTENCES if "36.49" in s]
    with pytest.raises(DataError, match="no table"):
        list(own_sentences("# nothing"))


@pytest.mark.parametrize("claim", load_claims(), ids=lambda c: c.sentence[:50])
def test_a_number_is_the_one_its_runs_give(claim):
    assert disagreements(claim) == []
    for number in claim.numbers:
        *_, digit = says = number["says"]
        wrong = says[:-1] + str((int(digit) + 5) % 10) if digit.isdigit() else f"not {says}"
        assert len(disagreements(dataclasses.replace(claim, numbers=({**number, "says": wrong},)))) == 1


@pytest.mark.parametrize("claim", load_claims(), ids=lambda c: c.sentence[:50])
def test_a_claim_rests_on_runs_that_exist_or_on_a_check_that_can_fail(claim):
    if claim.check:
        notebook = json.loads((notebooks_folder() / f"{claim.check['notebook']}.ipynb").read_text())
        code = "".join(line for cell in notebook["cells"] if cell["cell_type"] == "code" for line in cell["source"])
        assert f'nb.check("{claim.check["promise"]}"' in code  # and test_notebooks.py perturbs every check
    elif claim.verdicts:
        studies = {ground["study"] for ground in claim.verdicts}
        assert len(run_ids(claim)) >= sum(2 * len(load_plan(study).seeds) for study in studies)
    else:
        assert all((shipped(run) / "metrics.jsonl").is_file() for run in run_ids(claim))
        assert "one seed" in next(s for s in SENTENCES if claim_of(s) == claim)


def test_a_claim_on_a_verdict_that_was_not_registered_is_refused():
    claim = next(claim for claim in load_claims() if claim.verdicts)
    ground = {**claim.verdicts[0], "measure": "beauty"}
    with pytest.raises(DataError, match="has no ground"):
        run_ids(dataclasses.replace(claim, verdicts=(ground,)))


@pytest.mark.parametrize("claim", [c for c in load_claims() if c.verdicts], ids=lambda c: c.sentence[:50])
def test_a_claim_whose_verdict_has_another_word_is_noticed(claim):
    for i, ground in enumerate(claim.verdicts):
        turned = {**ground, "word": "better" if ground["word"] != "better" else "worse"}
        others = (*claim.verdicts[:i], turned, *claim.verdicts[i + 1 :])
        assert len(disagreements(dataclasses.replace(claim, verdicts=others))) == 1


@pytest.mark.parametrize("name", RESULTS)
def test_shipped_results_are_those_of_the_shipped_plan_and_whole(name):
    plan = load_plan(name)
    results = shipped_results()[name]
    assert name in shipped_plans() and results["plan_sha256"] == plan.sha256
    assert [(r["arm"], r["seed"]) for r in results["runs"]] == [(c.arm, c.seed) for c in plan.cells()]
    assert all(environment["versions"]["torch"] and environment["commit"] for environment in results["environments"])


@pytest.mark.parametrize("name", RESULTS)
def test_shipped_verdicts_follow_from_the_shipped_runs(name):
    plan = load_plan(name)
    results = shipped_results()[name]
    for again, kept in zip(verdicts(plan, results["runs"]), results["verdicts"], strict=True):
        assert again == pytest.approx(kept)
    assert summary(plan, results["runs"]) == results["summary"]


def test_the_margin_of_later_studies_is_the_one_the_noise_floor_gave():
    """The rule is in the plan of study 1: the larger of 0.05 (0.01) and twice the SD of its paired log-ratios."""
    noise = shipped_results()["1-noise-floor"]["runs"]
    for measure, least in (("frechet", 0.05), ("held_out", 0.01)):
        values = {(run["arm"], run["seed"]): math.log(run["values"][measure]) for run in noise}
        ratios = [values["base-again", seed] - values["base", seed] for arm, seed in values if arm == "base"]
        margin = max(least, math.ceil(200 * statistics.stdev(ratios)) / 100)
        assert load_plan("2a-published-short").margin[measure] == margin
        assert load_plan("2b-published-short-low-lr").margin[measure] == margin


# ---- the table of verdicts


def test_the_readme_has_the_verdicts_of_the_shipped_results():
    assert evidence_of(README) == evidence_markdown(), (
        "the README is of other results: dispersive-kit study table --write"
    )
    assert with_evidence(README) == README


def test_the_figure_was_drawn_from_the_same_verdicts():
    with Image.open(notebooks_folder() / "figures" / "verdicts.png") as figure:
        drawn_from = figure.text["Description"]
    assert drawn_from == evidence_hash(), "the figure is of other results: dispersive-kit study table --write"


def test_a_changed_digit_in_the_table_is_noticed_and_mended():
    row = next(line for line in evidence_of(README).splitlines() if line.startswith("| `"))
    digit = re.search(r"\d\.\d", row)[0]
    changed = README.replace(row, row.replace(digit, "9.9", 1))
    assert changed != README and evidence_of(changed) != evidence_markdown()
    assert not claim_of(row.replace(digit, "9.9", 1)) and with_evidence(changed) == README
    with pytest.raises(DataError, match="between which the verdicts stand"):
        with_evidence("# a README without the marks")


def test_every_verdict_is_a_row_and_every_row_a_claim():
    rows = [line.strip("| ") for line in evidence_of(README).splitlines() if line.startswith("| `")]
    verdicts = [(name, v) for name in RESULTS for v in shipped_results()[name]["verdicts"]]
    assert len(rows) == len(verdicts) >= 2
    for row, (name, verdict) in zip(rows, verdicts, strict=True):
        claim = claim_of(row)
        (ground,) = claim.verdicts
        assert (ground["study"], ground["arm"], claim.sentence) == (name, verdict["arm"], row)
        assert len(claim.numbers) >= 5 and len(run_ids(claim)) == 2 * verdict["n"]


@pytest.mark.parametrize("one", list(all_evidence()), ids=lambda one: f"{one.plan.name}, {one.verdict['arm']}")
def test_a_row_says_what_its_runs_say(one):
    """Worked out from the runs alone: geometric means of both arms, their ratio where no run crashed, and the side."""
    verdict, names = one.verdict, {"base": one.plan.reference, "arm": one.verdict["arm"]}
    runs = [r for r in shipped_results()[one.plan.name]["runs"] if r["condition"] == verdict["condition"]]
    values = {
        side: [r["values"][verdict["measure"]] for r in runs if r["arm"] == name and r["status"] == "ok"]
        for side, name in names.items()
    }
    means = {side: statistics.geometric_mean(found) for side, found in values.items() if found}
    assert means.keys() == one.says.keys() & names.keys()
    for side, mean in means.items():
        assert float(one.says[side]) == pytest.approx(mean, rel=6e-3)
    if len(values["base"]) == len(values["arm"]) == verdict["n"]:
        assert float(one.says["mean"]) == pytest.approx(means["arm"] / means["base"], abs=6e-3)
    assert float(one.says["low"]) <= float(one.says["mean"]) <= float(one.says["high"])
    sides = {"better": "**for**: ", "worse": "**against**: ", "equivalent": "no difference: ", "inconclusive": "open: "}
    assert one.cells[-1] == sides[verdict["word"]] + verdict["word"]


def test_the_command_prints_the_table_and_writes_nothing(capsys):
    main(["study", "table"])
    assert capsys.readouterr().out == f"{evidence_markdown()}\n"


def test_readme_text_is_absent_from_a_wheel(monkeypatch, tmp_path):
    monkeypatch.setattr(claims, "PACKAGE", tmp_path / "dispersive_kit")
    assert readme_text() is None
