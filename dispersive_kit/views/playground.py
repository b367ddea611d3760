"""The loss on points of the plane that one can move: where each is pushed, what the loss is, how far its floor.

`playground(**state)` draws a state and nothing else; `Playground` puts sliders around it, and the lecture console
draws the same picture in the browser, where points can be dragged.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import ipywidgets
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dispersive_kit.regularizers import dispersive_loss, floor
from dispersive_kit.regularizers.losses import LossOptions
from dispersive_kit.views.figures import BLUE, RED
from dispersive_kit.views.lessons import cloud
from dispersive_kit.views.svg import GREY, SIZE, Panel, picture, text
from dispersive_kit.views.widgets import control, display_box

CLOUD_EXTENT = 7.8  # half side of its picture: the largest scale, and its arrows
ARROW = 1.3  # length of an arrow for a gradient of 1 or more; none below 1e-3, logarithmic between
# What the playground offers: name -> (options of the loss, y axis)
VARIANTS: dict[str, tuple[dict[str, Any], tuple[float, float]]] = {
    "l2": ({"kind": "infonce_l2"}, (-5.0, 0.6)),
    "l2, no diagonal": ({"kind": "infonce_l2", "diagonal": False}, (-5.0, 0.6)),
    "cosine": ({"kind": "infonce_cosine"}, (-1.2, 4.3)),
    "hinge": ({"kind": "hinge"}, (-0.15, 4.2)),
    "covariance": ({"kind": "covariance"}, (0.4, 1.05)),
}
GRID = np.geomspace(0.1, 6.0, 15)  # scales of the curve beside the cloud
TAUS = (0.25, 0.5, 1.0, 2.0)
BATCHES = (2, 4, 8, 16, 32)
SCALES = (0.1, 0.25, 0.5, 1.0, 2.0, 3.0, 5.0)
REACH, STEP = 1.5, 0.05  # of the sliders that move a point at scale 1
PLANE = Panel((20, 44, 420, 420), (-CLOUD_EXTENT, CLOUD_EXTENT), (-CLOUD_EXTENT, CLOUD_EXTENT))
CURVE_BOX, GAUGE_BOX = (560, 44, 400, 340), (1030, 44, 50, 340)
Moved = Mapping[int, Sequence[float]]  # point -> its place at scale 1


def arrows(gradient: Tensor) -> NDArray[np.float64]:
    """Downhill arrows (B, 2), log in length: ARROW for B |g| >= 1, none for B |g| <= 1e-3."""
    norm = gradient.norm(dim=1, keepdim=True).clamp(min=1e-300)
    length = (1 + (len(gradient) * norm).log10() / 3).clamp(0, 1)
    return (-gradient / norm * length * ARROW).numpy()


def points(B: int, moved: Moved) -> Tensor:
    """The cloud (B, 2) at scale 1, in whole steps of the sliders, and some of its points moved."""
    z = STEP * (cloud(B) / STEP).round()
    for i, place in moved.items():
        if i < B:
            z[i] = torch.tensor(place, dtype=z.dtype)
    return z


def loss_of(z: Tensor, variant: str, tau: float) -> Tensor:
    """The loss of points (B, 2) as the playground offers it."""
    options = dict(VARIANTS[variant][0])
    if options["kind"] != "covariance":  # which has no scale
        options["tau"] = tau
    return dispersive_loss(z, **options)


def floor_of(variant: str, tau: float, B: int) -> float:
    options = VARIANTS[variant][0]
    scale = None if options["kind"] == "covariance" else tau
    return floor(options["kind"], B, scale, dim=2, diagonal=options.get("diagonal"))


def playground(
    variant: str = "l2", tau: float = 0.5, B: int = 16, s: float = 1.0, moved: Moved | None = None, chosen: int = 0
) -> str:
    """Left: B points at scale s, and arrows downhill of the loss. Middle: the loss of this cloud at every scale, with
    its floor. Right: how far the loss is on its way from equal points to the floor.
    """
    z = points(B, moved or {})
    leaf = (s * z).requires_grad_()
    differentiable = loss_of(leaf, variant, tau)
    (gradient,) = torch.autograd.grad(differentiable, leaf)
    loss = differentiable.item()
    with torch.no_grad():
        curve = [float(loss_of(float(k) * z, variant, tau)) for k in GRID]
    low = floor_of(variant, tau, B)
    size = B * float(gradient.square().sum(1).mean().sqrt())
    words = f"{B} points at scale {s:g}, {variant}, tau = {tau:g}: loss {loss:.3f}, " + (
        f"{loss - low:.3f} above its floor {low:.3f}" if low > -np.inf else "which has no floor"
    )
    return picture(
        _plane(leaf.detach(), gradient, chosen),
        _curve(curve, loss, low, variant, s),
        _gauge(loss, low, size, variant),
        alt=f"{words}. Arrows show where each point is pushed; B times the size of the gradient is {size:.2g}.",
    )


def _plane(z: Tensor, gradient: Tensor, chosen: int) -> str:
    tips = z.numpy() + arrows(gradient)
    sticks = "".join(
        PLANE.line([tail, tip], RED, 3) for tail, tip in zip(z.numpy(), tips, strict=True) if not np.allclose(tail, tip)
    )
    x, y = PLANE.pixels(z[chosen : chosen + 1])[0]
    ring = f'<circle cx="{x:.0f}" cy="{y:.0f}" r="12" fill="none" stroke="{RED}" stroke-width="3"/>'
    dots = PLANE.dots(z, BLUE, 11, 1) + PLANE.dots(tips, RED, 7, 1)
    return PLANE.frame("pushed downhill") + sticks + dots + ring


def _curve(curve: Sequence[float], loss: float, low: float, variant: str, s: float) -> str:
    """The axis is log10 of the scale, written as scales."""
    limits = VARIANTS[variant][1]
    log = np.log10(GRID)
    panel = Panel(CURVE_BOX, (log[0], log[-1]), limits)
    parts = [panel.frame("loss at every scale"), panel.line(np.stack([log, curve], 1), BLUE)]
    if low > limits[0]:
        parts.append(panel.line([(log[0], low), (log[-1], low)], "black", 2, "8 6"))
    at = panel.pixels([(np.log10(s), loss)])[0]
    parts.append(f'<circle cx="{at[0]:.0f}" cy="{at[1]:.0f}" r="9" fill="{RED}"/>')
    for k in (0.1, 0.5, 1, 5):
        x, y = panel.pixels([(np.log10(k), limits[0])])[0]
        parts.append(text(x, y + 26, f"{k:g}", anchor="middle", color=GREY))
    for value in limits:
        x, y = panel.pixels([(log[0], value)])[0]
        parts.append(text(x - 8, y + SIZE / 3, f"{value:g}", anchor="end", color=GREY))
    return "".join(parts) + text(760, 446, "scale s", anchor="middle", color=GREY)


def _gauge(loss: float, low: float, size: float, variant: str) -> str:
    """A thermometer on the axis of the curve, filled from the loss down to the floor."""
    panel = Panel(GAUGE_BOX, (0, 1), VARIANTS[variant][1])
    (left, top), (right, bottom) = panel.pixels([(0, loss), (1, low if low > -np.inf else panel.ylim[0])])
    fill = f'<rect x="{left:.0f}" y="{top:.0f}" width="{right - left:.0f}" height="{max(0, bottom - top):.0f}" '
    name = f"floor {low:.2f}" if low > -np.inf else "no floor"
    return (
        panel.frame("to the floor")
        + f'{fill}fill="{BLUE}" opacity="0.5"/>'
        + text(right + 10, min(max(top, 60), bottom - 4), f"{loss:.2f}", color=RED)
        + text(1055, 418, name, anchor="middle")
        + text(1055, 452, f"B|g| = {size:.2g}", anchor="middle", color=RED)
    )


class Playground:
    """Menus and sliders for every argument of `playground`; x and y move the chosen point, at scale 1."""

    def __init__(self, **start: Any) -> None:
        choices = {"variant": tuple(VARIANTS), "tau": TAUS, "B": BATCHES, "s": SCALES}
        self.controls = {name: control(name, values, start.get(name)) for name, values in choices.items()}
        self.point = ipywidgets.IntSlider(description="point", max=self.controls["B"].value - 1)
        self.x, self.y = (
            ipywidgets.FloatSlider(description=name, min=-REACH, max=REACH, step=STEP, readout_format=".2f")
            for name in "xy"
        )
        self.moved: dict[int, tuple[float, float]] = {}
        self.picture = ipywidgets.HTML(layout={"width": "100%"})
        self._choosing = False
        for one in (*self.controls.values(), self.point):
            one.observe(self.choose, names="value")
        for one in (self.x, self.y):
            one.observe(self.move, names="value")
        self.choose()
        rows = [ipywidgets.HBox(list(self.controls.values())), ipywidgets.HBox([self.point, self.x, self.y])]
        self.box = ipywidgets.VBox([*rows, self.picture])

    @property
    def state(self) -> dict[str, Any]:
        chosen = {name: one.value for name, one in self.controls.items()}
        return {**chosen, "moved": dict(self.moved), "chosen": self.point.value}

    def choose(self, _change: Any = None) -> None:
        """Another point or setting: the sliders of the place follow, and move nothing."""
        self.point.max = self.controls["B"].value - 1
        place = points(self.controls["B"].value, self.moved)[self.point.value]
        self._choosing = True
        self.x.value, self.y.value = place.tolist()
        self._choosing = False
        self.picture.value = playground(**self.state)

    def move(self, _change: Any = None) -> None:
        if not self._choosing:
            self.moved[self.point.value] = (self.x.value, self.y.value)
            self.picture.value = playground(**self.state)


def open_playground(**start: Any) -> Playground:
    """Display the playground, begun at `start` (variant, tau, B, s), and return it."""
    opened = Playground(**start)
    display_box(opened.box)
    return opened


def for_the_browser() -> dict[str, Any]:
    """What the lecture console needs to draw the same in the browser."""
    return {
        "clouds": {B: points(B, {}).tolist() for B in BATCHES},
        "variants": {
            name: {"kind": options["kind"], "diagonal": LossOptions(**options).with_diagonal, "limits": limits}
            for name, (options, limits) in VARIANTS.items()
        },
        "floors": {
            f"{v},{tau:g},{B}": low if (low := floor_of(v, tau, B)) > -np.inf else None
            for v in VARIANTS
            for tau in TAUS
            for B in BATCHES
        },
        "controls": {"variant": list(VARIANTS), "tau": TAUS, "B": BATCHES, "s": SCALES},
        "start": {"variant": "l2", "tau": 0.5, "B": 16, "s": 1.0},
        "extent": CLOUD_EXTENT,
        "arrow": ARROW,
        "grid": GRID.tolist(),
        "plane": PLANE.box,
        "curve": CURVE_BOX,
        "gauge": GAUGE_BOX,
    }
