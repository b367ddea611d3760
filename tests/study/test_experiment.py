"""A small study for real: trained, killed, resumed, judged and reported, from the command line."""

import copy
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml

from dispersive_kit.cli import main
from dispersive_kit.data import load_images, to_float
from dispersive_kit.data.files import write_json
from dispersive_kit.errors import ConfigError, DataError
from dispersive_kit.evaluation import draw_images
from dispersive_kit.study import experiment
from dispersive_kit.study.experiment import is_done, run_cell, run_study
from dispersive_kit.study.plan import load_plan
from dispersive_kit.study.results import conclude, load_results, summary, verdicts
from dispersive_kit.study.tuning import choose
from dispersive_kit.training import load_run, train

MEASURED = ("values", "described", "status", "settings")


def command(*words):
    return [sys.executable, "-m", "dispersive_kit.cli", "study", *map(str, words)]


def write_plan(folder, content, name="small"):
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


@pytest.fixture(scope="module")
def finished(tmp_path_factory, small_plan):
    """Plan, output folder and what the command said, of a study that nobody disturbed."""
    folder = tmp_path_factory.mktemp("study")
    plan = write_plan(folder, small_plan)
    said = subprocess.run(command("run", plan, "--out", folder / "out"), capture_output=True, text=True, check=True)
    return load_plan(str(plan)), folder / "out", said.stdout


def numbers_of(results):
    return [{name: run[name] for name in ("id", *MEASURED)} for run in results["runs"]]


def test_the_cost_is_said_before_the_first_run_and_each_run_as_it_ends(finished):
    plan, _, said = finished
    first, last = said.index("12 runs, 1 at once; the plan states 0.01 CPU hours"), said.index("[12/12]")
    assert first < said.index("[1/12] confirmation/base/one/seed=0: frechet ") < last
    assert re.search(r"\[6/12\] .* CPU s\); about \d+ min left", said) and plan.sha256[:16] in said


def test_every_run_carries_the_plans_hash_and_what_it_was_measured_with(finished):
    plan, out, _ = finished
    files = sorted(out.rglob("confirmation/*/*/*/result.json"))
    assert len(files) == 12
    for file in files:
        run = json.loads(file.read_text())
        assert run["plan_sha256"] == plan.sha256 and run["environment"]["torch_threads"] == 1
        assert run["record"]["name"] == "FD[random-conv64, N=40]" and run["record"]["step"] == 12
        assert run["record"]["reference"]["sha256"] and run["record"]["versions"]["torch"]
        assert run["values"].keys() == {"frechet", "held_out"}
        assert run["described"]["feature_rms"] > 0 and run["described"]["gradient_ratio"] > 0


def test_the_rank_of_pooled_features_is_of_one_block_and_the_same_images_in_every_arm(finished):
    """By hand: the mean tokens of the first of two blocks, their centred singular values, and those of entropy."""
    plan, out, _ = finished
    for cell in plan.cells()[::6]:
        model, _ = load_run(out / cell.name / "training")
        images = draw_images(load_images("digits", "test"), 500).images
        null = torch.full((len(images),), model.null_label)
        with torch.no_grad():
            z = model(to_float(images), torch.zeros(len(images)), null, taps=[0])[1][0].mean(1)
        share = torch.linalg.svdvals((z - z.mean(0)).double())
        share = share / share.sum()
        rank = float((-share * share.clamp(min=1e-300).log()).sum().exp())
        result = json.loads((out / cell.name / "result.json").read_text())
        assert result["described"]["pooled_rank"] == pytest.approx(rank, rel=1e-3)


def test_the_word_is_the_one_that_follows_from_the_runs(finished):
    plan, out, said = finished
    results = json.loads((out / "results.json").read_text())
    assert verdicts(plan, results["runs"]) == results["verdicts"]
    primary, co_primary = results["verdicts"]
    assert (primary["role"], primary["n"], co_primary["measure"]) == ("primary", 6, "held_out")
    assert re.search(rf"primary +paper +one +frechet +{primary['word']}", said)
    worse = copy.deepcopy(results["runs"])
    for i, run in enumerate(worse):
        if run["arm"] == "paper":
            run["values"]["frechet"] *= 100 + i
    assert verdicts(plan, worse)[0]["word"] == "worse"


def test_the_page_stands_alone_and_shows_plan_verdict_and_runs(finished):
    _, out, _ = finished
    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64") == 2 and not re.search(r"(src|href)=.https?:", page)
    assert "stop_rule: six pairs" in page and "co-primary" in page and "paper/one/seed=5" in page


def test_a_report_of_runs_that_lie_elsewhere_is_of_those(finished, tmp_path, monkeypatch, capsys):
    plan, out, said = finished
    monkeypatch.setenv("DISPERSIVE_KIT_RUNS", str(tmp_path))  # where there is none
    main(["study", "report", str(plan.file), "--out", str(out)])
    verdict = re.search(r"^primary .*$", said, re.MULTILINE)
    assert verdict and verdict.group() in capsys.readouterr().out


def test_a_block_that_is_not_there_is_a_fault_of_the_plan_and_no_crash(tmp_path, small_plan):
    arms = {"base": {}, "paper": {"regularizer.preset": "paper", "regularizer.at": "block.2"}}
    plan = load_plan(str(write_plan(tmp_path, {**small_plan, "arms": arms})))
    with pytest.raises(ConfigError, match=r"no module 'block\.2'"):
        run_cell(plan, plan.cells()[1], out=tmp_path)
    with pytest.raises(ConfigError, match="0 workers"):
        next(run_study(plan, tmp_path, workers=0))


def test_training_images_may_differ_between_conditions_and_not_within_one(finished, tmp_path, small_plan):
    _, out, _ = finished
    shares = {"all": {}, "half": {"data_share": 0.5}}
    two = load_plan(str(write_plan(tmp_path, {**small_plan, "conditions": shares})))
    for cell in two.cells():
        run = json.loads((out / "confirmation" / cell.arm / "one" / f"seed={cell.seed}" / "result.json").read_text())
        own = {"plan_sha256": two.sha256, "condition": cell.condition, "settings": cell.settings}
        (tmp_path / cell.name).mkdir(parents=True)
        record = {**run["record"], "data_sha256": cell.condition}
        write_json(tmp_path / cell.name / "result.json", {**run, **own, "record": record})
    assert "data_sha256" not in conclude(two, tmp_path)["record"]
    write_json(tmp_path / cell.name / "result.json", {**run, **own})
    with pytest.raises(DataError, match="different data_sha256"):
        conclude(two, tmp_path)


def test_a_plan_that_ships_is_listed_and_one_that_does_not_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("DISPERSIVE_KIT_RUNS", str(tmp_path))
    main(["study", "list"])
    said = capsys.readouterr().out
    assert re.search(r"^1-noise-floor +12 +0\.15 +(not run|equivalent|inconclusive|better|worse) ", said, re.MULTILINE)
    with pytest.raises(SystemExit):
        main(["study", "run", "nowhere"])
    assert "no plan 'nowhere'" in capsys.readouterr().err


def test_killed_in_the_middle_of_a_training_it_goes_on_to_equal_results(finished, tmp_path, small_plan):
    _, out, _ = finished
    file, folder = write_plan(tmp_path, small_plan), tmp_path / "out"
    words = command("run", file, "--out", folder, "--workers", 2)
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT)
    end = time.monotonic() + 400
    while not in_the_middle(folder):
        assert process.poll() is None and time.monotonic() < end, sorted(map(str, folder.rglob("*.json")))
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    before = {one: one.stat().st_mtime_ns for one in folder.glob("confirmation/*/*/*/result.json")}
    assert 0 < len(before) < 12
    said = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    assert said.count("skipped, done before") == len(before)
    assert all(one.stat().st_mtime_ns == when for one, when in before.items())
    ours, theirs = (json.loads((one / "results.json").read_text()) for one in (folder, out))
    assert numbers_of(ours) == numbers_of(theirs) and ours["verdicts"] == theirs["verdicts"]


def in_the_middle(folder):
    """Some run is done, and another one has a checkpoint and is not."""
    done = {file.parent for file in folder.glob("confirmation/*/*/*/result.json")}
    begun = {file.parents[2] for file in folder.glob("confirmation/*/*/*/training/checkpoints/step-*")}
    return done and begun - done


def test_a_training_that_was_killed_is_taken_up_at_its_checkpoint(finished, tmp_path, monkeypatch):
    """Not begun anew: the checkpoint of the killed run is where the loop starts."""
    plan, out, _ = finished
    cell = plan.cells()[0]
    whole = json.loads((out / cell.name / "result.json").read_text())
    kept = out / cell.name / "training"
    killed = tmp_path / cell.name / "training"
    killed.parent.mkdir(parents=True)
    shutil.copytree(kept, killed)
    shutil.rmtree(killed / "checkpoints" / "step-00000012")
    steps = []
    monkeypatch.setattr(
        experiment, "train", lambda *how, **more: (steps.append(r.step) or r for r in train(*how, **more))
    )
    resumed = run_cell(plan, cell, out=tmp_path)
    assert steps == [9, 10, 11, 12]
    assert {k: resumed[k] for k in MEASURED} == {k: whole[k] for k in MEASURED}


def test_a_changed_plan_takes_no_old_run(finished, tmp_path, small_plan):
    _, out, _ = finished
    changed = load_plan(str(write_plan(tmp_path, {**small_plan, "margin": {"frechet": 0.3, "held_out": 0.05}})))
    assert not any(is_done(changed, cell, out) for cell in changed.cells())
    with pytest.raises(DataError, match=r"12 of 12 runs of small are not done .* its number of seeds is fixed"):
        conclude(changed, out)


def test_results_of_an_earlier_plan_are_refused(finished, tmp_path, small_plan, monkeypatch):
    plan, out, _ = finished
    monkeypatch.setenv("DISPERSIVE_KIT_RUNS", str(tmp_path))
    with pytest.raises(DataError, match=r"small has no results yet: dispersive-kit study run /.*small\.yaml"):
        load_results(plan)
    place = tmp_path / "studies" / f"small-{plan.sha256[:8]}"
    place.mkdir(parents=True)
    results = json.loads((out / "results.json").read_text())
    write_json(place / "results.json", results)
    assert load_results(plan)["verdicts"] == results["verdicts"]
    write_json(place / "results.json", {**results, "plan_sha256": "0" * 64})
    with pytest.raises(DataError, match="a plan is not changed after its runs"):
        load_results(plan)


def test_a_training_that_breaks_down_is_a_result_and_counts_against_its_arm(tmp_path, small_plan):
    arms = {"base": {}, "paper": {"regularizer.preset": "paper", "regularizer.weight": 1e38}}
    plan = load_plan(str(write_plan(tmp_path, {**small_plan, "arms": arms})))
    run = run_cell(plan, plan.cells()[1], out=tmp_path)
    assert run["status"] == "crashed" and "NaN or infinite" in run["error"] and run["values"] == {}


@pytest.mark.parametrize(("broken", "word", "crashes"), [("paper", "worse", (6, 0)), ("base", "better", (0, 6))])
def test_a_verdict_says_of_both_sides_how_many_runs_crashed(tmp_path, small_plan, broken, word, crashes):
    plan = load_plan(str(write_plan(tmp_path, small_plan)))
    runs = [
        {"arm": cell.arm, "condition": "one", "seed": cell.seed, "described": {"gradient_ratio": 1.0},
         "status": "crashed" if cell.arm == broken else "ok",
         "values": {} if cell.arm == broken else {"frechet": 3.0, "held_out": 0.2}}
        for cell in plan.cells()
    ]  # fmt: skip
    primary = verdicts(plan, runs)[0]
    assert (primary["word"], primary["crashes"], primary["reference_crashes"]) == (word, *crashes)
    assert not primary["inactive"]


def test_a_loss_without_a_floor_has_no_gap_and_is_measured_all_the_same(tmp_path, small_plan):
    arms = {"base": {}, "paper": {"regularizer.preset": "paper", "regularizer.diagonal": False}}
    plan = load_plan(str(write_plan(tmp_path, {**small_plan, "arms": arms})))
    runs = [run_cell(plan, cell, out=tmp_path) for cell in plan.cells()[:2]]
    assert [run["status"] for run in runs] == ["ok", "ok"]
    assert ["gap" in run["described"] for run in runs] == [True, False]
    assert [row["n"] for row in summary(plan, runs)] == [1, 1]
    mixed = [runs[0], {**runs[0], "described": runs[1]["described"]}]
    assert "gap" not in summary(plan, mixed)[0]["described"]


def test_a_run_whose_held_out_loss_is_not_finite_has_broken_down(finished, tmp_path):
    plan, out, _ = finished
    cell = plan.cells()[0]
    shutil.copytree(out / cell.name / "training", tmp_path / cell.name / "training")
    log = tmp_path / cell.name / "training" / "metrics.jsonl"
    *lines, last = map(json.loads, log.read_text().splitlines())
    del last["held_out"]  # what is not finite has no JSON: the training's log leaves it out
    log.write_text("".join(f"{json.dumps(line)}\n" for line in [*lines, last]))
    run = run_cell(plan, cell, out=tmp_path)
    assert (run["status"], run["values"]) == ("crashed", {}) and "not finite" in run["error"]


def test_missing_data_is_no_fault_of_the_arm_and_no_result(tmp_path, small_plan):
    plan = load_plan(str(write_plan(tmp_path, {**small_plan, "train": {"preset": "smoke", "data": "nowhere"}})))
    with pytest.raises(DataError, match="nowhere"):
        run_cell(plan, plan.cells()[0], out=tmp_path)
    assert not list(tmp_path.rglob("result.json"))


def test_a_regulariser_that_never_pulls_is_flagged(tmp_path, small_plan):
    plan = load_plan(str(write_plan(tmp_path, small_plan)))
    runs = [
        {"arm": cell.arm, "condition": "one", "seed": cell.seed, "status": "ok",
         "values": {"frechet": 3.0 + 0.01 * cell.seed, "held_out": 0.2}, "described": {"gradient_ratio": 9e-4}}
        for cell in plan.cells()
    ]  # fmt: skip
    assert verdicts(plan, runs)[0]["inactive"] and verdicts(plan, runs)[0]["word"] == "equivalent"


def test_tuning_gives_every_arm_the_trial_with_the_least_mean_log_distance(tmp_path, small_plan):
    rates = [{"learning_rate": 0.001}, {"learning_rate": 0.002}]
    tuning = {"seeds": [7, 8], "trials": {"base": rates, "paper": rates}, "note": "two rates for each"}
    plan = load_plan(str(write_plan(tmp_path, {**small_plan, "tuning": tuning})))
    cells = plan.tuning_cells()
    assert len(cells) == 8 and plan.config(cells[1]).learning_rate == 0.002
    distance = {"base.0": 3.0, "base.1": 2.0, "paper.0": 4.0, "paper.1": 1.0}
    results = [
        {"arm": c.arm, "condition": "one", "seed": c.seed, "status": "ok", "values": {"frechet": distance[c.arm]}}
        for c in cells
    ]
    results[-1] = {**results[-1], "status": "crashed", "values": {}}
    chosen = choose(plan, results)
    assert chosen == {"one": {"base": rates[1], "paper": rates[0]}}
    config = plan.config(plan.cells(chosen)[0])
    assert (config.learning_rate, config.seed) == (0.002, 0)
