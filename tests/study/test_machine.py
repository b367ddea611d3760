"""What doctor says of a machine; and runs beside each other: in a pool of processes, with a GPU each, and as jobs."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from dispersive_kit.cli import main
from dispersive_kit.errors import ConfigError
from dispersive_kit.study import machine
from dispersive_kit.study.machine import examine, in_pool
from dispersive_kit.study.run import _Pipeline, _run_pipeline, _Stage

SUICIDE = "import os, signal, time\nos.kill(os.getppid(), signal.SIGKILL)\ntime.sleep(60)"


def finding(name):
    return next(f for f in examine() if f.name == name)


def test_every_finding_says_what_was_seen_and_a_fault_has_a_fix(monkeypatch, tmp_path, capsys):
    main(["doctor"])
    assert "PyTorch" in capsys.readouterr().out
    blocked = tmp_path / "file"
    blocked.write_text("a file where a folder should be")
    monkeypatch.setenv("DISPERSIVE_KIT_RUNS", str(blocked / "runs"))
    findings = {f.name: f for f in examine()}
    assert all(f.detail for f in findings.values())
    assert not findings["runs folder"].ok and "DISPERSIVE_KIT_RUNS" in findings["runs folder"].fix
    assert findings["packages"].ok and "PyTorch 2" in findings["packages"].detail
    assert findings["notebook kernel"].ok and sys.executable in findings["notebook kernel"].detail
    assert {"device", "memory", "data folder", "data sets"} <= set(findings)


@pytest.mark.parametrize("check", ["_packages", "_kernel", "_device", "_memory", "_writable", "_data_sets"])
def test_a_check_that_fails_is_a_finding_and_ends_no_other(monkeypatch, check):
    """mutation: only some kinds of error are caught"""
    names = [f.name for f in examine()]

    def fails(*_):
        raise AssertionError("no such thing")

    monkeypatch.setattr(machine, check, fails)
    findings = examine()
    failed = [f for f in findings if f.detail == "AssertionError: no such thing"]
    assert [f.name for f in findings] == names and 1 <= len(failed) <= 2 and not any(f.ok for f in failed)


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


@pytest.mark.parametrize(
    ("wanted", "words"),
    [("papermill>=99", "papermill>=99 wanted, found 2"), ("no-such-thing>=1", "no-such-thing is missing")],
)
def test_a_missing_or_old_package_is_named(monkeypatch, wanted, words):
    needs = ["torch>=2.6", f'{wanted}; extra == "notebooks"', 'another>=1; extra == "latents"']
    monkeypatch.setattr("importlib.metadata.requires", lambda name: needs)
    found = finding("packages")
    assert not found.ok and found.detail.startswith(words) and "another" not in found.detail and found.fix


def test_a_kernel_of_another_python_is_found(monkeypatch, tmp_path):
    spec = tmp_path / "kernels" / "python3"
    spec.mkdir(parents=True)
    kernel = {"argv": ["/opt/other/python", "-m", "ipykernel_launcher"], "display_name": "P", "language": "python"}
    (spec / "kernel.json").write_text(json.dumps(kernel))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    found = finding("notebook kernel")
    assert not found.ok and "/opt/other/python" in found.detail and str(spec) in found.fix


def test_a_driver_that_torch_cannot_use_is_a_fault(monkeypatch, tmp_path):
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert not finding("device").ok and "driver" in finding("device").fix
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # hidden on purpose
    assert finding("device").ok


def test_a_folder_that_a_failed_download_left_is_no_data(monkeypatch, tmp_path):
    monkeypatch.setenv("DISPERSIVE_KIT_DATA", str(tmp_path))
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    assert finding("data sets").detail.startswith("digits here")
    (raw / "train-images-idx3-ubyte").write_bytes(b"x")
    assert finding("data sets").detail.startswith("digits, mnist here")


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
    monkeypatch.setattr("dispersive_kit.study.machine._visible_gpus", lambda: ("3", "5"))
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


def test_no_workers_and_a_request_that_the_cluster_does_not_know_are_refused(quick, tmp_path):
    stages = (_Stage(notebook=str(quick)),)
    with pytest.raises(ValueError, match="workers"):
        _Pipeline(title="t", stages=stages, workers=0)
    for wrong in ({"gpus": 1}, {"timeout_min": "an hour"}):
        asking = _Pipeline(title="t", stages=stages, executor="local", cluster=wrong)
        with pytest.raises(ConfigError, match=f"cluster: .*{next(iter(wrong))}"):
            list(_run_pipeline(asking, tmp_path / "out", resume=True))
    assert not (tmp_path / "out" / "quick").exists()


@pytest.mark.parametrize("executor", ["pool", "local"])
def test_a_worker_or_job_that_is_killed_is_a_failed_run_and_said_so(write_quick, tmp_path, executor):
    stage = _Stage(notebook=str(write_quick("made", SUICIDE)), grid={"seed": [0, 1]})
    pipeline = _Pipeline(title="t", stages=(stage,), executor=executor, workers=2)
    results = list(_run_pipeline(pipeline, tmp_path / "out"))
    assert [result.status for result in results] == ["failed", "failed"]
    words = {"pool": ["killed", "--resume"], "local": ["ended without a result", str(tmp_path / "out/.submitit")]}
    assert all(word in results[0].error for word in words[executor])
