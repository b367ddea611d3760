"""The whole chain can learn: 64 images of CIFAR's size are learnt by heart."""

import torch

from dispersive_kit.data import load_images
from dispersive_kit.training import overfit as module
from dispersive_kit.training.loop import learning_rate
from dispersive_kit.training.overfit import overfit


def test_64_images_are_learnt_to_a_tenth_of_the_first_loss_within_250_steps():
    data = load_images("photos").subset(torch.arange(0, 1024, 16))
    losses = overfit(data, steps=250, until=0.1)
    assert len(data) == 64 and losses[-1] < 0.1 * losses[0], (len(losses), losses[-1] / losses[0])


def test_the_schedule_ends_with_the_steps_it_was_given(monkeypatch):
    from dispersive_kit.training import TrainConfig

    rates = []
    monkeypatch.setattr(module, "learning_rate", lambda *a: rates.append(learning_rate(*a)) or rates[-1])
    config = TrainConfig(model="DiT-T/4", steps=3, warmup_steps=1, schedule="cosine")
    overfit(load_images("digits").subset(torch.arange(8)), steps=12, until=0.0, config=config)
    assert len(rates) == 12 and rates == sorted(rates, reverse=True) and rates[-1] > 0
