"""Images to measure, drawn from a run with one seed for each image, and real images to compare them with.

Under a launcher the processes share the batches, and each gets all results: the same bits for any number of processes.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor
from tqdm import tqdm

from dispersive_kit.data import ImageSet, load_images, to_uint8
from dispersive_kit.data.autoencoders import Autoencoder, AutoencoderCard, load_named, refuse_other
from dispersive_kit.data.files import notebook_stdout
from dispersive_kit.data.latents import Selection
from dispersive_kit.diffusion.guidance import ClassifierFree
from dispersive_kit.errors import ConfigError
from dispersive_kit.training.batches import open_store, stream
from dispersive_kit.training.config import TrainConfig
from dispersive_kit.training.parallel import this_process
from dispersive_kit.training.runs import sample_batch

T = TypeVar("T")
Decode = Callable[[Tensor], Tensor]  # latents (B, C, h, w) -> images in [-1, 1]
BATCH, DECODED = 256, 2000  # images drawn together, and real ones decoded at most
PATIENCE = {"delay": 5, "mininterval": 5, "leave": False}  # seconds to the first line, and between: a page keeps all


def shared_out(work: Callable[[slice], T], n: int, what: str) -> list[T]:
    """[work(rows) for the batches of n rows], shared among the processes; every process gets all results in order."""
    state = this_process()
    starts = range(0, n, BATCH)[state.process_index :: state.num_processes]
    own = [(i, work(slice(i, min(i + BATCH, n)))) for i in progress(starts, what)]
    return [part for _, part in sorted(gathered(own), key=lambda pair: pair[0])]


def progress(items: Sequence[T], what: str) -> Iterable[T]:
    """The items; after five seconds a bar says what is done and how long it will take."""
    return tqdm(items, what, file=notebook_stdout(), disable=not this_process().is_local_main_process, **PATIENCE)


def gathered(own: list[Any]) -> list[Any]:
    """The lists of all processes, one after the other."""
    return own if this_process().num_processes == 1 else gather_object(own)


def balanced_labels(n: int, num_classes: int) -> Tensor:
    """Labels 0, 1, ..., K - 1, 0, 1, ... (n,)."""
    return torch.arange(n) % num_classes


@dataclass(frozen=True)
class Samples:
    """Images that are drawn when they are indexed: `samples[a:b]` is uint8 (b - a, C, H, W), seeds from first_seed + a.

    An extractor takes them in place of a tensor and keeps only the features. The fields are those of `generate`.
    Raises ConfigError: a label outside the classes, guidance without a null class. KitError: the model draws NaN.
    """

    model: Any
    labels: Tensor
    objective: str = "flow"
    sampler: str = ""
    num_steps: int = 25
    cfg_scale: float = 1.0
    guidance_low: float = 0.0
    guidance_high: float = 1.0
    first_seed: int = 0
    decode: Decode | None = None

    def __post_init__(self) -> None:
        outside = self.labels[(self.labels < 0) | (self.labels >= self.model.num_classes)]
        if len(outside):
            raise ConfigError(f"labels must lie in 0..{self.model.num_classes - 1}, got {int(outside[0])}")
        if not -(2**63) <= self.first_seed < 2**63 - len(self):
            raise ConfigError(f"a seed must fit into 64 bits, and the first is {self.first_seed}")
        if not math.isfinite(self.cfg_scale):
            raise ConfigError(f"cfg_scale must be a number, got {self.cfg_scale}")

    def __len__(self) -> int:
        return len(self.labels)

    @torch.no_grad()
    def __getitem__(self, rows: slice) -> Tensor:
        y = self.labels[rows].to(next(self.model.parameters()).device)
        seeds = range(self.first_seed, self.first_seed + len(self))[rows]
        guidance = ClassifierFree(y, self.model.null_label, self.cfg_scale, self.guidance_low, self.guidance_high)
        how: dict[str, Any] = {"objective": self.objective, "sampler": self.sampler, "num_steps": self.num_steps}
        x = sample_batch(self.model, y, seeds, guidance=guidance, **how)
        return to_uint8(self.decode(x) if self.decode else x).cpu()


def generate(model: Any, labels: Tensor, **options: Any) -> Tensor:
    """Draw one uint8 image (N, C, H, W) for each label (N,); image i has the seed first_seed + i.

    options: `objective` of the training (flow, ddpm, meanflow), which decides on the samplers; `sampler` (flow's
    default is Heun's method), `num_steps`, `first_seed`; `cfg_scale`, the guidance where t is in [`guidance_low`,
    `guidance_high`] (t = 1 is noise); `decode`, see `decoder_of`. Raises what `Samples` raises.
    """
    return torch.cat(shared_out(Samples(model, labels, **options).__getitem__, len(labels), "drawing samples"))


def decoder_of(card: dict[str, Any], *, device: torch.device | str = "cpu", path: str | None = None) -> Decode | None:
    """The decoder of a run's latents, from the card of `load_run`; None for a run on images.

    Raises DataError: the autoencoder is missing, or has other weights. ConfigError: a run on points; a run on images
        with a `path`.
    """
    if len(card["data"].get("shape", ())) == 1:
        raise ConfigError(f"{card['run']} was trained on points, and they are no images: for points, see notebook 02")
    if autoencoder := card["data"].get("autoencoder"):
        return load_named(AutoencoderCard(**autoencoder), device=device, path=path).images
    if path:
        raise ConfigError(f"an autoencoder ({path}) is for runs on latents, and {card['run']} was trained on images")
    return None


def draw_images(data: ImageSet, n: int) -> ImageSet:
    """n images of a set in random order, or all if it has fewer. The set itself may be sorted by class."""
    drawn = data.subset(torch.randperm(len(data), generator=stream(0, "images"))[:n])
    return replace(drawn, drawn_from=len(data) if n < len(data) else data.drawn_from)


def load_reference(config: TrainConfig, decode: Decode | None = None) -> tuple[ImageSet, ImageSet]:
    """Training and held-out images of a run's configuration.

    decode: for a run on latents, see `decoder_of`. The images are then at most 2,000 decoded posterior means, named
    "...-decoded": samples use the same decoder, so what the autoencoder loses is missing on both sides.
    """
    if decode:
        train, held_out = (_decoded(part, decode) for part in open_store(config.data))
        return train, held_out
    where: dict[str, Any] = {"data_dir": config.data_dir, "size": config.image_size}
    return load_images(config.data, "train", **where), load_images(config.data, "test", **where)


def _decoded(data: Selection, decode: Decode) -> ImageSet:
    store, rows = data.store, data.rows(np.arange(min(DECODED, len(data))))
    if isinstance(run_has := getattr(decode, "__self__", None), Autoencoder):  # as `decoder_of` gives it
        refuse_other(run_has.card, store.spec.autoencoder)
    to_model = store.spec.autoencoder.to_model
    parts = progress(np.array_split(rows, -(-len(rows) // 64)), "decoding real images")
    images = torch.cat([to_uint8(decode(to_model(store.read(part)[:, 0].float()))) for part in parts])
    name, labels = f"{store.path.name}-decoded", torch.from_numpy(store.labels(rows))
    drawn_from = len(data) if len(rows) < len(data) else None
    return ImageSet(name, data.part, images, labels, store.spec.classes, str(store.path), drawn_from=drawn_from)


def pixel_gaussian(train: ImageSet, n: int, *, seed: int = 0) -> Tensor:
    """n uint8 images (n, C, H, W) from one Gaussian fitted to the training pixels, as a baseline."""
    flat = train.images.flatten(1).double().numpy()  # (N, C H W)
    draws = np.random.default_rng(seed).multivariate_normal(flat.mean(0), np.cov(flat.T), n, method="eigh")
    return torch.from_numpy(draws.round().clip(0, 255).astype(np.uint8)).reshape(n, *train.images.shape[1:])
