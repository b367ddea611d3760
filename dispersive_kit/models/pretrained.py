"""Published DiT and SiT checkpoints: read, checked key by key, run in the kit's time, and written back.

Their time conventions cannot be moved into the weights, so `PublishedDiT` and `PublishedSiT` wrap a `DiT`:
the only place of the kit that converts time and sign.
"""

import argparse
import contextlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..errors import CheckpointError, ConfigError
from .dit import DIT_CONFIGS, DiT, Mlp, sincos_2d

State = Mapping[str, Tensor]
# Module names, ours: those of diffusers' DiTTransformer2DModel, which repeats the embedders in every block.
TOP_NAMES = {
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}
SHARED_NAMES = {
    "t_embedder.mlp.0": "norm1.emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "norm1.emb.timestep_embedder.linear_2",
    "y_embedder.embedding_table": "norm1.emb.class_embedder.embedding_table",
}
BLOCK_NAMES = {
    "adaLN_modulation.1": "norm1.linear",
    "attn.proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
}
DIFFUSERS_CLASS = "DiTTransformer2DModel"  # Transformer2DModel in folders of before 2024, as the public DiT-XL/2 is
DIFFUSERS_CONFIG = {"activation_fn": "gelu-approximate", "norm_type": "ada_norm_zero"}  # and this alone is a DiT's
NEEDED_CONFIG = ("num_layers", "num_attention_heads", "attention_head_dim", "sample_size", "patch_size")


class PublishedDiT(nn.Module):
    """The public DiT in the kit's time: eps (and variance channels) at timestep 1000 t - 1, for `DDPMPath()`.

    Its blocks lie below `model`: `Dispersive(published, "model.blocks.6")`.
    """

    family = "DiT"

    def __init__(self, model: DiT) -> None:
        super().__init__()
        self.model = model
        self.null_label, self.num_classes = model.null_label, model.num_classes
        self.in_channels, self.input_size = model.in_channels, model.input_size

    @property
    def blocks(self) -> nn.ModuleList:
        return self.model.blocks

    @property
    def sample_shape(self) -> tuple[int, ...]:
        return self.model.sample_shape

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None, *, taps: Sequence[int] = ()) -> Any:
        return self.model(x, t * 1000 - 1, y, taps=taps)


class PublishedSiT(PublishedDiT):
    """The public SiT in the kit's time: v(x, t) = -v_SiT(x, 1 - t), its unused variance channels dropped."""

    family = "SiT"

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None, *, taps: Sequence[int] = ()) -> Any:
        out = self.model(x, 1 - t, y, taps=taps)
        v = -(out[0] if taps else out)[:, : self.in_channels]
        return (v, out[1]) if taps else v


def load_published(
    path: str | Path, family: str | None = None, num_heads: int | None = None, checkpointing: bool = False
) -> PublishedDiT:
    """Read `DiT-XL-2-256x256.pt`, `SiT-XL-2-256.pt`, a training checkpoint of either (its EMA), or a
    diffusers folder.

    family: "DiT" or "SiT" where the file name does not begin with it. num_heads: where (depth, width) is not
    a published size. Loaded with weights_only; CheckpointError lists every key and shape that differs.
    """
    path, state = Path(path), dict[str, Tensor]()
    if path.is_dir():
        family = family or "DiT"
        state, num_heads = read_diffusers(path)
    elif path.is_file():
        state, family = dict(read_state(path)), family or path.name[:3]
    else:
        raise CheckpointError(f"there is no checkpoint at {path}: give a .pt file or a diffusers folder")
    if family not in ("DiT", "SiT"):
        raise ConfigError(f"is {path.name} a DiT or a SiT? Say family='DiT' or family='SiT'")
    with torch.device("meta"):  # no weight is drawn that the file replaces
        model = DiT(**config_of(state, num_heads, path), time_scale=1.0, checkpointing=checkpointing)
    differences = compare(state, model.state_dict())
    if differences:
        raise CheckpointError(f"{path} is no {family} of its first layer's shape:\n  " + "\n  ".join(differences))
    model.load_state_dict(state, assign=True)
    model.pos_embed.requires_grad_(False)
    return PublishedSiT(model) if family == "SiT" else PublishedDiT(model)


def save_published(published: PublishedDiT, path: str | Path) -> None:
    """Write the weights back: to a name ending in .pt as the public file, else as a diffusers folder (DiT).

    Raises ConfigError: the model has what neither holds, and would be read back as another one.
    """
    path = Path(path)
    if extras := beyond_published(published.model):
        raise ConfigError(f"the published files have no place for {', '.join(extras)}: keep the run's own checkpoint")
    state = {key: value.detach().cpu().contiguous() for key, value in published.model.state_dict().items()}
    if path.suffix == ".pt":
        with replacing(path) as partial:
            torch.save(state, partial)
        return
    if published.family != "DiT":
        raise ConfigError("diffusers has no SiT transformer: save to a name ending in .pt")
    model = published.model
    path.mkdir(parents=True, exist_ok=True)
    with replacing(path / "diffusion_pytorch_model.safetensors") as partial:
        save_file(to_diffusers(state), partial)
    config = (
        {"_class_name": DIFFUSERS_CLASS}
        | DIFFUSERS_CONFIG
        | {
            "attention_head_dim": model.pos_embed.shape[2] // model.num_heads,
            "num_attention_heads": model.num_heads,
            "num_embeds_ada_norm": model.num_classes,
            "num_layers": len(model.blocks),
            "in_channels": model.in_channels,
            "out_channels": model.out_channels,
            "patch_size": model.patch_size,
            "sample_size": model.input_size,
        }
    )
    with replacing(path / "config.json") as partial:
        partial.write_text(json.dumps(config, indent=2) + "\n")


def beyond_published(model: DiT) -> list[str]:
    """What a model has and the published ones have not; the shapes of a file do not tell all of it."""
    first: Any = model.blocks[0]
    width = model.pos_embed.shape[2]
    found = {
        "RMSNorm": isinstance(first.norm1, nn.RMSNorm),
        "QK-norm": not isinstance(first.attn.q_norm, nn.Identity),
        "SwiGLU": not isinstance(first.mlp, Mlp),
        "an MLP of another ratio than 4": isinstance(first.mlp, Mlp) and first.mlp.fc1.out_features != 4 * width,
        "RoPE": model.rope_cos is not None,
        "a second time r": model.r_embedder is not None,
        "a class table without a null class": model.null_label is None,
        f"times that the model itself scales by {model.time_scale:g}": model.time_scale != 1,
    }
    return [name for name, has in found.items() if has]


@contextlib.contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """The name to write `file` under, which then replaces it as a whole."""
    partial = file.with_name(f".partial-{file.name}")
    try:
        yield partial
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


def read_state(path: Path) -> State:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):  # training checkpoints carry their arguments
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(f"{path} cannot be read as weights: {error}. Download it again") from error
    if not isinstance(state, Mapping):
        raise CheckpointError(f"{path} holds a {type(state).__name__}, not weights by name")
    return state.get("ema", state)


def config_of(state: State, num_heads: int | None, path: Path) -> dict[str, Any]:
    """The DiT's arguments, from the shapes of its state."""
    needed = (
        "x_embedder.proj.weight",
        "pos_embed",
        "final_layer.linear.weight",
        "y_embedder.embedding_table.weight",
    )
    absent = [key for key in needed if not isinstance(state.get(key), Tensor)]
    if absent:
        raise CheckpointError(f"{path} is no class-conditional DiT or SiT: it lacks {', '.join(absent)}")
    hidden_size, in_channels, patch_size, _ = state[needed[0]].shape
    depth = len({key.split(".")[1] for key in state if key.startswith("blocks.")})
    published = {(c["depth"], c["hidden_size"]): c["num_heads"] for c in DIT_CONFIGS.values()}
    num_heads = num_heads or published.get((depth, hidden_size))
    if num_heads is None:
        raise ConfigError(f"{path} has depth {depth} and width {hidden_size}, no published size: say num_heads=")
    return {
        "input_size": math.isqrt(state["pos_embed"].shape[1]) * patch_size,
        "patch_size": patch_size,
        "in_channels": in_channels,
        "hidden_size": hidden_size,
        "depth": depth,
        "num_heads": num_heads,
        "num_classes": state[needed[3]].shape[0] - 1,
        "learn_sigma": state[needed[2]].shape[0] == 2 * in_channels * patch_size**2,
    }


def compare(state: State, wanted: State) -> list[str]:
    """What differs, a line each: missing, unexpected, and other shapes."""
    lines = [f"missing: {key} {tuple(value.shape)}" for key, value in wanted.items() if key not in state]
    lines += [f"unexpected: {key}" for key in state if key not in wanted]
    for key in (key for key in wanted if key in state and state[key].shape != wanted[key].shape):
        lines.append(f"shape: {key} is {tuple(state[key].shape)}, expected {tuple(wanted[key].shape)}")
    return lines


def diffusers_names(depth: int) -> dict[str, list[str]]:
    """Module names, kit: diffusers; several where diffusers repeats a module or splits it (q, k, v)."""
    blocks = [f"transformer_blocks.{i}" for i in range(depth)]
    names = {kit: [theirs] for kit, theirs in TOP_NAMES.items()}
    names |= {kit: [f"{block}.{theirs}" for block in blocks] for kit, theirs in SHARED_NAMES.items()}
    for i, block in enumerate(blocks):
        names |= {f"blocks.{i}.{kit}": [f"{block}.{theirs}"] for kit, theirs in BLOCK_NAMES.items()}
        names[f"blocks.{i}.attn.qkv"] = [f"{block}.attn1.to_{part}" for part in "qkv"]
    return names


def read_diffusers(folder: Path) -> tuple[dict[str, Tensor], int]:
    """The state under the public names, and the number of heads, of a DiTTransformer2DModel or a pipeline with one."""
    folder = folder / "transformer" if (folder / "transformer").is_dir() else folder
    weights = [f for f in sorted(folder.glob("diffusion_pytorch_model.*")) if f.suffix in (".safetensors", ".bin")]
    if not weights or not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} is no diffusers folder: it needs config.json and diffusion_pytorch_model.*")
    config, theirs = json.loads((folder / "config.json").read_text()), dict(read_state(weights[-1]))
    if absent := [name for name in NEEDED_CONFIG if name not in config]:
        raise CheckpointError(f"{folder}/config.json is not a DiT's: it lacks {', '.join(absent)}")
    if not config.items() >= DIFFUSERS_CONFIG.items():
        raise CheckpointError(f"{folder}/config.json is not a DiT's: it lacks one of {DIFFUSERS_CONFIG}")
    state: dict[str, Tensor] = {}
    repeated = []
    for kit, names in diffusers_names(config["num_layers"]).items():
        for kind in ("weight", "bias"):
            found = [theirs.pop(f"{name}.{kind}") for name in names if f"{name}.{kind}" in theirs]
            if found and kit.endswith("qkv"):
                state[f"{kit}.{kind}"] = torch.cat(found)
            elif found:
                state[f"{kit}.{kind}"] = found[0]
                repeated += [f"{names[0]}.{kind}"] if any(not torch.equal(found[0], f) for f in found) else []
    if repeated or theirs:
        raise CheckpointError(
            f"{folder} cannot be a DiT: unexpected {sorted(theirs)}; different from block to block {repeated}"
        )
    hidden_size = config["num_attention_heads"] * config["attention_head_dim"]
    state["pos_embed"] = sincos_2d(hidden_size, config["sample_size"] // config["patch_size"])[None]
    return state, config["num_attention_heads"]


def to_diffusers(state: State) -> dict[str, Tensor]:
    depth = len({key.split(".")[1] for key in state if key.startswith("blocks.")})
    theirs: dict[str, Tensor] = {}
    for kit, names in diffusers_names(depth).items():
        for kind in ("weight", "bias"):
            if f"{kit}.{kind}" in state:
                value = state[f"{kit}.{kind}"]
                parts = value.chunk(3) if kit.endswith("qkv") else [value] * len(names)
                theirs |= {f"{n}.{kind}": part.clone() for n, part in zip(names, parts, strict=True)}
    return theirs
