"""Everything random in training, as a function of (seed, step, global sample index).

The whole global batch is drawn from one generator that is seeded by (seed, step), and each process takes its rows.
So the numbers do not depend on how the batch is split, a run resumes without any generator state, and two arms
that differ only in the regulariser see the same images, times, noise and label drops.
"""

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from dispersive_kit.data import ImageSet, to_float

HELD_OUT = 512  # samples at most in the frozen batch of the held-out loss


def stream(seed: int, name: str, step: int = 0, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator of its own for one purpose (`name`) at one step."""
    digest = hashlib.blake2b(f"{seed}/{name}/{step}".encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)


@lru_cache(maxsize=2)
def _epoch_order(seed: int, epoch: int, n: int) -> Tensor:
    return torch.randperm(n, generator=stream(seed, "order", epoch))


def sample_index(seed: int, step: int, batch_size: int, n: int) -> Tensor:
    """Indices (batch_size,) into a set of n that step `step` trains on: each epoch is one permutation."""
    position = torch.arange(step * batch_size, (step + 1) * batch_size)
    epoch = position // n
    orders = [_epoch_order(seed, int(e), n)[position[epoch == e] % n] for e in range(int(epoch[0]), int(epoch[-1]) + 1)]
    return torch.cat(orders)


@dataclass(frozen=True)
class Batch:
    """Samples x0 (B, ...), images in [-1, 1]; labels y (B,) with some dropped to the null class, and as they were;
    the objective's draws.
    """

    x0: Tensor
    y: Tensor
    labels: Tensor
    draws: Any

    def rows(self, part: int, parts: int) -> "Batch":
        """The `part`-th of `parts` equal slices."""
        size = len(self.x0) // parts
        keep = slice(part * size, (part + 1) * size)
        return Batch(self.x0[keep], self.y[keep], self.labels[keep], self.draws[keep])


def drop_labels(labels: Tensor, null_label: int | None, drop_prob: float, generator: torch.Generator) -> Tensor:
    """Labels (B,) of which some are the null class, which classifier-free guidance needs; None has none."""
    if null_label is None:
        return labels
    dropped = torch.rand(labels.shape, generator=generator, device=labels.device) < drop_prob
    return torch.where(dropped, null_label, labels)


@dataclass(frozen=True)
class DeviceSet:
    """A small set held whole on the device: no loader, no workers."""

    samples: Tensor  # images uint8 (N, C, H, W), or points float (N, 2)
    labels: Tensor  # (N,)

    @classmethod
    def of(cls, data: ImageSet, device: torch.device | str) -> "DeviceSet":
        return cls(data.images.to(device), data.labels.to(device))

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def sha256(self) -> str:
        digest = hashlib.sha256(self.samples.cpu().numpy().tobytes())
        digest.update(self.labels.cpu().numpy().tobytes())
        return digest.hexdigest()

    def batch(
        self,
        objective: Any,
        *,
        seed: int,
        step: int,
        size: int,
        null_label: int | None,
        drop_prob: float,
        flip: bool = False,
    ) -> Batch:
        """The global batch of one step; the same whatever device count, arm or accumulation asks for it."""
        device = self.samples.device
        index = sample_index(seed, step, size, len(self)).to(device)
        generator = stream(seed, "batch", step, device)
        x0, labels = self.samples[index], self.labels[index]
        if flip:  # while they are bytes: a quarter of the memory to move
            mirrored = torch.rand(size, generator=generator, device=device) < 0.5
            x0 = torch.where(mirrored[:, None, None, None], x0.flip(-1), x0)
        if x0.dtype == torch.uint8:
            x0 = to_float(x0)
        y = drop_labels(labels, null_label, drop_prob, generator)
        return Batch(x0, y, labels, objective.draw(x0, generator))


def frozen_batch(held_out: Any, objective: Any, size: int = HELD_OUT) -> Batch:
    """At most `size` held-out samples with their t and eps: the same for every run, arm and step."""
    size = min(size, len(held_out))
    return held_out.batch(objective, seed=0, step=0, size=size, null_label=None, drop_prob=0.0)
