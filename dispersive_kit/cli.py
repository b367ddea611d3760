"""The command line: dispersive-kit train | sample | evaluate | encode | check | run | export | study | lab | ...

Errors of the kit are printed without a traceback and end with status 2; Ctrl-C ends with 130, SIGTERM with 143, and a
closed pipe, as of `| head`, with 141.
"""

import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import tyro

from dispersive_kit import __version__
from dispersive_kit.cli_study import console, doctor, export, lab, run, study
from dispersive_kit.errors import ConfigError, DataError, KitError, printable


def train(
    out: Path,
    preset: str = "digits",
    regularizer: str | None = None,
    resume: bool = False,
    data: str | None = None,
    steps: int | None = None,
    seed: int | None = None,
    set: tyro.conf.UseAppendAction[tuple[str, ...]] = (),
) -> None:
    """Train a model. Ctrl-C saves a checkpoint; --resume continues from it, with the same result to the bit.

    Args:
        out: Folder of the run.
        preset: Name of a complete set of settings. The other options replace single settings of it.
        regularizer: none; a Dispersive Loss: paper, official-pytorch, small or care; or a rival: repa, clean-patch or
            layersync. Default: that of the preset.
        resume: Continue the run in this folder, or start one if there is none.
        data: digits, mnist, cifar10, a 2-D set such as two-moons, or the path of a folder of images or of latents.
        steps: Optimizer steps.
        seed: Seed of the initial weights and of everything random.
        set: Any other setting as NAME=VALUE, e.g. --set batch_size=256 --set model=DiT-S/2 --set regularizer.tau=0.5.
    """
    from dispersive_kit import training

    given = {"data": data, "steps": steps, "seed": seed, "regularizer.preset": regularizer}
    settings = {name: value for name, value in given.items() if value is not None} | dict(map(_setting, set))
    config = training.with_settings(training.train_preset(preset), settings)
    for _ in training.progress(training.train(config, out, resume=resume)):
        pass
    print(f"done: {out}")


def _setting(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"--set {text!r} is not NAME=VALUE: write, for example, --set batch_size=256")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def sample(
    run: tyro.conf.Positional[Path | None] = None,
    *,
    out: Path,
    published: Path | None = None,
    num: int = 100,
    label: int | None = None,
    sampler: Literal["", "heun", "euler", "dopri5", "sde", "ddim", "ddpm", "meanflow"] = "",
    num_steps: int = 25,
    cfg_scale: float = 1.0,
    guidance: tuple[float, float] = (0.0, 1.0),
    seed: int = 0,
    weights: Literal["ema", "model"] = "ema",
    vae: str | None = None,
) -> None:
    """Draw images from a trained run or a published checkpoint.

    Writes a picture of the first 100 images, and all images as one .npz with the array arr_0, uint8 NHWC.

    Args:
        run: Folder of a trained run, or name of a shipped one (digits-base).
        out: Folder for grid.png and samples.npz. It must be new or empty.
        published: Instead of a run, a public DiT or SiT checkpoint such as DiT-XL-2-256x256.pt; needs --vae.
        num: Number of images.
        label: One class for all images. Default: all classes in turn.
        sampler: For flow runs heun (default), euler, dopri5 or sde (SiT's own); for DDPM runs ddim (default) or ddpm.
        num_steps: Steps of the sampler.
        cfg_scale: Classifier-free guidance; 1 is none.
        guidance: Guidance acts between these two times; 0 is data, 1 is noise.
        seed: Seed of the first image; image i has seed + i.
        weights: The running average (ema), or the weights of the last step (model).
        vae: Folder or hub id of the autoencoder that decodes latents. A published checkpoint needs it. A run needs it
            only if its autoencoder was moved; the weights must be the same.
    """
    import numpy as np
    import torch
    from torchvision.utils import save_image

    from dispersive_kit.data.autoencoders import load_autoencoder
    from dispersive_kit.data.files import require_writable
    from dispersive_kit.evaluation import balanced_labels, decoder_of, generate
    from dispersive_kit.models import load_published
    from dispersive_kit.training import load_run
    from dispersive_kit.training.parallel import this_process

    if out.exists() and any(out.iterdir()):
        raise KitError(f"{out} is not empty: name another folder with --out")
    if num < 1:
        raise ConfigError(f"--num must be at least 1, got {num}")
    if (run is None) == (published is None):
        raise ConfigError("name either a run or, with --published, a checkpoint file")
    device = this_process().device
    require_writable((out if out.exists() else out.parent) / "samples.npz")
    if published is None:
        net, card = load_run(str(run), weights=weights)
        objective, name = card["config"].objective, f"{card['run']} at step {card['step']}"
        decode = decoder_of(card, device=device, path=vae)
    elif vae is None:
        raise ConfigError(f"{published} draws latents: name their autoencoder: --vae stabilityai/sd-vae-ft-ema")
    else:
        net, name = load_published(published), published.name
        objective, autoencoder = net.objective, load_autoencoder(vae, device=device)
        if (wanted := net.sample_shape[0]) != (found := autoencoder.latent_shape(64)[0]):
            raise ConfigError(f"{name} draws latents of {wanted} channels, and {vae} has {found}: give another --vae")
        decode = autoencoder.images
    labels = balanced_labels(num, net.num_classes) if label is None else torch.full((num,), label)
    settings: dict[str, Any] = {"sampler": sampler, "num_steps": num_steps, "cfg_scale": cfg_scale, "first_seed": seed}
    settings |= {"guidance_low": guidance[0], "guidance_high": guidance[1]}
    images = generate(net.to(device), labels, objective=objective, decode=decode, **settings)
    if not this_process().is_main_process:
        return
    out.mkdir(parents=True, exist_ok=True)
    save_image(images[:100].float() / 255, out / "grid.png", nrow=10, padding=1)  # 50,000 would need 40 GB
    np.savez(out / "samples.npz", images.permute(0, 2, 3, 1).numpy())
    print(f"{num} images of {name}: {out / 'grid.png'}, {out / 'samples.npz'}")


def evaluate(
    run: tyro.conf.Positional[Path],
    out: Path | None = None,
    extractor: Literal["auto", "classifier", "pixels-pca32", "effnet-lite0-pca64", "inception"] = "auto",
    metrics: Literal["panel", "FD", "FID"] = "panel",
    reference: str = "test",
    num: int = 500,
    num_steps: int = 25,
    cfg_scale: float = 1.0,
    seed: int = 0,
    memorisation: bool = False,
    data: str | None = None,
    vae: str | None = None,
) -> None:
    """Measure samples: distances to real images, each with its interval, its floor (of real images) and its record.

    Args:
        run: Folder of a trained run, name of a shipped one (digits-base), or an .npz of samples (arr_0, uint8 NHWC).
        out: JSON file for the records. Default: in the run's folder (shipped run: current folder), or beside the .npz.
        extractor: Feature space; it is part of each number's name. auto: a classifier for images of up to 32 pixels
            (trained in a minute), EfficientNet for larger ones (about 0.1 s per image on one core). inception: its
            weights must be in the data folder.
        metrics: panel: all metrics. FD: the Frechet distance alone. FID: the same, by the published protocol only.
        reference: Real images to compare with: test, train, or an .npz with their mean and covariance (mu and sigma, as
            in ADM's VIRTUAL_imagenet256_labeled.npz), which gives the Frechet distance alone, without a floor.
        num: Number of generated images, classes in turn. From a larger .npz, this many are drawn at random.
        num_steps: Steps of the default sampler of the run's objective.
        cfg_scale: Classifier-free guidance; 1 is none.
        seed: Seed of the first image; image i has seed + i.
        memorisation: Also measure how near samples are to training images, compared with held-out images.
        data: Data set to compare the samples with. Default: that of the run. An .npz of samples has no default.
        vae: New place of the autoencoder of a run on latents, if it was moved. Its weights must be the same.
    """
    from dispersive_kit.data.files import require_writable
    from dispersive_kit.evaluation import panel
    from dispersive_kit.training import run_folder
    from dispersive_kit.training.parallel import this_process

    how = panel.Evaluation(extractor, metrics, reference, num, num_steps, cfg_scale, seed, memorisation, data, vae)
    if out:
        require_writable(out)
    elif run_folder(run).exists():  # for a run that does not exist, `panel.evaluate` raises the error
        require_writable(panel.record_folder(run) / "evaluation.json")
    records = panel.evaluate(run, how)
    if this_process().is_main_process:
        print(panel.table(records))
        file = out or panel.record_file(run, how, records[0])
        file.write_text(panel.to_json(records))
        print(f"record: {file}")


def encode(
    images: Path,
    vae: str,
    out: Path,
    image_size: int = 256,
    flip: bool = True,
    dtype: Literal["float16", "bfloat16"] = "float16",
    shard_size: int = 4096,
    batch_size: int = 32,
    plan_only: bool = False,
) -> None:
    """Encode a folder of images into a store of latents to train on. The same command continues after a stop.

    A launcher lets several processes share the work, on one machine or more. With
    `torchrun --nproc_per_node 8 -m dispersive_kit.cli encode ...` each of them makes every eighth shard.

    Args:
        images: Folder of images; the first folder below it names the class.
        vae: Folder or hub id of a diffusers AutoencoderKL or AutoencoderTiny, or a registered name (module:name).
        out: Folder of the store.
        image_size: Side of ADM's centre crop.
        flip: Store mirror images too.
        dtype: Number format of the stored posterior mean and std.
        shard_size: Images per file.
        batch_size: Images per pass through the autoencoder.
        plan_only: Only print how large the store will be.
    """
    import torch

    from dispersive_kit.data.encode import Encoder, encode, store_size
    from dispersive_kit.data.files import free_bytes

    device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
    encoder = Encoder(images, vae, out, image_size, flip, dtype, shard_size, batch_size, device)
    number, calls = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if number == 0:  # show a wrong level of folders or a full disk before the long work
        classes = encoder.folder.classes
        total, size = store_size(len(encoder.folder.files), encoder.shape, flip=flip, shard_size=shard_size)
        missing = (total - sum((out / shard).stat().st_size for shard in encoder.finished())) / 1e6
        free = free_bytes(out) / 1e6
        print(f"{size}, of {len(classes):,} classes: {', '.join(classes[:3])}{', ...' if len(classes) > 3 else ''}")
        print(f"{calls} processes, each at a shard of its own; {free:,.1f} MB free on the disk of {out}", flush=True)
        if missing > free:
            cure = "make room, choose another disk, or store half with --no-flip"
            raise DataError(f"{out} needs {missing:,.1f} MB more, and its disk has {free:,.1f} MB free: {cure}")
    if plan_only or not (store := encode(encoder, part=(number, calls))):
        return
    print(f"done: {store.path}: {len(store):,} images of {len(store.spec.classes)} classes")
    for kind, count in {**store.spec.images["odd"], "left out": len(store.spec.images["left_out"])}.items():
        print(f"  {count:,} images: {kind} (see spec.json)")


def check(store: tyro.conf.Positional[Path], vae: str | None = None) -> None:
    """Verify checksums, counts and autoencoder of a store of latents, and decode 16 of its images to look at: they go
    beside the store, as STORE-grid.png, or into the current folder if its own cannot be written.

    Args:
        store: Folder that `encode` wrote.
        vae: New place of the autoencoder, if it was moved. Its weights must be the same.
    """
    from torchvision.utils import save_image

    from dispersive_kit.data.autoencoders import load_named
    from dispersive_kit.data.files import require_writable
    from dispersive_kit.data.latents import LatentStore

    opened, file = LatentStore(store), Path(f"{store.absolute()}-grid.png")
    try:
        require_writable(file)
    except DataError:  # a store may be shared, for reading alone
        require_writable(file := Path(file.name))
    for line in opened.check():
        print(f"ok  {line}", flush=True)
    autoencoder = load_named(opened.spec.autoencoder, path=vae)
    print(f"ok  autoencoder {autoencoder.card}")
    images = opened.decoded_grid(autoencoder)
    save_image(images.float() / 255, file, nrow=4, padding=1)
    print(f"look at {file}: {len(images)} images, decoded")


_IN_ORDER = (train, sample, evaluate, encode, check, run, export, study, lab, console, doctor)
COMMANDS: dict[str, Callable[..., Any]] = {command.__name__: command for command in _IN_ORDER}
DESCRIPTION = "Learn, test and plug in Dispersive Loss. -V, --version: print the version."


def main(args: Sequence[str] | None = None) -> None:
    """Entry point of `dispersive-kit`."""
    try:
        try:
            _run(list(sys.argv[1:] if args is None else args))
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # the program that reads the output, such as `head`, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None
    group = sys.modules.get("torch.distributed")
    if group and group.is_available() and group.is_initialized():
        group.destroy_process_group()
        if args is None:  # DDP keeps Gloo's threads, and they may abort Python as it ends (pytorch/pytorch#190489)
            os._exit(0)


def _run(args: list[str]) -> None:
    if args in (["--version"], ["-V"]):
        print(f"dispersive-kit {__version__}")
        return
    try:
        tyro.extras.subcommand_cli_from_dict(COMMANDS, prog="dispersive-kit", description=DESCRIPTION, args=args)
    except (KitError, OSError) as error:  # the latter: a file in place of a folder, a missing permission, a full disk
        if isinstance(error, BrokenPipeError):
            print(flush=True)  # raises again if stdout is the broken pipe: see `main`
        said = error if isinstance(error, KitError) else f"{error.filename or 'a file'}: {error.strerror or error}"
        print(printable(f"error: {said}"), file=sys.stderr)
        raise SystemExit(2) from error
    except KeyboardInterrupt:
        print("interrupted; to continue, give the same command again, with --resume if it has that", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
