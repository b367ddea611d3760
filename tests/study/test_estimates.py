import re
from pathlib import Path

import pytest

from dispersive_kit.study.estimates import estimate, measured
from dispersive_kit.study.lookup import find_notebook, notebooks_folder
from dispersive_kit.study.modes import MODES
from dispersive_kit.study.sweep import Task


def tasks(number, mode, count=1):
    return [Task(f"{number}-{k}", find_notebook(number), {"mode": mode}) for k in range(count)]


@pytest.fixture
def seconds():
    table = measured()["notebooks"]
    return lambda number, mode: table[find_notebook(number).stem][mode]["seconds"]


def test_the_table_holds_measured_runs_of_notebooks_that_exist():
    assert measured()["machine"]
    for notebook, modes in measured()["notebooks"].items():
        assert find_notebook(notebook).stem == notebook and set(modes) <= set(MODES)
        assert all(run["seconds"] > 1 and run["peak_gib"] > 0.1 for run in modes.values())


def test_class_mode_of_every_notebook_was_measured_and_is_short_enough_for_a_class():
    """At most 3 minutes and 3 GB; and the README's table says what was measured."""
    found = {name: modes["class"] for name, modes in measured()["notebooks"].items()}
    assert set(found) == {path.stem for path in notebooks_folder().glob("*.ipynb")}
    assert all(run["seconds"] <= 180 and run["peak_gib"] <= 3e9 / 2**30 for run in found.values())
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    rows = re.findall(r"^\| (\d\d_\w+) \|.*\| (\d+) s \| ([\d.]+) GiB \|$", readme, re.MULTILINE)
    assert rows == [(name, f"{run['seconds']:.0f}", f"{run['peak_gib']:.2f}") for name, run in sorted(found.items())]


def test_stages_add_up_and_workers_share_the_time_of_a_sweep_but_not_its_memory(seconds):
    one, smoke = estimate([tasks("06", "smoke")]), seconds("06", "smoke")
    assert f"about {smoke:.0f} s and" in one and measured()["machine"] in one
    assert f"about {2 * smoke + seconds('00', 'smoke'):.0f} s" in estimate(
        [tasks("00", "smoke"), tasks("06", "smoke", 4)], workers=2
    )
    gib = measured()["notebooks"]["06_does_it_help"]["smoke"]["peak_gib"]
    assert f"{2 * gib:.1f} GiB" in estimate([tasks("06", "smoke", 4)], workers=2)


def test_what_was_never_measured_has_no_estimate():
    assert estimate([tasks("06", "full")]) == "estimate: no estimate for 06_does_it_help in full mode"
    assert "; no estimate for 06_does_it_help in full mode" in estimate([tasks("00", "smoke"), tasks("06", "full")])
