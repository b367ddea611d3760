"""The options of an evaluation, as the command line shows them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dispersive_kit.errors import ConfigError

Extractors = Literal["classifier", "random-conv", "pixels-pca32", "effnet-lite0-pca64", "inception"]


@dataclass(frozen=True)
class Evaluation:
    """What is measured, against what, and how the samples of a run are drawn (an .npz has its own)."""

    extractor: Extractors = "classifier"
    """Feature space, which names the numbers; `inception` needs --inception-weights."""
    metrics: Literal["panel", "FD", "FID", "IS"] = "panel"
    """All metrics or one. FID and IS are refused unless their conditions hold."""
    reference: str = "test"
    """Real images to compare with: test, train, or an .npz of statistics (mu, sigma; Frechet distance only)."""
    num: int = 500
    """Number of generated images, classes in turn; of an .npz with more, so many drawn at random."""
    num_reference: int | None = None
    """Only so many reference images, drawn at random; all if not given."""
    num_steps: int = 25
    """Steps of the sampler that fits the run's objective."""
    cfg_scale: float = 1.0
    """Classifier-free guidance; 1 is none."""
    guidance_low: float = 0.0
    """Guidance acts where t is above this (t = 0 is data) ..."""
    guidance_high: float = 1.0
    """... and below this (t = 1 is noise)."""
    seed: int = 0
    """Of the first image; image i has seed + i."""
    weights: Literal["ema", "model"] = "ema"
    """The average (ema), or the weights as last trained (model)."""
    step: int | None = None
    """A kept checkpoint of the run; the newest if not given."""
    resamples: int = 100
    """Half-samples behind each interval."""
    memorisation: bool = False
    """Also compare distances to the nearest training image with those of held-out images."""
    inception_weights: Path | None = None
    """torch-fidelity's weights-inception-2015-12-05-6726825d.pth; never downloaded."""
    data: str | None = None
    """Data set the samples of an .npz are compared with; a run knows its own."""
    data_dir: str | None = None
    """Folder in which mnist and cifar10 lie."""
    vae: str | None = None
    """Where the autoencoder of a run on latents lies now, if it was moved; its weights must be the same."""

    def __post_init__(self) -> None:
        least = {"num": 4, "num_reference": 4, "num_steps": 1, "resamples": 2}  # half-samples need two images each
        for name, low in least.items():
            if (value := getattr(self, name)) is not None and value < low:
                raise ConfigError(f"--{name.replace('_', '-')} must be at least {low}, got {value}")
