"""Autoencoders by id: a registered name, a folder that diffusers wrote, or the name of a model on the Hugging Face hub.

One of your own takes ten lines:

    @register_autoencoder("mine")
    class Mine:
        scale, shift = 0.5, 0.0  # the diffusion model sees (z - shift) * scale

        def encode(self, x):  # (B, 3, H, W) in [-1, 1] -> posterior mean and std, (B, C, h, w) each
            return x[:, :, ::8, ::8], torch.zeros_like(x[:, :, ::8, ::8])

        def decode(self, z):  # (B, C, h, w) -> (B, 3, H, W)
            return z.repeat_interleave(8, 2).repeat_interleave(8, 3)

Its id is "mine", or "package.module:mine" for other processes. The weights in its `state_dict`, if any, are hashed.
"""

import hashlib
import importlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from dispersive_kit.errors import CheckpointError, ConfigError, DataError

Factory = TypeVar("Factory", bound=Callable[[], Any])
REGISTERED: dict[str, Callable[[], Any]] = {}


def register_autoencoder(name: str) -> Callable[[Factory], Factory]:
    """Decorator: make a class, or a function without arguments, known as the autoencoder `name`."""

    def register(factory: Factory) -> Factory:
        REGISTERED[name] = factory
        return factory

    return register


@dataclass(frozen=True)
class AutoencoderCard:
    """Which autoencoder, to the last bit of its weights, and how its latents are scaled for the model."""

    id: str
    kind: str
    weights_sha256: str
    scale: float
    shift: float

    def to_model(self, z: Tensor) -> Tensor:
        """Raw latents -> what the diffusion model is trained on."""
        return (z - self.shift) * self.scale


@dataclass(frozen=True)
class Autoencoder:
    """A loaded autoencoder on its device, and its card. What goes in on another device comes back there."""

    card: AutoencoderCard
    network: Any
    device: torch.device | str = "cpu"

    @torch.no_grad()
    def posterior(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> mean and std of the raw latents (B, 2, C, h, w)."""
        return torch.stack(self.network.encode(x.to(self.device)), dim=1).to(x.device)

    @torch.no_grad()
    def images(self, x: Tensor) -> Tensor:
        """Latents as the diffusion model has them (B, C, h, w) -> images (B, 3, H, W), about [-1, 1]."""
        return self.network.decode((x / self.card.scale + self.card.shift).to(self.device)).to(x.device)


class _Diffusers:
    """An autoencoder of diffusers with the methods of the ten lines above."""

    def __init__(self, network: Any) -> None:
        self.network = network.eval().requires_grad_(False)
        self.scale = float(network.config.scaling_factor)
        self.shift = float(network.config.get("shift_factor") or 0.0)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        out = self.network.encode(x)
        if not hasattr(out, "latent_dist"):  # AutoencoderTiny: a point, not a distribution
            return out.latents, torch.zeros_like(out.latents)
        return out.latent_dist.mean, out.latent_dist.std

    def decode(self, z: Tensor) -> Tensor:
        return self.network.decode(z).sample

    def state_dict(self) -> dict[str, Tensor]:
        return self.network.state_dict()

    def to(self, device: torch.device | str) -> None:
        self.network.to(device)


def load_autoencoder(
    autoencoder_id: str, *, device: torch.device | str = "cpu", download: bool = True, path: str | None = None
) -> Autoencoder:
    """Load an autoencoder by id; from `path`, where a folder was moved; the id stays.

    Raises:
        DataError: it is not here. CheckpointError: its weights are not those its configuration asks for.
        ConfigError: a kind of autoencoder the kit does not read.
    """
    where = path or autoencoder_id
    network = _registered(where) or _from_diffusers(where, download)
    if hasattr(network, "to"):
        network.to(device)
    name = str(Path(autoencoder_id).resolve()) if Path(autoencoder_id).is_dir() else autoencoder_id
    kind = type(network.network if isinstance(network, _Diffusers) else network).__name__
    card = AutoencoderCard(name, kind, _weights_sha256(network), float(network.scale), float(network.shift))
    return Autoencoder(card, network, device)


def load_named(card: AutoencoderCard, *, path: str | None = None, **options: Any) -> Autoencoder:
    """Load the autoencoder of a store or run, and refuse any other.

    Raises:
        DataError: it was moved, or is not the same: the message says whether kind, weights, scale or shift differ.
    """
    if path is None and Path(card.id).is_absolute() and not Path(card.id).exists():
        raise DataError(
            f"autoencoder {card.id} is no longer there: if it was moved, give its new place with --vae (path= in code)"
        )
    loaded = load_autoencoder(card.id, path=path, **options)
    refuse_other(loaded.card, card)
    return loaded


def refuse_other(found: AutoencoderCard, wanted: AutoencoderCard) -> None:
    """Raise DataError unless the two are the same autoencoder, scaled in the same way."""
    a, b = asdict(found), asdict(wanted)
    if wrong := [f"{k} is {a[k]!r}, not {b[k]!r}" for k in a if a[k] != b[k]]:
        raise DataError(
            f"autoencoder {found.id} is not the one the latents were made with: {'; '.join(wrong)}. "
            "Its images would be wrong: restore that autoencoder, or encode again with this one"
        )


def _weights_sha256(network: Any) -> str:
    """Of names, types, shapes and values of the weights, whatever file they came from; without any, of the class."""
    state = network.state_dict() if hasattr(network, "state_dict") else {}
    digest = hashlib.sha256(b"" if state else type(network).__qualname__.encode())
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _registered(name: str) -> Any:
    module, colon, last = name.rpartition(":")
    if colon and not Path(name).exists():
        try:
            importlib.import_module(module)
        except (ImportError, ValueError, TypeError) as error:  # the latter two of an empty or a relative name
            raise DataError(
                f"autoencoder {name!r}: module {module!r} cannot be imported ({error}); give its dotted name, as in "
                "my.package:MyAutoencoder"
            ) from error
    return REGISTERED[last]() if last in REGISTERED else None


def _from_diffusers(where: str, download: bool) -> _Diffusers:
    try:
        import diffusers
    except ImportError as error:
        raise DataError(f"autoencoder {where!r} needs diffusers: pip install 'dispersive-kit[latents]'") from error
    options: dict[str, Any] = {"local_files_only": not download}
    try:
        kind = diffusers.AutoencoderKL.load_config(where, **options).get("_class_name")
        if kind not in ("AutoencoderKL", "AutoencoderTiny"):
            raise ConfigError(f"{where} is a {kind}; the kit reads AutoencoderKL and AutoencoderTiny")
        network, info = getattr(diffusers, kind).from_pretrained(where, output_loading_info=True, **options)
    except ConfigError:
        raise
    except (OSError, ValueError) as error:
        known = f", a registered name ({', '.join(REGISTERED)})" if REGISTERED else ""
        raise DataError(
            f"autoencoder {where!r} cannot be loaded: {str(error).splitlines()[0]}. Give the folder of a diffusers "
            f"autoencoder (config.json and weights), a hub id{known} or module:name"
        ) from error
    # diffusers only warns, and leaves at random, what the file does not have
    if faults := [f"{len(info[k])} {k.replace('_', ' ')}" for k in ("missing_keys", "unexpected_keys") if info[k]]:
        raise CheckpointError(f"the weights of autoencoder {where} do not fit its config.json: {', '.join(faults)}")
    return _Diffusers(network)
