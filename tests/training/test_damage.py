"""Files of a run that are not as they were written are refused by name, and nothing is begun anew in their place."""

import json
import shutil
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_runs import bytes_of
from small_runs import run as trained

from dispersive_kit.cli import main
from dispersive_kit.data.files import file_sha256
from dispersive_kit.errors import CheckpointError, DataError, KitError
from dispersive_kit.training import load_run, read_metrics, train, train_preset
from dispersive_kit.training.checkpoint import checkpoints
from dispersive_kit.training.runs import sample_batch
from dispersive_kit.training.train import Session

CONFIG = train_preset("smoke", steps=4, checkpoint_every=2, log_every=2, preview_images=0, model="DiT-T/4")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return trained(CONFIG, tmp_path_factory.mktemp("made") / "run")


@pytest.fixture
def run(made, tmp_path):
    return shutil.copytree(made, tmp_path / "run")


def changed(run, file, field, value):
    """Put `value` at the dotted `field` of a JSON file; "" is all of it, and ... takes the field out."""
    content = json.loads((run / file).read_text())
    *path, last = field.split(".")
    inner = content
    for name in path:
        inner = inner[name]
    if value is ...:
        del inner[last]
    elif field:
        inner[last] = value
    (run / file).write_text(json.dumps(content if field else value))


WRONG = [
    *(("config.json", "", value, "by name") for value in ([], {}, None, "x", 3, {"regularizer": []})),
    ("config.json", "regularizer", ..., "by name"),
    ("config.json", "steps", "many", "steps = 'many'"),
    ("config.json", "steps", None, "steps = None"),
    ("config.json", "learning_rate", float("nan"), "learning_rate = nan"),
    ("config.json", "grad_clip", float("inf"), "grad_clip = inf"),
    ("config.json", "betas", [0.9], "betas"),
    ("config.json", "betas", [0.9, 1.0], r"betas\.1 = 1"),
    ("config.json", "regularizer.memory", 2.5, r"memory = 2\.5"),
    ("config.json", "ema_widths", [0.05], r"ema_widths is \[0\.05\]"),
    ("config.json", "model", "DiT-T/2", "do not fit its config.json"),
    *(("run.json", "", value, "run.json") for value in ([], None, "x", 3)),
    ("run.json", "", {}, "data: Field required"),
    ("run.json", "data", [], "data"),
    ("run.json", "data", ..., "data: Field required"),
    *(
        ("run.json", f"data.{field}", ..., rf"data\.{field}: Field required")
        for field in ("shape", "classes", "sha256")
    ),
    *(("run.json", "data.shape", value, r"data\.shape") for value in (3, [], [0], [1, 8, 10**7], ["a"], [1, 2, 3, 4])),
    *(("run.json", "data.classes", value, r"data\.classes") for value in (None, "ten", 10, [1, 2])),
]
NEWEST = "checkpoints/step-00000004"
WRONG_MANIFEST = [
    *((f"{NEWEST}/manifest.json", "", value, "manifest.json") for value in ([], {}, None, "x")),
    *((f"{NEWEST}/manifest.json", "sha256", value, "sha256") for value in ([], None, {"../config.json": "0"})),
    (f"{NEWEST}/manifest.json", "step", "four", "step"),
    (f"{NEWEST}/manifest.json", "state", [], "state"),
]


@pytest.mark.parametrize(("file", "field", "value", "words"), WRONG + WRONG_MANIFEST)
def test_a_file_of_another_form_is_refused_by_file_and_field_at_once(run, file, field, value, words):
    changed(run, file, field, value)
    before, start = bytes_of(run), time.process_time()
    with pytest.raises(CheckpointError, match=words) as caught:
        load_run(run, step=4)
    assert file.rpartition("/")[2] in str(caught.value) and time.process_time() - start < 1
    if NEWEST not in file and field != "model":  # else it goes back to step 2; another model is another configuration
        with pytest.raises(CheckpointError, match=words):
            next(train(CONFIG, run, resume=True))
        assert bytes_of(run) == before


@pytest.mark.parametrize("content", [b"", b"{", b"[" * 100_000, b"\xff\xfe", b'{"regularizer": ' * 30_000])
@pytest.mark.parametrize("file", ["config.json", "run.json", f"{NEWEST}/manifest.json"])
def test_a_file_that_is_no_json_is_refused_by_name(run, file, content):
    (run / file).write_bytes(content)
    with pytest.raises(KitError, match=file.rpartition("/")[2]):
        load_run(run, step=4)


@pytest.mark.parametrize("content", ["[]\n", '{"step": 1, "loss": "low"}\n', "{\n", '{"step": 1}\n3\n'])
def test_metrics_of_another_form_are_refused_and_a_line_that_a_kill_cut_is_left_out(run, content):
    whole = read_metrics(run)
    with (run / "metrics.jsonl").open("a") as lines:
        lines.write('{"step": 5, "lo')
    assert read_metrics(run) == whole and [line["step"] for line in whole] == [2, 4]
    (run / "metrics.jsonl").write_text(content)
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl"):
        read_metrics(run)
    (run / "metrics.jsonl").open("ab").write(b'{"step": 1, "l\xff": 1}\n')  # a flipped bit
    list(train(CONFIG, run, resume=True))


@pytest.mark.parametrize("group", ["model", "ema", "optimizer", "state"])
def test_a_checkpoint_that_lacks_what_is_gone_on_from_is_refused(run, group):
    """Its sums are right: it is of another program, or of a run of another model."""
    for path in checkpoints(run / "checkpoints"):
        manifest = json.loads((path / "manifest.json").read_text())
        if group == "state":
            manifest["state"] = {}
        else:
            del manifest["sha256"][f"{group}.safetensors"]
        (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"step 4 in .*checkpoints does not fit this run: KeyError"):
        next(train(CONFIG, run, resume=True))


@pytest.mark.parametrize("place", ["checkpoints", "nowhere"])
def test_checkpoints_that_cannot_be_listed_are_no_reason_to_begin_anew(run, place):
    """A link to itself, or to a disk that is not mounted: for root too, who may read everything else."""
    folder = run / "checkpoints"
    folder.rename(run / "elsewhere")
    folder.symlink_to(place)
    before = bytes_of(run)
    for read in (lambda: next(train(CONFIG, run, resume=True)), lambda: load_run(run)):
        with pytest.raises(KitError, match=str(folder)):
            read()
    assert bytes_of(run) == before
    folder.unlink()
    folder.symlink_to("elsewhere")
    assert load_run(run)[1]["step"] == 4


def diverged(run):
    """Make the averages of its newest checkpoint NaN."""
    file, manifest = run / NEWEST / "ema.safetensors", run / NEWEST / "manifest.json"
    save_file({name: value * float("nan") for name, value in load_file(file).items()}, file)
    content = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(content | {"sha256": content["sha256"] | {file.name: file_sha256(file)}}))
    return run


def test_a_model_that_gives_nan_is_never_a_picture(run, tmp_path, capsys):
    model = load_run(diverged(run))[0]
    with pytest.raises(DataError, match="NaN or infinity"):
        sample_batch(model, torch.zeros(2, dtype=torch.long), [0, 1], num_steps=1)
    with pytest.raises(SystemExit, match="2"):
        main(["sample", str(run), "--out", str(tmp_path / "samples"), "--num", "3", "--num-steps", "1"])
    assert "NaN or infinity" in capsys.readouterr().err and not (tmp_path / "samples").exists()


def test_a_preview_that_would_be_nan_is_left_out_and_said_and_the_checkpoint_is_written(run):
    session = Session(CONFIG.changed(preview_images=3), diverged(run), resume=True)
    with session.held, pytest.warns(UserWarning, match="no preview step-00000004: .*NaN or infinity"):
        session.save(4)
    assert not list((run / "previews").glob("*")) and load_run(run)[1]["step"] == 4
