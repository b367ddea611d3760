"""Helpers of single notebooks: exact fields, views inside a model, and frames for sliders.

A frame depends on its state alone. Its axes are the same for every state, so a slider changes only what is drawn.
"""

import inspect
import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn

from dispersive_kit.data.toy import GaussianMixture, eight_gaussians
from dispersive_kit.diffusion.paths import LINEAR, DDPMPath, GVPPath, LinearPath, Path, VPPath
from dispersive_kit.diffusion.samplers import euler, euler_maruyama, heun, rk4
from dispersive_kit.models.dit import DiT
from dispersive_kit.regularizers import Dispersive
from dispersive_kit.views.figures import BLUE, GREY, MEASURES, RED, heatmaps, pairwise_distances

# ---- noise and fields in the plane

PATHS: dict[str, Path] = {
    "linear": LinearPath(), "GVP": GVPPath(), "VP": VPPath(), "DDPM linear": DDPMPath(),
    "DDPM cosine": DDPMPath("cosine"),
}  # fmt: skip


def cloud(B: int) -> Tensor:
    """The first B points (B, 2), float64, of a sequence that fills a disc of radius 1.3 evenly."""
    steps = torch.tensor([0.7548776662, 0.5698402910], dtype=torch.float64)  # Roberts' R2 sequence, on the disc
    radius, turn = (0.5 + torch.arange(B)[:, None] * steps).frac().T
    angle = 2 * math.pi * turn
    return 1.3 * radius.sqrt()[:, None] * torch.stack([angle.cos(), angle.sin()], 1)


# ---- sampling with the exact velocity of eight Gaussians

T_END = 1e-3  # at t = 0 the exact velocity is 0 / 0
# With the model evaluations of a step.
SAMPLERS: dict[str, tuple[Callable[..., Tensor], int]] = {
    "Euler": (euler, 1), "Heun": (heun, 2), "RK4": (rk4, 4), "SDE": (euler_maruyama, 1),
}  # fmt: skip
DATA = eight_gaussians()
CLASSES = [GaussianMixture(DATA.means[rows], DATA.std) for rows in ([0, 1, 7], [2, 3, 4, 5, 6])] + [DATA]
NULL = 2  # the last of `CLASSES`: all eight


def exact_velocity(x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
    """E[eps - x0 | x_t = x, y] (B, 2) of eight Gaussians on the linear path; class 0 is the three on the right,
    1 the other five, and `NULL`, or no y, all eight.
    """
    if y is None:
        return LINEAR.convert(DATA.posterior_mean(x, 1 - t, t), x, t, "x0", "v")
    of_class = torch.stack([c.posterior_mean(x, 1 - t, t) for c in CLASSES])  # (3, B, 2)
    return LINEAR.convert(of_class[y, torch.arange(len(x))], x, t, "x0", "v")


# ---- inside a model


def level_names(levels: Sequence[float]) -> list[str]:
    return ["clean" if level == math.inf else f"{level:g}" for level in levels]


def block_maps(arms: Mapping[str, Any], levels: Sequence[float], label: str, **how: Any) -> Figure:
    """`heatmaps` (levels, blocks) of one measure: a panel for each arm, and the difference of two arms."""
    figure = heatmaps(arms, rows=level_names(levels), ylabel="log-SNR", difference=True, **{"fmt": ".3g", **how})
    figure.suptitle(label, fontsize=11)
    return figure


class BlockViews:
    """Attention, gates and features of each block of a DiT, at several times.

    inputs: t -> noisy images x (B, C, H, W) at that time. y: their classes (B,).
    Attributes, each t -> tensor: attention (depth, B, heads, N, N); gates (depth, 2), the RMS of the gates of attention
    and of the MLP; features (depth, B, N, D), the output of each block.
    """

    def __init__(self, model: DiT, inputs: Mapping[float, Tensor], y: Tensor) -> None:
        self.inputs = inputs
        seen = {t: _look_inside(model, x, torch.full((len(y),), t), y) for t, x in inputs.items()}
        self.attention, self.gates, self.features = ({t: one[k] for t, one in seen.items()} for k in range(3))


@torch.no_grad()
def _look_inside(model: DiT, x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    qkv: list[Tensor] = []
    blocks: list[Any] = list(model.blocks)
    hooks = [block.attn.qkv.register_forward_hook(lambda _m, _a, out: qkv.append(out)) for block in blocks]
    _, after = model(x, t, y, taps=range(len(blocks)))
    for hook in hooks:
        hook.remove()
    q, k, _ = torch.stack(qkv).unflatten(-1, (3, model.num_heads, -1)).permute(3, 0, 1, 4, 2, 5)
    c = model.condition(t, y, None)
    gates = torch.stack([block.adaLN_modulation(c).unflatten(1, (6, -1))[:, 2::3] for block in blocks])
    return F.softmax(q @ k.mT / q.shape[-1] ** 0.5, dim=-1), gates.square().mean((1, 3)).sqrt(), torch.stack(after)


class TapViews:
    """Features z (B, ...) of one batch at each module that could be tapped, their RMS, and |z_i - z_j|^2 / dim, i < j.

    `call()` runs the model in training mode on the batch. It is called once for all paths.
    """

    TAUS = np.geomspace(1e-3, 1e2, 61)

    def __init__(self, model: nn.Module, call: Callable[[], Any], paths: Sequence[str]) -> None:
        reg = Dispersive(model, paths, weight=0.0)
        with reg:
            call()
        self.z = {path: z.detach() for path, z in zip(reg.paths, reg.captured, strict=True)}
        reg.remove()
        self.distances = {path: pairwise_distances(z) for path, z in self.z.items()}
        self.rms = {path: float(z.double().square().mean().sqrt()) for path, z in self.z.items()}

    def frame(self, path: str, tau: float = 0.5) -> Figure:
        """RMS at every tap, the distances of pairs at this tap with tau, and the pull for every tau."""
        figure, (sizes, pairs, pulls) = plt.subplots(1, 3, figsize=(12.4, 3.7), layout="constrained")
        sizes.barh(list(self.z), list(self.rms.values()), color=[RED if one == path else GREY for one in self.z])
        for i, (one, z) in enumerate(self.z.items()):
            beside = {"xytext": (4, 0), "textcoords": "offset points", "va": "center"}
            sizes.annotate(f"{self.rms[one]:.2g}  {tuple(z.shape)}", (0, i), **beside)
        sizes.set(title="RMS and shape of z", ylim=(len(self.z) - 0.5, -0.5))
        pairs.hist(np.clip(self.distances[path], 1e-3, 1e2), bins=self.TAUS[::2].tolist(), color=BLUE)
        pairs.axvline(tau, color=RED, linestyle="--", label=f"tau = {tau:g}")
        pairs.set(xscale="log", xlim=(1e-3, 1e2), yticks=[], xlabel="squared distance / dim", title=f"pairs at {path}")
        pairs.legend()
        for one, z in self.z.items():
            chosen = {"color": RED, "linewidth": 2.5, "zorder": 3} if one == path else {"color": GREY, "linewidth": 1}
            pulls.plot(self.TAUS, [pull_of(self.distances[one], len(z), x) for x in self.TAUS], **chosen)
        pulls.plot(tau, pull_of(self.distances[path], len(self.z[path]), tau), "D", color=RED, markersize=9)
        pulls.set(xscale="log", xlim=(1e-3, 1e2), ylim=(0, 5), xlabel="tau", title="pull of the l2 form")
        return figure


def pull_of(distances: Any, B: int, tau: float) -> float:
    """-sum_i <z_i, dL/dz_i> = (2 / tau) sum_ij p_ij D_ij of the l2 form, with the diagonal: how fast the loss
    falls when all features grow by one factor. It is near zero where all pairs are much nearer or farther than tau.

    distances: |z_i - z_j|^2 / dim of the pairs i < j of B rows.
    """
    kernel = np.exp(-distances / tau)
    return float(2 / tau * 2 * (kernel * distances).sum() / (B + 2 * kernel.sum()))


def regime_map(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Ratios to base without guidance, of rows as `all_verdicts` gives them, against the epochs of the base.

    Left held-out losses, right Frechet distances. Points with equal epochs are drawn beside each other. Dotted lines
    separate the states of the base in these studies: its held-out loss falls, has almost stopped falling, or rises.
    """
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    looks = {"paper": (RED, "o"), "small": (BLUE, "s"), "placebo": (GREY, "^")}
    states = {4: "still learning", 190: "converged", 900: "over-fitted"}
    for axis, measure in zip(axes, ("held_out", "frechet"), strict=True):
        found = [row for row in rows if row["measure"] == measure and row["arm"] in looks and "against" not in row]
        found.sort(key=lambda row: row["epochs"])
        for arm, (color, marker) in looks.items():
            own = [(row["epochs"] * 1.06 ** (k % 9 - 4), row) for k, row in enumerate(found) if row["arm"] == arm]
            low, mid, high = (np.exp([row[end] for _, row in own]) for end in ("low", "mean", "high"))
            how = {"color": color, "marker": marker, "label": arm, "ls": "", "capsize": 2}
            axis.errorbar([at for at, _ in own], mid, (mid - low, high - mid), **how)
        axis.plot([0.15, 2000], [1, 1], color="black", lw=0.8)  # all three states are shown
        for at, word in states.items():
            axis.text(at, 1.01, word, transform=axis.get_xaxis_transform(), ha="center", fontsize="x-small")
        for edge in (100, 400):
            axis.axvline(edge, color="black", ls=":", lw=0.8)
        axis.set(xscale="log", xlabel="epochs of the base (log axis)", ylabel=f"{MEASURES[measure]}, ratio to base")
        axis.set_xticks([1, 10, 100, 1000], ["1", "10", "100", "1,000"])
    axes[1].set(yscale="log", yticks=[1, 2, 4], yticklabels=["1", "2", "4"])
    axes[1].minorticks_off()
    figure.legend(*axes[1].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return figure


def show_source(f: Callable[..., Any]) -> None:
    """Display the source code of a function or method, with syntax highlighting."""
    from IPython.display import Code, display

    display(Code(textwrap.dedent(inspect.getsource(f)).rstrip(), language="python"))
