import itertools

import matplotlib.pyplot as plt
import numpy as np
import pytest

from dispersive_kit.views.study_plots import WORDS, one_word, sign_flips, slope_graph, verdict_forest


@pytest.fixture
def results():
    values = {"base": 4.0, "paper": 12.0}
    runs = [
        {"arm": arm, "condition": "one", "seed": seed, "values": {"frechet": value + seed} if seed < 5 else {}}
        for seed in range(6)
        for arm, value in values.items()
    ]
    verdict = {"arm": "paper", "condition": "one", "measure": "frechet", "word": "worse", "margin": 0.1}
    return {
        "reference": "base",
        "runs": runs,
        "summary": [{"condition": "one", "arm": arm, "values": {"frechet": {"mean": v}}} for arm, v in values.items()],
        "record": {"floor_value": 2.8},
        "verdicts": [{**verdict, "low": 0.8, "mean": 1.0, "high": 1.2}],
    }


def test_a_line_a_seed_and_the_interval_of_the_ratio_with_its_word(results):
    figure = slope_graph(results)
    above, below = figure.axes
    lines = [line for line in above.lines if len(line.get_xdata()) == 2 and line.get_marker() != "None"]
    assert [list(line.get_ydata()) for line in lines[:2]] == [[4.0, 12.0], [5.0, 13.0]] and len(lines) == 6
    assert [label.get_text() for label in below.texts] == ["worse"]
    assert below.containers[0].lines[0].get_xdata()[0] == pytest.approx(2.71828, abs=1e-5)
    plt.close(figure)


def test_a_measure_without_a_registered_contrast_has_lines_and_no_interval(results):
    figure = slope_graph({**results, "verdicts": []})
    (above,) = figure.axes
    assert len(above.lines) >= 6 and not above.containers
    plt.close(figure)


def test_thirteen_arms_stand_in_the_order_of_their_values_and_no_two_names_overlap():
    """Reference first; an arm whose runs all crashed, last."""
    means = {f"a long name {k}": float((k * 5) % 13 + 1) for k in range(11)} | {"base": 4.0}
    arms = [*means, "crashed"]
    runs = [
        {"arm": arm, "condition": "one", "seed": seed, "values": {"frechet": means[arm]} if arm in means else {}}
        for seed in range(9)
        for arm in arms
    ]
    summary = [
        {"condition": "one", "arm": arm, "values": {"frechet": {"mean": means[arm]}} if arm in means else {}}
        for arm in arms
    ]
    verdicts = [
        {"arm": arm, "condition": "one", "measure": "frechet", "word": WORDS[k % 4], "margin": 0.1,
         "low": -0.1, "mean": 0.0, "high": 0.1}
        for k, arm in enumerate(arms) if arm != "base"
    ]  # fmt: skip
    figure = slope_graph({"reference": "base", "runs": runs, "summary": summary, "record": {}, "verdicts": verdicts})
    above, below = figure.axes
    figure.canvas.draw()
    names = [label.get_text() for label in above.get_xticklabels()]
    assert names[0] == "base" and names[-1] == "crashed"
    assert [means[name] for name in names[1:-1]] == sorted(means[name] for name in means if name != "base")
    assert [label.get_text() for label in below.get_yticklabels()] == names[1:]
    assert_apart([*below.get_yticklabels()])
    assert_apart(below.texts)
    step = np.diff([label.get_window_extent().x1 for label in above.get_xticklabels()])
    assert (step > above.get_xticklabels()[0].get_fontsize()).all()  # slanted lines of text, a line apart
    right = figure.get_window_extent().x1
    assert max(word.get_window_extent().x1 for word in below.texts) <= right
    plt.close(figure)


def assert_apart(texts):
    boxes = [text.get_window_extent() for text in texts]
    assert len(boxes) == 12 and not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))


ROW = {"study": "1", "arm": "paper", "condition": "one", "measure": "frechet", "low": -0.1, "mean": 0.0, "high": 0.2}


def test_a_forest_names_the_condition_where_a_study_has_several():
    rows = [{**ROW, "word": "better"}, {**ROW, "study": "2", "word": "worse"}]
    rows.append({**ROW, "study": "2", "condition": "two", "word": "worse"})
    figure = verdict_forest(rows)
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels == ["1: paper, frechet", "2: paper, one, frechet", "2: paper, two, frechet"]
    plt.close(figure)


def test_forty_verdicts_fit_one_page_and_a_filter_keeps_axis_and_height():
    rows = [{**ROW, "study": str(k // 5), "arm": f"arm {k}", "word": WORDS[k % 4]} for k in range(40)]
    whole, some = verdict_forest(rows), verdict_forest(rows, show="worse")
    whole.canvas.draw()
    boxes = [label.get_window_extent() for label in whole.axes[0].get_yticklabels()]
    assert not any(a.overlaps(b) for a, b in itertools.pairwise(boxes)) and whole.get_figheight() < 14
    assert [text.get_text() for text in some.axes[0].texts] == ["worse"] * 10
    assert (some.axes[0].get_xlim(), some.get_figheight()) == (whole.axes[0].get_xlim(), whole.get_figheight())
    plt.close("all")


def test_every_choice_of_signs_is_a_tick_and_those_as_far_out_are_counted():
    figure = sign_flips([0.1, 0.2, 0.4], p=0.25)
    near, far, data = figure.axes[0].lines
    assert (len(near.get_xdata()), sorted(far.get_xdata())) == (6, pytest.approx([-0.7 / 3, 0.7 / 3]))
    assert data.get_xdata() == pytest.approx(0.7 / 3) and "8 choices" in figure.axes[0].get_xlabel()
    plt.close(figure)


@pytest.mark.parametrize("word", WORDS)
def test_one_word_shows_pairs_interval_and_margin_on_a_fixed_axis(word):
    verdict = {"mean": 0.1, "low": 0.0, "high": 0.2, "margin": 0.05, "p": 0.03, "p_equivalent": 0.9, "word": word}
    figure = one_word([0.0, 0.1, 0.2], verdict)
    axis = figure.axes[0]
    assert word in axis.get_title() and axis.get_xlim() == (-0.6, 0.6)
    assert axis.containers[0].lines[0].get_xdata()[0] == 0.1
    plt.close(figure)
