"""A small classifier trained on the data set itself: its last hidden layer is a feature space for small images."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dispersive_kit.data import ImageSet, to_float

WIDTH = 48  # features
STEPS, BATCH, LEARNING_RATE = 400, 128, 3e-3


class SmallConvNet(nn.Module):
    """Three convolutions, mean over positions, one linear layer: (B, C, H, W) -> features (B, 48), logits (B, K)."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, 24, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(24, WIDTH, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(WIDTH, WIDTH, 3, padding=1),
            nn.ReLU(),
        )
        self.head = nn.Linear(WIDTH, num_classes)

    def features(self, x: Tensor) -> Tensor:
        return self.body(x).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


@dataclass(frozen=True)
class TrainedClassifier:
    """The network, how well it does on held-out images, and the hash of its weights."""

    network: SmallConvNet
    accuracy: float
    sha256: str


def train_classifier(train: ImageSet, held_out: ImageSet, *, seed: int = 0) -> TrainedClassifier:
    """Train `SmallConvNet` on `train` (some seconds on a CPU); accuracy is measured on `held_out`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = SmallConvNet(train.images.shape[1], len(train.classes))
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=STEPS)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(STEPS):
        index = torch.randint(len(train), (BATCH,), generator=generator)
        loss = F.cross_entropy(network(to_float(train.images[index])), train.labels[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    network.eval().requires_grad_(False)
    return TrainedClassifier(network, _accuracy(network, held_out), weights_sha256(network.state_dict()))


def _accuracy(network: SmallConvNet, data: ImageSet) -> float:
    parts = zip(data.images.split(512), data.labels.split(512), strict=True)
    right = sum(int((network(to_float(x)).argmax(1) == y).sum()) for x, y in parts)
    return right / len(data)


def weights_sha256(state_dict: Mapping[str, Tensor]) -> str:
    """Of names and values, in their order."""
    digest = hashlib.sha256()
    for name, tensor in state_dict.items():
        digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
