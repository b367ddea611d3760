"""The notebooks as files, their checks and their exercises. That they run, nbmake and the pipeline show."""

import ast
import functools
import itertools
import re
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from scipy.stats import binomtest

from dispersive_kit.regularizers import dispersive_loss
from dispersive_kit.study.notebook import begin

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
            assert used - set(dir(__builtins__)), ast.unparse(call)


@each_notebook
def test_no_cell_reaches_for_the_network(path: Path) -> None:
    reaching = re.compile(r"https?://|\b(requests|urllib|wget|curl|hf_hub_download)\b|download=True")
    assert not [cell.id for cell in CODE[path] if reaching.search(cell.source)]


@each_notebook
def test_without_the_package_its_first_import_says_what_to_install(path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(AssertionError, match=r"%pip install 'dispersive-kit\[notebooks"):
        exec(CODE[path][1].source, {})


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

# What the functions of the stubs must not return
WRONG = {
    "time on the line": ["torch.sigmoid(log_snr / 2)", "torch.sigmoid(-log_snr)", "torch.exp(-log_snr / 2)"],
    "log-SNR of DDPM": [  # the sum in place of the product; deviations; only this step's noise
        "torch.log((1 - beta.cumsum(0)) / beta.cumsum(0))", "torch.log(signal.sqrt() / (1 - signal).sqrt())",
        "torch.log((1 - beta) / beta)", "torch.log(signal)",
    ],
    "change of path": [
        "x_t * ((1 - t) ** 2 + t**2).sqrt()", "x_t / ((1 - t) + t)", "x_t / ((1 - t) ** 2 + t**2)",
        "x_t * torch.cos(t * math.pi / 2) / (1 - t)",
    ],
    "heun step": [
        "x + (s - t) * f(x, t)", "x + (s - t) / 2 * (f(x, t) + f(x, s))",
        "x + (s - t) / 2 * (f(x, t) + f(x + (s - t) * f(x, t), t))",
        "x + (t - s) / 2 * (f(x, t) + f(x + (t - s) * f(x, t), s))",
    ],
    "steps needed": [  # the power; one that suits; not the first; the mean of all coordinates
        "power", "8", "2 * need(lambda x: x.abs().max())", "need(lambda x: x.mean().abs())",
    ],
    "guidance": ["weak + g * (strong - weak)", "strong + (1 + g) * (strong - weak)", "(1 + g) * weak - g * strong"],
    "adaptive norm": ["n * s + b", "n * (1 + b) + s", "(n + b) * (1 + s)", "z * (1 + s) + b"],
    "tap index": ["depth // 4", "depth // 4 - 1", "(depth - 1) // 4"],
    "average of averages": [
        "(u_rs + u_st) / 2", "(s - r) * u_rs + (t - s) * u_st", "((t - s) * u_rs + (s - r) * u_st) / (t - r)",
    ],
    "jumps": [  # one jump; forward in time; ends of the interval exchanged; an interval of no length
        "x - u(x, 0.0, 1.0)", "walk(lambda x, k: u(x, k / n, (k + 1) / n) / n, range(n))",
        "walk(lambda x, k: u(x, (k - 1) / n, k / n), range(n, 0, -1))",
        "walk(lambda x, k: u(x, k / n, k / n) / n, range(n, 0, -1))",
    ],
    "pull": [
        "(torch.softmax(-D.flatten() / tau, 0).view_as(D) * D).sum()",
        "2 / tau * (torch.softmax(-D / tau, 1) * D).sum()", "2 / tau * (torch.exp(-D / tau) * D).sum()",
        "2 / tau * (torch.softmax(-D.flatten(), 0).view_as(D) * D).sum()",
    ],
    "select": ["out[0]", "out[0].mean(0)", "out[1][0]", "out[0].mean(2)"],
    "score": ["(x_t - (1 - t) * x0_mean) / t**2", "((1 - t) * x0_mean - x_t) / t", "(x0_mean - x_t) / t**2"],
    "denoise": ["x_t + t * v", "x_t - (1 - t) * v", "x_t - v"],
    "best guess": [  # all rows alike; the nearest row; twice the width; data of another scale
        "torch.softmax(0 * miss, 1) @ data", "data[miss.argmin(1)]", "torch.softmax(-miss / t**2, 1) @ data",
        "torch.softmax(-torch.cdist(x_t, data).square() / (2 * t**2), 1) @ data",
    ],
    "floor of a device": ["-math.log(global_batch)", "-math.log(global_batch * devices)", "-math.log(devices)"],
    "temperature": ["share", "1 / share", "2 * z.var(0).mean() / (share * math.log(len(z)))"],
    "cosine loss": [  # the l2 form; attracts; the log inside; sees size; tau outside
        "loss_by_hand(u, tau)", "torch.exp(-u @ u.T / tau).mean().log()", "torch.exp(u @ u.T / tau).log().mean()",
        "torch.exp(z @ z.T / tau).mean().log()", "torch.exp(u @ u.T).mean().log() / tau",
    ],
    "without the diagonal": [
        "L + math.log(B)", "math.log(math.exp(L) - 1 / B)", "(math.exp(L) - 1 / B) / (1 - 1 / B)", "1 / 0",
    ],
    "epochs": ["steps / images", "steps * batch_size // images", "images / (steps * batch_size)"],
    "warm-up and cosine": [
        "peak * 0.5 * (1 + math.cos(math.pi * k / steps))",
        "peak * min(1, k / warmup) * 0.5 * (1 + math.cos(math.pi * k / steps))",
        "peak * min(1, (k + 1) / warmup) * math.cos(math.pi * k / steps)", "peak * min(1, (k + 1) / warmup)",
    ],
    "store bytes": [  # the mean only; values, not bytes; no mirror images
        "images * (1 + flip) * C * h * w * 2", "images * (1 + flip) * 2 * C * h * w", "images * 2 * C * h * w * 2",
    ],
    "sample a posterior": [
        "mean * scale + std * eps - shift", "(mean + std * eps) * scale - shift",
        "(mean + std**2 * eps - shift) * scale", "(mean + std * eps) / scale + shift",
    ],
    "gpu hours": [
        "flops_per_image * epochs * images / (tflops * 1e12)", "flops_per_image * images / (tflops * 1e12) / 3600",
        "flops_per_image * epochs * images / (tflops * 1e9) / 3600",
    ],
    "dispersion batch": ["global_batch // processes", "global_batch", "global_batch // processes * accumulation"],
    "distance along one axis": [
        "(m1 - m2) ** 2 + (s1**2 - s2**2) ** 2", "abs(m1 - m2) + abs(s1 - s2)", "(m1 - m2) ** 2 + s1**2 + s2**2",
    ],
    "unbiased MMD": [  # every image against itself too; divided by n^2; one cross term; k(x, x) taken for 1
        "K_xx.mean() + K_yy.mean() - 2 * K_xy.mean()",
        "(K_xx.sum() - K_xx.trace()) / n**2 + (K_yy.sum() - K_yy.trace()) / m**2 - 2 * K_xy.mean()",
        "(K_xx.sum() - K_xx.trace()) / (n * (n - 1)) + (K_yy.sum() - K_yy.trace()) / (m * (m - 1)) - K_xy.mean()",
        "(K_xx.sum() - n) / (n * (n - 1)) + (K_yy.sum() - m) / (m * (m - 1)) - 2 * K_xy.mean()",
    ],
    "mean distance": [  # one trace; not centred; not over D; over N
        "x.var(0).sum() / x.shape[1]", "2 * x.square().mean(0).sum() / x.shape[1]", "2 * x.var(0).sum()",
        "2 * x.var(0, correction=0).sum() / x.shape[1]",
    ],
    "discordant": [  # the share; of all that are right; one-sided
        "float((first != second).double().mean())",
        "binomtest(int(first.sum()), int(first.sum() + second.sum())).pvalue",
        "binomtest(a, a + b, alternative='greater').pvalue",
    ],
    "equivalent": [  # no difference seen; however little was measured; one side; of one pair, not of the mean
        "bool(mean.abs() < half)", "bool(mean.abs() < margin)", "bool(mean + half < margin)",
        "bool(mean.abs() + t * x.std() < margin)",
    ],
    "holm": [  # Bonferroni; in another order; one below an earlier one
        "(p * len(p)).clamp(max=1)", "(p[order] * times).cummax(0).values.clamp(max=1)",
        "torch.empty_like(p).scatter(0, order, (p[order] * times).clamp(max=1))",
    ],
    "shared neighbours": [  # minds the order; not over k; over all rows at once
        "(a == b).double().mean()", "(a[:, :, None] == b[:, None]).double().sum((1, 2)).mean()",
        "len(set(a.flatten().tolist()) & set(b.flatten().tolist())) / a.numel()",
    ],
}  # fmt: skip
FIRST = {  # what their bodies have in common
    "log-SNR of DDPM": "beta = torch.linspace(1e-4, 0.02, steps).double(); signal = (1 - beta).cumprod(0)",
    "steps needed": (
        "power = 3; far = lambda n: functools.reduce(lambda y, k: y - f(y, 1 - k / n) / n, range(n), x) - exact\n"
        "    need = lambda size: next(n for n in (2**p for p in range(11)) if size(far(n)) <= tolerance)"
    ),
    "best guess": "miss = (x_t[:, None] - (1 - t)[:, None] * data).square().sum(-1)",
    "adaptive norm": "n, b, s = torch.layer_norm(z, z.shape[-1:]), shift[:, None], scale[:, None]",
    "jumps": "walk = lambda step, ks: functools.reduce(lambda x, k: x - step(x, k), ks, x)",
    "cosine loss": "u = z / z.norm(dim=1, keepdim=True)",
    "unbiased MMD": "n, m = K_xy.shape",
    "discordant": "a, b = int((first & ~second).sum()), int((second & ~first).sum())",
    "equivalent": "mean, half = x.mean(), t * x.std() / len(x) ** 0.5",
    "holm": "order, times = p.argsort(), torch.arange(len(p), 0, -1, dtype=p.dtype)",
}


def exercises() -> Iterator[tuple[str, tuple[Path, str, str]]]:
    """Name, then notebook, stub cell with its cases, solution, as they stand in the notebooks."""
    for path in PATHS:
        for cell, after in itertools.pairwise(NOTEBOOKS[path].cells):
            for name in (tag[9:] for tag in cell.metadata.get("tags", []) if tag.startswith("exercise:")):
                yield name, (path, cell.source, re.findall(r"```python\n(.+?)```", after.source, re.DOTALL)[0])


EXERCISES = dict(exercises())


def solved(name: str, folder: Path, answer: str = "") -> bool:
    """What the cell of an exercise says of the stub in it, or of an answer in its place. It needs the imports alone."""
    path, stub, _ = EXERCISES[name]
    lines = [line for cell in CODE[path] for line in ast.parse(cell.source).body]
    run = begin(path.stem, mode="smoke", out=str(folder))
    space: dict[str, Any] = {"nb": run, "binomtest": binomtest, "functools": functools}
    space["loss_by_hand"] = lambda z, tau: dispersive_loss(z, tau=tau)  # of notebook 04, where a solution calls it
    exec("\n".join(ast.unparse(line) for line in lines if isinstance(line, ast.Import | ast.ImportFrom)), space)
    exec(f"{answer}{GAP}{stub.partition(GAP)[2]}" if answer else stub, space)
    return space["solved"]


def test_every_exercise_has_wrong_answers() -> None:
    assert set(EXERCISES) == set(WRONG)
    assert min(len(answers) for answers in WRONG.values()) >= 3


@pytest.mark.parametrize("name", EXERCISES)
def test_the_stub_fails_and_the_solution_passes_in_ten_lines(name: str, tmp_path: Path, capsys: Any) -> None:
    assert solved(name, tmp_path) is False
    assert "returns nothing yet" in capsys.readouterr().out
    solution = EXERCISES[name][2]
    assert len(solution.splitlines()) <= 11  # the first is its head
    assert solved(name, tmp_path, solution) is True


@pytest.mark.parametrize(("name", "wrong"), [(name, w) for name, answers in WRONG.items() for w in answers])
def test_a_wrong_answer_is_refused_with_a_hint(name: str, wrong: str, tmp_path: Path, capsys: Any) -> None:
    head = EXERCISES[name][1].partition(": ...")[0]
    assert solved(name, tmp_path, f"{head}:\n    {FIRST.get(name, '...')}\n    return {wrong}") is False
    assert re.search(r"^not yet, case \d: .+\nhint: .{20}", capsys.readouterr().out)
