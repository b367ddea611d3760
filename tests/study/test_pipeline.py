import json

import nbformat
import pytest

from dispersive_kit.errors import ConfigError, KitError
from dispersive_kit.study.gate import tracebacks
from dispersive_kit.study.pipeline import Stage, check_parameters, find_notebook, run_notebook, run_pipeline
from dispersive_kit.study.report import write_report

PARAMETERS = 'mode: str = "smoke"  # mode\nvalue: float = 1.5  # a number\nout: str = ""  # run folder'
BEGIN = "from dispersive_kit.study import begin\nnb = begin('made', mode=mode, out=out)"
FIGURE = '<figure><img alt="a dot" src="data:image/png;base64,AA=="></figure>'


def write_notebook(file, *cells):
    notebook = nbformat.v4.new_notebook()
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    first = nbformat.v4.new_code_cell(PARAMETERS)
    first.metadata["tags"] = ["parameters"]
    notebook.cells = [first, *map(nbformat.v4.new_code_cell, (BEGIN, *cells))]
    nbformat.write(notebook, file)
    return file


@pytest.fixture
def good(tmp_path):
    return write_notebook(
        tmp_path / "made.ipynb",
        "nb.record('half', value / 2, note='of value')\nnb.check('positive', value > 0)\nnb.say('It is so.')",
        f"from IPython.display import HTML, display\ndisplay(HTML('''{FIGURE}'''))",
        "nb.finish()",
    )


def test_a_notebook_runs_with_its_parameters_and_is_skipped_when_unchanged(good, tmp_path):
    first = run_notebook(str(good), tmp_path / "run", {"value": 3.0})
    assert first.status == "ok"
    assert json.loads((tmp_path / "run" / "result.json").read_text())["numbers"][0]["value"] == 1.5
    assert run_notebook(str(good), tmp_path / "run", {"value": 3.0}).status == "skipped"
    assert run_notebook(str(good), tmp_path / "run", {"value": 4.0}).status == "ok"
    write_notebook(good, "nb.finish()")
    assert run_notebook(str(good), tmp_path / "run", {"value": 4.0}).status == "ok"


def test_the_report_is_one_offline_page_with_numbers_and_pictures(good, tmp_path):
    out = tmp_path / "out"
    results = list(run_pipeline([Stage(str(good))], out))
    page = write_report(results, out, title="A & B").read_text()
    assert "A &amp; B" in page and "half" in page and "0.75" in page and 'alt="a dot"' in page and "It is so." in page
    assert "http://" not in page and "https://" not in page and "<script" not in page


@pytest.mark.parametrize(
    ("parameters", "words"),
    [({"values": 1.0}, "no parameter 'values'; it has: mode, value, out"), ({"value": "much"}, "value is float")],
)
def test_a_wrong_parameter_is_refused_before_a_kernel_starts(good, tmp_path, parameters, words):
    with pytest.raises(ConfigError, match=words):
        run_notebook(str(good), tmp_path / "run", parameters)
    assert not (tmp_path / "run").exists()


def test_a_failed_notebook_is_kept_and_named_and_ends_the_pipeline(good, tmp_path):
    bad = write_notebook(tmp_path / "bad.ipynb", "nb.check('water is dry', False, 'it is wet')")
    results = list(run_pipeline([Stage(str(bad)), Stage(str(good))], tmp_path / "out"))
    assert [r.status for r in results] == ["failed"]
    assert "CheckError: water is dry" in results[0].error
    assert (tmp_path / "out" / "bad" / "notebook.ipynb").is_file()
    assert "water is dry" in write_report(results, tmp_path / "out", title="t").read_text()
    # Mended, the same pipeline goes on in the same folder.
    write_notebook(bad, "nb.finish()")
    again = list(run_pipeline([Stage(str(bad)), Stage(str(good))], tmp_path / "out", resume=True))
    assert [r.status for r in again] == ["ok", "ok"]


def test_a_notebook_that_forgets_to_finish_fails(tmp_path):
    file = write_notebook(tmp_path / "made.ipynb", "1 + 1")
    assert "nb.finish()" in run_notebook(str(file), tmp_path / "run").error


def test_a_kernel_that_dies_is_a_failed_notebook(tmp_path):
    file = write_notebook(tmp_path / "made.ipynb", "import os\nos._exit(1)")
    result = run_notebook(str(file), tmp_path / "run")
    assert result.status == "failed" and "died" in result.error.lower()


HIDDEN = {
    "interact": "import ipywidgets as w\nw.interact(lambda x: 1 / x, x=w.IntSlider(0, 0, 3));",
    "output": "import ipywidgets as w\no = w.Output()\ndisplay(o)\nwith o:\n    1 / 0",
    "observer": (
        "import ipywidgets as w\ns = w.IntSlider()\no = w.Output()\ndisplay(s, o)\n"
        "@o.capture()\ndef look(change):\n    1 / 0\ns.observe(look, 'value')\ns.value = 3"
    ),
    "thread": "import threading\nt = threading.Thread(target=lambda: 1 / 0)\nt.start()\nt.join()",
}


@pytest.mark.parametrize("kind", HIDDEN)
def test_an_error_hidden_in_a_widget_or_thread_fails_the_run(tmp_path, kind):
    file = write_notebook(tmp_path / "made.ipynb", HIDDEN[kind], "nb.finish()")
    result = run_notebook(str(file), tmp_path / "run")
    assert result.status == "failed" and "ZeroDivisionError" in result.error
    assert tracebacks(tmp_path / "run" / "notebook.ipynb")


def test_a_pipeline_never_writes_into_a_used_folder_unless_asked(good, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    with pytest.raises(KitError, match="--resume"):
        list(run_pipeline([Stage(str(good))], tmp_path / "out"))


def test_a_wrong_later_stage_is_refused_before_the_first_one_runs(good, tmp_path):
    with pytest.raises(ConfigError, match="no parameter"):
        list(run_pipeline([Stage(str(good)), Stage(str(good), {"x": 1})], tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_notebooks_are_found_by_number_name_or_path(good):
    assert find_notebook("06").stem == "06_does_it_help" == find_notebook("06_does_it_help").stem
    assert find_notebook(str(good)) == good
    for wrong in ("77", "0", ""):
        with pytest.raises(ConfigError, match="06_does_it_help"):
            find_notebook(wrong)


def test_an_integer_will_do_for_a_float(good):
    check_parameters(good, {"value": 2})
