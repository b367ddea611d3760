"""A plan is checked throughout before anything runs, and is known by its hash."""

import copy
import datetime

import pytest
import yaml

from dispersive_kit.errors import ConfigError
from dispersive_kit.study.plan import Cell, load_plan


@pytest.fixture
def load(tmp_path, small_plan):
    """A function that writes the small plan with changes, by path "a__b", and loads it."""

    def load(changes):
        content = copy.deepcopy(small_plan)
        for path, value in changes.items():
            *parents, last = path.split("__") if isinstance(path, str) else [path]
            place = content
            for parent in parents:
                place = place[parent]
            place[last] = value
        file = tmp_path / "small.yaml"
        file.write_text(yaml.safe_dump(content))
        return load_plan(str(file))

    return load


def test_all_arms_of_a_seed_differ_in_what_the_plan_says_and_in_nothing_else(load):
    plan = load({})
    cells = plan.cells()
    assert [cell.seed for cell in cells] == [seed for seed in range(6) for _ in range(2)]
    base, paper = (plan.config(cell) for cell in cells[2:4])
    assert (base.seed, base.learning_rate, base.regularizer.preset) == (1, 0.004, "none")
    assert paper.regularizer.preset == "paper"
    assert {k for k in vars(base) if vars(base)[k] != vars(paper)[k]} == {"regularizer"}


def test_the_hash_is_of_the_content_and_not_of_the_layout(load):
    plan = load({})
    text = plan.file.read_text()
    plan.file.write_text(f"# a comment\n{text}\n")
    assert load_plan(str(plan.file)).sha256 == plan.sha256
    assert load({"stop_rule": "another"}).sha256 != plan.sha256


PAPER = {"regularizer.preset": "paper"}
REFUSED = {
    "five seeds": ({"seeds": [0, 1, 2, 3, 4]}, r"5 seeds cannot reach p < 0\.05.*0\.0625 at best.*at least 6 seeds"),
    "a seed twice": ({"seeds": [0, 1, 2, 3, 4, 5, 5]}, r"a seed is listed twice"),
    "too many secondaries": (
        {"secondaries": [{"arm": "paper", "measure": m} for m in ("frechet cfg 2", "frechet cfg 3")],
         "evaluation__cfg_scales": [1.0, 2.0, 3.0]},
        r"6 seeds cannot reach .* by Holm over 2 secondaries, gives 0\.0625 at best; take at least 7 seeds",
    ),
    "no such arm": ({"primary__arm": "papers"}, r"cannot have arm 'papers'; there are: paper"),
    "the reference against itself": ({"primary__arm": "base"}, r"cannot have arm 'base'"),
    "no such measure": ({"primary__measure": "FID"}, r"cannot have measure 'FID'; there are: frechet, held_out"),
    "no such extractor": ({"evaluation__extractor": "VGG"}, r"evaluation\.extractor = 'VGG': Input should be 'class"),
    "no such sampler": ({"evaluation__sampler": "ddim"}, r"no sampler 'ddim' for a model of flow; there are: heun"),
    "halves of three samples": ({"evaluation__num": 3}, r"num = 3"),
    "guidance beyond time": ({"evaluation__guidance_high": 1.5}, r"guidance_high = 1\.5"),
    "no such reference": ({"reference": "none"}, r"reference 'none' is no arm"),
    "no margin": ({"margin": {"frechet": 0.1}}, r"no margin for 'held_out'"),
    "a margin of nothing": ({"margin__helt_out": 0.1}, r"margin\.helt_out.*frechet\|held_out\|copies\|probe"),
    "a contrast twice": ({"co_primary__measure": "frechet"}, r"\(paper against base, one, frechet\) is listed twice"),
    "against no arm": ({"primary__against": "papers"}, r"cannot have against 'papers'; there are: base, paper"),
    "stopped without validation images": (
        {"early_stopped": ["paper"]}, r"paper is stopped early, which needs .*data_share.*keep_last to 1",
    ),
    "an arm with a dot": ({"arms__paper-0.1": {}, "early_stopped": ["paper-0.1"]}, r"paper-0\.1 is stopped early"),
    "no such arm to stop": ({"early_stopped": ["papers"]}, r"early_stopped names no arm: papers"),
    "no such setting": ({"arms__paper": {"regularizer.lambda": 1.0}}, r"regularizer: lambda = 1\.0"),
    "a setting of another type": ({"train__steps": "many"}, r"steps.*many"),
    "no preset": ({"train": {"steps": 3}}, r"preset ''"),
    "no such preset": ({"arms__paper": {"regularizer.preset": "papre"}}, r"'papre'.*paper"),
    "options at odds": (
        {"arms__paper": {**PAPER, "regularizer.kind": "covariance", "regularizer.tau": 1.0}}, r"has no scale",
    ),
    "a weight of no preset": ({"arms__paper": {"regularizer.weight": 0.1}}, r"weight is set"),
    "a placebo of no size": ({"arms__paper": {**PAPER, "regularizer.norm_matched": 0.0}}, r"norm_matched"),
    "more seeds than can be tested": ({"seeds": list(range(24))}, r"seeds = .*at most 20 items.*not 24"),
    "a seed of its own for a trial": (
        {"tuning__seeds": [9], "tuning__trials": {"base": [{}], "paper": [{"seed": 3}]}}, r"seeds belong in `seeds`"
    ),
    "a seed of its own for an arm": ({"arms__paper": {"seed": 3}}, r"seeds belong in `seeds`"),
    "tuning on the confirmation seeds": (
        {"tuning__seeds": [5], "tuning__trials": {"base": [{}], "paper": [{}]}},
        r"a seed is listed twice",
    ),
    "unequal tuning": (
        {"tuning__seeds": [9], "tuning__trials": {"base": [{}], "paper": [{}, {"learning_rate": 0.001}]}},
        r"equally many tuning trials, including the reference",
    ),
    "tuning of one arm alone": (
        {"tuning__seeds": [9], "tuning__trials": {"paper": [{}]}}, r"each arm needs equally many tuning trials"
    ),
    "no stop rule": ({"stop_rule": ""}, r"stop_rule = '': String should have at least 1"),
    "an unknown word": ({"best_of": 3}, r"best_of = 3: no field has this name"),
    "a name that leaves the folder": ({"arms__../paper": {}}, r"arms\.\.\./paper.* should match pattern"),
    "a name that is a number": ({"arms": {"base": {}, "paper": {}, 0.5: {}}}, r"arms\.0\.5.* = 0\.5: .*valid string"),
    "a date": ({"train__steps": datetime.date(2026, 1, 1)}, r"train\.steps = .*not a valid JSON value"),
    "no number": ({"evaluation__cfg_scales": [float("nan")]}, r"cfg_scales\.0 = nan: .*finite"),
    "no end": ({"margin__frechet": float("inf")}, r"margin\.frechet = inf: .*finite"),
    "points": ({"train__data": "two-moons"}, r"measured as images"),
}  # fmt: skip


@pytest.mark.parametrize("fault", REFUSED)
def test_a_faulty_plan_is_refused_by_file_and_name(load, fault):
    changes, message = REFUSED[fault]
    with pytest.raises(ConfigError, match=rf"small\.yaml: .*{message}"):
        load(changes)


def test_an_early_stopped_run_shares_that_of_the_reference_and_a_trial_that_of_the_same_number(load):
    plan = load({}).model_copy(update={"early_stopped": ["paper-0.1"]})
    cells = [Cell("paper-0.1", "one", 5, {}), Cell("paper-0.1.3", "one", 5, {}, "tuning")]
    assert [plan.unstopped(cell).name for cell in cells] == [
        "confirmation/base/one/seed=5",
        "tuning/base.3/one/seed=5",
    ]
    for cell in (Cell("base", "one", 5, {}), Cell("paper-0.1", "one", 5, {}, "tuning")):
        assert plan.unstopped(cell) is None


LATER = {
    "warm-up": {"regularizer.schedule": "warmup", "regularizer.schedule_steps": 100},
    "another block": {"regularizer.at": "blocks.2"},
    "tau by the median": {"regularizer.tau": "auto"},
    "local batch of 16": {"accumulation": 4, "batch_size": 64},
    "MeanFlow": {"objective": "meanflow"},
}


@pytest.mark.parametrize("arm", LATER)
def test_an_arm_is_a_matter_of_the_plan_alone(load, arm):
    plan = load({"arms__paper": {**PAPER, **LATER[arm]}, "evaluation__cfg_scales": [1.0, 1.5, 3.0]})
    config = plan.config(plan.cells()[1])
    for name, value in LATER[arm].items():
        place, _, field = name.rpartition(".")
        assert getattr(config.regularizer if place else config, field) == value
    assert list(plan.evaluation.frechets) == ["frechet", "frechet cfg 1.5", "frechet cfg 3"]
