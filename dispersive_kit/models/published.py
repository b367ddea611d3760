"""Published DiT and SiT checkpoints: read, checked key by key, and run in the kit's time.

Their conventions of time cannot be moved into the weights, so `Published` wraps a `DiT`. No other part of the kit
converts time and sign.
"""

import argparse
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dispersive_kit.errors import CheckpointError, ConfigError
from dispersive_kit.models.dit import DIT_CONFIGS, DiT

State = Mapping[str, Tensor]
WRAPPERS = ("module", "_orig_mod")  # put into the names by DDP and torch.compile
OBJECTIVES = {"DiT": "ddpm", "SiT": "flow"}


class Published(nn.Module):
    """A public DiT or SiT in the kit's time; `objective` is its training objective, which decides on the sampler.

    DiT: eps (and variance channels) at timestep 1000 t - 1, for `DDPMPath()`. SiT: v(x, t) = -v_SiT(x, 1 - t), its
    unused variance channels dropped. The blocks are inside `model`: `Dispersive(published, "model.blocks.6")`.
    """

    def __init__(self, model: DiT, family: str) -> None:
        super().__init__()
        self.model, self.family, self.objective = model, family, OBJECTIVES[family]
        self.num_classes, self.null_label = model.num_classes, model.null_label
        self.sample_shape = model.sample_shape

    @property
    def blocks(self) -> nn.ModuleList:
        return self.model.blocks

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None, *, taps: Sequence[int] = ()) -> Any:
        if self.family == "DiT":
            return self.model(x, t * 1000 - 1, y, taps=taps)
        out = self.model(x, 1 - t, y, taps=taps)
        v = -(out[0] if taps else out)[:, : self.model.in_channels]
        return (v, out[1]) if taps else v


def load_published(path: str | Path, family: str | None = None) -> Published:
    """The model of `DiT-XL-2-256x256.pt`, `SiT-XL-2-256.pt` or a training checkpoint (its EMA), in eval mode.

        model = load_published("DiT-XL-2-256x256.pt")
        latents = generate(model, labels, objective=model.objective, decode=...)   # or any sampler of the kit

    path: a .pt file, read with weights_only, or .safetensors with the same names. family: "DiT" or "SiT", if the
    file name does not begin with it. The size of the model is found from the shapes.
    Raises CheckpointError: no such file, not weights, or not of this form; every key and shape that differs is listed.
        ConfigError: a family that is not known, or a depth and width of no published size.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint at {path}: give a .pt or .safetensors file")
    family = family or path.name[:3]
    if family not in OBJECTIVES:
        raise ConfigError(f"is {path.name} a DiT or a SiT? Begin its name with one of them, or say family='DiT'")
    state = _read_state(path)
    with torch.device("meta"):  # no random weights, because the file replaces them all
        model = DiT(**_config_of(state, path), time_scale=1.0)
    try:
        model.load_state_dict(state, assign=True)
    except RuntimeError as error:  # names or shapes: torch says which
        raise CheckpointError(f"{path} is no {family} of the size that its shapes give: {error}") from error
    model.pos_embed.requires_grad_(False)
    return Published(model, family).eval()


def _read_state(path: Path) -> State:
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file  # here, because .pt files need torch only

            state: Any = load_file(path)
        else:
            with torch.serialization.safe_globals([argparse.Namespace]):  # training checkpoints carry their arguments
                state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling a damaged file may raise almost anything
        raise CheckpointError(f"{path} cannot be read as weights: {error}. Download it again") from error
    if isinstance(state, Mapping):
        state = state.get("ema", state)
    if not isinstance(state, Mapping):
        raise CheckpointError(f"{path} holds a {type(state).__name__}, not weights by name")
    return {".".join(p for p in str(key).split(".") if p not in WRAPPERS): value for key, value in state.items()}


def _config_of(state: State, path: Path) -> dict[str, Any]:
    """The DiT's arguments, from the shapes of its state."""
    needed = "x_embedder.proj.weight", "pos_embed", "final_layer.linear.weight", "y_embedder.embedding_table.weight"
    absent = [key for key, n in zip(needed, (4, 3, 2, 2), strict=True) if getattr(state.get(key), "ndim", 0) != n]
    if absent:
        raise CheckpointError(f"{path} is no class-conditional DiT or SiT: it lacks {', '.join(absent)} of their form")
    patches, positions, last, classes = (state[key].shape for key in needed)
    hidden_size, in_channels, patch_size, _ = patches
    depth = len({key.split(".")[1] for key in state if key.startswith("blocks.")})
    heads = [c["num_heads"] for c in DIT_CONFIGS.values() if (c["depth"], c["hidden_size"]) == (depth, hidden_size)]
    if not heads:
        sizes = ", ".join(f"{name} {c['depth']} x {c['hidden_size']}" for name, c in DIT_CONFIGS.items())
        raise ConfigError(f"{path} has depth {depth} and width {hidden_size}, no published size: there are {sizes}")
    return {
        "input_size": math.isqrt(positions[1]) * patch_size,
        "patch_size": patch_size,
        "in_channels": in_channels,
        "hidden_size": hidden_size,
        "depth": depth,
        "num_heads": heads[0],
        "num_classes": classes[0] - 1,
        "learn_sigma": last[0] == 2 * in_channels * patch_size**2,
    }
