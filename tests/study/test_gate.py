"""Errors that stop no cell. Each is planted beside a cell that does the same without the error."""

import pytest

from dispersive_kit.study.execute import run_notebook

PLANTED = {
    "interact callback": "import ipywidgets as w\nw.interact(lambda x: 1 / {x}, x=w.IntSlider(0, 0, 3));",
    "output context": "import ipywidgets as w\no = w.Output()\ndisplay(o)\nwith o:\n    1 / {x}",
    "observer": (
        "import ipywidgets as w\ns = w.IntSlider()\no = w.Output()\ndisplay(s, o)\n"
        "@o.capture()\ndef look(change):\n    1 / {x}\ns.observe(look, 'value')\ns.value = 3"
    ),
    "thread": "import threading\nt = threading.Thread(target=lambda: 1 / {x})\nt.start()\nt.join()",
    "late thread": (
        "import threading, time\ndef late():\n    time.sleep(0.5)\n    1 / {x}\n"
        "t = threading.Thread(target=late)\nt.start()"
    ),
}


@pytest.mark.parametrize("kind", PLANTED)
def test_a_planted_error_that_stops_no_cell_fails_the_run(write_quick, tmp_path, kind):
    join = "t.join()" if kind == "late thread" else "1 + 1"
    result = run_notebook(str(write_quick("made", PLANTED[kind].format(x=0), join)), tmp_path / "run")
    assert result.status == "failed" and "ZeroDivisionError" in result.error


def test_the_same_without_an_error_passes(write_quick, tmp_path):
    cells = [cell.format(x=1) for cell in PLANTED.values()]
    assert run_notebook(str(write_quick("made", *cells, "t.join()")), tmp_path / "run").status == "ok"
