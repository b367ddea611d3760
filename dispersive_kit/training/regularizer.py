"""What is added to the objective of a run: Dispersive Loss, its placebo, or a rival with its head and encoder."""

import re
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dispersive_kit.data import to_float
from dispersive_kit.errors import ConfigError, DispersiveError
from dispersive_kit.models.dit import DiT
from dispersive_kit.regularizers.attach import Dispersive
from dispersive_kit.regularizers.losses import RIVALS, preset_settings
from dispersive_kit.regularizers.rivals import REPA, CleanPatch, LayerSync, NormMatched, Rival
from dispersive_kit.regularizers.taps import block_at
from dispersive_kit.training.batches import DeviceSet, LatentSet, stream
from dispersive_kit.training.config import TrainConfig

HEAD = "training_head"  # the part of a model that only a rival uses, and only in training
ENCODER: dict[str, Any] = {"seed": 1, "widths": (16, 32, 64)}  # of REPA; the classifier for evaluation has others
ENCODER_NOTE = f"classifier, trained on the labels of the run's own images, {ENCODER}; it judges no samples"


def attach_regularizer(model: nn.Module, config: TrainConfig, data: DeviceSet | LatentSet) -> Dispersive | Rival:
    """Attach what the configuration adds. If it adds nothing, attach the paper's loss, which is then only measured.

    data: the training set. A rival's head becomes a part of the model, `HEAD`, so that the optimizer, the checkpoints
    and the processes include it. The averaged model is made before and does not have it.
    Raises ConfigError: the model has no such block, or the configuration does not fit it or the data.
    """
    chosen = config.regularizer
    try:
        if chosen.preset in RIVALS:
            found: Dispersive | Rival = _attach_rival(model, config, data)
        elif chosen.norm_matched:
            found = NormMatched.from_preset(model, chosen.preset, rms=chosen.norm_matched, **chosen.overrides())
        else:
            found = Dispersive.from_preset(model, chosen.preset if chosen.added else "paper", **chosen.overrides())
    except DispersiveError as error:
        raise ConfigError(f"regularizer: {error}") from error
    whole = all(re.fullmatch(r"blocks\.\d+", path) for path in found.paths)
    if not whole and (config.objective == "meanflow" or hasattr(model, HEAD)):
        raise ConfigError(f"regularizer.at is {found.where}: MeanFlow, repa, clean-patch need whole blocks (blocks.1)")
    return found


def _attach_rival(model: nn.Module, config: TrainConfig, data: DeviceSet | LatentSet) -> Rival:
    name = config.regularizer.preset
    how = preset_settings(name, config.regularizer.overrides(), RIVALS)
    if name == "layersync":
        at, depth = how.pop("at", None), how.pop("depth")
        return LayerSync(model, at or block_at(model, depth), block_at(model, min(1.0, 2 * depth)), **how)
    if not isinstance(model, DiT) or not (isinstance(data, DeviceSet) or name == "clean-patch"):
        fitting = "images or latents" if name == "clean-patch" else "images in pixels"
        raise ConfigError(f"regularizer.preset {name} is for a DiT on {fitting}, and {config.data!r} holds none")
    width, patch = model.pos_embed.shape[-1], model.in_channels * model.patch_size**2
    sizes = (width, patch) if name == "clean-patch" else (width, 2 * width, 2 * width, ENCODER["widths"][-1])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream(config.seed, "head").initial_seed())
        layers = [part for n, m in pairwise(sizes) for part in (nn.Linear(n, m), nn.SiLU())]
    head = nn.ModuleDict({"projector": nn.Sequential(*layers[:-1])}).to(data.device)
    model.add_module(HEAD, head)
    if name == "clean-patch" or not isinstance(data, DeviceSet):
        return CleanPatch(model, patch_size=model.patch_size, projector=head["projector"], **how)
    # Checkpoints hold the encoder too: a resumed run has the same one on any machine.
    head["encoder"] = train_classifier(data, model.num_classes, **ENCODER)["body"]
    grid = model.input_size // model.patch_size

    def features(x0: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(head["encoder"](x0), grid).flatten(2).transpose(1, 2)  # (B, N, E)

    return REPA(model, encoder=features, projector=head["projector"], **how)


def train_classifier(
    data: DeviceSet, classes: int, *, seed: int, widths: tuple[int, int, int], steps: Iterable[Any] = range(400)
) -> nn.ModuleDict:
    """A small classifier of images, trained for 400 steps (seconds on a CPU) and then frozen.

    Its "body" maps images in [-1, 1], (B, C, H, W), to (B, widths[-1], H / 2, W / 2); its "head" maps the mean of these
    over the pixels to logits. The caller's random generators do not change.
    """
    if classes < 2:
        raise ConfigError("one class is too few for a classifier: give two or more, or take another extractor or arm")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sizes = zip((data.samples.shape[1], *widths), widths, (1, 2, 1), strict=False)
        layers = [(nn.Conv2d(n, m, 3, stride, 1), nn.ReLU()) for n, m, stride in sizes]
        body = nn.Sequential(*(layer for pair in layers for layer in pair))
        network = nn.ModuleDict({"body": body, "head": nn.Linear(widths[-1], classes)}).to(data.device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=400)
    generator = torch.Generator().manual_seed(seed)
    for _ in steps:
        index = torch.randint(len(data), (128,), generator=generator).to(data.device)
        logits = network["head"](body(to_float(data.samples[index])).mean((2, 3)))
        F.cross_entropy(logits, data.labels[index]).backward()
        optimizer.step()
        optimizer.zero_grad()  # after the step: with gradients left, a later optimizer would change the frozen network
        schedule.step()
    return network.eval().requires_grad_(False)
