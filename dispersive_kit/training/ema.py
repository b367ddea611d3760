"""Averages of the weights over training: the models one samples from.

`EMA` forgets at a fixed rate. `PowerEMA` forgets at a rate that falls with the number of steps, so its width is a
share of the training whatever its length; from the snapshots of two of them any other width is built after the
fact (`reconstruct`). Karras et al., "Analyzing and Improving the Training Dynamics of Diffusion Models"
(arXiv 2312.02696), section 3 and appendix C.
"""

import copy
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dispersive_kit.errors import CheckpointError, ConfigError
from dispersive_kit.training.checkpoint import checkpoints, load_checkpoint
from dispersive_kit.training.parallel import local


class EMA:
    """A copy of the model whose parameters follow it slowly.

    With w the average and p the parameters, w <- d w + (1 - d) p, where d = min(decay, (1 + n) / (10 + n)) at the
    n-th update: without that ramp a short run would average in its own initialisation.
    """

    def __init__(self, model: nn.Module, decay: float = 0.9999) -> None:
        self.decay, self.updates = decay, 0
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    def decay_at(self, n: int) -> float:
        """d of the n-th update, counted from 0."""
        return min(self.decay, (1 + n) / (10 + n))

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        decay = self.decay_at(self.updates)
        self.updates += 1
        averages, parameters = ([local(p) for p in m.parameters()] for m in (self.model, model))
        torch._foreach_lerp_(averages, parameters, 1 - decay)
        for mine, theirs in zip(self.model.buffers(), model.buffers(), strict=True):
            mine.copy_(theirs)


class PowerEMA(EMA):
    """Average with weights t^gamma: d = (1 - 1/t)^(gamma + 1) at step t counted from 1 (equations 121 and 127).

    width: standard deviation of the average's profile as a share of the training, `sigma_rel` there; 0.05 to 0.1
    is usual.
    """

    def __init__(self, model: nn.Module, width: float) -> None:
        super().__init__(model)
        self.gamma = power_exponent(width)

    def decay_at(self, n: int) -> float:
        return (1 - 1 / (n + 1)) ** (self.gamma + 1)


def power_exponent(width: float) -> float:
    """gamma of a relative width (equation 126 and algorithm 2).

    Raises:
        ConfigError: not between 0 and 0.28, the width of a flat average.
    """
    if not 0 < width < 12**-0.5:
        raise ConfigError(f"the width of an average must lie between 0 and {12**-0.5:.3f}, got {width}")
    return float(np.roots([1, 7, 16 - width**-2, 12 - width**-2]).real.max())


def reconstruct(snapshots: Path, width: float, *, step: int | None = None) -> dict[str, Tensor]:
    """Weights of the average of relative `width` at `step`, from the stored snapshots of the tracked ones.

    The combination of snapshots whose profile is nearest to the wanted one (algorithm 3).

    Args:
        snapshots: the folder `ema-snapshots` of a run. step: None is the last one.

    Raises:
        CheckpointError: the run kept no snapshots (train with ema_widths). ConfigError: impossible width.
    """
    kept = {int(path.name[5:]): path for path in checkpoints(snapshots)}  # step -> folder
    kept = {at: path for at, path in kept.items() if step is None or at <= step}
    if not kept:
        raise CheckpointError(
            f"{snapshots} holds no snapshot up to step {step}: train with two ema_widths, e.g. 0.05 and 0.10"
        )
    names = [(at, file.stem) for at, path in kept.items() for file in path.glob("*.safetensors")]
    profiles = [(at, power_exponent(float(name))) for at, name in names]
    shares = dict(zip(names, profile_shares(profiles, step or max(kept), power_exponent(width)), strict=True))
    total: dict[str, Tensor] = {}
    for at, path in kept.items():  # one snapshot in memory at a time: a long run has hundreds
        for name, weights in load_checkpoint(path).groups.items():
            for key, value in weights.items():
                term = shares[at, name] * value.double() if value.is_floating_point() else value
                total[key] = total[key] + term if key in total and value.is_floating_point() else term
    return {key: value.to(weights[key].dtype) for key, value in total.items()}


def profile_shares(profiles: Sequence[tuple[int, float]], step: int, gamma: float) -> NDArray[np.float64]:
    """Share of each stored average (its step, its gamma) in the wanted one: least squares on the profiles."""
    steps, gammas = (np.array(column, dtype=np.float64) for column in zip(*profiles, strict=True))
    products = profile_product(steps[:, None], gammas[:, None], steps[None], gammas[None])
    wanted = profile_product(steps, gammas, np.array(step), np.array(gamma))
    return np.linalg.lstsq(products, wanted, rcond=None)[0]


def profile_product(t_a: NDArray, gamma_a: NDArray, t_b: NDArray, gamma_b: NDArray) -> NDArray:
    """Inner product of two profiles p(t) = (gamma + 1) t^gamma / T^(gamma + 1) on [0, T] (equation 151)."""
    exponent = np.where(t_a < t_b, gamma_b, -gamma_a)
    longest = np.maximum(t_a, t_b)
    return (gamma_a + 1) * (gamma_b + 1) * (t_a / t_b) ** exponent / ((gamma_a + gamma_b + 1) * longest)
