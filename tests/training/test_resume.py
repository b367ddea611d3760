"""A run that was stopped, however rudely, goes on to the same bits."""

import json
import random
import resource
import shutil
import signal
import time

import pytest
import torch
from small_runs import assert_same_bits, run, stopped, tensors

from dispersive_kit.errors import CheckpointError
from dispersive_kit.training import RegularizerConfig, checkpoint, load_run, train, train_preset
from dispersive_kit.training.checkpoint import Checkpoint, checkpoints, load_latest, save_checkpoint
from dispersive_kit.training.parallel import StopRequest

SMALL = {"model": "DiT-T/4", "checkpoint_every": 3}
CONFIG = train_preset("smoke", steps=14, regularizer=RegularizerConfig(preset="paper"), **SMALL)
COMMAND = [
    "train", "--preset", "smoke", "--steps", 30, "--set", "checkpoint_every=3", "--set", "log_every=1",
    "--set", "model=DiT-T/4", "--set", "accumulation=2", "--set", "preview_images=0", "--regularizer", "paper",
    "--resume",
]  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return run(CONFIG, tmp_path_factory.mktemp("whole") / "run")


@pytest.fixture(scope="module")
def left_at_11(tmp_path_factory):
    return stopped(CONFIG, tmp_path_factory.mktemp("interrupted") / "run", after=11)


@pytest.fixture
def folder(left_at_11, tmp_path):
    """A run of its own that was left after step 11, with checkpoints of steps 6 and 9."""
    return shutil.copytree(left_at_11, tmp_path / "run")


def test_a_run_stopped_between_checkpoints_resumes_to_the_same_bits_and_the_same_log(folder, whole):
    (folder / "metrics.jsonl").open("a").write('{"step": 12, "lo')  # a kill in the middle of a line
    assert_same_bits(run(CONFIG, folder, resume=True), whole)
    assert (folder / "metrics.jsonl").read_text() == (whole / "metrics.jsonl").read_text()


@pytest.fixture(scope="module")
def command(cifar_folder):
    extra = {"digits": [], "cifar10": ["--data", "cifar10", "--set", f"data_dir={cifar_folder}"]}
    return lambda data, out: [*COMMAND, *extra[data], "--out", out]


@pytest.fixture(scope="module")
def whole_command(command, run_command, tmp_path_factory):
    """The final tensors of each kind of run that nobody stopped, trained when first asked for."""
    known = {}

    def get(data="digits", processes=1):
        if (data, processes) not in known:
            out = tmp_path_factory.mktemp("whole_command") / "run"
            run_command(command(data, out), processes)
            known[data, processes] = tensors(out)
        return known[data, processes]

    return get


def after_first_checkpoint(process, folder):
    while process.poll() is None and not checkpoints(folder / "checkpoints"):
        time.sleep(0.01)
    return process


KINDS = [("digits", 1), ("digits", 2), ("cifar10", 1), ("cifar10", 2)]
STOPS = [
    pytest.param(signal.SIGKILL, *KINDS[3], 102, id="kill -9, 2 processes"),
    pytest.param(signal.SIGKILL, *KINDS[0], 9, id="kill -9"),
    pytest.param(signal.SIGTERM, *KINDS[0], 15, id="SIGTERM"),
    pytest.param(signal.SIGINT, *KINDS[0], 2, id="Ctrl-C"),
    *(pytest.param(signal.SIGKILL, *KINDS[seed % 4], seed, marks=pytest.mark.long) for seed in range(20)),
]


@pytest.mark.parametrize(("number", "data", "processes", "seed"), STOPS)
def test_a_killed_command_resumes_to_the_same_bits(
    start, run_command, tmp_path, command, whole_command, number, data, processes, seed
):
    """Stopped at a random moment after its first checkpoint."""
    folder = tmp_path / "run"
    process = after_first_checkpoint(start(command(data, folder), processes), folder)
    time.sleep(random.Random(seed).uniform(0, 1.0))
    process.send_signal(number)
    ended = process.wait(60)
    assert ended in ({signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}[number], 0)
    if number != signal.SIGKILL and ended:  # the step in hand was finished and saved
        log = (folder / "metrics.jsonl").read_text().splitlines()
        assert load_latest(folder / "checkpoints").step >= json.loads(log[-1])["step"]
    run_command(command(data, folder), processes)
    assert_same_bits(folder, whole_command(data, processes))


def test_an_existing_run_is_refused_without_resume_and_left_as_it_was(whole):
    before = {p: p.stat().st_mtime_ns for p in whole.rglob("*")}
    with pytest.raises(CheckpointError, match="--resume"):
        run(CONFIG, whole)
    assert {p: p.stat().st_mtime_ns for p in whole.rglob("*")} == before


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("three years of work")
    with pytest.raises(CheckpointError, match="holds no run"):
        run(CONFIG, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_changed_configuration_is_refused_with_the_difference(whole):
    weaker = CONFIG.regularizer.changed(weight=0.1)
    other = CONFIG.changed(checkpoint_every=5, learning_rate=0.5, regularizer=weaker)
    with pytest.raises(CheckpointError, match=r"learning_rate: 0\.004 -> 0\.5\n  regularizer.weight: None -> 0\.1$"):
        run(other, whole, resume=True)  # and not of the cadence, which may change


@pytest.mark.parametrize("damage", ["truncated", "one bit", "missing", "manifest"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before_and_says_so(folder, whole, damage):
    newest = checkpoints(folder / "checkpoints")[-1]
    file = newest / ("manifest.json" if damage == "manifest" else "model.safetensors")
    content = bytearray(file.read_bytes())
    if damage == "missing":
        file.unlink()
    elif damage == "one bit":
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    else:
        file.write_bytes(content[: len(content) // 2])
    with pytest.warns(UserWarning, match="going back to step-00000006"):
        run(CONFIG, folder, resume=True)
    assert_same_bits(folder, whole)


def test_when_every_checkpoint_is_damaged_the_run_is_refused_by_name(folder):
    for path in checkpoints(folder / "checkpoints"):
        (path / "ema.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"ema\.safetensors"):
        run(CONFIG, folder, resume=True)
    with pytest.raises(CheckpointError, match="damaged"):
        load_run(folder)


@pytest.mark.parametrize("largest", [200_000, 0])
def test_a_full_disk_keeps_the_last_good_checkpoint_and_the_configuration(folder, whole, largest):
    before = {name: (folder / name).read_text() for name in ("config.json", "run.json")}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, hard))  # what a write to a full disk looks like: it fails
    try:
        with pytest.raises(CheckpointError, match="could not be written"):
            run(CONFIG, folder, resume=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {name: (folder / name).read_text() for name in before} == before
    assert load_latest(folder / "checkpoints").step == 9 and not list(folder.rglob(".partial*"))
    assert_same_bits(run(CONFIG, folder, resume=True), whole)


def test_a_damaged_newer_checkpoint_does_not_push_out_the_good_one(tmp_path):
    tensors = {"model": {"weight": torch.ones(3)}}
    for step in (6, 9):
        save_checkpoint(tmp_path, Checkpoint(step, tensors, {}))
    (tmp_path / "step-00000009" / "model.safetensors").write_bytes(b"")
    save_checkpoint(tmp_path, Checkpoint(7, tensors, {}), keep_last=1)  # stopped soon after it had gone back to 6
    assert load_latest(tmp_path).step == 7


def test_what_a_killed_writer_left_is_cleared_away(folder, whole, tmp_path):
    left = folder / "checkpoints" / ".partial-step-00000012"  # by the process that was killed at step 12
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half")
    (begun := tmp_path / "begun").mkdir()  # by one that was killed before it had made a run of the folder
    for name in (".lock", "run.json", ".partial-1-config.json"):
        (begun / name).write_text("")
    (folder / ".partial-1-config.json").write_text("{")
    for one in (folder, begun):
        assert_same_bits(run(CONFIG, one, resume=True), whole)
    assert not left.exists()


def test_a_folder_is_trained_by_one_process_at_a_time(start, run_command, tmp_path, command, whole_command):
    """A second one is refused, changes nothing, and may go on once the first is gone."""
    folder = tmp_path / "run"
    first = after_first_checkpoint(start(command("digits", folder)), folder)
    first.send_signal(signal.SIGSTOP)
    second = start(command("digits", folder))
    assert second.wait() == 2 and "another process is training" in second.output
    first.kill()
    run_command(command("digits", folder))
    assert_same_bits(folder, whole_command())


def test_a_reader_whom_the_pruning_overtakes_reads_the_newer_one(whole, monkeypatch):
    folder = whole / "checkpoints"
    gone, listed = folder / "step-00000001", iter([[folder / "step-00000001"]])
    monkeypatch.setattr(checkpoint, "checkpoints", lambda there: next(listed, None) or checkpoints(there))
    assert not gone.exists() and load_latest(folder).step == 14


def test_a_folder_is_trained_by_one_generator_at_a_time(tmp_path):
    """In one process too; and the end of the refused one does not free the folder for others."""
    first = train(CONFIG, tmp_path / "run")
    next(first)
    with pytest.raises(CheckpointError, match="a training in this process has not ended"):
        next(train(CONFIG, tmp_path / "run", resume=True))
    first.close()
    next(train(CONFIG, tmp_path / "run", resume=True))


def test_a_preview_that_cannot_be_written_comes_after_the_checkpoint(tmp_path):
    (tmp_path / "run").mkdir()
    stopped(CONFIG, tmp_path / "run", after=2)
    (tmp_path / "run" / "previews").write_text("a file, where a folder should be")
    with pytest.raises(CheckpointError, match="previews could not be written"):
        run(CONFIG, tmp_path / "run", resume=True)
    assert load_latest(tmp_path / "run" / "checkpoints").step == 3


def test_ctrl_c_while_the_last_step_is_saved_ends_the_loop_around_the_runs_too(tmp_path):
    done = []
    with pytest.raises(KeyboardInterrupt):
        for name in ("a", "b"):
            for record in train(CONFIG, tmp_path / name):
                if record.step == record.steps:
                    signal.raise_signal(signal.SIGINT)
            done.append(name)
    assert done == [] and load_latest(tmp_path / "a" / "checkpoints").step == CONFIG.steps


def handlers():
    return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


@pytest.mark.parametrize("first_out", [0, 1])
def test_two_runs_side_by_side_leave_the_signals_as_they_found_them(first_out):
    before, runs = handlers(), [StopRequest().__enter__(), StopRequest().__enter__()]
    signal.raise_signal(signal.SIGTERM)
    assert [run.signal_number for run in runs] == [None, signal.SIGTERM]  # the one begun last has them
    runs[first_out].__exit__()
    signal.raise_signal(signal.SIGTERM)
    assert runs[1 - first_out].signal_number == signal.SIGTERM
    runs[1 - first_out].__exit__()
    assert handlers() == before


def test_a_run_that_ends_leaves_a_handler_that_was_set_after_it_began():
    """As a notebook's kernel sets one with every cell."""
    before, run = handlers(), StopRequest().__enter__()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    run.__exit__()
    assert handlers() == [signal.SIG_IGN, before[1]]
    signal.signal(signal.SIGINT, before[0])


def test_a_second_ctrl_c_acts_at_once():
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        stop.end_run()
