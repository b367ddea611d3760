"""The commands around a store of latents: dispersive-kit encode | latents check | latents plan."""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from dispersive_kit.errors import ConfigError, DataError


def encode(
    images: Path,
    vae: str,
    out: Path,
    image_size: int = 256,
    flip: bool = True,
    dtype: Literal["float16", "bfloat16"] = "float16",
    shard_size: int = 4096,
    batch_size: int = 32,
    readers: int = 4,
    processes: int = 0,
    strict: bool = False,
    plan_only: bool = False,
) -> None:
    """Encode a folder of images once, into a store of latents to train on; given again, it goes on where it was.

    torchrun and accelerate may start it on many machines at once, and a second terminal may help at any time.

    Args:
        images: Folder of images; the first folder below it names the class.
        vae: Folder or hub id of a diffusers AutoencoderKL or AutoencoderTiny, or a registered name (module:name).
        out: The store.
        image_size: Side of ADM's centre crop.
        flip: Store mirror images too.
        dtype: Of the stored posterior mean and std.
        shard_size: Images in a file.
        batch_size: Images through the autoencoder at once.
        readers: Threads of each process that read and crop images.
        processes: On this machine; 0: one for each GPU, or for each core where there is none.
        strict: End at a file that cannot be read; otherwise it is left out, and listed in spec.json.
        plan_only: Print the final size and end.
    """
    from dispersive_kit.data.encode import EncodeProgress, encode
    from dispersive_kit.data.encoder import EncodeConfig, Encoder
    from dispersive_kit.data.store_plan import StorePlan, size_in_words

    require_positive(image_size=image_size, shard_size=shard_size, batch_size=batch_size, readers=readers)
    if processes < 0:
        raise ConfigError(f"--processes must be 0 or more, got {processes}")
    config = EncodeConfig(
        images, vae, out, image_size, flip, dtype, shard_size, batch_size, strict, readers, device=_device()
    )
    first = os.environ.get("RANK", "0") == "0"
    encoder = Encoder(config)
    plan = StorePlan(len(encoder.folder.files), encoder.shape, flip, shard_size=shard_size)
    processes = min(processes or _processes(), plan.shards)
    if first:
        print(f"{plan}\n{_in_short(encoder.folder.classes)}; {processes} processes, each at a shard of its own")
        print(f"{size_in_words(_room(out, plan.bytes))} free on the disk of {out}", flush=True)
    if plan_only:
        return
    progress = EncodeProgress() if first else None
    try:
        with _ended_by_sigterm():
            store = encode(encoder, processes=processes, on_batch=progress)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the shards that are finished", file=sys.stderr)
        raise SystemExit(130) from None
    if first:
        _report(store)


def require_positive(**values: float) -> None:
    """Raises ConfigError: a number is not above 0."""
    for name, value in values.items():
        if not value > 0:
            raise ConfigError(f"--{name.replace('_', '-')} must be above 0, got {value}")


@contextlib.contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Leave in order, so that the helping processes end too."""

    def leave(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _in_short(classes: tuple[str, ...]) -> str:
    """A folder too high or too low is seen here, before the night."""
    more = ", ..." if len(classes) > 3 else ""
    return f"{len(classes):,} classes, the first folders below it: {', '.join(classes[:3])}{more}"


def _device() -> str:
    import torch

    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"


def _processes() -> int:
    """One under a launcher, which has started the others."""
    import torch

    if "WORLD_SIZE" in os.environ:
        return 1
    return torch.cuda.device_count() or len(os.sched_getaffinity(0))


def _room(out: Path, wanted: int) -> int:
    """Bytes free where the store will lie, of which it may already have used some."""
    from dispersive_kit.data.files import free_bytes
    from dispersive_kit.data.store_plan import size_in_words

    used = sum(f.stat().st_size for f in out.glob("shard-*")) if out.is_dir() else 0
    free = free_bytes(out)
    if wanted > free + used:
        raise DataError(
            f"the store needs {size_in_words(wanted - used)} more, and the disk of {out} has {size_in_words(free)} "
            "free: make room, choose another disk, or store half with --no-flip"
        )
    return free


def _report(store: Any) -> None:
    spec = store.spec
    print(f"done: {store.path}: {len(store):,} images of {len(spec.classes)} classes")
    for kind, count in spec.images["odd"].items():
        print(f"  {count:,} {kind}: put right")
    for photo in spec.images["left_out"][:10]:
        print(f"  left out: {photo['file']} ({photo['fault']})")
    if (more := len(spec.images["left_out"]) - 10) > 0:
        print(f"  and {more:,} more left out, listed in spec.json")


def check(store: Annotated[Path, tyro.conf.Positional], vae: str | None = None, grid: Path | None = None) -> None:
    """Verify checksums, counts, statistics and autoencoder of a store, and decode 16 of its images to look at.

    Args:
        store: Folder that `encode` wrote.
        vae: Where the autoencoder lies now, if its folder was moved; its weights must be the same.
        grid: PNG to write; STORE-grid.png beside the store if not given.
    """
    from torchvision.utils import save_image

    from dispersive_kit.data.autoencoders import load_named
    from dispersive_kit.data.files import require_file
    from dispersive_kit.data.latents import LatentStore
    from dispersive_kit.data.store_check import check_store, decoded_grid

    file = grid or store.with_name(f"{store.name}-grid.png")
    require_file(file)
    opened = LatentStore(store)
    for line in check_store(opened):
        print(f"ok  {line}", flush=True)
    autoencoder = load_named(opened.spec.autoencoder, path=vae)
    print(f"ok  autoencoder {autoencoder.card}")
    images = decoded_grid(opened, autoencoder)
    save_image(images.float() / 255, file, nrow=4, padding=1)
    print(f"look at {file}: {len(images)} images, decoded")


def plan(
    num_images: int = 1_281_167,
    image_size: int = 256,
    downsampling: int = 8,
    channels: int = 4,
    flip: bool = True,
    shard_size: int = 4096,
    rate: float = 200.0,
    processes: int = 1,
) -> None:
    """Say how large a store will be and how long it will take, without any file. The defaults are ImageNet-1k.

    Args:
        num_images: In the folder.
        image_size: Side of the crop.
        downsampling: Of the autoencoder: 8 for the published sd-vae.
        channels: Of its latents.
        flip: Store mirror images too.
        shard_size: Images in a file.
        rate: Images a second of one process, mirror images included. The default is an assumption: `encode` prints
            the rate of your machine.
        processes: That work at once.
    """
    from dispersive_kit.data.store_plan import StorePlan

    given = {"num_images": num_images, "image_size": image_size, "downsampling": downsampling, "channels": channels,
             "shard_size": shard_size, "rate": rate, "processes": processes}  # fmt: skip
    require_positive(**given)
    if image_size % downsampling:
        raise ConfigError(f"--image-size {image_size} is no multiple of --downsampling {downsampling}")
    side = image_size // downsampling
    planned = StorePlan(num_images, (channels, side, side), flip, shard_size=shard_size)
    print(planned)
    print(f"{planned.bytes:,} bytes")
    print(f"{planned.hours(rate * processes):.2f} hours at {rate:g} images a second on each of {processes} processes")


Check = Annotated[Any, tyro.conf.subcommand("check", constructor=check, prefix_name=False)]
Plan = Annotated[Any, tyro.conf.subcommand("plan", constructor=plan, prefix_name=False)]


def latents(task: tyro.conf.OmitArgPrefixes[Check | Plan]) -> None:
    """Check a store of latents, or plan one."""
