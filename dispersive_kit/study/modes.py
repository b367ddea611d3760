"""The numbers that differ between smoke (CI, 30 s), class (3 minutes on two cores) and full mode, for each notebook."""

from types import SimpleNamespace
from typing import Any

MODES = ("smoke", "class", "full")

# Of the store of latents that is made of photographs which come with packages
PRACTICE: dict[str, tuple[Any, Any, Any]] = {
    "per_class": (8, 60, 60),
    "vae_steps": (25, 250, 250),
    "shard_size": (16, 100, 100),
}

# notebook -> setting -> (smoke, class, full)
SETTINGS: dict[str, dict[str, tuple[Any, Any, Any]]] = {
    "00_start_here": {},
    "90_lecture_console": {},
    "01_noise": {
        "points": (4000, 20000, 20000),
    },
    "02_denoiser_2d": {
        "train_steps": (200, 1200, 20000),
        "batch_size": (128, 256, 1024),
        "points": (300, 1000, 2000),
        "max_error": (0.35, 0.12, 0.08),  # share of |v|^2 that the learned field may miss
        "max_w2": (0.8, 0.5, 0.5),  # distance of the samples to the data, in those of the untrained net
    },
    "03_samplers": {
        "points": (200, 500, 2000),
        "steps": ([1, 2, 4, 8, 16, 32, 64], [1, 2, 4, 8, 16, 32, 64, 128], [1, 2, 4, 8, 16, 32, 64, 128, 256]),
        "order_gap": (0.3, 0.15, 0.1),
    },
    "04_dispersive_loss": {
        "descent_steps": (60, 300, 2000),
    },
    "05_dit_anatomy": {},
    "06_does_it_help": {  # of one seed of a study, in class mode as the study has it
        "steps": (20, 300, 300),
        "log_every": (5, 25, 25),
        "images": (64, 2000, 2000),
    },
    "14_one_step_meanflow": {
        "train_steps": (150, 1000, 20000),
        "points": (300, 800, 2000),
        "max_share": (0.8, 0.4, 0.3),  # W2 of one MeanFlow step, in those of one Euler step of flow matching
        "max_ratio": (2.5, 1.5, 1.3),  # W2 of one MeanFlow step, in those of eight
    },
    "15_your_own_model": {},
    "12_imagenet_latents": {
        **PRACTICE,
        "min_psnr": (8, 15, 15),  # dB; the published sd-vae is far above it
        "shown": (8, 8, 16),
    },
    "13_imagenet_train": {
        **PRACTICE,
        "costed": (("S", "B"), *(("S", "B", "L", "XL"),) * 2),  # sizes whose price is told
        "preset": ("smoke", "photographs", "imagenet-{size}2-{arm}"),
        "stop_after": (3, 6, 0),
        "images": (40, 100, 50_000),
        "num_steps": (3, 20, 125),
    },
    "07_cifar10": {
        "overfit_images": (8, 64, 64),
        "overfit_steps": (60, 250, 500),
        "max_share": (0.8, 0.1, 0.1),  # of the first loss
        "source": ("train", "shipped", "train"),
        "preset": ("smoke", "cifar10-cpu", "cifar10-cpu"),
        "changes": ({"data": "photos", "model": "DiT-T/4", "steps": 6, "eval_every": 3, "checkpoint_every": 3}, {}, {}),
        "images": (10, 20, 100),
        "num_steps": (2, 10, 25),
    },
    "08_evaluate": {
        "runs": (("digits-base", "digits-paper"),) * 2 + (("cifar10-cpu-base", "cifar10-cpu-paper"),),
        "extractor": ("classifier", "classifier", "effnet-lite0-pca64"),
        "steps": ((1, 4), (1, 4, 12), (5, 12, 25, 50)),
        "scales": ((1.0, 2.0), (1.0, 1.5, 3.0), (1.0, 1.5, 2.0, 4.0)),
        "grid_images": (40, 200, 2000),  # a cell of the grid
        "panel_images": (120, 500, 2000),
        "resamples": (20, 100, 100),
    },
    "09_dispersion": {
        "images": (200, 1297, 1297),
        "noise_images": (64, 200, 1297),  # of which three draws of noise are taken
        "batches": (2, 8, 32),  # over which gradients are compared
    },
    "10_linear_probes": {
        "train": (300, 997, 997),
        "validation": (100, 300, 300),
        "test": (200, 500, 500),
        "draws": (1, 3, 3),
    },
    "11_umap": {},
    "16_what_may_we_claim": {},
}


def settings_of(name: str, mode: str) -> SimpleNamespace:
    """The settings of one notebook in one mode."""
    column = MODES.index(mode)
    return SimpleNamespace(**{key: values[column] for key, values in SETTINGS.get(name, {}).items()})
