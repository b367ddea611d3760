import ast
import json
from pathlib import Path

import pytest

from dispersive_kit.errors import ConfigError, KitError
from dispersive_kit.study.execute import run_notebook
from dispersive_kit.study.lookup import find_notebook, notebooks_folder
from dispersive_kit.study.pipeline import Stage, load_pipeline, plan, run_pipeline, shipped_pipelines
from dispersive_kit.study.schema import read_result

LINE = {"step": 1, "loss": 0.5}


def number_of(folder):
    return read_result(folder)["numbers"][0]["value"]


def test_a_run_folder_keeps_everything_of_the_run(write_notebook, tmp_path):
    trained = "import json\n(nb.out / 'base').mkdir()\nfile = nb.out / 'base' / 'metrics.jsonl'"
    trained += f"\nfile.write_text(json.dumps({LINE}) + '\\n')"
    printed = "import sys\nprint('\\x1b[31mred\\x1b[0m')\nsys.stderr.write('10%\\r20%\\r100%\\n')"
    numbers = "nb.record('half', value / 2, note='of value')\nnb.check('positive', value > 0)"
    notebook = write_notebook("made", trained, printed, numbers, "nb.finish()")
    folder = tmp_path / "run"
    assert run_notebook(str(notebook), folder, {"value": 3.0}).status == "ok"
    result = read_result(folder)
    assert number_of(folder) == 1.5 and result["mode"] == "class" and 0.05 < result["peak_gib"] < 20
    assert json.loads((folder / "params.json").read_text()) == {"value": 3.0}
    assert json.loads((folder / "metrics.jsonl").read_text()) == {"run": "base", **LINE}
    assert (folder / "log.txt").read_text().splitlines()[:2] == ["red", "100%"]
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["versions"]["torch"] and environment["device"] and len(environment["package_sha256"]) == 64
    page = (folder / "notebook.html").read_text()
    assert "positive" in page and "default-src 'none'" in page and "://" not in page


def test_a_run_is_skipped_when_unchanged_and_what_it_replaces_is_kept(write_quick, tmp_path):
    notebook, folder = write_quick("made"), tmp_path / "run"
    assert run_notebook(str(notebook), folder, {"value": 3.0}).status == "ok"
    (folder / "mine.txt").write_text("keep")
    assert run_notebook(str(notebook), folder, {"value": 3.0}).status == "skipped"
    first = number_of(folder)
    assert run_notebook(str(notebook), folder, {"value": 4.0}).status == "ok"
    assert number_of(folder) == first + 1 and number_of(tmp_path / "run.earlier-1") == first
    assert (tmp_path / "run.earlier-1" / "mine.txt").is_file() and not (folder / "mine.txt").exists()
    write_quick("made", "changed = True")
    assert run_notebook(str(notebook), folder, {"value": 4.0}).status == "ok"


def test_a_failed_notebook_is_kept_and_named_and_ends_the_pipeline(write_quick, tmp_path):
    bad, good, out = write_quick("bad", "assert 1 > 2, 'water is dry'"), write_quick("good"), tmp_path / "out"
    results = list(run_pipeline([Stage(str(bad)), Stage(str(good))], out))
    assert [r.status for r in results] == ["failed"]
    assert "AssertionError: water is dry" in results[0].error
    assert "water is dry" in (out / "bad" / "notebook.html").read_text()
    stage = json.loads((out / "bad" / "stage.json").read_text())
    assert stage["status"] == "failed" and "assert 1 > 2" in stage["traceback"]
    log = (out / "bad" / "log.txt").read_text()
    assert log.rstrip().endswith("AssertionError: water is dry") and "\x1b" not in log
    # Mended, the same pipeline goes on in the same folder.
    write_quick("bad")
    again = list(run_pipeline([Stage(str(bad)), Stage(str(good))], out, resume=True))
    assert [r.status for r in again] == ["ok", "ok"]


@pytest.mark.parametrize(
    ("cell", "words"),
    [
        ("1 + 1", r"nb.finish\(\)"),
        ("import os\nos._exit(1)", "died"),
        ("open(out + '/result.json', 'w').write('{}')", "'notebook' is a required property"),
        ("open(out + '/result.json', 'w').write('{\"seconds\": NaN}')", "NaN is no measured number"),
    ],
)
def test_a_notebook_that_leaves_no_proper_result_has_failed(write_notebook, tmp_path, cell, words):
    result = run_notebook(str(write_notebook("made", cell, bare=True)), tmp_path / "run")
    assert result.status == "failed"
    with pytest.raises(AssertionError, match=words):
        raise AssertionError(result.error.replace("Kernel died", "died"))


def test_a_kernel_asks_for_no_port_and_leaves_no_file(write_quick, tmp_path):
    """A free port may be taken before the kernel binds it."""
    seen = "import ipykernel.connect as c\nprint(c.get_connection_info(unpack=True))"
    result = run_notebook(str(write_quick("made", seen)), tmp_path / "run")
    info = ast.literal_eval((tmp_path / "run" / "log.txt").read_text())
    assert result.status == "ok" and info["transport"] == "ipc" and info["ip"].startswith("/tmp/kernel-")
    assert not Path(info["ip"]).parent.exists()


def test_a_kernel_that_does_not_begin_with_a_cell_has_failed(write_quick, tmp_path, monkeypatch):
    monkeypatch.setattr("dispersive_kit.study.lab._BEGIN_S", 3)
    deaf = "get_ipython().kernel.shell_stream.stop_on_recv()"
    result = run_notebook(str(write_quick("made", deaf)), tmp_path / "run")
    assert result.status == "failed" and "DeadKernelError" in result.error and result.seconds < 60


def test_a_pipeline_never_writes_into_a_used_folder_unless_asked(write_quick, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    with pytest.raises(KitError, match="--resume"):
        list(run_pipeline([Stage(str(write_quick("made")))], tmp_path / "out"))


def test_a_wrong_later_stage_is_refused_before_the_first_one_runs(write_quick, tmp_path):
    good = str(write_quick("made"))
    for words, wrong in {
        "no parameter 'x'": Stage(good, {"x": 1}, name="b"),
        "seed is int, got 'one'": Stage(good, {"seed": "one"}, name="b"),
        "seed is int, got 0.5": Stage(good, name="b", grid={"seed": [0, 0.5]}),
        "'99' names 0 notebooks": Stage("99"),
        "two stages are called 'made'": Stage(good),
        "--out": Stage(good, {"out": "/tmp"}, name="b"),
        "stage name '../b'": Stage(good, name="../b"),
    }.items():
        with pytest.raises(ConfigError, match=words):
            list(run_pipeline([Stage(good), wrong], tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_every_shipped_pipeline_names_notebooks_that_exist_and_parameters_they_have(tmp_path):
    assert {"demo", "quick", "digits", "cifar10", "imagenet", "analysis"} <= set(shipped_pipelines())
    for name in shipped_pipelines():
        pipeline = load_pipeline(name)
        runs = plan(pipeline.stages, tmp_path, mode=pipeline.mode)
        assert all(task.notebook.is_file() for tasks in runs for task in tasks), name
        assert not any(stage.notebook.endswith(".ipynb") for stage in pipeline.stages)  # by number: from a wheel too


def test_quick_runs_every_notebook_in_smoke_mode(tmp_path):
    quick = load_pipeline("quick")
    runs = plan(quick.stages, tmp_path, mode=quick.mode)
    assert [task.notebook for tasks in runs for task in tasks] == sorted(notebooks_folder().glob("*.ipynb"))
    assert all(task.parameters == {"mode": "smoke"} for tasks in runs for task in tasks)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("stages: [{notebook: '06'}]", "'title' is a required property"),
        ("title: t\nstages: [{notebook: 6}]", r"\$.stages\[0\].notebook: 6 is not of type 'string'"),
        ("title: t\nstages: [{notebook: '06', params: {}}]", "'params' was unexpected"),
        ("title: t\nmode: fast\nstages: [{notebook: '06'}]", "'fast' is not one of"),
        ("title: [", "not YAML"),
        ("title: !!python/object/apply:os.system ['touch owned']\nstages: [{notebook: '06'}]", "not YAML of plain"),
    ],
)
def test_a_pipeline_of_another_form_is_refused_and_the_place_named(tmp_path, monkeypatch, text, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.yaml").write_text(text)
    with pytest.raises(ConfigError, match=words):
        load_pipeline("p.yaml")
    assert not (tmp_path / "owned").exists()


def test_an_unknown_pipeline_is_told_the_shipped_ones():
    with pytest.raises(ConfigError, match="demo, digits"):
        load_pipeline("demos.yaml")


def test_a_pipeline_finds_notebooks_beside_its_file(write_quick, tmp_path, monkeypatch):
    write_quick("made")
    (tmp_path / "p.yaml").write_text("title: t\nstages: [{notebook: made.ipynb}]")
    monkeypatch.chdir("/")
    pipeline = load_pipeline(str(tmp_path / "p.yaml"))
    assert plan(pipeline.stages, tmp_path, beside=pipeline.folder)[0][0].notebook == tmp_path / "made.ipynb"


def test_notebooks_are_found_by_number_name_or_path(write_quick):
    good = write_quick("made")
    assert find_notebook("06").stem == "06_does_it_help" == find_notebook("06_does_it_help").stem
    assert find_notebook(str(good)) == good
    for wrong in ("77", "0", "", "nothing.ipynb"):
        with pytest.raises(ConfigError, match="06_does_it_help"):
            find_notebook(wrong)


def test_a_folder_may_be_named_relative_to_where_one_stands(write_quick, tmp_path, monkeypatch):
    """While a notebook runs, its own folder is the current one: the log and the copy must still find their place."""
    monkeypatch.chdir(tmp_path)
    notebook = write_quick("quick", "print('seen')")
    result = run_notebook(str(notebook), Path("runs/relative"))
    assert result.status == "ok"
    assert "seen" in (tmp_path / "runs/relative/log.txt").read_text()
    assert (tmp_path / "runs/relative/notebook.ipynb").is_file()


def test_a_notebook_is_never_run_in_the_folder_of_something_else(write_quick, tmp_path):
    """mutation: the check is left out; the training's only log is then deleted as a leftover"""
    (tmp_path / "training").mkdir()
    log = tmp_path / "training" / "metrics.jsonl"
    log.write_text("{}")
    with pytest.raises(KitError, match="holds no run of a notebook"):
        run_notebook(str(write_quick("one")), tmp_path / "training")
    assert log.read_text() == "{}"
