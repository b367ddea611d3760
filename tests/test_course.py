"""`make course`: its two editions, and the marks of the three students of its sample."""

import re
import runpy
import sys
from pathlib import Path

import nbformat
import pytest

from dispersive_kit.study import notebook

ROOT = Path(__file__).parents[1]
LESSONS = sorted(p.stem for p in (ROOT / "notebooks").glob("*.ipynb") if p.stem[:2] not in ("00", "90"))
CORE = "04_dispersive_loss"


def make_course(folder, monkeypatch, capsys):
    """Of each notebook the points of the solutions, the stub and the mistakes, and how many there are."""
    for name, value in {notebook.MODE_VARIABLE: "", "DISPERSIVE_KIT_RUNS": "", "PATH": "/usr/bin:/bin"}.items():
        monkeypatch.setenv(name, value)  # which the script sets; without the environment's own programs
    monkeypatch.setattr(sys, "argv", ["make_course.py", str(folder)])
    runpy.run_path(str(ROOT / "data" / "make_course.py"), run_name="__main__")
    rows = re.findall(
        r"^(\d\d_\w+) +solutions (\S+) +stub (\S+) +mistakes (\S+)", capsys.readouterr().out, re.MULTILINE
    )
    return {name: [tuple(map(int, mark.split("/"))) for mark in of] for name, *of in rows}


@pytest.fixture
def only_the_exercises(tmp_path, monkeypatch):
    """Of one notebook: its imports and its exercises, which take seconds."""
    (cut := tmp_path / "notebooks").mkdir()
    document = nbformat.read(ROOT / "notebooks" / f"{CORE}.ipynb", 4)
    head = next(n for n, cell in enumerate(document.cells) if "nb = begin(" in cell.source)
    tail = next(n for n, cell in enumerate(document.cells) if cell.source.startswith("## Exercises"))
    quick = [line for line in document.cells[head].source.splitlines() if "views" not in line and line != "style()"]
    document.cells[head].source = "\n".join(quick)
    document.cells = document.cells[: head + 1] + document.cells[tail:]
    nbformat.write(document, cut / f"{CORE}.ipynb")
    (cut / "COURSE.md").write_text(f"| 2. The loss | {CORE} |\n")
    monkeypatch.setattr(notebook, "notebooks_folder", lambda: cut)


def test_solutions_get_full_marks_and_wrong_answers_lose_theirs(only_the_exercises, tmp_path, monkeypatch, capsys):
    """And the students' edition shows no solution; mutation: a test without its assert, or a solution left in."""
    marks = make_course(tmp_path / "course", monkeypatch, capsys)
    assert marks == {CORE: [(8, 8), (0, 8), (2, 8)]}
    editions = (tmp_path / "course" / name / "session-2" / f"{CORE}.ipynb" for name in ("source", "release"))
    teachers, students = (nbformat.read(file, 4).cells for file in editions)
    for cell, blank in zip(teachers, students, strict=True):
        assert "SOLUTION" not in blank.source and "<summary>Solution" not in blank.source
        if solution := re.search(r"BEGIN SOLUTION\n(.*?)\n *### END", cell.source, re.DOTALL):
            assert solution[1] not in blank.source and ("# your lines" in blank.source or "Your answer" in blank.source)
    tests = [cell for cell in students if cell.metadata.get("nbgrader", {}).get("locked")]
    assert len(tests) == 4 and all(cell.source.endswith('assert solved, "not yet"') for cell in tests)
    by_hand = [cell for cell in students if cell.cell_type == "markdown" and "nbgrader" in cell.metadata]
    assert [cell.metadata.nbgrader.points for cell in by_hand] == [2]


@pytest.mark.long
def test_so_it_is_in_all_notebooks_whole(tmp_path, monkeypatch, capsys):
    marks = make_course(tmp_path / "course", monkeypatch, capsys)
    assert sorted(marks) == LESSONS
    for name, of in marks.items():
        full = of[0][1]
        lost = full - of[2][0]  # three points for each exercise of several lines
        assert of == [(full, full), (0, full), (full - lost, full)] and lost >= 3 and lost % 3 == 0, name
