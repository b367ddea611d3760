"""What doctor says of a machine; and calls beside each other in a pool of processes, with a GPU each."""

import os
import subprocess
from functools import partial
from pathlib import Path

import pytest

from dispersive_kit.cli import main
from dispersive_kit.errors import ConfigError
from dispersive_kit.study import machine
from dispersive_kit.study.machine import examine, in_pool
from dispersive_kit.study.run import _Pipeline, _run_pipeline, _Stage


def test_a_machine_that_is_ready_is_described(capsys):
    main(["doctor"])
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith("ok") for line in lines) and "PyTorch 2" in lines[0]
    assert [line[6:18].strip() for line in lines] == [name for name, _, _ in examine()]


def requires(*needs):
    return lambda monkeypatch, folder: monkeypatch.setattr("importlib.metadata.requires", lambda name: needs)


def driver_without_torch(monkeypatch, folder):
    (folder / "nvidia-smi").write_text("#!/bin/sh\n")
    (folder / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def file_in_place_of_a_folder(monkeypatch, folder):
    (folder / "file").write_text("")
    monkeypatch.setenv("DISPERSIVE_KIT_RUNS", str(folder / "file" / "runs"))


def replaced(name, value):
    return lambda monkeypatch, folder: monkeypatch.setattr(machine, name, value)


MISSING = ("torch>=2.6", 'no-such-thing>=1; extra == "notebooks"', 'another>=1; extra == "latents"')
FAULTS = [
    (requires(*MISSING), "packages", ["no-such-thing>=1 wanted, found none", "pip install"]),
    (requires('papermill>=99; extra == "notebooks"'), "packages", ["papermill>=99 wanted, found 2", "pip install"]),
    (driver_without_torch, "device", ["NVIDIA driver", "install the PyTorch build"]),
    (file_in_place_of_a_folder, "runs folder", ["Not a directory", "DISPERSIVE_KIT_RUNS"]),
    (replaced("_MEMORY_GIB", 1e6), "memory", ["close other programs"]),
    (replaced("_memory", lambda: {}["no such thing"]), "memory", ["KeyError: 'no such thing'"]),
]


@pytest.mark.parametrize(("make", "name", "words"), FAULTS)
def test_a_fault_is_named_with_what_to_do_and_the_others_are_checked(monkeypatch, tmp_path, capsys, make, name, words):
    make(monkeypatch, tmp_path)
    with pytest.raises(SystemExit):
        main(["doctor"])
    captured = capsys.readouterr()
    (line,) = (line for line in captured.out.splitlines() if line.startswith("FAIL"))
    assert line[6:].startswith(name) and all(word in line for word in words)
    assert len(captured.out.splitlines()) == 6 and "1 of 6 checks failed" in captured.err


def test_a_gpu_that_is_hidden_on_purpose_is_no_fault(monkeypatch, tmp_path):
    driver_without_torch(monkeypatch, tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert next(fine for name, fine, _ in examine() if name == "device")


@pytest.mark.parametrize("command", [["doctor"], ["run", "01"], ["run", "demo"], ["lab"], ["console"]])
def test_a_user_without_a_home_gets_one_line_that_says_so(monkeypatch, tmp_path, capsys, command):
    def nobody():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", nobody)
    monkeypatch.setenv("DISPERSIVE_KIT_RUNS", str(tmp_path))
    with pytest.raises(SystemExit) as ended:
        main(command)
    said = "".join(capsys.readouterr())
    assert ended.value.code == 2 and "set HOME" in said and "Traceback" not in said


@pytest.mark.parametrize("venv", ["a b", "", "one two three", "a\tb"])
def test_make_removes_no_folder_that_was_not_named(tmp_path, venv):
    """mutation: $(VENV) without quotes and without the check removes both `a` and `b`"""
    (tmp_path / "Makefile").write_text((Path(__file__).parents[2] / "Makefile").read_text())
    folders = [tmp_path / name for name in ("a", "b", "one", "two", "three", ".venv")]
    for folder in folders:
        folder.mkdir()
    done = subprocess.run(["make", "clean", f"VENV={venv}"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "one path without spaces" in done.stderr and all(f.is_dir() for f in folders)
    subprocess.run(["make", "clean", "VENV=a"], cwd=tmp_path, capture_output=True, check=True)
    assert [f.is_dir() for f in folders] == [False, *[True] * 5]


def touch(tmp_path, name):
    return f"echo $CUDA_VISIBLE_DEVICES >> {tmp_path / name}; sleep 0.5"


shell = partial(subprocess.run, shell=True, check=True)


def test_each_worker_has_a_gpu_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "_visible_gpus", lambda: ("3", "5"))
    for _, future in in_pool(shell, [touch(tmp_path, str(k)) for k in range(4)]):
        future.result()
    assert {(tmp_path / str(k)).read_text().strip() for k in range(4)} == {"3", "5"}
    assert os.environ.get("CUDA_VISIBLE_DEVICES") not in ("3", "5")
    for workers, words in ((3, "3 workers for 2 GPUs"), (0, "1 or more")):
        with pytest.raises(ConfigError, match=words):
            list(in_pool(print, [1], workers))


def test_a_caller_that_stops_early_starts_nothing_more(tmp_path):
    for _, future in in_pool(shell, [touch(tmp_path, str(k)) for k in range(20)], 2):
        future.result()
        break
    assert len(list(tmp_path.iterdir())) == 2


def test_a_worker_that_is_killed_is_a_failed_run_and_said_so(write_quick, tmp_path):
    suicide = "import os, signal, time\nos.kill(os.getppid(), signal.SIGKILL)\ntime.sleep(60)"
    stage = _Stage(notebook=str(write_quick("made", suicide)), grid={"seed": [0, 1]})
    results = list(_run_pipeline(_Pipeline(title="t", stages=(stage,), workers=2), tmp_path / "out"))
    assert [result.status for result in results] == ["failed", "failed"]
    assert all(word in results[0].error for word in ("killed", "--resume"))
