"""A small study for real: trained, killed, resumed, judged and reported, from the command line."""

import copy
import dataclasses
import json
import math
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
import warm
import yaml
from latent_stores import write_store
from scipy.spatial.distance import cdist

from dispersive_kit.cli import main
from dispersive_kit.data import load_images, to_float
from dispersive_kit.data.autoencoders import load_autoencoder
from dispersive_kit.errors import ConfigError, DataError
from dispersive_kit.evaluation import draw_images, make_extractor
from dispersive_kit.study import experiment
from dispersive_kit.study.experiment import _run_cell, conclude, run_study
from dispersive_kit.study.plan import load_plan
from dispersive_kit.study.verdict import load_results, summary, verdict_rows, verdicts
from dispersive_kit.training import load_run, read_metrics, train, train_preset
from dispersive_kit.training.batches import split_share

MEASURED = ("values", "described", "status", "settings")


def write_plan(folder, content, **changes):
    file = folder / "small.yaml"
    file.write_text(yaml.safe_dump({**content, **changes}))
    return load_plan(str(file))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, small_plan):
    """Plan, output folder and what the command said, of a study that nobody disturbed."""
    folder = tmp_path_factory.mktemp("study")
    plan = write_plan(folder, small_plan)
    return plan, folder / "out", warm.run("dispersive-kit", "study", "run", plan.file, "--out", folder / "out")


def result_of(out, cell):
    return json.loads((out / cell.name / "result.json").read_text())


def made_up(plan, **numbers):
    """A run for each cell, with nothing in it but values and how it ended."""
    return [{"arm": c.arm, "condition": c.condition, "seed": c.seed, "status": "ok",
             "values": {"frechet": 3.0 + 0.01 * c.seed, "held_out": 0.2}, "described": {"gradient_ratio": 1},
             **numbers}
            for c in plan.cells()]  # fmt: skip


def test_the_cost_is_said_before_the_first_run_and_each_run_as_it_ends(finished):
    plan, _, said = finished
    first, last = said.index("12 runs, 1 at once; the plan states 0.01 CPU hours"), said.index("[12/12]")
    assert first < said.index("[1/12] confirmation/base/one/seed=0: frechet ") < last
    assert re.search(r"\[6/12\] .* CPU s\); about \d+ min left", said) and plan.sha256[:16] in said


def test_every_run_carries_the_plans_hash_and_what_it_was_measured_with(finished):
    plan, out, _ = finished
    for cell in plan.cells():
        run = result_of(out, cell)
        assert run["plan_sha256"] == plan.sha256 and run["environment"]["torch_threads"] == 1
        assert run["record"]["name"] == "FD[pixels/pca32, N=40]" and run["record"]["step"] == 12
        assert run["record"]["reference"]["sha256"] and run["record"]["versions"]["torch"]
        assert run["values"].keys() == {"frechet", "held_out"}
        assert run["described"]["feature_rms"] > 0 and run["described"]["gradient_ratio"] > 0


def test_the_rank_of_pooled_features_is_of_one_block_and_the_same_images_in_every_arm(finished):
    """By hand: the mean tokens of the first of two blocks, their centred singular values, and those of entropy."""
    plan, out, _ = finished
    for cell in plan.cells()[:2]:
        model, _ = load_run(out / cell.name / "training")
        images = draw_images(load_images("digits", "test"), 500).images
        null = torch.full((len(images),), model.null_label)
        with torch.no_grad():
            z = model(to_float(images), torch.zeros(len(images)), null, taps=[0])[1][0].mean(1)
        share = torch.linalg.svdvals((z - z.mean(0)).double())
        share = share / share.sum()
        rank = float((-share * share.clamp(min=1e-300).log()).sum().exp())
        assert result_of(out, cell)["described"]["pooled_rank"] == pytest.approx(rank, rel=1e-3)


def test_the_verdicts_follow_from_the_runs_and_are_printed_and_reported(finished, tmp_path, monkeypatch, capsys):
    plan, out, said = finished
    results = load_results(plan, out)
    assert verdicts(plan, results["runs"]) == results["verdicts"]
    primary, co_primary = results["verdicts"]
    assert (primary["role"], primary["n"], co_primary["measure"]) == ("primary", 6, "held_out")
    assert re.search(rf"primary +paper +one +FD\[.*\] .* {primary['word']}$", said, re.MULTILINE)
    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64") == 2 and not re.search(r"(src|href)=.https?:", page)
    assert "stop_rule: six pairs" in page and "co-primary" in page and "paper/one/seed=5" in page
    monkeypatch.setenv("DISPERSIVE_KIT_RUNS", str(tmp_path))  # where there is none
    main(["study", "report", str(plan.file), "--out", str(out)])
    assert re.search(r"^primary .*$", said, re.MULTILINE).group() in capsys.readouterr().out
    worse = copy.deepcopy(results["runs"])
    for i, run in enumerate(worse):
        run["values"]["frechet"] *= 100 + i if run["arm"] == "paper" else 1
    assert verdicts(plan, worse)[0]["word"] == "worse"


def test_a_block_that_is_not_there_is_a_fault_of_the_plan_and_missing_data_none_of_the_arm(tmp_path, small_plan):
    arms = {"base": {}, "paper": {"regularizer.preset": "paper", "regularizer.at": "block.2"}}
    plan = write_plan(tmp_path, small_plan, arms=arms)
    with pytest.raises(ConfigError, match=r"no module 'block\.2'"):
        _run_cell(plan, plan.cells()[1], out=tmp_path)
    with pytest.raises(ConfigError, match="0 workers"):
        next(run_study(plan, tmp_path, workers=0))
    plan = write_plan(tmp_path, small_plan, train={"preset": "smoke", "data": "nowhere"})
    with pytest.raises(DataError, match="nowhere"):
        _run_cell(plan, plan.cells()[0], out=tmp_path)
    assert not list(tmp_path.rglob("result.json"))


def test_training_images_may_differ_between_conditions_and_not_within_one(finished, tmp_path, small_plan):
    plan, out, _ = finished
    two = write_plan(tmp_path, small_plan, conditions={"all": {}, "half": {"data_share": 0.5}})
    kept = {(cell.arm, cell.seed): result_of(out, cell) for cell in plan.cells()}
    for cell in two.cells():
        run = kept[cell.arm, cell.seed]
        own = {"plan_sha256": two.sha256, "condition": cell.condition, "settings": cell.settings}
        (tmp_path / cell.name).mkdir(parents=True)
        record = {**run["record"], "data_sha256": cell.condition, "reference": cell.condition}
        (tmp_path / cell.name / "result.json").write_text(json.dumps({**run, **own, "record": record}))
    assert "data_sha256" not in conclude(two, tmp_path)["record"]
    (tmp_path / cell.name / "result.json").write_text(json.dumps({**run, **own}))
    with pytest.raises(DataError, match="different reference"):
        conclude(two, tmp_path)


def test_results_of_a_plan_are_not_replaced_by_those_of_a_changed_one(finished, tmp_path, small_plan, capsys):
    out = shutil.copytree(finished[1], tmp_path / "out")
    conclude(finished[0], out)
    changed = write_plan(tmp_path, small_plan, margin={"frechet": 0.3, "held_out": 0.05})
    with pytest.raises(SystemExit):
        main(["study", "run", str(changed.file), "--out", str(out)])
    assert "of another plan" in capsys.readouterr().err


def test_a_probe_that_is_never_right_has_a_logarithm(monkeypatch):
    monkeypatch.setattr(experiment, "candidates", lambda *_, **__: {})
    monkeypatch.setattr(experiment, "choose_and_test", lambda *_: (SimpleNamespace(accuracy=0.0), {}))
    assert experiment._probe_accuracy(None, train_preset("smoke"), "mean") == 0.5 / 500


@pytest.mark.parametrize("words", [["run"], ["report", "nowhere"]])
def test_a_study_without_a_plan_or_with_none_that_is_there_names_those_that_ship(capsys, words):
    with pytest.raises(SystemExit):
        main(["study", *words])
    assert "shipped are: 1-noise-floor, 2a-published-short" in capsys.readouterr().err


def test_killed_in_the_middle_of_a_training_it_goes_on_to_equal_results(finished, tmp_path):
    plan, out, _ = finished
    words = ("dispersive-kit", "study", "run", plan.file, "--out", tmp_path, "--workers", 2)
    process = warm.start(*words)
    process.until(lambda: in_the_middle(tmp_path))
    process.kill()
    before = {one: one.stat().st_mtime_ns for one in tmp_path.glob("confirmation/*/*/*/result.json")}
    assert 0 < len(before) < 12
    said = warm.run(*words)
    assert said.count("skipped, done before") == len(before)
    assert all(one.stat().st_mtime_ns == when for one, when in before.items())
    ours, theirs = (load_results(plan, folder) for folder in (tmp_path, out))
    for one, other in zip(ours["runs"], theirs["runs"], strict=True):
        assert [one[k] for k in ("id", *MEASURED)] == [other[k] for k in ("id", *MEASURED)]
    assert ours["verdicts"] == theirs["verdicts"]


def in_the_middle(folder):
    """Some run is done, and another one has a checkpoint and is not."""
    done = {file.parent for file in folder.glob("confirmation/*/*/*/result.json")}
    begun = {file.parents[2] for file in folder.glob("confirmation/*/*/*/training/checkpoints/step-*")}
    return done and begun - done


def test_a_training_that_was_killed_is_taken_up_at_its_checkpoint(finished, tmp_path, monkeypatch):
    """Not begun anew: the checkpoint of the killed run is where the loop starts."""
    plan, out, _ = finished
    cell = plan.cells()[0]
    whole = result_of(out, cell)
    shutil.copytree(out / cell.name / "training", tmp_path / cell.name / "training")
    shutil.rmtree(tmp_path / cell.name / "training" / "checkpoints" / "step-00000012")
    steps = []
    monkeypatch.setattr(
        experiment, "train", lambda *how, **more: (steps.append(r.step) or r for r in train(*how, **more))
    )
    resumed = _run_cell(plan, cell, out=tmp_path)
    assert steps == [9, 10, 11, 12]
    assert {k: resumed[k] for k in MEASURED} == {k: whole[k] for k in MEASURED}


def test_a_changed_plan_takes_no_old_run_and_no_old_results(finished, tmp_path, small_plan, monkeypatch):
    plan, out, _ = finished
    monkeypatch.setenv("DISPERSIVE_KIT_RUNS", str(tmp_path))
    with pytest.raises(DataError, match=r"small has no results yet.* dispersive-kit study run /.*small\.yaml"):
        load_results(plan)
    changed = write_plan(tmp_path, small_plan, margin={"frechet": 0.3, "held_out": 0.05})
    with pytest.raises(DataError, match=r"12 of 12 runs of small are not done .* its number of seeds is fixed"):
        conclude(changed, out)
    with pytest.raises(DataError, match="a plan is not changed after its runs"):
        load_results(changed, out)


def test_a_training_that_breaks_down_is_a_result_and_counts_against_its_arm(tmp_path, small_plan):
    arms = {"base": {}, "paper": {"regularizer.preset": "paper", "regularizer.weight": 1e38}}
    plan = write_plan(tmp_path, small_plan, arms=arms)
    run = _run_cell(plan, plan.cells()[1], out=tmp_path)
    assert run["status"] == "crashed" and "NaN or infinite" in run["error"] and run["values"] == {}


def test_a_run_whose_held_out_loss_is_not_finite_has_broken_down(finished, tmp_path):
    plan, out, _ = finished
    cell = plan.cells()[0]
    shutil.copytree(out / cell.name / "training", tmp_path / cell.name / "training")
    log = tmp_path / cell.name / "training" / "metrics.jsonl"
    *lines, last = map(json.loads, log.read_text().splitlines())
    del last["held_out"]  # what is not finite has no JSON: the training's log leaves it out
    log.write_text("".join(f"{json.dumps(line)}\n" for line in [*lines, last]))
    run = _run_cell(plan, cell, out=tmp_path)
    assert (run["status"], run["values"]) == ("crashed", {}) and "not finite" in run["error"]


@pytest.mark.parametrize(("broken", "word", "crashes"), [("paper", "worse", (6, 0)), ("base", "better", (0, 6))])
def test_a_verdict_says_of_both_sides_how_many_runs_crashed(tmp_path, small_plan, broken, word, crashes):
    plan = write_plan(tmp_path, small_plan)
    runs = [run | ({"status": "crashed", "values": {}} if run["arm"] == broken else {}) for run in made_up(plan)]
    primary = verdicts(plan, runs)[0]
    assert (primary["word"], primary["crashes"], primary["reference_crashes"]) == (word, *crashes)
    assert not primary["inactive"]


def test_a_regulariser_that_never_pulls_is_flagged(tmp_path, small_plan):
    plan = write_plan(tmp_path, small_plan)
    primary = verdicts(plan, made_up(plan, described={"gradient_ratio": 9e-4}))[0]
    assert primary["inactive"] and primary["word"] == "equivalent"


def test_a_loss_without_a_floor_has_no_gap_and_is_measured_all_the_same(finished, tmp_path, small_plan):
    done, out, _ = finished
    arms = {"base": {}, "paper": {"regularizer.preset": "paper", "regularizer.diagonal": False}}
    plan = write_plan(tmp_path, small_plan, arms=arms)
    runs = [result_of(out, done.cells()[0]), _run_cell(plan, plan.cells()[1], out=tmp_path)]
    assert [(run["status"], "gap" in run["described"]) for run in runs] == [("ok", True), ("ok", False)]
    assert [row["n"] for row in summary(plan, runs)] == [1, 1]
    mixed = [runs[0], {**runs[0], "described": runs[1]["described"]}]
    assert "gap" not in summary(plan, mixed)[0]["described"]


def test_tuning_gives_every_arm_the_trial_with_the_least_mean_log_distance(tmp_path, small_plan, monkeypatch):
    rates = [{"learning_rate": 0.001}, {"learning_rate": 0.002}]
    trials = {"seeds": [7, 8], "trials": {"base": rates, "paper": rates}, "note": "two rates for each"}
    plan = write_plan(tmp_path, small_plan, tuning=trials)
    distance = {"base.0": 3.0, "base.1": 2.0, "paper.0": 4.0, "paper.1": 1.0}

    def measured(plan, cell, *, out):
        ok = cell.name != "tuning/paper.1/one/seed=8"
        (out / cell.name).mkdir(parents=True)
        return (out / cell.name / "result.json").write_text(json.dumps({
            "plan_sha256": plan.sha256, "settings": cell.settings, "arm": cell.arm, "condition": cell.condition,
            "status": "ok" if ok else "crashed", "values": {"frechet": distance.get(cell.arm, 1.0)} if ok else {},
        }))  # fmt: skip

    monkeypatch.setattr(experiment, "_run_cell", measured)
    monkeypatch.setattr(experiment, "in_pool", in_this_process)
    ended = [cell for cell, _, _ in run_study(plan, tmp_path)]
    tuning, confirmed = ended[:8], ended[8:]
    assert {cell.stage for cell in tuning} == {"tuning"} and plan.config(tuning[1]).learning_rate == 0.002
    rate = {cell.arm: plan.config(cell).learning_rate for cell in confirmed}
    assert len(confirmed) == 12 and rate == {"base": 0.002, "paper": 0.001}


def in_this_process(call, items, *_):
    return ((item, SimpleNamespace(result=lambda item=item: call(item))) for item in items)


def test_a_study_on_latents_is_decoded_by_its_store_and_comes_to_its_verdict(tmp_path, small_plan, monkeypatch):
    patches = load_autoencoder("small_autoencoders:patches").card
    store = write_store(tmp_path / "store", rows=300, shape=(3, 4, 4), card=patches)
    training = {"preset": "smoke", "data": str(store), "steps": 3, "checkpoint_every": 3, "batch_size": 8}
    evaluation = {**small_plan["evaluation"], "sampler": "sde", "cfg_scales": [1.5], "guidance_low": 0.25}
    plan = write_plan(tmp_path, small_plan, train={**training, "preview_images": 0}, evaluation=evaluation)
    monkeypatch.setattr(experiment, "in_pool", in_this_process)
    assert all(run["status"] == "ok" for _, run, _ in run_study(plan, tmp_path))
    results = conclude(plan, tmp_path)
    assert [v["n"] for v in results["verdicts"]] == [6, 6] and "pooled_rank" not in results["summary"][0]["described"]
    record = results["record"]
    assert "store-decoded" in str(record["reference"]) and record["sampler"] == "sde"
    assert (record["cfg_scale"], record["guidance_low"], record["guidance_high"]) == (1.5, 0.25, 1.0)
    plan = write_plan(tmp_path, small_plan, train=training, evaluation={**small_plan["evaluation"], "probe": True})
    with pytest.raises(ConfigError, match="a probe needs images"):
        _run_cell(plan, plan.cells()[0], out=tmp_path)


def test_an_arm_stopped_early_is_the_reference_where_its_validation_loss_was_lowest(tmp_path, small_plan):
    plan = write_plan(
        tmp_path, small_plan, early_stopped=["stopped"],
        train={**small_plan["train"], "data_share": 0.1, "eval_every": 4, "keep_last": 3},
        conditions={"one": {"learning_rate": 0.1}},
        arms={"base": {}, "paper": {"regularizer.preset": "paper"}, "stopped": {}},
        primary={"arm": "paper", "against": "stopped", "measure": "held_out"},
        co_primary={"arm": "paper", "measure": "copies"},
        margin={"copies": 0.2, "held_out": 0.05},
        evaluation={**small_plan["evaluation"], "copies": True, "curves": True},
    )  # fmt: skip
    base, _, stopped = plan.cells()[:3]
    runs = {cell.arm: _run_cell(plan, cell, out=tmp_path) for cell in (base, stopped)}
    lines = [line for line in read_metrics(tmp_path / base.name / "training") if "validation" in line]
    best = min(lines, key=lambda line: line["validation"])
    assert not (tmp_path / stopped.name / "training").exists()
    assert (runs["base"]["record"]["step"], runs["stopped"]["record"]["step"]) == (12, best["step"])
    assert [runs[arm]["values"]["held_out"] for arm in runs] == [lines[-1]["held_out"], best["held_out"]]
    assert len({line["validation"] for line in lines}) == 3 and best["step"] < 12
    kept = runs["base"]["described"]
    assert all(kept[f"{name}@{at['step']}"] == at[name] for at in lines for name in ("held_out", "depth_use_1"))
    copied = runs["base"]["values"]["copies"] * 41 - 0.5  # of 40 samples
    assert copied == pytest.approx(round(copied))
    real, held_out = (load_images("digits", split) for split in ("train", "test"))
    extractor = make_extractor("pixels-pca32", real, held_out)
    trained_on = split_share(real, 0.1)[0]  # and not the others, which lie nearer
    near = cdist(extractor(held_out.images), extractor(trained_on.images)).min(1)
    assert runs["base"]["described"]["copies_of_held_out"] == pytest.approx((near < near.mean() / 2).mean())

    own = dataclasses.replace(stopped, settings={**stopped.settings, "learning_rate": 0.01}, seed=1)
    assert _run_cell(plan, own, out=tmp_path)["status"] == "ok" and (tmp_path / own.name / "training").exists()


def test_arms_are_compared_with_the_arm_that_the_contrast_names(tmp_path, small_plan):
    plan = write_plan(
        tmp_path, small_plan, arms={"base": {}, "paper": {"regularizer.preset": "paper"}, "small": {}},
        co_primary={"arm": "paper", "against": "small", "measure": "held_out"},
    )  # fmt: skip
    runs = made_up(plan)
    for run in runs:
        run["values"]["held_out"] = {"base": 0.2, "paper": 0.3, "small": 0.6}[run["arm"]]
    of_base, of_small = verdicts(plan, runs)
    assert "against" not in of_base and of_small["against"] == "small"
    assert of_small["mean"] == pytest.approx(math.log(0.5)) and of_small["word"] == "better"
    results = {"reference": "base", "verdicts": [of_base, of_small], "summary": summary(plan, runs), "record": {}}
    rows = [dict(zip(verdict_rows(results)[0], row, strict=True)) for row in verdict_rows(results)[1:]]
    assert [(row["arm"], row["base"]) for row in rows] == [("paper", "3.02"), ("paper", "0.600 (small)")]
