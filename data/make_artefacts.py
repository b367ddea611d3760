"""The small files of numbers and pictures that the package ships, made anew: `python data/make_artefacts.py NAME ...`

    classroom   samples and nearest neighbours of the lecture console, 3 minutes on one core
    umap        UMAP pictures of the digits runs, 10 minutes
    autoencoder the small AutoencoderKL that stands in for ImageNet's, trained on ten photographs: 10 minutes
    digits      samples that a person reads, of both long arms: notebooks/figures/digits.png
    evidence    the count of all verdicts in README.md, and the map of them, notebooks/figures/map.png

Then the list of checksums, `dispersive_kit/artefacts/SHA256SUMS`, is written anew. Without a name it only does that.
Trained runs are made by the commands in their run.json and `dispersive-kit export`.
"""

import hashlib
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from dispersive_kit.analysis import encoder, extract, geometry, noisy, projection
from dispersive_kit.analysis.projection import picture_name
from dispersive_kit.data import ImageSet, load_images, to_float, to_uint8
from dispersive_kit.data.files import ARTEFACTS, SUMS, atomic_write, file_sha256, list_folder
from dispersive_kit.diffusion.guidance import ClassifierFree
from dispersive_kit.diffusion.samplers import heun, initial_noise, time_grid
from dispersive_kit.evaluation import balanced_labels, generate
from dispersive_kit.models.dit import DiT
from dispersive_kit.study.practice import AUTOENCODER, photographs
from dispersive_kit.study.verdict import all_verdicts, evidence_page
from dispersive_kit.training import load_run
from dispersive_kit.views.figures import image_grid, style
from dispersive_kit.views.lessons import regime_map

DIGITS = {"base": "digits-base", "paper": "digits-paper"}  # short trainings
FILMS = {"MNIST": "mnist-long", "digits": "digits-long", "digits, short training": "digits"}  # of denoising
SCALES = (1.0, 2.0, 3.0, 5.0)
UMAPS = list(product((5, 15, 50), (0.0, 0.1, 0.5), (0, 1)))  # neighbours, min_dist, seed
BEGIN, END = "<!-- written by: python data/make_artefacts.py evidence -->", "<!-- up to here -->"
MAP = """![Held-out loss and Fréchet distance, as a ratio to base, against its epochs](notebooks/figures/map.png)

*Contrasts with the base, without guidance, of `paper` (the published setting), `small` (gentle preset) and `placebo`,
each with its 95 % interval. Above the line: worse than without the loss.
[All contrasts, one by one](notebooks/studies/README.md).*"""


def classroom() -> dict[str, Any]:
    """Denoising at scales of guidance, pairs for the quiz, and whom a block takes for neighbours at a level of noise.

    Images that share a place share their noise and their label.
    """
    data, found = load_images("digits", "test").subset(torch.arange(400)), {}
    for arm in DIGITS:
        levels = extract(encoder(load_run(f"digits-long-{arm}")[0]), data.images)  # (1, blocks, N, D) each
        near = torch.stack([torch.stack([nearest(x) for x in level[0]]) for level in levels])
        own = (data.labels[near] == data.labels[:, None]).double().mean((-2, -1))
        found |= {f"agreement/{arm}": own, f"nearest/{arm}": near[:, :, :6].short()}
        for (name, run), scale in product(FILMS.items(), SCALES):
            found[f"film/{name}/{arm}/{scale:g}"] = film(f"{run}-{arm}", scale)
        found[f"quiz/{arm}"] = samples(f"mnist-long-{arm}", 1.5, 60)
    seen = torch.stack([to_uint8(x) for _, _, x, _ in noisy(data.images[:6])])
    return found | {"digits": data.images, "labels": data.labels.byte(), "noisy": seen}


def film(run: str, scale: float, steps: int = 12) -> Tensor:
    """One image a class after each step of Heun's method: uint8 (steps + 1, 10, C, H, W)."""
    model, labels = load_run(run)[0], torch.arange(10)
    states = [initial_noise(range(10), (model.in_channels, *2 * [model.input_size]))]
    guidance = ClassifierFree(labels, model.num_classes, scale)
    with torch.no_grad():
        heun(model, states[0], time_grid(steps), guidance=guidance, callback=lambda _i, _t, x: states.append(x))
    return torch.stack([to_uint8(x) for x in states])


def samples(run: str, scale: float, n: int) -> Tensor:
    """n uint8 images (n, C, H, W) of a shipped run, the classes in turn."""
    model = load_run(run)[0]
    return generate(model, balanced_labels(n, model.num_classes), cfg_scale=scale)


def nearest(x: Tensor, k: int = 5) -> Tensor:
    """Indices (N, k) of the k nearest other rows, the nearest first."""
    x = geometry.centred(x)
    return torch.cdist(x, x).fill_diagonal_(torch.inf).topk(k, largest=False).indices


def umap() -> dict[str, Any]:
    """Pictures of the last block of both arms, one for each setting."""
    data = load_images("digits", "test").subset(torch.arange(400))
    features = {arm: last_block(load_run(run)[0], data) for arm, run in DIGITS.items()}
    found = {
        picture_name(arm, *one): projection.umap(x, neighbours=one[0], min_dist=one[1], seed=one[2])
        for (arm, x), one in product(features.items(), UMAPS)
    }
    return {name: points.astype(np.float16) for name, points in found.items()}


def last_block(model: DiT, data: ImageSet) -> Tensor:
    """All tokens (N, E) at log-SNR 2."""
    return extract(encoder(model), data.images, (2.0,))[0][0, -1]


def evidence() -> None:
    """Between `BEGIN` and `END` of the README; the picture carries the hash of the page that it belongs to."""
    root, said = Path(__file__).parents[1], evidence_page().splitlines()[0]
    readme = root / "README.md"
    before, _, rest = readme.read_text(encoding="utf-8").partition(BEGIN)
    readme.write_text(f"{before}{BEGIN}\n\n{said}\n\n{MAP}\n\n{END}{rest.partition(END)[2]}", encoding="utf-8")
    style()
    drawn_from = {"Description": hashlib.sha256(evidence_page().encode()).hexdigest()}
    regime_map(all_verdicts()).savefig(root / "notebooks" / "figures" / "map.png", metadata=drawn_from)


def digits() -> None:
    """Both long arms from the same noise and labels."""
    style()
    arms = {"without the loss": "mnist-long-base", "with the loss": "mnist-long-paper"}
    grid = image_grid({arm: samples(run, 1.5, 20) for arm, run in arms.items()}, columns=20, size=0.5)
    grid.savefig(Path(__file__).parents[1] / "notebooks" / "figures" / "digits.png")


def autoencoder(steps: int = 1200, batch: int = 16, rate: float = 4e-3) -> None:
    """The AutoencoderKL of the shipped config.json, trained anew on cuts of the photographs from near and far.

    |x - decoded|, the same of means over 4 x 4 pixels (colours are learned sooner), and a little KL divergence; the
    published one also has a perceptual and an adversarial term. As there, the scaling factor is one over the spread of
    the latents.
    """
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    network: Any = AutoencoderKL.from_config(AutoencoderKL.load_config(AUTOENCODER))
    x = to_float(torch.from_numpy(near_and_far()).permute(0, 3, 1, 2))
    optimizer = torch.optim.Adam(network.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    for step in range(steps):
        part = x[torch.randint(len(x), (batch,))]
        posterior = network.encode(part).latent_dist
        back = network.decode(posterior.sample()).sample
        error = F.l1_loss(back, part) + F.l1_loss(F.avg_pool2d(back, 4), F.avg_pool2d(part, 4))
        optimizer.zero_grad()
        (error + 1e-6 * posterior.kl().mean()).backward()  # the weight of Rombach et al., arXiv 2112.10752
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"step {step}: {error.item():.3f}", flush=True)
    with torch.no_grad():
        spread = torch.cat([network.encode(part).latent_dist.mean for part in x[:1000].split(100)]).std()
    network.eval().register_to_config(scaling_factor=1 / float(spread))
    network.save_pretrained(AUTOENCODER)


def near_and_far(size: int = 32, n: int = 5000) -> Any:
    """n square cuts of the photographs, from 48 pixels wide up to all, at one size: uint8 (n, size, size, 3)."""
    rng, found = np.random.default_rng(0), list(photographs().values())
    cuts = np.empty((n, size, size, 3), np.uint8)
    for i in range(n):
        image = Image.fromarray(found[i % len(found)])
        side = int(np.exp(rng.uniform(np.log(48), np.log(min(image.size)))))
        left, top = (int(rng.integers(length - side + 1)) for length in image.size)
        cuts[i] = image.resize((size, size), Image.Resampling.BICUBIC, (left, top, left + side, top + side))
    return cuts


def files_below(folder: Path) -> Iterator[Path]:
    """At any depth; a folder that cannot be listed is an error, and not empty."""
    for path in list_folder(folder):
        yield from files_below(path) if path.is_dir() else [path]


def seal(folder: Path) -> None:
    """List every file of a folder with its sha256."""
    files = sorted(file for file in files_below(folder) if file.name != SUMS)
    lines = [f"{file_sha256(file)}  {file.relative_to(folder).as_posix()}\n" for file in files]
    with atomic_write(folder / SUMS) as partial:
        partial.write_text("".join(lines))
    print(f"{len(files)} files listed in {folder / SUMS}")


MAKERS = {make.__name__: make for make in (classroom, umap, autoencoder, digits, evidence)}
FILES = {"classroom": "classroom.npz", "umap": "umap-digits.npz"}  # of what their makers return

if __name__ == "__main__":
    torch.set_num_threads(1)
    for wanted in sys.argv[1:]:
        if made := MAKERS[wanted]():
            np.savez_compressed(ARTEFACTS / FILES[wanted], **made)
    seal(ARTEFACTS)
