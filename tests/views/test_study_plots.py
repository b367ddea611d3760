import matplotlib.pyplot as plt
import pytest

from dispersive_kit.views.study_plots import slope_graph


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
        "summary": [{"condition": "one", "arm": arm} for arm in values],
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


def test_an_arm_without_a_registered_contrast_has_no_interval(results):
    figure = slope_graph({**results, "verdicts": []})
    assert not figure.axes[1].containers
    plt.close(figure)
