"""The blind quiz: blind until the end, and honest then."""

import pytest
import torch

from dispersive_kit.errors import ConfigError
from dispersive_kit.views.quiz import EACH, NEITHER, Quiz, blind_quiz

# Every image of an arm is of one brightness, which says where it stands.
SAMPLES = {"bright": torch.full((10 * EACH, 1, 8, 8), 250, dtype=torch.uint8),
           "dark": torch.full((10 * EACH, 1, 8, 8), 5, dtype=torch.uint8)}  # fmt: skip


def answer_all(quiz: Quiz, arm: str) -> None:
    """As one who recognises an arm."""
    for left, _ in list(quiz.sides):
        quiz.buttons["left" if left == arm else "right"].click()


def test_picks_are_counted_for_the_arm_whatever_its_side() -> None:
    quiz = blind_quiz(SAMPLES, seed=1)
    assert {left for left, _ in quiz.sides} == {"bright", "dark"}
    answer_all(quiz, "dark")
    assert quiz.tally() == {"bright": 0, "dark": 10, NEITHER: 0}
    assert "probability 0.00" in quiz.text.value


def test_the_picture_shows_the_arms_on_the_sides_they_are_counted_for() -> None:
    quiz = Quiz(SAMPLES, question="Which?", seed=1)
    swapped = Quiz({"dark": SAMPLES["dark"], "bright": SAMPLES["bright"]}, question="Which?", seed=1)
    for k, (one, other) in enumerate(zip(quiz.sides, swapped.sides, strict=True)):
        assert one == other[::-1]
        assert quiz.frame(k) != swapped.frame(k)
    same_side = [k for k, sides in enumerate(quiz.sides) if sides == quiz.sides[0]]
    assert len({quiz.frame(k) for k in same_side}) == 1


def test_nothing_names_the_arms_before_the_last_answer() -> None:
    quiz = Quiz(SAMPLES, question="Which?")
    for _ in range(quiz.rounds):
        page = quiz.text.value + quiz.picture.value + "".join(b.description for b in quiz.buttons.values())
        assert not any(name in page for name in SAMPLES)
        quiz.answer(NEITHER)
    assert all(name in quiz.text.value for name in SAMPLES)
    assert "probability 1.00" in quiz.text.value


def test_after_the_last_round_nothing_more_is_counted() -> None:
    quiz = Quiz(SAMPLES, question="Which?")
    answer_all(quiz, "bright")
    quiz.answer("left")
    assert len(quiz.votes) == quiz.rounds == 10
    assert all(button.disabled for button in quiz.buttons.values())


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ({"a": SAMPLES["dark"]}, "two arms"),
        ({"a": SAMPLES["dark"], "b": SAMPLES["dark"][:12]}, "two arms"),
        ({name: images[: EACH - 1] for name, images in SAMPLES.items()}, f"{EACH} images"),
    ],
)
def test_what_cannot_be_compared_is_refused(samples: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        blind_quiz(samples)
