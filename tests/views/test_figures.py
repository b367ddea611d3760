"""The generic figures: what is given is drawn, arms look the same in all panels, and nothing covers anything."""

import itertools
import math
import re

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from dispersive_kit.views import figures
from dispersive_kit.views.figures import LOOKS, OKABE_ITO, slope_graph
from dispersive_kit.views.lessons import block_maps

WORDS = tuple(LOOKS)


@pytest.fixture(autouse=True)
def no_figure_is_left_open():
    yield
    plt.close("all")


def overlapping(texts):
    boxes = [text.get_window_extent() for text in texts]
    return [1 for a, b in itertools.combinations(boxes, 2) if a.overlaps(b)]


def test_a_figure_on_the_page_carries_its_alternative_text_inside():
    figure = figures.curves({"y": {"a": ([0, 1], [0, 1])}})
    page = figures.figure_html(figure, alt='two "lines" <cross>', caption="a & b")
    assert re.search(r'<img [^>]*alt="two &quot;lines&quot; &lt;cross&gt;"', page)
    assert page.startswith("<figure") and "a &amp; b" in page and "data:image/png;base64," in page


def test_an_arm_has_one_colour_in_all_panels_its_null_too_and_a_number_is_a_dotted_level():
    line = ([1, 2, 3], [1.0, 4.0, 9.0])
    panels = {"one": {"base": line, "real": 0.5}, "two": {"paper": line, "base": line}}
    figure = figures.curves(panels, nulls={"two": {"paper": line}}, each={"two": {"yscale": "log"}}, xlim=(0, 4))
    one, two = figure.axes
    assert [line.get_color() for line in one.lines] == [OKABE_ITO[0], "black"]
    assert [line.get_color() for line in two.lines] == [OKABE_ITO[1], OKABE_ITO[0], OKABE_ITO[1]]
    assert list(one.lines[0].get_ydata()) == [1, 4, 9] and set(one.lines[1].get_ydata()) == {0.5}
    assert (one.get_ylabel(), one.get_yscale(), two.get_yscale(), two.get_xlim()) == ("one", "linear", "log", (0, 4))
    names = [text.get_text() for text in figure.legends[0].texts]
    assert names == ["base", "real", "paper", "paper, Gaussian"]


def test_the_legend_lies_on_no_panel():
    lines = {f"a long name {k}": ([0, 1], [0, k]) for k in range(4)}
    for panels in ({"y": lines}, {f"y {i}": lines for i in range(4)}):
        figure = figures.curves(panels, columns=min(len(panels), 2))
        figure.canvas.draw()
        (legend,) = figure.legends
        assert not any(axis.get_legend() or legend.get_window_extent().overlaps(axis.bbox) for axis in figure.axes)


def test_what_was_logged_is_drawn_and_lines_without_the_key_are_passed_over():
    lines = [{"step": s, "gap": 3 / s, "feature_rms": 1.0, "gradient_ratio": 0.1 / s} for s in (1, 10)]
    metrics = {"base": lines, "paper": [{**lines[0], "gap": 0.0}, {"step": 25, "held_out": 0.5}]}
    assert figures.logged(metrics, "gap") == {"base": ((1, 10), (3, 0.3)), "paper": ((1,), (0.0,))}
    assert figures.logged(metrics, "held_out") == {"paper": ((25,), (0.5,))}
    figure = figures.saturation(metrics)
    figure.canvas.draw()
    assert [len(axis.lines) for axis in figure.axes] == [2, 2, 2]


def test_tables_share_one_scale_of_colours_and_every_number_stands_in_its_field():
    figure = block_maps({"base": torch.zeros(2, 3), "loss": torch.ones(2, 3)}, (math.inf, -2), "x")
    figure.canvas.draw()
    assert [axis.get_title() for axis in figure.axes] == ["base", "loss", "loss − base"]
    assert [axis.collections[0].get_clim() for axis in figure.axes] == [(0, 1), (0, 1), (-1, 1)]
    ticks = figure.axes[0].get_yticklabels(), figure.axes[0].get_xticklabels()
    assert [[tick.get_text() for tick in side] for side in ticks] == [["clean", "-2"], ["1", "2", "3"]]
    table = np.array([[2.0, 3.0], [40.0, 5.0]])
    figure = figures.heatmaps({"base": table}, fmt=".1f", limits=(1.5, 40), log=True)
    assert [t.get_text() for t in figure.axes[0].texts] == ["2.0", "3.0", "40.0", "5.0"]
    assert figure.axes[0].collections[0].get_clim() == (1.5, 40)
    figure = figures.heatmaps({"x": table, "y": table}, fmt="")  # a bar tells the colours
    assert len(figure.axes) == 3 and not figure.axes[0].texts


def test_a_grid_shows_each_image_as_it_is_and_all_maps_on_one_scale():
    digits = torch.randint(256, (5, 1, 8, 8), dtype=torch.uint8)
    photos, maps = torch.randint(256, (5, 3, 8, 8), dtype=torch.uint8), torch.randn(5, 4, 4)
    figure = figures.image_grid({"a": digits, "b": photos, "c": maps}, columns=3, titles=["x", "y", "z"])
    shown = [axis.images[0] for axis in figure.axes]
    assert len(shown) == 9
    np.testing.assert_array_equal(shown[2].get_array(), digits[2, 0])
    np.testing.assert_array_equal(shown[3].get_array(), photos[0].permute(1, 2, 0))
    assert {image.get_clim() for image in shown[6:]} == {(-3, 3)}
    assert [axis.get_title() for axis in figure.axes[:4]] == ["x", "y", "z", ""]


def test_panels_of_points_share_their_axes_and_classes_have_colour_and_numeral():
    x = torch.randn(30, 2)
    near, far = figures.scatter({"near": x, "far": 100 * x}, extent=2).axes
    assert near.get_xlim() == far.get_xlim() == (-2, 2) and list(near.lines[0].get_xdata()) == x[:, 0].tolist()
    figure = figures.scatter({"a": x}, labels=torch.arange(30) % 3, notes={"a": "trust 0.9"}, extent=None)
    (axis,) = figure.axes
    assert [t.get_text() for t in axis.texts] == ["0", "1", "2"] and axis.get_xlabel() == "trust 0.9"
    assert len({tuple(c.get_facecolor()[0]) for c in axis.collections}) == 3


def test_distances_are_the_definition_and_size_alone_moves_only_the_raw_ones():
    z = torch.randn(5, 2, 3, dtype=torch.float64)
    i, j = np.triu_indices(5, 1)
    assert np.allclose(figures.pairwise_distances(z), ((z[i] - z[j]) ** 2).flatten(1).mean(1))
    raw, scaled = (figures.pairwise_histogram({"z": z, "8 z": 8 * z}).axes[k].lines for k in (1, 3))
    assert not np.allclose(raw[0].get_xdata()[1:], raw[1].get_xdata()[1:])
    assert np.allclose(scaled[0].get_xdata()[1:], scaled[1].get_xdata()[1:])
    figure = figures.distribution({"a": torch.randn(50), "b": np.arange(50.0)}, "kde", xlim=(-3, 3))
    assert [text.get_text() for text in figure.legends[0].texts] == ["a", "b"]


def test_a_forest_has_a_panel_a_metric_with_its_level_and_draws_an_interval_that_misses_its_value():
    rows = {"base": (3.0, 4.0, 5.0), "paper": (41.0, 40.0, 50.0)}
    levels = {"FD": 2.0, "KID": 3.0}
    figure = figures.forest(dict.fromkeys(levels, rows), levels=levels, fmt=".1f", columns=2, xscale="log")
    figure.canvas.draw()
    assert [axis.get_xlabel() for axis in figure.axes] == ["FD", "KID"]
    for axis, level in zip(figure.axes, levels.values(), strict=True):
        assert level in [line.get_xdata()[0] for line in axis.lines]
    assert {"base", "paper", "4.0", "40.0"} <= {text.get_text() for text in figure.findobj(plt.Text)}


def study(means, seeds, words):
    """Runs and verdicts of arms by their values; without a value every run crashed."""
    of = {arm: {"frechet": mean} if mean else {} for arm, mean in means.items()}
    runs = [{"arm": arm, "condition": "one", "seed": seed, "values": of[arm]} for seed in range(seeds) for arm in means]
    summary = [
        {"condition": "one", "arm": arm, "values": {"frechet": {"mean": mean}} if mean else {}}
        for arm, mean in means.items()
    ]
    verdict = {"condition": "one", "measure": "frechet", "margin": 0.1, "low": 0.8, "mean": 1.0, "high": 1.2}
    verdicts = [{**verdict, "arm": arm, "word": words[k % len(words)]} for k, arm in enumerate(means) if arm != "base"]
    return {"reference": "base", "runs": runs, "summary": summary, "record": {}, "verdicts": verdicts}


def test_a_line_a_seed_and_the_interval_of_the_ratio_with_its_word():
    results = study({"base": 4.0, "paper": 12.0}, 5, ["worse"])
    above, below = slope_graph(results).axes
    assert [list(line.get_ydata()) for line in above.lines] == [[4.0, 12.0]] * 5
    assert [label.get_text() for label in below.texts] == ["worse"]
    assert below.containers[0].lines[0].get_xdata()[0] == pytest.approx(math.e)
    assert (above.get_ylabel(), above.get_title()) == ("Fréchet distance", "")  # no name of a measure or a condition
    (alone,) = slope_graph({**results, "verdicts": [], "record": {"floor_value": 2.8}}).axes  # no contrast registered
    assert len(alone.lines) == 6 and not alone.containers


def test_an_arm_that_is_held_against_two_others_has_a_ratio_and_a_line_for_each():
    results = study({"base": 4.0, "placebo": 8.0, "paper": 12.0}, 5, ["worse"])
    second = {**results["verdicts"][1], "against": "placebo", "mean": 0.5}
    results["verdicts"].append(second)
    below = slope_graph(results).axes[1]
    assert [label.get_text() for label in below.get_yticklabels()] == ["placebo", "paper", "paper / placebo"]
    assert below.containers[2].lines[0].get_xdata()[0] == pytest.approx(math.exp(0.5))


def test_thirteen_arms_stand_in_the_order_of_their_values_and_no_two_names_overlap():
    """Reference first; an arm whose runs all crashed, last."""
    means = {f"a long name {k}": float((k * 5) % 13 + 1) for k in range(11)} | {"base": 4.0, "crashed": None}
    figure = slope_graph(study(means, 9, WORDS))
    above, below = figure.axes
    figure.canvas.draw()
    names = [label.get_text() for label in above.get_xticklabels()]
    assert names[0] == "base" and names[-1] == "crashed"
    assert [means[name] for name in names[1:-1]] == sorted(v for name, v in means.items() if v and name != "base")
    assert [label.get_text() for label in below.get_yticklabels()] == names[1:]
    assert len(below.texts) == 12 and not overlapping(below.get_yticklabels()) and not overlapping(below.texts)
    step = np.diff([label.get_window_extent().x1 for label in above.get_xticklabels()])
    assert (step > above.get_xticklabels()[0].get_fontsize()).all()  # slanted lines of text, a line apart
    assert max(word.get_window_extent().x1 for word in below.texts) <= figure.get_window_extent().x1
