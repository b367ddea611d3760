"""The command line: dispersive-kit demo | train | sample | evaluate | encode | latents | export | run | study ...

Errors of the kit are printed without a traceback and end with status 2; Ctrl-C ends with 130, SIGTERM with 143.
"""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from dispersive_kit import __version__
from dispersive_kit.cli_classroom import artefacts, console, lab
from dispersive_kit.cli_latents import encode, latents
from dispersive_kit.cli_study import study
from dispersive_kit.errors import ConfigError, KitError
from dispersive_kit.evaluation.options import Evaluation


def demo(out: Path = Path("runs/demo"), resume: bool = False) -> None:
    """Run the main job headlessly: four notebooks on data that needs no download, then one offline report.

    Trains a small class-conditional DiT on digits with flow matching, once without and once with Dispersive Loss at
    the paper's settings, samples both and measures them. About five minutes on two CPU cores.

    Args:
        out: Folder for the executed notebooks and report.html.
        resume: Go on in a folder that holds an earlier demo; stages that are unchanged are not run again.
    """
    from dispersive_kit.study.commands import run as run_headlessly

    run_headlessly("demo", out, mode=None, resume=resume)


def run(
    notebook: Annotated[str, tyro.conf.Positional],
    out: Path | None = None,
    mode: Literal["smoke", "class", "full"] | None = None,
    param: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(aliases=("-p",))] = (),
    resume: bool = False,
    executor_kind: Annotated[Literal["pool", "slurm", "local"], tyro.conf.arg(name="executor")] = "pool",
    workers: int | None = None,
) -> None:
    """Run one notebook ("06", or a path) or a pipeline ("demo", or a YAML file) headlessly.

    Args:
        notebook: Start of a notebook's name, a path, the name of a shipped pipeline, or the path of its YAML file.
        out: Folder to write; runs/NAME if not given.
        mode: smoke (seconds), class (minutes on a laptop) or full (a GPU); a pipeline's own, or class, if not given.
        param: A parameter of the notebook as NAME=VALUE, e.g. -p seed=3; may be given several times.
        resume: Go on in a folder that holds this run already; what is unchanged is not run again.
        executor_kind: Where a pipeline runs: processes here (pool), Slurm jobs, or a trial of such jobs here (local).
        workers: At most so many runs of a sweep at once; one per GPU if not given, and all of them on a cluster.
    """
    from dispersive_kit.study.commands import run as run_headlessly
    from dispersive_kit.study.sweep import Executor

    executor = Executor(kind=executor_kind, workers=workers)
    run_headlessly(notebook, out, mode=mode, parameters=param, resume=resume, executor=executor)


def runs(
    action: Annotated[Literal["list", "show", "compare"], tyro.conf.Positional],
    names: Annotated[tuple[str, ...], tyro.conf.Positional] = (),
    folder: Path | None = None,
) -> None:
    """List the runs of notebooks and pipelines that are there, show one, or compare several.

    Args:
        action: list (all), show NAME, or compare NAME NAME ... (only what they differ in).
        names: Names of runs, as `list` gives them.
        folder: Where the runs lie; the runs folder if not given.
    """
    from dispersive_kit.study.commands import show_runs

    print(show_runs(action, names, folder))


def _parameter(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"{text!r} is not NAME=VALUE")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def train(
    out: Path,
    preset: str = "digits",
    regularizer: str | None = None,
    resume: bool = False,
    data: str | None = None,
    data_dir: str | None = None,
    model: str | None = None,
    steps: int | None = None,
    batch_size: int | None = None,
    learning_rate: float | None = None,
    seed: int | None = None,
    weight: float | None = None,
    tau: float | None = None,
    kind: str | None = None,
    at: str | None = None,
    checkpoint_every: int | None = None,
    fsdp: bool = False,
    set: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = (),
) -> None:
    """Train a model; Ctrl-C leaves a checkpoint, and --resume goes on from it to the same bits.

    Args:
        out: Folder of the run.
        preset: Where all settings start from; those given beside it replace its own.
        regularizer: none, paper, official-pytorch or small; that of the preset if not given.
        resume: Go on with the run in this folder; a new one is started if there is none.
        data: digits, mnist, cifar10, a 2-D set such as two-moons, or the path of a folder of images or of latents.
        data_dir: Folder in which mnist and cifar10 lie.
        model: DiT-{T,S,B,L,XL}/{1,2,4,8}, or MLP for a 2-D set.
        steps: Optimizer steps.
        batch_size: Global batch, over all processes and accumulation.
        learning_rate: Peak of the schedule.
        seed: Of the initialisation and everything drawn.
        weight: Of the regulariser (lambda).
        tau: Temperature of the regulariser.
        kind: Variant of the regulariser.
        at: Dotted path of the block it acts on.
        checkpoint_every: Steps between checkpoints.
        fsdp: Shard the parameters over the processes of the launcher, not only the batch.
        set: Any other setting as NAME=VALUE, e.g. --set accumulation=2 --set regularizer.gather=true.
    """
    from dispersive_kit.training import progress, train_preset, with_settings
    from dispersive_kit.training import train as training_steps

    given = {
        "data": data,
        "data_dir": data_dir,
        "model": model,
        "steps": steps,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "seed": seed,
        "checkpoint_every": checkpoint_every,
        "fsdp": fsdp or None,
    }
    config = train_preset(
        preset,
        **{name: value for name, value in given.items() if value is not None},
    )
    options = {"preset": regularizer, "at": at, "kind": kind, "weight": weight, "tau": tau}
    chosen = {f"regularizer.{name}": value for name, value in options.items() if value is not None}
    config = with_settings(config, chosen | dict(_parameter(one) for one in set))
    for _ in progress(training_steps(config, out, resume=resume)):
        pass
    print(f"done: {out}")


def sample(
    run: Annotated[Path, tyro.conf.Positional],
    out: Path,
    num: int = 100,
    label: int | None = None,
    num_steps: int = 25,
    cfg_scale: float = 1.0,
    seed: int = 0,
    weights: Literal["ema", "model"] = "ema",
    vae: str | None = None,
) -> None:
    """Draw images from a trained run: a PNG grid of the first hundred, and one .npz (arr_0, uint8 NHWC).

    Args:
        run: Folder of a trained run, or name of a shipped one (digits-base).
        out: Folder to write grid.png and samples.npz into; refused if it holds something already.
        num: Number of images.
        label: Class of all images; all classes in turn if not given.
        num_steps: Steps of the sampler: Heun, of DDPM runs DDIM, of MeanFlow runs its own.
        cfg_scale: Classifier-free guidance; 1 is none.
        seed: Of the first image; image i has seed + i.
        weights: The average (ema), or the weights as last trained (model).
        vae: Where the autoencoder of a run on latents lies now, if it was moved; its weights must be the same.
    """
    import torch
    from torchvision.utils import save_image

    from dispersive_kit.evaluation import balanced_labels, decoder_of, generate
    from dispersive_kit.evaluation.export import save_npz
    from dispersive_kit.evaluation.processes import this_process
    from dispersive_kit.training import load_run
    from dispersive_kit.training.shipped import run_folder

    net, card = load_run(run_folder(run), weights=weights)
    device = this_process().device
    if len(net.sample_shape) != 3:
        raise ConfigError(f"{run} was trained on points of the plane, which are no images: see notebook 02 for those")
    if out.exists() and any(out.iterdir()):
        raise KitError(f"{out} is not empty: name another folder with --out")
    if num < 1:
        raise ConfigError(f"--num must be at least 1, got {num}")
    labels = balanced_labels(num, net.num_classes) if label is None else torch.full((num,), label)
    decode, objective = decoder_of(card, device=device, path=vae), card["config"].objective
    net = net.to(device)
    images = generate(
        net, labels, objective=objective, num_steps=num_steps, cfg_scale=cfg_scale, first_seed=seed, decode=decode
    )
    if not this_process().is_main_process:
        return
    out.mkdir(parents=True, exist_ok=True)
    save_image(images[:100].float() / 255, out / "grid.png", nrow=10, padding=1)  # 50,000 would need 40 GB
    save_npz(images, out / "samples.npz")
    print(f"{num} images of {card['run']} at step {card['step']}: {out / 'grid.png'}, {out / 'samples.npz'}")


def evaluate(
    run: Annotated[Path, tyro.conf.Positional],
    how: Annotated[Evaluation, tyro.conf.arg(name="")],
    out: Path | None = None,
) -> None:
    """Measure samples: a panel of distances to real images, each with interval, floor and record.

    Args:
        run: Folder of a trained run, name of a shipped one (digits-base), or an .npz of samples (arr_0, uint8 NHWC).
        how: What to measure, and how samples are drawn.
        out: JSON file for the records; named after the settings and beside the samples if not given.
    """
    from dispersive_kit.data.files import require_file
    from dispersive_kit.evaluation.evaluate import evaluate as measure
    from dispersive_kit.evaluation.evaluate import record_file, record_folder
    from dispersive_kit.evaluation.processes import this_process
    from dispersive_kit.evaluation.record import table, to_json
    from dispersive_kit.training.shipped import run_folder

    if out:
        require_file(out)
    elif run_folder(run).exists():  # anything else is named by what follows
        require_file(record_folder(run) / "evaluation.json")
    records = measure(run, how)
    if this_process().is_main_process:
        print(table(records))
        file = out or record_file(run, how, records[0])
        file.write_text(to_json(records))
        print(f"record: {file}")


def export(
    run: Annotated[Path, tyro.conf.Positional],
    out: Path,
    step: int | None = None,
    command: str = "",
    note: str = "",
) -> None:
    """Write a run's averaged weights in half precision, with its curves and card: small enough to share.

    Args:
        run: Folder of a trained run.
        out: Folder to write; refused if it holds something already. sample and evaluate take it like a run.
        step: A kept checkpoint; the newest if not given.
        command: What the run was started with, kept in run.json.
        note: What a reader should know of it, kept in run.json.
    """
    from dispersive_kit.training import export_run

    print(f"exported: {export_run(run, out, step=step, command=command, note=note)}")


def doctor() -> None:
    """Look at versions, devices, memory, folders and data, and say what to do about each fault."""
    from dispersive_kit.study.doctor import examine

    findings = examine()
    for finding in findings:
        print(f"{'ok  ' if finding.ok else 'FAIL'}  {finding.name:<20} {finding.detail}")
        if not finding.ok:
            print(f"      fix: {finding.fix}")
    if faults := sum(not f.ok for f in findings):
        raise KitError(f"{faults} of {len(findings)} need attention")


COMMANDS: dict[str, Callable[..., Any]] = {
    "demo": demo,
    "train": train,
    "sample": sample,
    "evaluate": evaluate,
    "encode": encode,
    "latents": latents,
    "run": run,
    "export": export,
    "runs": runs,
    "study": study,
    "lab": lab,
    "console": console,
    "artefacts": artefacts,
    "doctor": doctor,
}


DESCRIPTION = "Learn, test and plug in Dispersive Loss. -V, --version: say which this is, and end."


def _part_from_the_others() -> None:
    """Leave the processes of a launcher in order: threads of the group that still run as Python ends abort it."""
    group = sys.modules.get("torch.distributed")
    if group and group.is_available() and group.is_initialized():
        group.destroy_process_group()


def main(args: Sequence[str] | None = None) -> None:
    """Entry point of `dispersive-kit`."""
    if list(sys.argv[1:] if args is None else args) in (["--version"], ["-V"]):
        print(f"dispersive-kit {__version__}")
        return
    try:
        tyro.extras.subcommand_cli_from_dict(COMMANDS, prog="dispersive-kit", description=DESCRIPTION, args=args)
        _part_from_the_others()
    except KitError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    except OSError as error:  # a folder that is a file, that may not be written, a full disk
        print(f"error: {error.filename or 'a file'}: {error.strerror or error}", file=sys.stderr)
        raise SystemExit(2) from error
    except KeyboardInterrupt:
        print("interrupted; go on with the same command, and --resume where it has that", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
