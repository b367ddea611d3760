"""The two arms of a comparison: trained here, or those that come with the package."""

import json
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from dispersive_kit.errors import ConfigError
from dispersive_kit.training import RegularizerConfig, progress, run_folder, train, train_preset

ARMS = {"base": "none", "paper": "paper"}


def get_arms(source: str, preset: str, out: Path, **changes: Any) -> dict[str, Path]:
    """Run folders of the arms "base" and "paper": trained below `out`, or resumed there, or taken from the package.

    Args:
        source: "train", or "shipped". preset: a training preset; shipped arms are named PRESET-base and PRESET-paper.
        changes: fields of the preset that are replaced; for "train" only.

    Raises:
        ConfigError: unknown source, or no such shipped run.
    """
    if source == "shipped":
        return {arm: run_folder(f"{preset}-{arm}") for arm in ARMS}
    if source != "train":
        raise ConfigError(f"unknown source {source!r} of the arms; there are: train, shipped")
    for arm, regularizer in ARMS.items():
        config = train_preset(preset, regularizer=RegularizerConfig(preset=regularizer), **changes)
        for _ in progress(train(config, out / arm, resume=(out / arm).exists()), label=arm):
            pass
    return {arm: out / arm for arm in ARMS}


def read_metrics(run: Path) -> list[dict[str, float]]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def read_previews(run: Path, columns: int = 8) -> dict[int, Tensor]:
    """The preview grids of a run by step, cut into their images: uint8 (N, C, H, W)."""
    from torchvision.transforms.v2.functional import pil_to_tensor  # slow to import, and the commands do not need it

    grids = {}
    for file in sorted((run / "previews").glob("step-*.png")):
        with Image.open(file) as image:
            grid = pil_to_tensor(image)  # (C, rows (H + 1) + 1, columns (W + 1) + 1)
        side = (grid.shape[2] - 1) // columns
        cells = grid[:, 1:, 1:].unfold(1, side, side).unfold(2, side, side)  # (C, rows, columns, side, side)
        grids[int(file.stem[5:])] = cells.flatten(1, 2).transpose(0, 1)[..., :-1, :-1]
    return grids


def read_records(run: Path) -> list[dict[str, Any]]:
    """The numbers that were measured of a run and lie in its folder, each with its protocol, by step."""
    found = []
    for file in run.glob("evaluation-*.json"):
        content = json.loads(file.read_text())
        shared = content["protocol"]
        found += [{**number, "protocol": shared | number.get("protocol", {})} for number in content["numbers"]]
    return sorted(found, key=lambda record: record["protocol"]["step"])
