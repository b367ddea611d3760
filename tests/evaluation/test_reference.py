"""Images drawn from a set: in random order, the same each time, and named as the part they are."""

import torch

from dispersive_kit.data import load_images
from dispersive_kit.evaluation import draw_images
from dispersive_kit.evaluation.record import describe_set

DIGITS = load_images("digits", "test")


def test_a_part_is_drawn_from_all_classes_of_a_sorted_set_and_the_same_each_time():
    ordered = DIGITS.subset(DIGITS.labels.argsort())
    drawn, again = (draw_images(ordered, 100) for _ in range(2))
    assert torch.equal(drawn.images, again.images) and len(drawn.labels.unique()) == 10
    assert len(drawn.images.flatten(1).unique(dim=0)) == 100
    assert not torch.equal(draw_images(ordered, 100, seed=1).images, drawn.images)


def test_the_record_tells_a_part_from_the_whole():
    assert describe_set(draw_images(DIGITS, 100))["drawn_from"] == 500
    whole = draw_images(DIGITS, 10**6)
    assert len(whole) == 500 and "drawn_from" not in describe_set(whole)
    assert torch.equal(whole.labels.sort().values, DIGITS.labels.sort().values)
