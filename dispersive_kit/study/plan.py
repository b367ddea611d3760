"""The plan of a study. It is written and hashed before the first run: this is its pre-registration.

It states the training that all runs share, how the arms differ, the conditions, the seeds, and which result is called
better. An example: `notebooks/studies/2a-published-short.yaml`.

Two runs that share a seed share initial weights, order of images, times, noise and label drops: they are a pair.
"""

import hashlib
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, PositiveFloat, model_validator

from dispersive_kit.data import TOY_SETS
from dispersive_kit.errors import ConfigError
from dispersive_kit.study.notebook import Name, notebooks_folder, read_form, read_plain, runs_folder
from dispersive_kit.training import TrainConfig, train_preset, with_settings
from dispersive_kit.training.runs import sampler_of

LEVEL = 0.05
DIRECTION = {"frechet": -1, "held_out": -1, "copies": -1, "probe": 1}  # sign of the log-ratio of a better arm

_Text = Annotated[str, Field(min_length=1)]
_Seeds = Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=20)]  # a test looks at 2^n choices of signs
_Settings = dict[str, JsonValue]


class _Form(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Contrast(_Form):
    """An arm against the reference, or another arm, in one condition, by one measure."""

    arm: str
    against: str = ""  # empty: the reference of the plan
    condition: str = ""  # empty: the first of the plan
    measure: str

    @property
    def kind(self) -> str:
        """The measure without its guidance: "frechet" of "frechet cfg 2"."""
        return self.measure.partition(" ")[0]


class Sampling(_Form):
    """How samples are drawn and measured. The first of `cfg_scales` gives the measure "frechet"; each other one, w,
    a measure "frechet cfg w". probe: also fit linear probes, to the mean over tokens or to all of them (`probe_pool`).
    copies: also count the samples nearer to a training image than half the mean distance of held-out images. curves:
    also keep held-out loss and depth use of all logged steps, as "held_out@STEP" and so on.
    """

    extractor: Literal["classifier", "pixels-pca32", "effnet-lite0-pca64"]
    num: int = Field(2000, ge=4)
    sampler: str = ""  # that of the objective; sde is SiT's own
    num_steps: int = Field(10, ge=1)
    cfg_scales: list[float] = Field([1.0], min_length=1)
    guidance_low: float = Field(0.0, ge=0, le=1)
    guidance_high: float = Field(1.0, ge=0, le=1)
    probe: bool = False
    probe_pool: Literal["mean", "tokens"] = "mean"
    copies: bool = False
    curves: bool = False

    @property
    def measures(self) -> list[str]:
        return [*self.frechets, "held_out", *(name for name in ("copies", "probe") if getattr(self, name))]

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
    early_stopped: list[str] = []  # arms measured where their loss on validation images was lowest, not at the end
    reference: str
    conditions: dict[Name, _Settings] = Field(min_length=1)
    seeds: _Seeds
    evaluation: Sampling
    primary: Contrast
    co_primary: Contrast
    secondaries: list[Contrast]
    margin: dict[Annotated[str, Field(pattern="^(frechet|held_out|copies|probe)$")], PositiveFloat]
    margin_from: _Text
    tuning: _Tuning
    stop_rule: _Text
    cpu_hours: PositiveFloat
    file: Path = Path()
    sha256: str = ""

    @property
    def name(self) -> str:
        return self.file.stem

    @property
    def folder(self) -> Path:
        """The folder of its runs. Another plan, or this one after a change, has another folder."""
        return runs_folder() / "studies" / f"{self.name}-{self.sha256[:8]}"

    @property
    def called(self) -> str:
        """The name of the plan for `dispersive-kit study run`."""
        return self.name if self.file.parent == studies_folder() else str(self.file)

    @property
    def contrasts(self) -> list[Contrast]:
        return [self.primary, self.co_primary, *self.secondaries]

    def config(self, cell: Cell) -> TrainConfig:
        """The training of one run. Raises ConfigError: a setting has no such name or another type."""
        changes = {name: value for name, value in self.train.items() if name != "preset"}
        config = with_settings(train_preset(str(self.train.get("preset", "")), seed=cell.seed), changes)
        return with_settings(config, cell.settings)

    def unstopped(self, cell: Cell) -> Cell | None:
        """The run of the reference with which that of an early-stopped arm may share its training; else None."""
        arm, dot, trial = cell.arm.rpartition(".") if cell.stage == "tuning" else (cell.arm, "", "")
        return replace(cell, arm=f"{self.reference}{dot}{trial}") if arm in self.early_stopped else None

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
            contrast.against = contrast.against or self.reference
        self._check_contrasts()
        self._check_seeds()
        for cell in (*self.cells(), *self.tuning_cells()):
            if "seed" in {*self.train, *cell.settings}:
                raise ConfigError("seeds belong in `seeds`, and are the same in all arms")
            config = self.config(cell)
            sampler_of(config.objective, self.evaluation.sampler)
            if config.data in TOY_SETS or config.model == "MLP":
                raise ConfigError(f"samples are measured as images, and {config.data} with {config.model} has none")
            every, number = config.eval_every, config.steps // config.eval_every
            all_kept = (config.checkpoint_every, config.keep_last) == (every, number)
            if self.unstopped(cell) and not (all_kept and config.data_share < 1):
                raise ConfigError(
                    f"{cell.arm} is stopped early, which needs validation images (data_share below 1) and every "
                    f"checkpoint: set checkpoint_every to {every} and keep_last to {number}"
                )
        return self

    def _check_contrasts(self) -> None:
        known = {"against": self.arms, "condition": self.conditions, "measure": self.evaluation.measures}
        if unknown := {*self.early_stopped} - {*self.arms}:
            raise ConfigError(f"early_stopped names no arm: {', '.join(sorted(unknown))}")
        if self.reference not in self.arms:
            raise ConfigError(f"reference {self.reference!r} is no arm; there are: {', '.join(self.arms)}")
        for contrast in self.contrasts:
            for part, names in {"arm": {*self.arms} - {contrast.against}, **known}.items():
                if (given := getattr(contrast, part)) not in names:
                    raise ConfigError(f"a contrast cannot have {part} {given!r}; there are: {', '.join(sorted(names))}")
            if contrast.kind not in self.margin:
                raise ConfigError(f"no margin for {contrast.measure!r}: `margin` needs one, to judge equivalence")
            if self.contrasts.count(contrast) > 1:
                arms, rest = f"{contrast.arm} against {contrast.against}", f"{contrast.condition}, {contrast.measure}"
                raise ConfigError(f"the contrast ({arms}, {rest}) is listed twice")

    def _check_seeds(self) -> None:
        n, family, trials = len(self.seeds), max(1, len(self.secondaries)), self.tuning.trials
        best = 2.0 ** (1 - n) * family  # all signs equal: 2 cases of 2^n
        if best >= LEVEL:
            raise ConfigError(
                f"{n} seeds cannot reach p < {LEVEL}: the exact sign-flip test, by Holm over {family} secondaries, "
                f"gives {best:.3g} at best; take at least {math.floor(2 + math.log2(family / LEVEL))} seeds"
            )
        if len({*self.seeds, *self.tuning.seeds}) < n + len(self.tuning.seeds):
            raise ConfigError("a seed is listed twice: each seed is one pair, and tuning needs seeds of its own")
        if bool(trials) != bool(self.tuning.seeds):
            raise ConfigError("tuning needs both trials and seeds of its own")
        if trials and (set(trials) != set(self.arms) or len(set(map(len, trials.values()))) > 1):
            raise ConfigError("each arm needs equally many tuning trials, including the reference")


def studies_folder() -> Path:
    """The folder of the plans and results that come with the kit."""
    return notebooks_folder() / "studies"


def shipped_plans() -> list[str]:
    """Names of the plans that come with the kit."""
    return sorted(file.stem for file in studies_folder().glob("*.yaml"))


def load_plan(name: str) -> Plan:
    """A shipped plan by name, or one by the path of its YAML file, checked throughout.

    Raises ConfigError: no such plan; not YAML of plain values; not of a plan's form; a name in it that does not exist;
        too few seeds; unequal tuning.
    """
    file = studies_folder() / f"{name}.yaml" if name in shipped_plans() else Path(name)
    plan = read_form(file, Plan, f"no plan {name!r}; shipped are: {', '.join(shipped_plans())}", file=file)
    text = json.dumps(read_plain(file), sort_keys=True, separators=(",", ":"), ensure_ascii=False)  # canonical
    plan.sha256 = hashlib.sha256(text.encode()).hexdigest()
    return plan
