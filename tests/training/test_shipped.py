"""Runs that ship with the package, and the export that makes them."""

import json
from pathlib import Path

import pytest
import torch
from small_runs import bytes_of, stopped
from small_runs import run as trained

from dispersive_kit.errors import CheckpointError
from dispersive_kit.training import export_run, load_run, run_folder, shipped_names, train, train_preset
from dispersive_kit.training.runs import read_config

CONFIG = train_preset("smoke", steps=4, model="DiT-T/4")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return trained(CONFIG, tmp_path_factory.mktemp("run") / "run")


@pytest.mark.parametrize("name", shipped_names())
def test_a_shipped_run_is_whole_names_its_data_and_command_and_samples(name):
    model, card = load_run(name)
    about = json.loads((run_folder(name) / "run.json").read_text())
    assert about["command"].startswith("dispersive-kit train --preset ") and len(card["data"]["sha256"]) == 64
    assert card["step"] == read_config(run_folder(name)).steps
    assert (run_folder(name) / "metrics.jsonl").read_text().count("\n") > 10
    x = torch.zeros(1, model.in_channels, model.input_size, model.input_size)
    assert model(x, torch.ones(1), torch.zeros(1, dtype=torch.long)).isfinite().all()


def test_shipped_runs_are_small():
    sizes = {n: sum(f.stat().st_size for f in run_folder(n).rglob("*") if f.is_file()) for n in shipped_names()}
    assert sizes and max(sizes.values()) <= 4_200_000, sizes  # 4 MB of weights, and the curves


def test_an_exported_run_is_the_average_in_half_precision(run, tmp_path):
    (run / "evaluation-run.json").write_text("{}")
    exported = export_run(run, tmp_path / "out")
    a, b = load_run(run)[0].state_dict(), load_run(exported)[0].state_dict()
    assert all(torch.equal(a[k].half().float(), b[k]) for k in a)
    found = {path.relative_to(exported).as_posix() for path in exported.rglob("*") if path.is_file()}
    weights = {f"checkpoints/step-00000004/{name}" for name in ("ema.safetensors", "manifest.json")}
    beside = {"config.json", "run.json", "metrics.jsonl", "previews/step-00000004.png", "evaluation-run.json"}
    assert found == weights | beside


def test_an_exported_run_is_not_trained_further(run, tmp_path):
    exported = export_run(run, tmp_path / "out")
    before = bytes_of(exported)
    with pytest.raises(CheckpointError, match="exported run"):
        list(train(CONFIG, exported, resume=True))
    assert bytes_of(exported) == before
    with pytest.raises(CheckpointError, match="ema weights only"):
        load_run(exported, weights="model")


def test_an_export_overwrites_nothing(run):
    for name in (run, Path("digits-base")):  # a shipped one has a name
        with pytest.raises(CheckpointError, match="not empty"):
            export_run(name, run)


def test_an_export_needs_averaged_weights(run, tmp_path):
    exported = export_run(run, tmp_path / "out")
    file = exported / "checkpoints/step-00000004/manifest.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "sha256": {}}))
    with pytest.raises(CheckpointError, match="no weights only, not 'ema'"):
        export_run(exported, tmp_path / "again")


def test_an_unknown_shipped_run_names_those_there_are():
    with pytest.raises(CheckpointError, match="digits-base"):
        load_run("digits")


def test_a_run_without_a_logged_step_can_be_exported(tmp_path):
    run = stopped(CONFIG.changed(log_every=50, checkpoint_every=2), tmp_path / "run", after=3)
    assert not (run / "metrics.jsonl").exists()
    exported = export_run(run, tmp_path / "new" / "out")
    assert load_run(exported)[1]["step"] == 2


def test_an_export_that_fails_leaves_nothing(run, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.copyfile", mock_full_disk)
    with pytest.raises(CheckpointError, match="No space left"):
        export_run(run, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def mock_full_disk(*_):
    raise OSError(28, "No space left on device")
