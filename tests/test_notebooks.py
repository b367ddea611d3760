"""The notebooks as files, their checks and their exercises. That they run, nbmake and the pipeline show."""

import ast
import itertools
import re
import statistics
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nbformat
import pytest
import yaml

from dispersive_kit.cli import main
from dispersive_kit.regularizers import dispersive_loss
from dispersive_kit.study.notebook import begin, read_result

GAP = "\n\n\n"  # between the stub of an exercise and its cases
FOLDER = Path(__file__).parents[1] / "notebooks"
PATHS = sorted(FOLDER.glob("*.ipynb"))
each_notebook = pytest.mark.parametrize("path", PATHS, ids=lambda p: p.stem)
NO_LESSON = {"00_start_here"}  # shows the way, and asks nothing
CONSOLE = {"90_lecture_console"}  # no lesson; its pictures, with their words, are those of tests/views/test_console.py
RUNNING = {"00", "07", "13", "16", "90"}  # shorter
VERBS = {  # with which goals begin
    "add", "catch", "choose", "compare", "draw", "encode", "filter", "find", "hold", "keep", "know", "learn",
    "look", "measure", "meet", "mix", "predict", "put", "re-run", "read", "rebuild", "refuse", "sample", "say", "see",
    "stop", "trace", "train", "weigh", "write",
}  # fmt: skip
NOTEBOOKS: dict[Path, Any] = {path: nbformat.read(path, as_version=4) for path in PATHS}
CODE = {path: [cell for cell in nb.cells if cell.cell_type == "code"] for path, nb in NOTEBOOKS.items()}
TEXT = {path: "\n".join(cell.source for cell in nb.cells if cell not in CODE[path]) for path, nb in NOTEBOOKS.items()}


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    """Every call in the code cells, by the last part of its name."""
    for cell in CODE[path]:
        for node in ast.walk(ast.parse(cell.source)):
            if isinstance(node, ast.Call):
                yield ast.unparse(node.func).rpartition(".")[2], node


# ---- as files


@each_notebook
def test_the_first_code_cell_holds_typed_parameters_with_a_comment_each(path: Path) -> None:
    first = CODE[path][0]
    assert first.metadata.get("tags") == ["parameters"]
    assert all(isinstance(line, ast.AnnAssign) for line in ast.parse(first.source).body)
    assert all("  # " in line for line in first.source.splitlines())
    assert {"mode", "out"} <= {line.split(":")[0] for line in first.source.splitlines()}
    folded = [(cell.metadata.get("tags"), cell.metadata.get("jupyter")) for cell in CODE[path][1:3]]
    assert folded == 2 * [(["setup"], {"source_hidden": True})]  # installation and imports


@each_notebook
def test_a_notebook_is_neither_too_short_nor_too_long(path: Path) -> None:
    lengths = [len(cell.source.splitlines()) for cell in CODE[path]]
    assert len(lengths) <= 25 and max(lengths) <= 30 and statistics.median(lengths) <= 8
    text = re.sub(r"```.*?```|\$\$.*?\$\$", "", TEXT[path], flags=re.DOTALL)  # a formula that stands alone is no word
    text = re.sub(r"<[^>]*>", "", re.sub(r"\$[^$]*\$", "formula", text))  # one in a line is one
    least = 300 if path.stem[:2] in RUNNING else 1200
    assert least <= sum(bool(re.search(r"\w", word)) for word in text.split()) <= 2500


@each_notebook
def test_a_goal_has_at_most_four_verbs(path: Path) -> None:
    """It is written in imperatives: the verbs are the first words of its clauses."""
    goal = re.search(r"^\*\*Goal\.\*\* (.+)$", TEXT[path], re.MULTILINE)[1]
    firsts = [clause.split()[0].lower() for clause in re.split(r"[,;:.] (?:and )?| and ", goal) if clause]
    assert firsts[0] in VERBS, f"{firsts[0]!r} is not in VERBS: add it, if it is one"
    assert sum(word in VERBS for word in firsts) <= 4, goal


@each_notebook
def test_a_lesson_has_all_its_parts(path: Path) -> None:
    text = TEXT[path]
    assert re.match(rf"# {path.stem[:2]} · .+\n\n\*\*Goal\.\*\* ", text)
    if path.stem not in NO_LESSON | CONSOLE:
        headings = re.findall(r"^## (.+)$", text, re.MULTILINE)
        assert headings == ["Predict", "Do", "Check", "So what", "Exercises"]
        assert "<details><summary>Solution</summary>" in text


@each_notebook
def test_every_figure_has_alternative_text(path: Path) -> None:
    figures = [call for name, call in calls(path) if name in ("show", "explore", "scrub")]
    assert figures or path.stem in CONSOLE
    for call in figures:
        alt = next((keyword.value for keyword in call.keywords if keyword.arg == "alt"), ast.Constant(""))
        assert not isinstance(alt, ast.Constant) or len(alt.value) > 40, ast.unparse(call)


@each_notebook
def test_what_differs_between_modes_stands_in_one_cell_and_no_other_asks_for_the_mode(path: Path) -> None:
    first, *rest = CODE[path]
    assert 'mode: str = "class"' in first.source
    assert sum(name == "in_mode" for name, _ in calls(path)) <= 1
    asked = [node for cell in rest for node in ast.walk(ast.parse(cell.source)) if isinstance(node, ast.If | ast.IfExp)]
    assert not [ast.unparse(node) for node in asked if re.search(r"\bmode\b", ast.unparse(node.test))]


@each_notebook
def test_every_check_depends_on_what_the_notebook_computed(path: Path) -> None:
    for _, call in calls(path):
        if ast.unparse(call.func) == "nb.check":
            used = {node.id for node in ast.walk(call.args[1]) if isinstance(node, ast.Name)}
            assert used - set(__builtins__), ast.unparse(call)


@each_notebook
def test_no_cell_reaches_for_the_network(path: Path) -> None:
    reaching = re.compile(r"https?://|\b(requests|urllib|wget|curl|hf_hub_download)\b|download=True")
    assert not [cell.id for cell in CODE[path] if reaching.search(cell.source)]


@each_notebook
def test_on_a_machine_without_the_kit_it_says_what_it_installs_and_goes_on(
    path: Path, monkeypatch: Any, capsys: Any
) -> None:
    asked: list[str] = []
    monkeypatch.setattr("importlib.util.find_spec", lambda name: asked or None)  # nothing is there until pip ran
    shell = SimpleNamespace(run_line_magic=lambda magic, line: asked.append(f"%{magic} {line}"))
    exec(CODE[path][1].source, {"get_ipython": lambda: shell})
    (command,) = asked
    assert re.fullmatch(r"%pip install -q '(dispersive-kit|\.\.)\[notebooks(,latents)?\]'", command)
    assert command.replace("-q ", "") in capsys.readouterr().out
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(AssertionError, match="its message above says why"):
        exec(CODE[path][1].source, {"get_ipython": lambda: shell})


@each_notebook
def test_a_notebook_opens_its_run_under_its_own_name_and_ends_it(path: Path) -> None:
    begun = [call for name, call in calls(path) if name == "begin"]
    assert [ast.literal_eval(call.args[0]) for call in begun] == [path.stem]
    assert CODE[path][-1].source == "nb.finish()"


@each_notebook
def test_nothing_of_a_run_is_committed_and_cell_ids_are_stable(path: Path) -> None:
    metadata, ids = NOTEBOOKS[path].metadata, [cell.id for cell in NOTEBOOKS[path].cells]
    assert metadata.kernelspec.name == "python3" and "widgets" not in metadata
    assert not [cell.id for cell in CODE[path] if cell.outputs or cell.execution_count is not None]
    assert len(set(ids)) == len(ids) and all(re.fullmatch(r"c\d\d-\d\d[a-z]?", one) for one in ids)


# ---- their exercises


def exercises() -> Iterator[tuple[str, tuple[Path, str, str]]]:
    """Name, then notebook, stub cell with its cases, solution, as they stand in the notebooks."""
    for path in PATHS:
        for cell, after in itertools.pairwise(NOTEBOOKS[path].cells):
            for name in (tag[9:] for tag in cell.metadata.get("tags", []) if tag.startswith("exercise:")):
                yield name, (path, cell.source, re.findall(r"```python\n(.+?)```", after.source, re.DOTALL)[0])


EXERCISES = dict(exercises())
WRONG = yaml.safe_load((FOLDER.parent / "data/wrong_answers.yaml").read_text("utf-8"))


def solved(name: str, folder: Path, answer: str = "") -> bool:
    """What the cell of an exercise says of the stub in it, or of an answer in its place. It needs the imports alone."""
    path, stub, _ = EXERCISES[name]
    lines = [line for cell in CODE[path] for line in ast.parse(cell.source).body]
    run = begin(path.stem, mode="smoke", out=str(folder))
    space: dict[str, Any] = {"nb": run}
    space["loss_by_hand"] = lambda z, tau: dispersive_loss(z, tau=tau)  # of notebook 04, where a solution calls it
    exec("\n".join(ast.unparse(line) for line in lines if isinstance(line, ast.Import | ast.ImportFrom)), space)
    exec(f"{answer}{GAP}{stub.partition(GAP)[2]}" if answer else stub, space)
    return space["solved"]


def test_every_exercise_has_wrong_answers() -> None:
    assert set(EXERCISES) == set(WRONG)
    assert min(len(wrong["returns"]) for wrong in WRONG.values()) >= 3


@pytest.mark.parametrize("name", EXERCISES)
def test_the_stub_fails_and_the_solution_passes_in_ten_lines(name: str, tmp_path: Path, capsys: Any) -> None:
    assert solved(name, tmp_path) is False
    assert "returns nothing yet" in capsys.readouterr().out
    solution = EXERCISES[name][2]
    assert len(solution.splitlines()) <= 11  # the first is its head
    assert solved(name, tmp_path, solution) is True


@pytest.mark.parametrize(("name", "wrong"), [(name, w) for name, of in WRONG.items() for w in of["returns"]])
def test_a_wrong_answer_is_refused_with_a_hint(name: str, wrong: str, tmp_path: Path, capsys: Any) -> None:
    lines = f"{WRONG[name].get('begins', '')}return {wrong}"
    head = EXERCISES[name][1].partition(": ...")[0]
    assert solved(name, tmp_path, f"{head}:\n{textwrap.indent(lines, '    ')}") is False
    assert re.search(r"^not yet, case \d: .+\nhint: .{20}", capsys.readouterr().out)


# ---- in class mode


@pytest.mark.long
def test_the_readme_says_of_a_trained_model_what_notebook_15_measures(tmp_path: Path) -> None:
    main(["run", "15_your_own_model", "--mode", "class", "--out", str(tmp_path / "run")])
    (file,) = (tmp_path / "run").rglob("result.json")
    found = {number.name: number.value for number in read_result(file.parent).numbers}
    told = re.sub(r"\s+", " ", (FOLDER.parent / "README.md").read_text()).partition("In 100 more steps")[2]
    losses = [found[f"held-out loss, {arm}"] for arm in ("before", "paper", "small")]
    shares = [100 * found[f"share read as the class asked for, {arm}"] for arm in ("before", "paper", "small")]
    assert list(map(float, re.findall(r"\b0\.\d{3}\b", told)[:3])) == pytest.approx(losses, abs=2e-3)
    assert list(map(float, re.findall(r"(\d+) %", told)[:3])) == pytest.approx(shares, abs=1.6)  # 3 samples of 200
