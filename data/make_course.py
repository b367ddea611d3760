"""`make course`, as python data/make_course.py FOLDER [NOTEBOOK...]: the exercises as a course for nbgrader.

FOLDER/source is the teachers' edition, FOLDER/release the students', an assignment for each session of COURSE.md. Three
students are graded: all solutions; empty stubs; solutions but for a wrong answer where one line is not enough.
"""

import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from textwrap import indent

import nbformat
import yaml
from nbformat import v4
from nbgrader.api import Gradebook
from nbgrader.apps import NbGraderAPI
from traitlets.config import Config

from dispersive_kit.study import notebook

OPTIONS = {"code_stub": {"python": "...  # your lines"}, "text_stub": "Your answer:"}
ANSWERS = yaml.safe_load(Path(__file__).with_name("wrong_answers.yaml").read_text("utf-8")).items()
WRONG = {name: indent(f"{one.get('begins', '')}return {one['returns'][0]}", "    ") for name, one in ANSWERS}


def graded(cells: list, *, mistaken: bool) -> Iterator:
    """Cells of a notebook as nbgrader has them: solutions in their stubs, tests with points, answers to be read."""
    code = ""  # of the solution that the next folded part holds
    for cell, after in zip(cells, [*cells[1:], None], strict=True):
        if exercise := next((t[9:] for t in cell.metadata.get("tags", []) if t.startswith("exercise:")), ""):
            stub, _, cases = cell.source.partition("\n\n\n")
            code = re.search(r"```python\ndef .*?:\n(.*?)\n```", after.source, re.DOTALL)[1]
            answer = WRONG[exercise] if mistaken and "\n" in code else code
            body = f"    ### BEGIN SOLUTION\n{answer}\n    ### END SOLUTION"
            yield marked(v4.new_code_cell(f"{stub.partition(': ...')[0]}:\n{body}"), cell.id)
            test = v4.new_code_cell(f'{cases}\nassert solved, "not yet"')
            yield marked(test, f"{cell.id}-test", 3 if "\n" in code else 1, solution=False)
        elif "<details>" not in cell.source:
            yield cell
        else:
            for k, part in enumerate(re.split(r"(<details>.*?</details>)", cell.source, flags=re.DOTALL)):
                text = part.removesuffix("</details>").partition("</summary>")[2].strip()
                if not text or "<summary>Hint" in part:
                    yield v4.new_markdown_cell(part.strip())
                elif not code:
                    answer = v4.new_markdown_cell(f"### BEGIN SOLUTION\n{text}\n### END SOLUTION")
                    yield marked(answer, f"{cell.id}-{k}", 2)
                code = "" if text else code


def marked(cell, name: str, points: int = 0, *, solution: bool = True):
    kind = {"schema_version": 3, "grade_id": name, "solution": solution, "locked": not solution, "task": False}
    cell.metadata["nbgrader"] = kind | ({"grade": True, "points": points} if points else {"grade": False})
    return cell


def main() -> None:
    folder, wanted, place = Path(sys.argv[1]).resolve(), sys.argv[2:], notebook.notebooks_folder()
    if (folder / "gradebook.db").exists():  # a course: all of it is made here
        shutil.rmtree(folder)
    os.environ |= {notebook.MODE_VARIABLE: "smoke", "DISPERSIVE_KIT_RUNS": str(folder / "runs")}
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # nbgrader calls alembic
    root = {"CourseDirectory": {"root": str(folder)}, "ClearSolutions": OPTIONS, "Execute": {"timeout": 300}}
    nbgrader, students = NbGraderAPI(config=Config(root)), ("solutions", "stub", "mistakes")
    for number, row in re.findall(r"^\| (\d)\. (.*)", (place / "COURSE.md").read_text("utf-8"), re.MULTILINE):
        session = f"session-{number}"
        for name in (name for name in re.findall(r"\d\d_\w+", row) if not wanted or name in wanted):
            for edition in ("source", "submitted/solutions", "submitted/mistakes"):
                (folder / edition / session).mkdir(parents=True, exist_ok=True)
                document = nbformat.read(place / f"{name}.ipynb", 4)
                cells = graded(document.cells, mistaken=edition.endswith("mistakes"))
                document.cells = [cell for cell in cells if cell.source]
                nbformat.write(document, folder / edition / session / f"{name}.ipynb")
        if (folder / "source" / session).exists():
            steps = [nbgrader.generate_assignment(session)]
            shutil.copytree(folder / "release" / session, folder / "submitted" / "stub" / session)
            steps += [nbgrader.autograde(session, student) for student in students]
            if failed := [step for step in steps if not step["success"]]:
                sys.exit(f"nbgrader, {session}: {failed[0].get('log') or failed[0]['error']}")
    with Gradebook(nbgrader.coursedir.db_url) as book:
        sheets = [sheet for part in book.assignments for work in part.submissions for sheet in work.notebooks]
        marks = {(s.name, s.student.id): f"{s.code_score:g}/{s.max_code_score:g}" for s in sheets}
    for name in sorted({name for name, _ in marks}):
        print(f"{name:24}" + "".join(f"  {student} {marks[name, student]:6}" for student in students))


if __name__ == "__main__":
    main()
