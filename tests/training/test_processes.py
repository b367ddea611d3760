"""Several processes: one objective, however the batch is split, and a dispersion batch that says how it was."""

import json
import os
import shutil
import signal
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import warm
from safetensors.torch import load_file
from small_runs import assert_same_bits, run, tensors

from dispersive_kit.training import RegularizerConfig, load_run, train_preset
from dispersive_kit.training.checkpoint import checkpoints, load_latest

CLI = ["-m", "dispersive_kit.cli"]
TORCHRUN = [find_spec("torch.distributed.run").origin, "--standalone", "--nproc_per_node"]
ACCELERATE = [find_spec("accelerate.commands.launch").origin, "--num_processes", 2, "--main_process_port", 0]
WORKER = str(Path(__file__).with_name("gradient_worker.py"))
# A gradient that is not clipped, of 64 images, with and without the loss.
PLAIN = train_preset("smoke", steps=1, batch_size=64, grad_clip=1e9)
GATHERED = RegularizerConfig(preset="paper", gather=True)


def gradient(tmp_path: Path, name: str, config, processes: int) -> tuple[dict[str, torch.Tensor], dict]:
    out = tmp_path / name
    warm.run(WORKER, config.model_dump_json(), out, processes=processes)
    return load_file(f"{out}.safetensors"), json.loads((out / "run.json").read_text())


def apart(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Norm of the difference of two gradients over the norm of the first."""
    difference = torch.cat([(a[k] - b[k]).flatten() for k in a])
    return float(difference.norm() / torch.cat([v.flatten() for v in a.values()]).norm())


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    """Gradient and card of 64 images in one process, in 2 x 32, and in 2 x 16 with two micro-batches."""
    folder = tmp_path_factory.mktemp("splits")
    return {
        "64": gradient(folder, "64", PLAIN, 1),
        "2 x 32": gradient(folder, "2x32", PLAIN, 2),
        "2 x 16 x 2": gradient(folder, "2x16x2", PLAIN.changed(accumulation=2), 2),
    }


def test_the_denoising_gradient_does_not_depend_on_how_the_batch_is_split(splits):
    whole, _ = splits["64"]
    assert apart(whole, splits["2 x 32"][0]) < 1e-5
    assert apart(whole, splits["2 x 16 x 2"][0]) < 1e-5


def test_the_card_says_what_dispersive_loss_saw(splits):
    assert [card["dispersion_batch"] for _, card in splits.values()] == [64, 32, 16]
    assert [card["global_batch"] for _, card in splits.values()] == [64, 64, 64]
    assert [(card["processes"], card["accumulation"]) for _, card in splits.values()] == [(1, 1), (2, 1), (2, 2)]


def test_gathered_two_processes_equal_one_and_ungathered_they_do_not(tmp_path):
    local_config = PLAIN.changed(regularizer=RegularizerConfig(preset="paper"))
    one, _ = gradient(tmp_path, "one", local_config, 1)
    two, card = gradient(tmp_path, "two", PLAIN.changed(regularizer=GATHERED), 2)
    local, _ = gradient(tmp_path, "local", local_config, 2)
    assert apart(one, two) < 1e-5 and card["dispersion_batch"] == 64
    assert apart(one, local) > 1e-4  # the first gradient of a network whose gates are still shut


@pytest.mark.parametrize("processes", [4, pytest.param(16, marks=pytest.mark.long)])
@pytest.mark.parametrize("placebo", [{}, {"norm_matched": 3.0}], ids=["paper", "placebo"])
def test_groups_of_16_in_one_process_are_16_on_each_of_several(tmp_path, processes, placebo):
    config = PLAIN.changed(batch_size=16 * processes, regularizer=RegularizerConfig(preset="paper", **placebo))
    grouped = config.changed(regularizer=config.regularizer.changed(group_size=16))
    one, card = gradient(tmp_path, "one", grouped, 1)
    several, as_published = gradient(tmp_path, "several", config, processes)
    assert apart(one, several) < 1e-6 and card["dispersion_batch"] == as_published["dispersion_batch"] == 16
    assert apart(one, gradient(tmp_path, "ungrouped", config, 1)[0]) > (1e-6 if placebo else 1e-4)


RIVALS = [{"preset": "repa"}, {"preset": "layersync"}, {"preset": "care", "gather": True}]
RIVALS += [{"preset": "clean-patch", "schedule": "stop-at", "schedule_steps": 2}]


@pytest.mark.parametrize("arm", RIVALS, ids=lambda arm: arm["preset"])
def test_the_gradient_of_a_rival_does_not_depend_on_how_the_batch_is_split(tmp_path, arm):
    """Its head among it; mutations: no gradient for a head of weight zero, labels of the processes taken as alike."""
    config = PLAIN.changed(steps=4, learning_rate=1e-3, regularizer=RegularizerConfig(**arm))
    alone = config.changed(regularizer=config.regularizer.changed(gather=None))
    one, two = gradient(tmp_path, "one", alone, 1)[0], gradient(tmp_path, "two", config, 2)[0]
    assert one.keys() == two.keys() and apart(one, two) < 1e-5


TRAIN = ["train", "--preset", "smoke", "--set", "model=DiT-T/4"]
PAPER = ["--set", "checkpoint_every=3", "--regularizer", "paper"]


def test_two_processes_of_accelerate_train_resume_to_the_same_bits_and_sample(run_command, tmp_path):
    arguments = [*TRAIN, *PAPER, "--steps", 6, "--resume", "--out", tmp_path / "run"]
    warm.run(*ACCELERATE, "--multi_gpu", *CLI, *arguments)
    whole = tensors(tmp_path / "run")
    shutil.rmtree(checkpoints(tmp_path / "run" / "checkpoints")[-1])  # as if killed after the checkpoint before
    run_command(arguments, 2)
    assert_same_bits(tmp_path / "run", whole)
    model, card = load_run(tmp_path / "run")
    assert card["step"] == 6 and all(v.isfinite().all() for v in model.state_dict().values())
    run_command(["sample", tmp_path / "run", "--out", tmp_path / "samples", "--num", 10, "--num-steps", 2])
    assert np.load(tmp_path / "samples" / "samples.npz")["arr_0"].shape == (10, 8, 8, 1)


BUSY_THREAD = """import threading, torch, dispersive_kit.cli
threading.Thread(target=lambda: [None for _ in iter(int, 1) if torch.ones(9).sum() < 0], daemon=True).start()
dispersive_kit.cli.main()
"""


def test_a_thread_of_pytorch_that_outlives_a_command_does_not_abort_it(tmp_path):
    """As Gloo's do. Without the exit in cli: "terminate called without an active exception", here always."""
    (tmp_path / "busy.py").write_text(BUSY_THREAD)
    warm.run(*TORCHRUN, 1, tmp_path / "busy.py", *TRAIN, "--steps", 1, "--out", tmp_path / "run")


def test_accelerate_launch_that_starts_one_process_of_two_is_refused_with_the_cure(tmp_path):
    """Without --multi_gpu it starts one, and says nothing: a run on half the machines that were asked for."""
    started = warm.start(*ACCELERATE, "--cpu", *CLI, *TRAIN, "--out", tmp_path / "run")
    assert started.wait() != 0 and "--multi_gpu" in started.output, started.output
    assert not (tmp_path / "run").exists()


PORT = 20_000 + os.getpid() % 10_000  # below those that are given to whoever asks for any
NOTEBOOK = """
from accelerate import notebook_launcher
from dispersive_kit.training import progress, train, train_preset

def work(out):
    for _ in progress(train(train_preset("smoke", steps=6, model="DiT-T/4"), out)):
        pass

notebook_launcher(work, ({out!r},), num_processes=2, use_port="{port}")
"""


def test_a_notebook_trains_on_two_processes(tmp_path):
    """By its launcher, which forks: its cell as a script, since a kernel adds nothing but its start."""
    (tmp_path / "cell.py").write_text(NOTEBOOK.format(out=str(tmp_path / "run"), port=PORT))
    warm.run(tmp_path / "cell.py")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["processes"] == 2
    assert load_run(tmp_path / "run")[1]["step"] == 6


LONG = [*TRAIN, "--steps", 40, "--set", "checkpoint_every=10", "--set", "log_every=1", "--resume"]


@pytest.fixture(scope="module")
def never_stopped(tmp_path_factory, run_command):
    out = tmp_path_factory.mktemp("never_stopped") / "run"
    run_command([*LONG, "--out", out], 2)
    return out


@pytest.mark.parametrize("signalled", [1, "torchrun", pytest.param(0, marks=pytest.mark.long)])
def test_sigterm_to_any_process_ends_all_after_the_same_step_and_the_run_goes_on(
    start, run_command, tmp_path, never_stopped, signalled
):
    out = tmp_path / "run"
    command = [*LONG, "--out", out]
    started = warm.start(*TORCHRUN, 2, *CLI, *command) if signalled == "torchrun" else start(command, 2)
    while started.poll() is None and not checkpoints(out / "checkpoints"):
        time.sleep(0.01)
    os.kill(started.pid if signalled == "torchrun" else started.pids[signalled], signal.SIGTERM)
    ended, printed = started.wait(), started.output
    assert ended != 0 and "SIGKILL" not in printed, printed
    assert signalled == "torchrun" or {p.exitcode for p in started.processes} == {143}, printed
    stopped = load_latest(out / "checkpoints").step
    assert 10 <= stopped < 40
    assert json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])["step"] == stopped
    run_command(command, 2)
    assert_same_bits(out, never_stopped)


def test_a_run_folder_that_the_processes_do_not_share_is_refused_on_resume(tmp_path):
    """As on two machines without a common file system: one finds the checkpoint, the other would begin anew."""
    for rank in (0, 1):
        (tmp_path / str(rank)).mkdir()
    config = PLAIN.changed(steps=2, checkpoint_every=1)
    run(config, tmp_path / "0" / "run")
    shutil.rmtree(checkpoints(tmp_path / "0" / "run" / "checkpoints")[-1])
    started = warm.start(Path(__file__).with_name("apart_worker.py"), config.model_dump_json(), tmp_path, processes=2)
    assert started.wait() != 0 and "do not agree on the step and the data" in started.output
    assert load_latest(tmp_path / "0" / "run" / "checkpoints").step == 1


@pytest.mark.parametrize("preset", ["none", "paper"])
def test_another_dispersion_batch_is_refused_on_resume_where_it_is_part_of_the_objective(start, tmp_path, preset):
    config = train_preset("smoke", steps=2, checkpoint_every=1, model="DiT-T/4")
    run(config.changed(regularizer=RegularizerConfig(preset=preset)), tmp_path / "run")
    command = [*TRAIN, "--resume", "--out", tmp_path / "run", "--steps", 2]
    started = start([*command, "--set", "checkpoint_every=1", "--regularizer", preset], 2)
    assert started.wait() == (2 if preset == "paper" else 0), started.output
    assert ("dispersion_batch: 32 -> 16" in started.output) == (preset == "paper")


def test_meanflow_trains_on_two_processes_and_measures_its_base_arm(run_command, tmp_path):
    out = tmp_path / "run"
    run_command([*TRAIN, "--steps", 6, "--set", "objective=meanflow", "--set", "log_every=2", "--out", out], 2)
    assert load_run(out)[1]["step"] == 6
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 3 and all("gradient_ratio" in line for line in lines[1:])


PAGE_FAULTS = """
import resource, torch
from dispersive_kit.training.parallel import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        a, b = torch.ones(2**22), torch.ones(2**23)  # 16 and 32 MiB
        del a, b
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
given_back = faults()
keep_freed_memory(torch.device("cpu"))
faults()
print(given_back, faults())
"""


def test_a_cpu_keeps_the_memory_it_frees_and_faults_no_page_twice(tmp_path):
    (tmp_path / "faults.py").write_text(PAGE_FAULTS)
    given_back, kept = map(int, warm.run(tmp_path / "faults.py").split())
    assert kept < 100 < 1000 < given_back or (sys.platform != "linux" and kept <= given_back)
