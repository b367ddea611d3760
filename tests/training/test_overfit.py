"""The whole chain can learn: 64 images of CIFAR's size are learnt by heart."""

import torch

from dispersive_kit.data import load_images
from dispersive_kit.training.overfit import overfit


def test_64_images_are_learnt_to_a_tenth_of_the_first_loss_within_250_steps():
    data = load_images("photos").subset(torch.arange(0, 1024, 16))
    losses = overfit(data, steps=250, until=0.1)
    assert len(data) == 64 and losses[-1] < 0.1 * losses[0], (len(losses), losses[-1] / losses[0])
