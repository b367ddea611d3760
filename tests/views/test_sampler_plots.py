from collections.abc import Iterator
from itertools import product

import matplotlib.pyplot as plt
import pytest
import torch
from matplotlib.figure import Figure

from dispersive_kit.views import sampler_plots as views
from dispersive_kit.views import style

STEPPER = list(product(views.SAMPLERS, (views.STEPS[0], views.STEPS[-1]), (views.PARTS[0], views.PARTS[-1])))
GUIDANCE = list(product((views.SCALES[0], views.SCALES[-1]), views.INTERVALS))


@pytest.fixture(autouse=True)
def clean_figures() -> Iterator[None]:
    plt.switch_backend("Agg")
    style()
    yield
    plt.close("all")


def limits(figure: Figure) -> list[tuple[tuple[float, float], tuple[float, float]]]:
    return [(axis.get_xlim(), axis.get_ylim()) for axis in figure.axes]


@pytest.mark.parametrize(("sampler", "num_steps", "part"), STEPPER)
def test_the_stepper_draws_and_keeps_its_axes_at_every_corner(sampler: str, num_steps: int, part: float) -> None:
    figure = views.stepper(sampler, num_steps, part)
    figure.canvas.draw()
    assert limits(figure) == limits(views.stepper())
    calls = part * num_steps * views.SAMPLERS[sampler][1]
    assert figure.axes[0].get_title().endswith(f"step {part * num_steps:.0f} of {num_steps}, {calls:.0f} evaluations")


@pytest.mark.parametrize(("cfg_scale", "interval"), GUIDANCE)
def test_guidance_frames_draw_and_hold_every_sample_at_every_corner(cfg_scale: float, interval: str) -> None:
    figure = views.guidance_frame(cfg_scale, interval)
    figure.canvas.draw()
    assert limits(figure) == limits(views.guidance_frame())
    right = figure.axes[1]
    assert max(bar.get_height() for bar in right.patches) <= right.get_ylim()[1]
    assert views.guided(cfg_scale, interval)[:, 0].min() >= 0 and views.guided(cfg_scale, interval)[:, 0].max() <= 2.6


def test_a_trajectory_begins_at_the_same_noise_and_ends_on_the_data() -> None:
    ways = [views.trajectory(name, 32) for name in views.SAMPLERS]
    assert all(len(way) == 33 and torch.equal(way[0], ways[0][0]) for way in ways)
    for way in ways:
        assert torch.cdist(way[-1], views.DATA.means.double()).amin(1).mean() < 0.25


def test_the_conditional_velocity_is_that_of_the_class_and_the_null_class_is_all() -> None:
    x, t = torch.randn(6, 2, dtype=torch.float64), torch.full((6,), 0.4, dtype=torch.float64)
    y = torch.tensor([0, 0, 1, 1, views.NULL, views.NULL])
    mixed = views.exact_velocity(x, t, y)
    for k in range(3):
        alone = views.exact_velocity(x, t, torch.full((6,), k))
        assert torch.allclose(mixed[y == k], alone[y == k])
    assert torch.allclose(mixed[4:], views.exact_velocity(x, t)[4:])


def test_prices_and_distances_are_drawn_one_line_an_arm_and_the_floor() -> None:
    arm = {"a": ([1, 2], [0.5, 0.1]), "b": ([4, 8], [0.2, 0.01])}
    left, right = views.price_of_a_step(arm, arm, 0.2).axes
    assert (len(left.lines), len(right.lines)) == (2, 3)
    assert len(views.distance_against_steps(arm, 0.2).axes[0].lines) == 3
