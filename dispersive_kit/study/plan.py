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
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, JsonValue, PositiveFloat, ValidationError, model_validator

from dispersive_kit.data import TOY_SETS
from dispersive_kit.errors import ConfigError, form_error
from dispersive_kit.study.notebook import Name, notebooks_folder
from dispersive_kit.training import TrainConfig, train_preset, with_settings

LEVEL = 0.05
DIRECTION = {"frechet": -1, "held_out": -1, "probe": 1}  # the sign that a better arm's log-ratio has
LEAST_SEEDS, MOST_SEEDS = 6, 20  # five pairs cannot reach p < 0.05; an exact test looks at 2^n choices of signs

_Text = Annotated[str, Field(min_length=1)]
_Seeds = list[Annotated[int, Field(ge=0)]]
_Settings = dict[str, JsonValue]


class _Form(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Contrast(_Form):
    """An arm against the reference, in one condition, by one measure."""

    arm: str
    condition: str = ""  # empty: the first of the plan
    measure: str

    def __str__(self) -> str:
        return f"{self.arm}, {self.condition}, {self.measure}"

    @property
    def kind(self) -> str:
        """ "frechet cfg 2" is a frechet."""
        return self.measure.partition(" ")[0]


class Sampling(_Form):
    """How samples are drawn and measured. The first of `cfg_scales` gives the measure "frechet"; each other one, w,
    a measure "frechet cfg w". probe: also fit linear probes.
    """

    extractor: Literal["classifier", "pixels-pca32", "effnet-lite0-pca64"]
    num: int = Field(2000, ge=2)
    num_steps: int = Field(10, ge=1)
    cfg_scales: list[float] = Field([1.0], min_length=1)
    probe: bool = False

    @property
    def frechets(self) -> dict[str, float]:
        """Name of the measure -> guidance."""
        first, *others = self.cfg_scales
        return {"frechet": first, **{f"frechet cfg {w:g}": w for w in others}}


class Tuning(_Form):
    """Trials of settings for each arm, equally many, on seeds that are not used again."""

    trials: dict[str, Annotated[list[_Settings], Field(min_length=1)]]
    seeds: _Seeds
    note: _Text


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


class Plan(_Form):
    """A checked plan. `sha256` is of its content, so comments and layout do not count."""

    title: _Text
    question: _Text
    notes: str = ""
    train: _Settings
    arms: dict[Name, _Settings] = Field(min_length=2)
    reference: str
    conditions: dict[Name, _Settings] = Field(min_length=1)
    seeds: _Seeds
    evaluation: Sampling
    primary: Contrast
    co_primary: Contrast
    secondaries: list[Contrast]
    margin: dict[str, PositiveFloat]
    margin_from: _Text
    tuning: Tuning
    stop_rule: _Text
    cpu_hours: PositiveFloat
    _file: Path
    _sha256: str

    @property
    def file(self) -> Path:
        return self._file

    @property
    def sha256(self) -> str:
        return self._sha256

    @property
    def name(self) -> str:
        return self._file.stem

    @property
    def called(self) -> str:
        """What `dispersive-kit study run` takes: the name of a shipped plan, or the path of another."""
        return self.name if self.file.parent == studies_folder() else str(self.file)

    @property
    def contrasts(self) -> list[Contrast]:
        return [self.primary, self.co_primary, *self.secondaries]

    def config(self, cell: Cell) -> TrainConfig:
        """The training of one run.

        Raises:
            ConfigError: a setting has no such name or another type.
        """
        changes = {name: value for name, value in self.train.items() if name != "preset"}
        config = with_settings(train_preset(str(self.train["preset"]), seed=cell.seed), changes)
        return with_settings(config, cell.settings)

    def tuning_cells(self) -> list[Cell]:
        """The tuning runs: every trial of every arm, in every condition, on the tuning seeds."""
        return [
            Cell(f"{arm}.{number}", condition, seed, {**shared, **self.arms[arm], **trial}, "tuning")
            for seed in self.tuning.seeds
            for condition, shared in self.conditions.items()
            for arm, trials in self.tuning.trials.items()
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

    @model_validator(mode="after")
    def _check(self) -> "Plan":
        for contrast in self.contrasts:
            contrast.condition = contrast.condition or next(iter(self.conditions))
        for check in (_check_names, _check_contrasts, _check_seeds, _check_tuning, _check_settings):
            check(self)
        return self


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
        plan = Plan.model_validate(content)
    except OSError as error:
        raise ConfigError(f"no plan {name!r} ({error.strerror}); shipped are: {', '.join(shipped_plans())}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not YAML of plain values: {error}") from error
    except ValidationError as error:
        raise form_error(error, str(file)) from error
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)  # canonical
    plan._file, plan._sha256 = file, hashlib.sha256(text.encode()).hexdigest()
    return plan


def _check_names(plan: Plan) -> None:
    if plan.reference not in plan.arms:
        raise ConfigError(f"reference {plan.reference!r} is no arm; there are: {', '.join(plan.arms)}")
    if unknown := set(plan.margin) - set(DIRECTION):
        raise ConfigError(f"a margin of {min(unknown)!r}; there are: {', '.join(DIRECTION)}")


def _check_contrasts(plan: Plan) -> None:
    measures = [*plan.evaluation.frechets, "held_out", *(["probe"] if plan.evaluation.probe else [])]
    known = {"arm": set(plan.arms) - {plan.reference}, "condition": set(plan.conditions), "measure": set(measures)}
    for contrast in plan.contrasts:
        for part, names in known.items():
            if (given := getattr(contrast, part)) not in names:
                raise ConfigError(f"{part} {given!r} of a contrast; there are: {', '.join(sorted(names))}")
        if contrast.kind not in plan.margin:
            raise ConfigError(f"no margin for {contrast.measure!r}, so nothing could be equivalent by it")
    if twice := [one for one, n in Counter(map(str, plan.contrasts)).items() if n > 1]:
        raise ConfigError(f"the contrast ({twice[0]}) stands twice")


def _check_seeds(plan: Plan) -> None:
    n, wanted = len(plan.seeds), max(1, len(plan.secondaries))
    smallest_p = 2.0 ** (1 - n)  # all signs one way: 2 of 2^n
    if len(set(plan.seeds)) < n:
        raise ConfigError("a seed stands twice: each is one pair")
    if n > MOST_SEEDS:
        raise ConfigError(f"{n} seeds are more than an exact test can list; take at most {MOST_SEEDS}")
    if n < LEAST_SEEDS:
        raise ConfigError(
            f"{n} seeds cannot reach p < {LEVEL}, the exact sign-flip test gives {smallest_p:.3g} at best; "
            f"take at least {LEAST_SEEDS}"
        )
    if smallest_p * wanted >= LEVEL:
        raise ConfigError(
            f"with {n} seeds the best p of {wanted} secondaries is {smallest_p * wanted:.3g} by Holm; "
            "take more seeds, or fewer secondaries"
        )


def _check_tuning(plan: Plan) -> None:
    trials, seeds = plan.tuning.trials, plan.tuning.seeds
    if bool(trials) != bool(seeds):
        raise ConfigError("tuning needs both trials and seeds of its own")
    if trials and (set(trials) != set(plan.arms) or len(set(map(len, trials.values()))) > 1):
        raise ConfigError("each arm needs equally many tuning trials, the reference among them")
    if shared := set(seeds) & set(plan.seeds):
        raise ConfigError(f"seed {min(shared)} is for tuning and for confirmation; keep them apart")


def _check_settings(plan: Plan) -> None:
    if "preset" not in plan.train:
        raise ConfigError("train names no preset; take one of those of dispersive-kit train")
    cells = (*plan.cells(), *plan.tuning_cells())
    for cell in cells:
        config = plan.config(cell)
        if config.data in TOY_SETS or config.model == "MLP":
            raise ConfigError(f"samples are measured as images, and {config.data} with {config.model} has none")
    if "seed" in {*plan.train, *(name for cell in cells for name in cell.settings)}:
        raise ConfigError("seeds stand in `seeds`, and are the same in all arms")
