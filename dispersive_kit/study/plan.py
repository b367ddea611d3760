"""The plan of a study, written and hashed before its first run: that is its pre-registration.

Which training all runs share, what the arms differ in, in which conditions they are compared, on how many seeds, and
what will be called better: `notebooks/studies/2a-published-short.yaml` is one.

Two runs that share a seed share initial weights, order of images, times, noise and label drops: they are a pair.
"""

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, JsonValue, PositiveFloat, ValidationError, model_validator

from dispersive_kit.data import TOY_SETS
from dispersive_kit.errors import ConfigError, form_error
from dispersive_kit.study.notebook import Name, notebooks_folder, runs_folder
from dispersive_kit.training import TrainConfig, train_preset, with_settings

LEVEL = 0.05
DIRECTION = {"frechet": -1, "held_out": -1, "probe": 1}  # the sign that a better arm's log-ratio has

_Text = Annotated[str, Field(min_length=1)]
_Seeds = Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=20)]  # a test looks at 2^n choices of signs
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


class _Tuning(_Form):
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
    margin: dict[Annotated[str, Field(pattern="^(frechet|held_out|probe)$")], PositiveFloat]
    margin_from: _Text
    tuning: _Tuning
    stop_rule: _Text
    cpu_hours: PositiveFloat
    # Of the file, and not of its content
    called: str = ""  # what `dispersive-kit study run` takes
    file: Path = Path()
    sha256: str = ""

    @property
    def name(self) -> str:
        return self.file.stem

    @property
    def folder(self) -> Path:
        """Where its runs lie: another plan, or the same one changed, has another folder."""
        return runs_folder() / "studies" / f"{self.name}-{self.sha256[:8]}"

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
        for check in (_check_names, _check_seeds, _check_settings):
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
    plan.called, plan.file, plan.sha256 = name, file, hashlib.sha256(text.encode()).hexdigest()
    return plan


def _check_names(plan: Plan) -> None:
    if plan.reference not in plan.arms:
        raise ConfigError(f"reference {plan.reference!r} is no arm; there are: {', '.join(plan.arms)}")
    measures = [*plan.evaluation.frechets, "held_out", *(["probe"] if plan.evaluation.probe else [])]
    known = {"arm": set(plan.arms) - {plan.reference}, "condition": set(plan.conditions), "measure": set(measures)}
    said: set[str] = set()
    for contrast in plan.contrasts:
        for part, names in known.items():
            if (given := getattr(contrast, part)) not in names:
                raise ConfigError(f"{part} {given!r} of a contrast; there are: {', '.join(sorted(names))}")
        if contrast.kind not in plan.margin:
            raise ConfigError(f"no margin for {contrast.measure!r}, so nothing could be equivalent by it")
        if str(contrast) in said:
            raise ConfigError(f"the contrast ({contrast}) stands twice")
        said.add(str(contrast))


def _check_seeds(plan: Plan) -> None:
    n, family, trials = len(plan.seeds), max(1, len(plan.secondaries)), plan.tuning.trials
    best = 2.0 ** (1 - n) * family  # all signs one way: 2 of 2^n
    if best >= LEVEL:
        raise ConfigError(
            f"{n} seeds cannot reach p < {LEVEL}: the exact sign-flip test, by Holm over {family} secondaries, gives "
            f"{best:.3g} at best; take at least {math.floor(2 + math.log2(family / LEVEL))} seeds, or fewer secondaries"
        )
    if len(set(plan.seeds)) < n:
        raise ConfigError("a seed stands twice: each is one pair")
    if bool(trials) != bool(plan.tuning.seeds):
        raise ConfigError("tuning needs both trials and seeds of its own")
    if trials and (set(trials) != set(plan.arms) or len(set(map(len, trials.values()))) > 1):
        raise ConfigError("each arm needs equally many tuning trials, the reference among them")
    if shared := set(plan.tuning.seeds) & set(plan.seeds):
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
