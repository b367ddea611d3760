"""Autoencoders by id: a registered name, a folder that diffusers wrote, or a name on the Hugging Face hub."""

import hashlib
import importlib
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
from pydantic import Field, FiniteFloat, ValidationError
from pydantic.dataclasses import dataclass
from torch import Tensor

from dispersive_kit.errors import CheckpointError, ConfigError, DataError, form_error

Factory = TypeVar("Factory", bound=Callable[[], Any])
REGISTERED: dict[str, Callable[[], Any]] = {}
FORM = (
    "It needs encode(x): images (B, 3, H, W) in [-1, 1] -> posterior mean and std (0 or more), two tensors (B, C, h, w)"
    "; decode(z): a mean -> images; and numbers scale and shift"
)


def register_autoencoder(name: str) -> Callable[[Factory], Factory]:
    """Decorator: register a class, or a function without arguments, as the autoencoder `name`.

        @register_autoencoder("mine")
        class Mine:
            scale, shift = 0.5, 0.0  # the diffusion model sees (z - shift) * scale

            def encode(self, x):  # (B, 3, H, W) in [-1, 1] -> posterior mean and std, (B, C, h, w) each
                return x[:, :, ::8, ::8], torch.zeros_like(x[:, :, ::8, ::8])

            def decode(self, z):  # (B, C, h, w) -> (B, 3, H, W)
                return z.repeat_interleave(8, 2).repeat_interleave(8, 3)

    Its id is "mine", or "package.module:mine" for other processes. Its `state_dict`, if it has one, is hashed.
    """

    def register(factory: Factory) -> Factory:
        REGISTERED[name] = factory
        return factory

    return register


@dataclass(frozen=True)
class AutoencoderCard:
    """Identifies an autoencoder by the hash of its weights, and gives the scaling of its latents for the model."""

    id: str
    kind: str
    weights_sha256: str
    scale: Annotated[FiniteFloat, Field(gt=0)]
    shift: FiniteFloat

    def to_model(self, z: Tensor) -> Tensor:
        """Raw latents -> what the diffusion model is trained on."""
        return (z - self.shift) * self.scale


class Autoencoder:
    """A loaded autoencoder on its device, and its card. Results are on the device of the input."""

    def __init__(self, name: str, network: Any, device: torch.device | str = "cpu") -> None:
        if hasattr(network, "to"):
            network.to(device)
        self.network, self.device = network, device
        kind, digest = type(getattr(network, "of_diffusers", network)).__name__, _weights_sha256(network)
        try:
            self.card = AutoencoderCard(name, kind, digest, scale=network.scale, shift=network.shift)
        except ValidationError as error:
            raise form_error(error, f"autoencoder {name}") from error
        except AttributeError as error:
            raise ConfigError(f"autoencoder {name}: {error}. {FORM}") from error

    @torch.no_grad()
    def posterior(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> mean and std of the raw latents (B, 2, C, h, w)."""
        return torch.stack(self.network.encode(x.to(self.device)), dim=1).to(x.device)

    @torch.no_grad()
    def images(self, x: Tensor) -> Tensor:
        """Latents as the diffusion model has them (B, C, h, w) -> images (B, 3, H, W), about [-1, 1]."""
        return self.network.decode((x / self.card.scale + self.card.shift).to(self.device)).to(x.device)

    def latent_shape(self, size: int) -> tuple[int, int, int]:
        """(C, h, w) for images size x size; ConfigError if encoding and decoding one image does not work."""
        x = torch.linspace(-1, 1, 3 * size * size).reshape(1, 3, size, size)
        try:
            mean, std = self.posterior(x).unbind(1)
            _, C, h, w = mean.shape
            if not (mean.isfinite() & (std >= 0) & std.isfinite()).all():
                raise ValueError(f"encode gave NaN, infinity or a std below 0 (the least is {float(std.min()):.3g})")
            back = self.images(self.card.to_model(mean))
            if back.shape != x.shape or not back.isfinite().all():
                raise ValueError(f"decode gave {tuple(back.shape)} or values that are not finite; image_size may be no "
                                 "multiple of the factor of its downsampling")  # fmt: skip
        except Exception as error:  # a user's network may raise anything; the message shows it
            said = f"autoencoder {self.card.id}, tried on one image {tuple(x.shape)}"
            raise ConfigError(f"{said}: {type(error).__name__}: {error}. {FORM}") from error
        return C, h, w


class _Diffusers:
    """An autoencoder of diffusers with the interface of `FORM`."""

    def __init__(self, network: Any) -> None:
        self.of_diffusers, config = network.eval().requires_grad_(False), network.config
        self.scale, self.shift = float(config.scaling_factor), float(config.get("shift_factor") or 0.0)
        self.to, self.state_dict = network.to, network.state_dict

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        out = self.of_diffusers.encode(x)
        if not hasattr(out, "latent_dist"):  # AutoencoderTiny: a point, not a distribution
            return out.latents, torch.zeros_like(out.latents)
        return out.latent_dist.mean, out.latent_dist.std

    def decode(self, z: Tensor) -> Tensor:
        return self.of_diffusers.decode(z).sample


def load_autoencoder(
    autoencoder_id: str, *, device: torch.device | str = "cpu", download: bool = True, path: str | None = None
) -> Autoencoder:
    """Load an autoencoder by id. path: the new place, if its folder was moved; the id stays the same.

    Raises DataError: it is not found, or of a kind that the kit does not read. CheckpointError: its weights do not fit
        its configuration. ConfigError: a registered autoencoder without the interface that the message describes.
    """
    where = path or autoencoder_id
    name = str(Path(autoencoder_id).resolve()) if Path(autoencoder_id).is_dir() else autoencoder_id
    return Autoencoder(name, _registered(where) or _from_diffusers(where, download), device)


def load_named(card: AutoencoderCard, *, path: str | None = None, **options: Any) -> Autoencoder:
    """Load the autoencoder of a store or run; DataError if it is not found, or is a different one."""
    loaded = load_autoencoder(card.id, path=path, **options)
    refuse_other(loaded.card, card)
    return loaded


def refuse_other(found: AutoencoderCard, wanted: AutoencoderCard) -> None:
    """Raise DataError unless the two are the same autoencoder, scaled in the same way."""
    a, b = asdict(found), asdict(wanted)
    if wrong := [f"{k} is {a[k]!r}, not {b[k]!r}" for k in a if k != "id" and a[k] != b[k]]:
        raise DataError(
            f"autoencoder {found.id} is not the one the latents were made with: {'; '.join(wrong)}. "
            "Its images would be wrong: restore that autoencoder, or encode again with this one"
        )


def _weights_sha256(network: Any) -> str:
    """Hash of the names, types, shapes and values of the weights; if there are none, of the name of the class."""
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
            if last not in REGISTERED:
                raise ImportError(f"it registers no autoencoder {last!r}; there are: {', '.join(REGISTERED)}")
        except (ImportError, ValueError, TypeError) as error:  # the last two for an empty or a relative name
            raise DataError(
                f"autoencoder {name!r} cannot be imported from {module!r} ({error}); give a dotted name, as in "
                "my.package:mine, with the folder that holds it in PYTHONPATH"
            ) from error
    return REGISTERED[last]() if last in REGISTERED else None


def _from_diffusers(where: str, download: bool) -> _Diffusers:
    try:
        import diffusers
    except ImportError as error:
        raise DataError(f"autoencoder {where!r} needs diffusers: pip install 'dispersive-kit[latents]'") from error
    options: dict[str, Any] = {"local_files_only": not download}
    try:
        config = diffusers.AutoencoderKL.load_config(where, **options)
        kind = config.get("_class_name")
        if kind not in ("AutoencoderKL", "AutoencoderTiny") or config.get("latents_mean"):
            raise ValueError(f"it is a {kind}; the kit reads AutoencoderKL and AutoencoderTiny, without latents_mean")
        network, info = getattr(diffusers, kind).from_pretrained(where, output_loading_info=True, **options)
    except Exception as error:  # diffusers may raise anything for other files; the message shows it
        raise DataError(
            f"autoencoder {where!r} cannot be loaded ({type(error).__name__}: {str(error).partition(chr(10))[0]}). "
            "Give the folder of a diffusers autoencoder (config.json and weights; the folder vae of a whole pipeline), "
            f"a hub id, module:name{''.join(f', {name}' for name in REGISTERED)}; or, if it was moved, its new place "
            "with --vae (path= in code)"
        ) from error
    # if the file lacks a weight, diffusers leaves it random and only warns
    if faults := [f"{len(info[k])} {k.replace('_', ' ')}" for k in ("missing_keys", "unexpected_keys") if info[k]]:
        raise CheckpointError(f"the weights of autoencoder {where} do not fit its config.json: {', '.join(faults)}")
    return _Diffusers(network)
