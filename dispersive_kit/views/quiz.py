"""A blind test: which of two arms drew the better images from the same noise, before one knows which is which.

    quiz = blind_quiz({"base": images, "paper": others}, question="Which digits look better?", seed=seed)

The arms change sides from round to round. Nothing on the page names them before the last answer.
"""

import html
from collections import Counter
from collections.abc import Mapping

import ipywidgets
import torch
from torch import Tensor

from dispersive_kit.errors import ConfigError
from dispersive_kit.views.svg import HEIGHT, WIDTH, image_grid, picture, text

EACH = 6  # images of an arm in one round
NEITHER = "no difference"


class Quiz:
    """`box` is the widget; `votes` holds the name of the arm picked in each round so far, or `NEITHER`."""

    def __init__(self, samples: Mapping[str, Tensor], *, question: str, seed: int = 0) -> None:
        if len(samples) != 2 or len({images.shape for images in samples.values()}) != 1:
            shapes = {name: tuple(images.shape) for name, images in samples.items()}
            raise ConfigError(f"a quiz compares two arms of equally many images, got {shapes}")
        self.samples, self.question = dict(samples), question
        self.rounds = len(next(iter(samples.values()))) // EACH
        if not self.rounds:
            raise ConfigError(f"a round takes {EACH} images of each arm: give at least so many")
        names = list(samples)
        swaps = torch.randint(2, (self.rounds,), generator=torch.Generator().manual_seed(seed)).tolist()
        self.sides = [names[::-1] if swap else names for swap in swaps]  # (left, right) of each round
        self.votes: list[str] = []
        self.text, self.picture = ipywidgets.HTML(), ipywidgets.HTML()
        self.buttons = {name: ipywidgets.Button(description=name) for name in ("left", "right", NEITHER)}
        for button in self.buttons.values():
            button.on_click(lambda pressed: self.answer(pressed.description))
        self.update()
        self.box = ipywidgets.VBox([self.text, self.picture, ipywidgets.HBox(list(self.buttons.values()))])

    def answer(self, side: str) -> None:
        """Count "left", "right" or `NEITHER` for this round, and go to the next."""
        if len(self.votes) < self.rounds:
            left, right = self.sides[len(self.votes)]
            self.votes.append({"left": left, "right": right}.get(side, NEITHER))
            self.update()

    def update(self) -> None:
        done = len(self.votes) == self.rounds
        for button in self.buttons.values():
            button.disabled = done
        if done:
            self.text.value = f"<b>{html.escape(self.verdict())}</b>"
        else:
            self.text.value = f"<b>{html.escape(self.question)}</b> Round {len(self.votes) + 1} of {self.rounds}."
            self.picture.value = self.frame(len(self.votes))

    def frame(self, k: int) -> str:
        """Round k (from 0) as HTML, without the names of the arms."""
        return quiz_frame(*(self.samples[name][EACH * k : EACH * (k + 1)] for name in self.sides[k]))

    def tally(self) -> dict[str, int]:
        """Picks of each arm, and of neither."""
        return {name: Counter(self.votes)[name] for name in (*self.samples, NEITHER)}

    def verdict(self) -> str:
        """The picks by name, and how often a coin would part them so unequally (two-sided sign test)."""
        from scipy.stats import binomtest

        tally = self.tally()
        first, second = (tally[name] for name in self.samples)
        p = binomtest(first, first + second).pvalue if first + second else 1.0
        picks = ", ".join(f"{name} {count}" for name, count in tally.items())
        return f"Picked: {picks}. A coin would part them at least so unequally with probability {p:.2f}."


def quiz_frame(left: Tensor, right: Tensor) -> str:
    """Two sets of uint8 images (n, C, H, W) from the same noises beside each other, unnamed."""
    width = WIDTH / 2 - 40
    parts = [
        text(x + width / 2, 28, name, anchor="middle") + image_grid(images, (x, 44, width, HEIGHT - 44), columns=3)
        for x, name, images in ((20, "left", left), (WIDTH / 2 + 20, "right", right))
    ]
    return picture(*parts, alt=f"Left and right, {len(left)} images each from the same noises, of one arm each.")


def blind_quiz(samples: Mapping[str, Tensor], *, question: str = "Which look better?", seed: int = 0) -> Quiz:
    """Display a quiz over two arms' uint8 images (N, C, H, W), image i from the same noise in both, and return it.

    A round shows `EACH` images an arm, so there are N // EACH rounds. Answered, it names the arms: `quiz.tally()`,
    `quiz.verdict()`. seed: of the sides.

    Raises:
        ConfigError: not two arms, unequal shapes, or too few images for one round.
    """
    from IPython.display import display

    quiz = Quiz(samples, question=question, seed=seed)
    display(quiz.box)
    return quiz
