"""The plan of a study, written and hashed before its first run: that is its pre-registration.

title: The published settings against none
question: Does it lower the distance of samples to real digits?
train: {preset: digits, steps: 300}           # what all runs share: a training preset and changes to it
arms:                                         # what they differ in
  base: {}
  paper: {regularizer.preset: paper}
reference: base
conditions: {fast: {learning_rate: 0.004}}    # settings in which all arms are compared
seeds: [0, 1, 2, 3, 4, 5]
primary: {arm: paper, condition: fast, measure: frechet}
...

Two runs that share a seed share initial weights, order of images, times, noise and label drops: they are a pair.
"""

import hashlib
import json
import math
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from dispersive_kit.data import TOY_SETS
from dispersive_kit.errors import ConfigError
from dispersive_kit.study.lookup import notebooks_folder, safe_name
from dispersive_kit.study.schema import check_form
from dispersive_kit.study.verdict import DIRECTION, LEVEL, smallest_p
from dispersive_kit.training import TrainConfig, train_preset, with_settings

LEAST_SEEDS, MOST_SEEDS = 6, 20  # five pairs cannot reach p < 0.05; an exact test looks at 2^n choices of signs


@dataclass(frozen=True)
class Contrast:
    """An arm against the reference, in one condition, by one measure."""

    arm: str
    condition: str
    measure: str

    def __str__(self) -> str:
        return f"{self.arm}, {self.condition}, {self.measure}"


@dataclass(frozen=True)
class Cell:
    """One run of a study: its name is its folder."""

    arm: str
    condition: str
    seed: int
    settings: dict[str, Any]  # on top of the plan's `train`
    stage: str = "confirmation"  # or tuning

    @property
    def name(self) -> str:
        return f"{self.stage}/{self.arm}/{self.condition}/seed={self.seed}"


@dataclass(frozen=True)
class Sampling:
    """How samples are drawn and measured. The first of `cfg_scales` gives the measure "frechet"; each other one, w,
    a measure "frechet cfg w". probe: also fit linear probes.
    """

    extractor: str
    num: int = 2000
    num_steps: int = 10
    cfg_scales: tuple[float, ...] = (1.0,)
    probe: bool = False

    @property
    def frechets(self) -> dict[str, float]:
        """Name of the measure -> guidance."""
        first, *others = self.cfg_scales
        return {"frechet": first, **{f"frechet cfg {w:g}": w for w in others}}


@dataclass(frozen=True)
class Plan:
    """A checked plan. `sha256` is of its content, so comments and layout do not count."""

    name: str
    sha256: str
    title: str
    question: str
    train: dict[str, Any]
    arms: dict[str, dict[str, Any]]
    reference: str
    conditions: dict[str, dict[str, Any]]
    seeds: tuple[int, ...]
    evaluation: Sampling
    primary: Contrast
    co_primary: Contrast
    secondaries: tuple[Contrast, ...]
    margin: dict[str, float]
    margin_from: str
    tuning: dict[str, Any]
    stop_rule: str
    cpu_hours: float
    notes: str = ""
    file: Path = field(default=Path(), compare=False)

    @property
    def called(self) -> str:
        """What `dispersive-kit study run` takes: the name of a shipped plan, or the path of another."""
        return self.name if self.file.parent == studies_folder() else str(self.file)

    @property
    def contrasts(self) -> tuple[Contrast, ...]:
        return (self.primary, self.co_primary, *self.secondaries)

    def config(self, cell: Cell) -> TrainConfig:
        """The training of one run.

        Raises:
            ConfigError: a setting has no such name or another type.
        """
        changes = {name: value for name, value in self.train.items() if name != "preset"}
        config = with_settings(train_preset(self.train["preset"], seed=cell.seed), changes)
        return with_settings(config, cell.settings)

    def tuning_cells(self) -> list[Cell]:
        """The tuning runs: every trial of every arm, in every condition, on the tuning seeds."""
        return [
            Cell(f"{arm}.{number}", condition, seed, {**shared, **self.arms[arm], **trial}, "tuning")
            for seed in self.tuning["seeds"]
            for condition, shared in self.conditions.items()
            for arm, trials in self.tuning["trials"].items()
            for number, trial in enumerate(trials)
        ]

    def cells(self, chosen: dict[str, dict[str, dict[str, Any]]] | None = None) -> list[Cell]:
        """The confirmation runs, all arms of one seed before the next. chosen: condition -> arm -> tuned settings."""
        chosen = chosen or {}
        return [
            Cell(arm, condition, seed, {**shared, **settings, **chosen.get(condition, {}).get(arm, {})})
            for seed in self.seeds
            for condition, shared in self.conditions.items()
            for arm, settings in self.arms.items()
        ]


def studies_folder() -> Path:
    """Where the plans and results lie that come with the kit."""
    return notebooks_folder() / "studies"


def shipped_plans() -> list[str]:
    """Names of the plans that come with the kit."""
    return sorted(file.stem for file in studies_folder().glob("*.yaml"))


def load_plan(name: str) -> Plan:
    """A shipped plan by name, or one by the path of its YAML file, checked throughout.

    Raises:
        ConfigError: no such plan; not YAML of plain values; not of a plan's form; a name in it that does not exist;
            too few seeds; unequal tuning.
    """
    file = studies_folder() / f"{name}.yaml" if name in shipped_plans() else Path(name)
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"no plan {name!r} ({error.strerror}); shipped are: {', '.join(shipped_plans())}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not YAML of plain values: {error}") from error
    _check_plain(content, str(file))
    check_form(content, "study", str(file))
    plan = _read(content, file)
    for check in (_check_names, _check_seeds, _check_tuning, _check_settings):
        check(plan)
    return plan


def _check_plain(content: Any, where: str) -> None:
    """What YAML reads and JSON does not know: a name such as 0.5 without quotes, a date, NaN."""
    if isinstance(content, dict):
        for name, value in content.items():
            if not isinstance(name, str):
                raise ConfigError(f"{where}: the name {name!r} is read as a {type(name).__name__}: put it in quotes")
            _check_plain(value, f"{where}: {name}")
    elif isinstance(content, list):
        for value in content:
            _check_plain(value, where)
    elif not isinstance(content, str | int | float | None) or content in (math.inf, -math.inf) or content != content:
        raise ConfigError(f"{where}: {content!r} is no plain value")


def plan_hash(content: dict[str, Any]) -> str:
    """sha256 of the canonical JSON of a plan's content."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _read(content: dict[str, Any], file: Path) -> Plan:
    first = next(iter(content["conditions"]))

    def contrast(given: dict[str, str]) -> Contrast:
        return Contrast(given["arm"], given.get("condition", first), given["measure"])

    evaluation = {**content["evaluation"]}
    if "cfg_scales" in evaluation:
        evaluation["cfg_scales"] = tuple(evaluation["cfg_scales"])
    read = {
        "seeds": tuple(content["seeds"]),
        "evaluation": Sampling(**evaluation),
        "primary": contrast(content["primary"]),
        "co_primary": contrast(content["co_primary"]),
        "secondaries": tuple(map(contrast, content["secondaries"])),
    }
    return Plan(name=safe_name(file.stem), sha256=plan_hash(content), file=file, **{**content, **read})


def _check_names(plan: Plan) -> None:
    for name in (*plan.arms, *plan.conditions):
        safe_name(name, "arm or condition")
    if plan.reference not in plan.arms:
        raise ConfigError(f"{plan.name}: reference {plan.reference!r} is no arm; there are: {', '.join(plan.arms)}")
    measures = [*plan.evaluation.frechets, "held_out", *(["probe"] if plan.evaluation.probe else [])]
    known = {"arm": set(plan.arms) - {plan.reference}, "condition": set(plan.conditions), "measure": set(measures)}
    for contrast in plan.contrasts:
        for part, names in known.items():
            if getattr(contrast, part) not in names:
                raise ConfigError(
                    f"{plan.name}: {part} {getattr(contrast, part)!r} of a contrast; "
                    f"there are: {', '.join(sorted(names))}"
                )
        if contrast.measure.partition(" ")[0] not in plan.margin:
            raise ConfigError(f"{plan.name}: no margin for {contrast.measure!r}, so nothing could be equivalent by it")
    if unknown := set(plan.margin) - set(DIRECTION):
        raise ConfigError(f"{plan.name}: a margin of {min(unknown)!r}; there are: {', '.join(DIRECTION)}")
    if twice := [str(c) for c, n in Counter(plan.contrasts).items() if n > 1]:
        raise ConfigError(f"{plan.name}: the contrast ({twice[0]}) stands twice")


def _check_seeds(plan: Plan) -> None:
    n, wanted = len(plan.seeds), max(1, len(plan.secondaries))
    if n > MOST_SEEDS:
        raise ConfigError(f"{plan.name}: {n} seeds are more than an exact test can list; take at most {MOST_SEEDS}")
    if n < LEAST_SEEDS:
        raise ConfigError(
            f"{plan.name}: {n} seeds cannot reach p < {LEVEL}, the exact sign-flip test gives {smallest_p(n):.3g} at "
            f"best; take at least {LEAST_SEEDS}"
        )
    if smallest_p(n) * wanted >= LEVEL:
        raise ConfigError(
            f"{plan.name}: with {n} seeds the best p of {wanted} secondaries is {smallest_p(n) * wanted:.3g} by Holm; "
            "take more seeds, or fewer secondaries"
        )


def _check_tuning(plan: Plan) -> None:
    trials, seeds = plan.tuning["trials"], plan.tuning["seeds"]
    if bool(trials) != bool(seeds):
        raise ConfigError(f"{plan.name}: tuning needs both trials and seeds of its own")
    if trials and (set(trials) != set(plan.arms) or len(set(map(len, trials.values()))) > 1):
        raise ConfigError(f"{plan.name}: each arm needs equally many tuning trials, the reference among them")
    if shared := set(seeds) & set(plan.seeds):
        raise ConfigError(f"{plan.name}: seed {min(shared)} is for tuning and for confirmation; keep them apart")


def _check_settings(plan: Plan) -> None:
    cells = (*plan.cells(), *plan.tuning_cells())
    for cell in cells:
        config = plan.config(cell)
        if config.data in TOY_SETS or config.model == "MLP":
            raise ConfigError(
                f"{plan.name}: samples are measured as images, and {config.data} with {config.model} has none"
            )
    if "seed" in {*plan.train, *(name for cell in cells for name in cell.settings)}:
        raise ConfigError(f"{plan.name}: seeds stand in `seeds`, and are the same in all arms")
