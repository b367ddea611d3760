import json
import sys

import pytest

from dispersive_kit.study.machine import examine


def finding(name):
    return next(f for f in examine() if f.name == name)


def test_every_finding_says_what_was_seen_and_a_fault_has_a_fix(monkeypatch, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("a file where a folder should be")
    monkeypatch.setenv("DISPERSIVE_KIT_RUNS", str(blocked / "runs"))
    findings = {f.name: f for f in examine()}
    assert all(f.detail for f in findings.values())
    assert not findings["runs folder"].ok and "DISPERSIVE_KIT_RUNS" in findings["runs folder"].fix
    assert findings["packages"].ok and "PyTorch 2" in findings["packages"].detail
    assert findings["notebook kernel"].ok and sys.executable in findings["notebook kernel"].detail
    assert {"device", "memory", "data folder", "data sets"} <= set(findings)


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
    kernel = {
        "argv": ["/opt/other/python", "-m", "ipykernel_launcher"],
        "display_name": "Python 3",
        "language": "python",
    }
    (spec / "kernel.json").write_text(json.dumps(kernel))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    found = finding("notebook kernel")
    assert not found.ok and "/opt/other/python" in found.detail and str(spec) in found.fix


def test_a_driver_that_torch_cannot_use_is_a_fault(monkeypatch, tmp_path):
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
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
