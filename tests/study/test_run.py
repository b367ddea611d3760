"""Notebooks run headlessly: their folders, what is refused, what is run again, and what fails a run."""

import ast
import json
import re
import sys
import threading
from pathlib import Path

import nbformat
import pytest
from PIL import Image

from dispersive_kit.cli import main
from dispersive_kit.data.files import lock, write_json
from dispersive_kit.errors import ConfigError, KitError
from dispersive_kit.study import run as headless
from dispersive_kit.study.notebook import Number, find_notebook, notebooks_folder, read_result
from dispersive_kit.study.report import NotebookTask, _row, write_report
from dispersive_kit.study.run import _SHIPPED, _check_parameters, _plan, _run_pipeline, _Stage

FIGURE = '<figure><img alt="a dot" src="data:image/png;base64,AA=="></figure>'
RECORD = "dict(name='FD', value=3.0, low=2.5, high=3.5, floor=1.0, protocol={'cfg_scale': 2.0, 'sampler': 'sde'})"
ANSWER = f"'worse', '2.9 times [2.6, 3.2]', 'Not here.', picture='{FIGURE}', measured={{'plan': 'of six seeds'}}"
WHOLE = (  # what a notebook may do, in few cells
    "import sys\nprint('\\x1b[31mred\\x1b[0m')\nsys.stderr.write('10%\\r20%\\r100%\\n')",
    "nb.record('half', value / 2, note='of value')\nnb.check('positive', value > 0)\nnb.say('It is so.')",
    f"nb.record('FD', 3.0, record={RECORD})\nnb.answer({ANSWER})",
    f"from IPython.display import HTML, display\nsys.stderr.write('9%\\r  \\r')\ndisplay(HTML('''{FIGURE}'''))",
    "import ipykernel.connect as c\nprint(c.get_connection_info(unpack=True))",
)


def number_of(folder):
    return read_result(folder).numbers[0].value


def test_a_number_that_no_seed_changes_keeps_its_own_record():
    record = {"low": 1.1, "high": 1.4, "floor": 1.0}
    numbers = [Number(name="ratio", value=1.2, note="worse", record=record)] * 6
    assert _row("ratio", numbers) == ("ratio", "1.2", "1.10 to 1.40", "1.00", "worse")


def pipeline(*stages):
    return headless._Pipeline(title="A & B", stages=stages)


def shipped(name):
    return headless._open(str(name), (), {})


def run_one(notebook, folder, **parameters):
    task = NotebookTask(name="run", notebook=notebook, parameters=parameters, folder=folder.absolute())
    return headless._run_task(task)


# ---- what a run leaves


@pytest.fixture(scope="module")
def ended(write_notebook, write_quick, tmp_path_factory):
    """Folder of a pipeline: a notebook that uses all there is, then three seeds of which one fails."""
    out = tmp_path_factory.mktemp("runs") / "out"
    made = write_notebook("made", "pass", *WHOLE, "nb.finish()")
    document = nbformat.read(made, 4)
    words = r"Below $-\log B$ it cannot sink; $a^b^c$ is no formula. ![a](a.png)"
    Image.new("L", (2, 2)).save(made.with_name("a.png"))
    document.cells[2] = nbformat.v4.new_markdown_cell(words)
    document.cells[1].metadata["tags"] = ["setup"]
    nbformat.write(document, made)
    broken = write_quick("broken", "assert seed != 1, 'one is not enough'")
    stages = (
        _Stage(notebook=str(made), parameters={"value": 3.0}),
        _Stage(notebook=str(broken), name="seeds", grid={"seed": [0, 1, 2]}),
    )
    results = list(_run_pipeline(pipeline(*stages), out))
    write_report(results, out, title="A & B", subtitle="made")
    return out, results


def test_a_run_folder_keeps_everything_of_the_run(ended):
    folder = ended[0] / "made"
    result, stage = read_result(folder), json.loads((folder / "stage.json").read_text())
    assert number_of(folder) == 1.5 and result.mode == "class" and 0.05 < result.peak_gib < 20
    assert stage["parameters"] == {"mode": "class", "value": 3.0} and stage["status"] == "ok"
    assert (folder / "log.txt").read_text().splitlines()[:2] == ["red", "100%"]
    environment = stage["environment"]
    assert environment["versions"]["torch"] and environment["device"] and len(environment["package_sha256"]) == 64
    page = (folder / "notebook.html").read_text()
    assert "positive" in page and "<mi>log</mi><mi>B</mi>" in page and 'alt="a dot"' in page
    assert "begin(" not in page and "begin(" in (folder / "notebook.ipynb").read_text()  # of a cell tagged setup
    assert 'alt="a" src="data:image/png' in page and not re.search(r"<pre>\s*</pre>", page)  # nor a wiped progress bar
    assert "$a^b^c$ (DoubleSuperscriptsError" in page  # it stays, and does not end the run
    assert "default-src 'none'" in page and "<script" not in page and "://" not in page.partition("<body>")[0]


def test_a_kernel_asks_for_no_port_and_leaves_no_file(ended):
    """A free port may be taken before the kernel binds it."""
    info = ast.literal_eval(re.search(r"^\{.*\}$", (ended[0] / "made" / "log.txt").read_text(), re.MULTILINE)[0])
    assert info["transport"] == "ipc" and info["ip"].startswith("/tmp/kernel-") and not Path(info["ip"]).parent.exists()


def test_the_report_shows_everything_in_one_offline_file(ended):
    page = (ended[0] / "report.html").read_text()
    assert "A &amp; B" in page and "It is so." in page and 'alt="a dot"' in page and "1 checks passed" in page
    assert "half" in page and "1.5" in page and "2.50 to 3.50" in page and "torch 2" in page
    assert '<td class="failed">failed</td>' in page and "one is not enough" in page and "2 ok, 1 failed" in page
    assert "mean of 2" in page and "left out: seeds/seed=1: cell 3" in page
    assert page.count("floor</th>") == 1 < page.count("95 % interval</th>")  # no column in which nothing stands
    assert "://" not in page and "<script" not in page and "<link" not in page
    assert "default-src 'none'" in page.partition("<body>")[0]
    assert all(source.startswith("data:") for source in re.findall(r'src="([^"]*)"', page))


def test_the_report_begins_with_the_answer_then_how_it_was_measured_then_the_stages(ended):
    """In the words of the field; mutation: the first stage comes first, whatever it is"""
    page = (ended[0] / "report.html").read_text().partition("<body>")[2]
    order = ["A &amp; B", "<h2>made</h2>", 'class="verdict worse">Worse', "2.9 times", FIGURE, "Not here."]
    order += ["How it was measured", "of six seeds", ">Stages<", 'href="#made"']  # it is named: another stage is last
    assert [page.index(part) for part in order] == sorted(page.index(part) for part in order)
    assert "guidance scale: 2.0" in page and "Euler-Maruyama" in page
    assert not re.search(r"cfg_scale|\bsde\b|held_out|frechet|num_steps", page)


def test_a_failed_notebook_is_kept_and_named(ended):
    out, results = ended
    assert [r.status for r in results] == ["ok", "ok", "failed", "ok"]
    folder = out / "seeds" / "seed=1"
    stage, log = json.loads((folder / "stage.json").read_text()), (folder / "log.txt").read_text()
    assert results[2].error == stage["error"] == "cell 3: AssertionError: one is not enough"
    assert "assert seed != 1" in stage["traceback"] and "one is not enough" in (folder / "notebook.html").read_text()
    assert log.rstrip().endswith("AssertionError: one is not enough") and "\x1b" not in log


def test_a_smoke_or_failed_run_never_enters_a_mean(tmp_path):
    def run(name, value, at, mode="class", error=""):
        number = {"name": "FD", "value": value, "note": "", "record": None}
        result = {"notebook": "n", "mode": mode, "seconds": 1, "peak_gib": 1, "numbers": [number]}
        write_json(tmp_path / "sweep" / name / "result.json", {**result, "checks": [], "sentences": []})
        status, folder = "failed" if error else "ok", tmp_path / "sweep" / name
        given = {"parameters": {"at": at, "seed": len(name) + value}, "folder": folder}
        return NotebookTask(name=f"sweep/{name}", status=status, error=error, **given)

    runs = [run(f"a{k}", value, "a") for k, value in enumerate([3.0, 4.0, 8.0])]
    runs += [run("b", 7.0, "b"), run("smoke", 1e9, "a", mode="smoke"), run("broken", 1e9, "a", error="it broke")]
    page, numbers = write_report(runs, tmp_path, title="t", subtitle="")
    half = 4.302653 * 2.645751 / 3**0.5  # Student's t for two degrees of freedom, times the standard error
    interval = f"{5 - half:.2f} to {5 + half:.2f}"
    told = [" ".join(line.split()) for line in numbers.splitlines()]
    assert told[1:] == [f"FD, at = a 5 {interval} mean of 3", "FD, at = b 7"]  # one run has no interval
    assert "sweep/broken: it broke" in page.read_text() and "sweep/smoke: smoke mode" in page.read_text()


# ---- what fails a run without stopping a cell


PLANTED = {
    "output context": "import ipywidgets as w\no = w.Output()\ndisplay(o)\nwith o:\n    2 / {x}",
    "observer": (
        "import ipywidgets as w\ns = w.IntSlider()\no = w.Output()\ndisplay(s, o)\n"
        "@o.capture()\ndef look(change):\n    3 / {x}\ns.observe(look, 'value')\ns.value = 3"
    ),
    "thread": "import threading\nt = threading.Thread(target=lambda: 4 / {x})\nt.start()\nt.join()",
    "late thread": (
        "import threading, time\ndef late():\n    time.sleep(0.5)\n    5 / {x}\n"
        "t = threading.Thread(target=late)\nt.start()"
    ),
}


@pytest.mark.parametrize("x", [0, 1])
def test_an_error_that_stops_no_cell_fails_the_run(write_quick, tmp_path, x):
    cells = [cell.format(x=x) for cell in PLANTED.values()]
    result = run_one(write_quick("made", *cells, "t.join()"), tmp_path / "run")
    assert result.status == ("ok" if x else "failed") and ("ZeroDivisionError" in result.error) == (not x)
    found = headless._HIDDEN.findall((tmp_path / "run" / "notebook.ipynb").read_text())
    assert len(found) == (0 if x else len(PLANTED)) and all("ZeroDivisionError" in "".join(one) for one in found)


@pytest.mark.parametrize(
    ("cell", "words"), [("1 + 1", r"nb.finish\(\)"), ("import os\nos._exit(1)", "DeadKernelError")]
)
def test_a_notebook_that_leaves_no_proper_result_has_failed(write_notebook, tmp_path, cell, words):
    result = run_one(write_notebook("made", cell, bare=True), tmp_path / "run")
    assert result.status == "failed" and re.search(words, result.error), result.error


def test_a_kernel_that_does_not_begin_with_a_cell_has_failed(write_quick, tmp_path, monkeypatch):
    monkeypatch.setattr("dispersive_kit.study.lab._BEGIN_S", 3)
    deaf = "get_ipython().kernel.shell_stream.stop_on_recv()"
    result = run_one(write_quick("made", deaf), tmp_path / "run")
    assert result.status == "failed" and "DeadKernelError" in result.error and result.seconds < 60


# ---- what is run again, and what is never written over


def test_a_run_is_skipped_when_unchanged_and_what_it_replaces_is_kept(write_quick, tmp_path, monkeypatch):
    """Also in a folder named relative to where one stands: while a notebook runs, its own is the current one."""
    monkeypatch.chdir(tmp_path)
    notebook, folder = write_quick("made", "print('seen')"), Path("runs/relative")
    assert run_one(notebook, folder, value=3.0).status == "ok"
    assert "seen" in (folder / "log.txt").read_text() and (folder / "notebook.ipynb").is_file()
    (folder / "mine.txt").write_text("keep")
    assert run_one(notebook, folder, value=3.0).status == "skipped"
    first = number_of(folder)
    write_quick("made", "changed = True")
    assert run_one(notebook, folder, value=4.0).status == "ok"
    assert number_of(folder) == first + 1 and number_of(Path("runs/relative.earlier-1")) == first
    assert Path("runs/relative.earlier-1/mine.txt").is_file() and not (folder / "mine.txt").exists()


def test_a_used_folder_is_never_written_into_unless_asked(write_quick, tmp_path):
    """mutation: the check is left out; the training's only log is then deleted as a leftover"""
    (tmp_path / "training").mkdir()
    log = tmp_path / "training" / "metrics.jsonl"
    log.write_text("{}")
    with pytest.raises(KitError, match="holds no run of a notebook"):
        run_one(write_quick("one"), tmp_path / "training")
    with pytest.raises(KitError, match="--resume"):
        list(_run_pipeline(pipeline(_Stage(notebook=str(write_quick("one")))), tmp_path / "training"))
    assert log.read_text() == "{}"


def test_a_failed_stage_ends_the_pipeline_which_goes_on_once_it_is_mended(write_quick, tmp_path):
    bad, good = write_quick("bad", "assert 1 > 2"), write_quick("good")
    both = pipeline(_Stage(notebook=str(bad)), _Stage(notebook=str(good)))
    assert [r.status for r in _run_pipeline(both, tmp_path / "out")] == ["failed"]
    write_quick("bad")
    assert [r.status for r in _run_pipeline(both, tmp_path / "out", resume=True)] == ["ok", "ok"]


def test_a_run_waits_for_another_one_in_its_folder_and_does_not_repeat_it(write_quick, tmp_path):
    notebook, folder, results = write_quick("made"), tmp_path / "run", []
    with lock(tmp_path / ".run.lock"):
        waiting = threading.Thread(target=lambda: results.append(run_one(notebook, folder)))
        waiting.start()
        waiting.join(1.0)
        assert waiting.is_alive() and not folder.exists()
        folder.mkdir()
        key = headless._key(NotebookTask(name="made", notebook=notebook))
        write_json(folder / "stage.json", {"name": "made", "key": key, "status": "ok"})
        write_json(folder / "result.json", {})
    waiting.join()
    assert [result.status for result in results] == ["skipped"]


def test_processes_that_are_given_the_same_command_share_a_sweep(write_quick, tmp_path):
    """mutation: a run that another process is at is waited for at once, so that all processes do one after the other"""
    stage = _Stage(notebook=str(write_quick("quick")), grid={"seed": [0, 1]})
    ((elsewhere, free),) = _plan(pipeline(stage), tmp_path)
    elsewhere.folder.parent.mkdir()
    with lock(elsewhere.folder.with_name(".seed=0.lock")):
        ended = _run_pipeline(pipeline(stage), tmp_path, resume=True)
        assert next(ended).name == free.name and not elsewhere.folder.exists()
    assert [(task.name, task.status) for task in ended] == [(elsewhere.name, "ok")]


# ---- what is refused before a kernel starts


@pytest.mark.parametrize("wrong", [{"value": "much"}, {"seed": 1.0}, {"seed": True}, {"seed": None}, {"mode": 3}])
def test_a_wrong_type_is_refused(quick, wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(ConfigError, match=rf"{name} is (float|int|str), got {value!r} \({type(value).__name__}\)"):
        _check_parameters(quick, wrong)


def test_what_is_typed_is_read_as_the_notebook_declares_it(quick):
    for right in ({}, {"value": 2}, {"value": 2.5, "seed": -1, "mode": "full"}):  # an integer will do for a float
        assert _check_parameters(quick, right) == right
    typed = _check_parameters(quick, {"seed": "3", "value": "1e-3", "mode": "3"}, typed=True)
    assert typed == {"seed": 3, "value": 0.001, "mode": "3"}


def test_a_wrong_later_stage_is_refused_before_the_first_one_runs(quick, tmp_path):
    good = str(quick)
    for words, wrong in {
        "no parameter 'x'": _Stage(notebook=good, parameters={"x": 1}, name="b"),
        "seed is int, got 0.5": _Stage(notebook=good, name="b", grid={"seed": [0, 0.5]}),
        "'99' names 0 notebooks": _Stage(notebook="99"),
        "two stages are called 'quick'": _Stage(notebook=good),
        "would share the folder 'mode=a-b'": _Stage(notebook=good, name="b", grid={"mode": ["a/b", "a-b"]}),
    }.items():
        with pytest.raises(ConfigError, match=words):
            list(_run_pipeline(pipeline(_Stage(notebook=good), wrong), tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("typed", "words", "starts"), [("sed=3", "no parameter", False), ("seed=3", "failed", True)])
def test_the_command_ends_with_status_2_before_a_kernel_starts(
    quick, tmp_path, monkeypatch, capsys, typed, words, starts
):
    """The kernel is none: it leaves a file behind when it is started, and ends."""
    spec, started = tmp_path / "jupyter" / "kernels" / "python3", tmp_path / "kernel-started"
    spec.mkdir(parents=True)
    argv = [sys.executable, "-c", f"open({str(started)!r}, 'w')", "{connection_file}"]
    write_json(spec / "kernel.json", {"argv": argv, "display_name": "Python 3", "language": "python"})
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    with pytest.raises(SystemExit) as ended:
        main(["run", str(quick), "--out", str(tmp_path / "run"), "-p", typed])
    assert ended.value.code == 2 and words in capsys.readouterr().err
    assert started.exists() == starts == (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["..", ".", "a/b", "../a", "/etc", "a\\b", ".hidden", "-p", "a b", "a\n", "~"])
def test_a_name_that_could_leave_its_folder_is_refused(name):
    with pytest.raises(ValueError, match="name"):
        _Stage(notebook="06", name=name)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("stages: [{notebook: '06'}]", "title: Field required"),
        ("title: t\nstages: [{notebook: 6}]", "stages.0.notebook = 6"),
        ("title: t\nstages: [{notebook: '06', params: {}}]", "stages.0.params"),
        ("title: t\nmode: fast\nstages: [{notebook: '06'}]", "mode = 'fast'"),
        ("title: t\nstages: [{notebook: '06', grid: {seed: []}}]", "stages.0.grid.seed"),
    ],
)
def test_a_pipeline_of_another_form_is_refused_and_the_place_named(tmp_path, text, words):
    (tmp_path / "p.yaml").write_text(text)
    with pytest.raises(ConfigError, match=words):
        shipped(tmp_path / "p.yaml")


def test_every_shipped_pipeline_names_notebooks_that_exist_and_parameters_they_have():
    assert {"demo", "quick", "digits", "cifar10", "imagenet", "analysis"} <= set(_SHIPPED)
    for pipeline in map(shipped, _SHIPPED):
        assert all(task.notebook.is_file() for tasks in _plan(pipeline) for task in tasks)
        assert not any(stage.notebook.endswith(".ipynb") for stage in pipeline.stages)  # by number: from a wheel too
    quick = shipped("quick")
    (*tasks,) = (task for tasks in _plan(quick) for task in tasks)
    assert [task.notebook for task in tasks] == sorted(notebooks_folder().glob("*.ipynb"))
    assert all(task.parameters == {"mode": "smoke"} for task in tasks)


def test_notebooks_are_found_by_number_name_or_path_also_beside_a_pipeline(quick, monkeypatch):
    assert find_notebook("06").stem == "06_does_it_help" == find_notebook("06_does_it_help").stem
    assert find_notebook(str(quick)) == quick
    for wrong in ("77", "0", "", "nothing.ipynb"):
        with pytest.raises(ConfigError, match="06_does_it_help"):
            find_notebook(wrong)
    (quick.parent / "p.yaml").write_text("title: t\nstages: [{notebook: quick.ipynb}]")
    monkeypatch.chdir("/")
    assert _plan(shipped(quick.parent / "p.yaml"))[0][0].notebook == quick
