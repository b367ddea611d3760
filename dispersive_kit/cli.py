"""The command line: dispersive-kit train | sample | evaluate | encode | check | run | runs | study | lab | console ...

Errors of the kit are printed without a traceback and end with status 2; Ctrl-C ends with 130, SIGTERM with 143.
"""

import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union

import tyro

from dispersive_kit import __version__
from dispersive_kit.errors import ConfigError, KitError
from dispersive_kit.evaluation import Evaluation

Name = Annotated[str, tyro.conf.Positional]
Folder = Annotated[Path, tyro.conf.Positional]


def train(
    out: Path,
    preset: str = "digits",
    regularizer: str | None = None,
    resume: bool = False,
    data: str | None = None,
    model: str | None = None,
    steps: int | None = None,
    batch_size: int | None = None,
    learning_rate: float | None = None,
    seed: int | None = None,
    weight: float | None = None,
    set: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = (),
) -> None:
    """Train a model; Ctrl-C leaves a checkpoint, and --resume goes on from it to the same bits.

    Args:
        out: Folder of the run.
        preset: Where all settings start from; those given beside it replace its own.
        regularizer: none, paper, official-pytorch or small; that of the preset if not given.
        resume: Go on with the run in this folder; a new one is started if there is none.
        data: digits, mnist, cifar10, a 2-D set such as two-moons, or the path of a folder of images or of latents.
        model: DiT-{T,S,B,L,XL}/{1,2,4,8}, or MLP for a 2-D set.
        steps: Optimizer steps.
        batch_size: Global batch, over all processes and accumulation.
        learning_rate: Peak of the schedule.
        seed: Seed of the initialisation and of everything drawn.
        weight: Weight of the regulariser (lambda).
        set: Any other setting as NAME=VALUE, e.g. --set accumulation=2 --set regularizer.tau=0.5.
    """
    from dispersive_kit.training import progress, train_preset, with_settings
    from dispersive_kit.training import train as training_steps

    given = {
        "data": data,
        "model": model,
        "steps": steps,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "seed": seed,
        "regularizer.preset": regularizer,
        "regularizer.weight": weight,
    }
    settings = {name: value for name, value in given.items() if value is not None} | dict(map(_setting, set))
    for _ in progress(training_steps(with_settings(train_preset(preset), settings), out, resume=resume)):
        pass
    print(f"done: {out}")


def _setting(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"{text!r} is not NAME=VALUE")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def sample(
    run: Folder,
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
        seed: Seed of the first image; image i has seed + i.
        weights: The average (ema), or the weights as last trained (model).
        vae: Where the autoencoder of a run on latents lies now, if it was moved; its weights must be the same.
    """
    import numpy as np
    import torch
    from torchvision.utils import save_image

    from dispersive_kit.evaluation import balanced_labels, decoder_of, generate
    from dispersive_kit.evaluation.generate import this_process
    from dispersive_kit.training import load_run
    from dispersive_kit.training.runs import run_folder

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
    np.savez(out / "samples.npz", images.permute(0, 2, 3, 1).numpy())
    print(f"{num} images of {card['run']} at step {card['step']}: {out / 'grid.png'}, {out / 'samples.npz'}")


def evaluate(run: Folder, how: Annotated[Evaluation, tyro.conf.arg(name="")], out: Path | None = None) -> None:
    """Measure samples: a panel of distances to real images, each with interval, floor and record.

    Args:
        run: Folder of a trained run, name of a shipped one (digits-base), or an .npz of samples (arr_0, uint8 NHWC).
        how: What to measure, and how samples are drawn.
        out: JSON file for the records; named after the settings and beside the samples if not given.
    """
    from dispersive_kit.data.files import require_writable
    from dispersive_kit.evaluation import evaluate as measure
    from dispersive_kit.evaluation import table, to_json
    from dispersive_kit.evaluation.generate import this_process
    from dispersive_kit.evaluation.panel import record_file, record_folder
    from dispersive_kit.training.runs import run_folder

    if out:
        require_writable(out)
    elif run_folder(run).exists():  # anything else is named by what follows
        require_writable(record_folder(run) / "evaluation.json")
    records = measure(run, how)
    if this_process().is_main_process:
        print(table(records))
        file = out or record_file(run, how, records[0])
        file.write_text(to_json(records))
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
    processes: int = 0,
    strict: bool = False,
    plan_only: bool = False,
) -> None:
    """Encode a folder of images once, into a store of latents to train on; given again, it goes on where it was.

    torchrun and accelerate may start it on many machines at once.

    Args:
        images: Folder of images; the first folder below it names the class.
        vae: Folder or hub id of a diffusers AutoencoderKL or AutoencoderTiny, or a registered name (module:name).
        out: The store.
        image_size: Side of ADM's centre crop.
        flip: Store mirror images too.
        dtype: Number format of the stored posterior mean and std.
        shard_size: Images in a file.
        batch_size: Images through the autoencoder at once.
        processes: On this machine; 0: one for each GPU, or for each core where there is none.
        strict: End at a file that cannot be read; otherwise it is left out, and listed in spec.json.
        plan_only: Print the size of the store, and end.
    """
    from dispersive_kit.data.encode import EncodeConfig, Encoder, encode, size_in_words

    for name, value in {"image-size": image_size, "shard-size": shard_size, "batch-size": batch_size}.items():
        if value < 1:
            raise ConfigError(f"--{name} must be above 0, got {value}")
    if processes < 0:
        raise ConfigError(f"--processes must be 0 or more, got {processes}")
    config = EncodeConfig(images, vae, out, image_size, flip, dtype, shard_size, batch_size, strict, device=_device())
    number, calls = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    encoder = Encoder(config)
    processes = min(processes or _processes(), encoder.size.shards)
    if number == 0:
        print(f"{encoder.size}\n{_in_short(encoder.folder.classes)}; {processes} processes, each at a shard of its own")
        print(f"{size_in_words(_room(out, encoder.size.bytes))} free on the disk of {out}", flush=True)
    if plan_only:
        return
    try:
        store = encode(encoder, processes=processes, part=(number, calls))
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the shards that are finished", file=sys.stderr)
        raise SystemExit(130) from None
    if store:
        _report_store(store)


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
    from dispersive_kit.data.encode import size_in_words
    from dispersive_kit.data.files import free_bytes
    from dispersive_kit.errors import DataError

    used = sum(f.stat().st_size for f in out.glob("shard-*")) if out.is_dir() else 0
    free = free_bytes(out)
    if wanted > free + used:
        raise DataError(
            f"the store needs {size_in_words(wanted - used)} more, and the disk of {out} has {size_in_words(free)} "
            "free: make room, choose another disk, or store half with --no-flip"
        )
    return free


def _report_store(store: Any) -> None:
    spec = store.spec
    print(f"done: {store.path}: {len(store):,} images of {len(spec.classes)} classes")
    for kind, count in spec.images["odd"].items():
        print(f"  {count:,} {kind}: put right")
    for photo in spec.images["left_out"][:10]:
        print(f"  left out: {photo['file']} ({photo['fault']})")
    if (more := len(spec.images["left_out"]) - 10) > 0:
        print(f"  and {more:,} more left out, listed in spec.json")


def check(store: Folder, vae: str | None = None) -> None:
    """Verify checksums, counts, statistics and autoencoder of a store of latents, and decode 16 of its images.

    They are written beside the store, as STORE-grid.png, to look at.

    Args:
        store: Folder that `encode` wrote.
        vae: Where the autoencoder lies now, if its folder was moved; its weights must be the same.
    """
    from torchvision.utils import save_image

    from dispersive_kit.data.autoencoders import load_named
    from dispersive_kit.data.files import require_writable
    from dispersive_kit.data.latents import LatentStore

    file = store.with_name(f"{store.name}-grid.png")
    require_writable(file)
    opened = LatentStore(store)
    for line in opened.check():
        print(f"ok  {line}", flush=True)
    autoencoder = load_named(opened.spec.autoencoder, path=vae)
    print(f"ok  autoencoder {autoencoder.card}")
    images = opened.decoded_grid(autoencoder)
    save_image(images.float() / 255, file, nrow=4, padding=1)
    print(f"look at {file}: {len(images)} images, decoded")


def run(
    notebook: Name,
    out: Path | None = None,
    mode: Literal["smoke", "class", "full"] | None = None,
    param: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(aliases=("-p",))] = (),
    resume: bool = False,
    executor: Literal["pool", "slurm", "local"] | None = None,
    workers: int | None = None,
) -> None:
    """Run one notebook ("06", or a path) or a pipeline ("demo", or a YAML file) headlessly, and write a report.

    `run demo` is the main job: it trains a small DiT on digits without and with Dispersive Loss, samples both and
    measures them; about five minutes on two CPU cores, no download.

    Args:
        notebook: Start of a notebook's name, a path, the name of a shipped pipeline, or the path of its YAML file.
        out: Folder to write; runs/NAME if not given.
        mode: smoke (seconds), class (minutes on a laptop) or full (a GPU); a pipeline's own, or class, if not given.
        param: A parameter of the notebook as NAME=VALUE, e.g. -p seed=3; may be given several times.
        resume: Go on in a folder that holds this run already; what is unchanged is not run again.
        executor: Where a pipeline runs: processes here (pool), Slurm jobs, or a trial of such jobs here (local).
        workers: At most so many runs of a sweep at once; one per GPU if not given, and all of them on a cluster.
    """
    from dispersive_kit.study.run import run as run_headlessly

    run_headlessly(notebook, out, mode=mode, parameters=param, resume=resume, executor=executor, workers=workers)


def list_runs() -> None:
    """List the runs of notebooks and pipelines in the runs folder ($DISPERSIVE_KIT_RUNS, else runs/)."""
    from dispersive_kit.study.report import runs_table

    print(runs_table())


def export(run: Folder, out: Path, step: int | None = None) -> None:
    """Write a run's averaged weights in half precision, with its curves and card: small enough to share.

    Args:
        run: Folder of a trained run.
        out: Folder to write; refused if it holds something already. sample and evaluate take it like a run.
        step: A kept checkpoint; the newest if not given.
    """
    from dispersive_kit.training import export_run

    print(f"exported: {export_run(run, out, step=step)}")


def study_run(plan: Name, out: Path | None = None, workers: int = 1) -> None:
    """Run what is not done yet of a study; give the same command again after a stop or kill.

    Args:
        plan: Name of a shipped plan (1-noise-floor), or the path of a YAML file.
        out: Folder of the runs; runs/studies/NAME-HASH if not given.
        workers: Runs at once, each on one thread.
    """
    from dispersive_kit.study.experiment import conclude, run_study, study_folder
    from dispersive_kit.study.plan import load_plan

    opened = load_plan(plan)
    folder = out or study_folder(opened)
    total = len(opened.tuning_cells()) + len(opened.cells())
    print(f"{opened.title}\nplan {opened.name}, sha256 {opened.sha256[:16]}; runs in {folder}")
    print(f"{total} runs, {workers} at once; the plan states {opened.cpu_hours:g} CPU hours", flush=True)
    started, done, here = time.monotonic(), 0, 0
    for cell, result, skipped in run_study(opened, folder, workers=workers):
        done, here = done + 1, here + (not skipped)
        said = result["error"] or ", ".join(f"{name} {value:.4g}" for name, value in result["values"].items())
        how = "skipped, done before" if skipped else f"{result['cpu_seconds']:.0f} CPU s"
        left = f"; about {(time.monotonic() - started) / here * (total - done) / 60:.0f} min left" if here else ""
        print(f"[{done}/{total}] {cell.name}: {said} ({how}){left}", flush=True)
    _report_study(opened, conclude(opened, folder), folder)


def study_report(plan: Name, out: Path | None = None) -> None:
    """Write the page of a study and print its verdicts: of the runs made here, else of the results that come along.

    Args:
        plan: Name of a shipped plan, or the path of a YAML file.
        out: Folder of the runs, as for run, which report.html is written into. If it is not given,
            runs/studies/NAME-HASH, or else the results that come with the kit.
    """
    from dispersive_kit.study.experiment import load_results, study_folder
    from dispersive_kit.study.plan import load_plan

    opened = load_plan(plan)
    _report_study(opened, load_results(opened, out), out or study_folder(opened))


def _report_study(plan: Any, results: dict[str, Any], folder: Path) -> None:
    from dispersive_kit.study.report import as_table
    from dispersive_kit.study.study_report import verdict_rows, write_study_report

    folder.mkdir(parents=True, exist_ok=True)
    page = write_study_report(plan, results, _study_figures(results, folder), folder / "report.html")
    used = results["cpu_hours"]["used"]
    print(f"\n{as_table(verdict_rows(results))}\n\n{len(results['runs'])} runs, {used} CPU hours; report: {page}")


def _study_figures(results: dict[str, Any], folder: Path) -> list[str]:
    """A slope graph for each measure that has a verdict, as HTML elements and as FOLDER/MEASURE.png."""
    from dispersive_kit.views.figures import figure_html, slope_graph, style

    style()
    elements = []
    for measure in dict.fromkeys(v["measure"] for v in results["verdicts"]):
        found = [v for v in results["verdicts"] if v["measure"] == measure]
        said = "; ".join(f"{v['arm']} in {v['condition']}: {math.exp(v['mean']):.2f} times, {v['word']}" for v in found)
        figure = slope_graph(results, measure)
        figure.savefig(folder / f"{measure.replace(' ', '-')}.png")
        alt = f"Slope graph of {measure} over arms, a line a seed; ratio to {results['reference']}: {said}."
        elements.append(figure_html(figure, alt=alt))
    return elements


def study_list() -> None:
    """List the plans that come with the kit, and what they found."""
    from dispersive_kit.errors import DataError
    from dispersive_kit.study.experiment import load_results
    from dispersive_kit.study.plan import load_plan, shipped_plans
    from dispersive_kit.study.report import as_table

    rows = [["plan", "runs", "CPU hours", "primary", "title"]]
    for opened in map(load_plan, shipped_plans()):
        try:
            word = load_results(opened)["verdicts"][0]["word"]
        except DataError:
            word = "not run"
        total = len(opened.tuning_cells()) + len(opened.cells())
        rows.append([opened.name, str(total), f"{opened.cpu_hours:g}", word, opened.title])
    print(as_table(rows))


def study_table(write: bool = False) -> None:
    """The verdicts of all studies that come with the kit, as the README has them.

    Args:
        write: Put them into the README of this checkout, and draw notebooks/figures/verdicts.png.
    """
    from dispersive_kit.study.notebook import PACKAGE
    from dispersive_kit.study.verdict import BEGIN, END, all_verdicts, evidence_hash, evidence_markdown
    from dispersive_kit.views.figures import style, verdict_forest

    if not write:
        print(evidence_markdown())
        return
    root = PACKAGE.parent
    readme = root / "README.md"
    if not readme.is_file():
        raise ConfigError(f"{root} has no README.md to write into: --write is for a checkout")
    before, _, rest = readme.read_text(encoding="utf-8").partition(BEGIN)
    readme.write_text(f"{before}{BEGIN}\n{evidence_markdown()}\n{END}{rest.partition(END)[2]}", encoding="utf-8")
    style()
    picture = root / "notebooks" / "figures" / "verdicts.png"  # it carries the hash of the table it belongs to
    verdict_forest(all_verdicts()).savefig(picture, metadata={"Description": evidence_hash()})


def lab(port: int = 8888, browser: bool = True) -> None:
    """Open the notebooks in JupyterLab: on this machine alone, with a token.

    Args:
        port: The port to listen on.
        browser: Open a browser; otherwise the address is printed.
    """
    from dispersive_kit.study.lab import serve_lab

    serve_lab(port, browser=browser)


def console(out: Path | None = None, port: int = 8889, browser: bool = True) -> None:
    """Open all demos in large type for a lecture: in Voila, on this machine alone, or as one HTML file.

    Args:
        out: Write the console as one file that needs neither Python nor a network, instead of serving it.
        port: The port to listen on.
        browser: Open a browser; otherwise the address is printed.
    """
    if out is not None:
        from dispersive_kit.views.console import write_console

        print(f"{out}: {write_console(out) / 1e6:.1f} MB, open it in any browser")
        return
    from dispersive_kit.study.lab import CONSOLE, serve_lab

    serve_lab(port, browser=browser, page=CONSOLE)


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


def _tasks(doc: str, **tasks: Callable[..., None]) -> Callable[..., None]:
    """One command of several tasks, such as `study run` and `study report`."""
    choices = [
        Annotated[Any, tyro.conf.subcommand(name, constructor=f, prefix_name=False)] for name, f in tasks.items()
    ]

    def command(task: Any) -> None: ...

    command.__doc__, command.__annotations__["task"] = doc, Annotated[Union[*choices], tyro.conf.OmitArgPrefixes]
    return command


COMMANDS: dict[str, Callable[..., Any]] = {
    "train": train,
    "sample": sample,
    "evaluate": evaluate,
    "encode": encode,
    "check": check,
    "run": run,
    "runs": _tasks(
        "List the runs of notebooks and pipelines, or export one of a training.", list=list_runs, export=export
    ),
    "study": _tasks(
        "Run a pre-registered study, report one, list those that come with the kit, or show all their verdicts.",
        run=study_run,
        report=study_report,
        list=study_list,
        table=study_table,
    ),
    "lab": lab,
    "console": console,
    "doctor": doctor,
}


DESCRIPTION = "Learn, test and plug in Dispersive Loss. -V, --version: print the version."


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
