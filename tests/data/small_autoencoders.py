"""Autoencoders of the tests, importable by other processes as `small_autoencoders:NAME`."""

import time

import torch

from dispersive_kit.data.autoencoders import register_autoencoder
from dispersive_kit.errors import DataError


@register_autoencoder("patches")
class Patches:
    """Mean and spread of every 8 x 8 patch, by channel: a posterior that a test can work out by hand."""

    scale, shift = 0.5, 0.25

    def encode(self, x):
        patches = x.unfold(2, 8, 8).unfold(3, 8, 8)  # (B, 3, h, w, 8, 8)
        return patches.mean((-1, -2)), patches.std((-1, -2))

    def decode(self, z):
        return z.repeat_interleave(8, 2).repeat_interleave(8, 3)


@register_autoencoder("slow patches")
class SlowPatches(Patches):
    """Long enough at each batch to be killed in the middle of it."""

    def encode(self, x):
        time.sleep(0.03)
        return super().encode(x)


@register_autoencoder("bright")
class Bright(Patches):
    """Beyond float16."""

    def encode(self, x):
        return 1e6 + x[:, :, ::8, ::8], torch.zeros_like(x[:, :, ::8, ::8])


@register_autoencoder("telling")
class Telling(Patches):
    """Says how it is called."""

    def encode(self, x):
        if len(x) == 1:  # the image on which an autoencoder is tried
            return super().encode(x)
        cudnn = torch.backends.cudnn
        raise DataError(
            f"threads {torch.get_num_threads()}, deterministic {cudnn.deterministic}, benchmark {cudnn.benchmark}"
        )


def register_drawn(factor, channels, exponent):
    """An autoencoder of drawn sizes and scale, registered as "drawn"."""

    @register_autoencoder("drawn")
    class Drawn:
        scale, shift = 1.0, 0.0

        def encode(self, x):
            mean = x[:, :1, ::factor, ::factor] * torch.arange(1, channels + 1)[:, None, None] * 2.0**exponent
            return mean, mean.abs().sqrt()

        def decode(self, z):
            return z[:, :1].repeat_interleave(factor, 2).repeat_interleave(factor, 3).expand(-1, 3, -1, -1)

    return Drawn()
