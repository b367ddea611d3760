import matplotlib.pyplot as plt
import pytest

from dispersive_kit.views.training_plots import held_out_curves, loss_curve


@pytest.fixture(autouse=True)
def no_figure_is_left_open():
    yield
    plt.close("all")


def test_a_loss_is_drawn_with_its_goal():
    axis = loss_curve([1.0, 0.5, 0.09], goal=0.1, label="loss").axes[0]
    curve, goal = axis.lines
    assert list(curve.get_ydata()) == [1.0, 0.5, 0.09] and set(goal.get_ydata()) == {0.1}
    assert loss_curve([1.0], goal=0.1, label="loss").axes[0].get_yscale() == "log"


def test_held_out_losses_are_drawn_for_each_arm_and_part_of_t():
    line = {"step": 10, "held_out": 0.5, **{f"held_out_t{i}": 0.1 * (i + 1) for i in range(4)}}
    figure = held_out_curves({"base": [{"step": 5, "loss": 1.0}, line], "paper": [line, {**line, "step": 20}]})
    assert [len(axis.lines) for axis in figure.axes] == [2] * 5
    assert list(figure.axes[2].lines[1].get_ydata()) == [0.2, 0.2]
