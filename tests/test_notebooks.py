"""The notebooks as files, their checks and their exercises. That they run, nbmake and the pipeline show."""

import ast
import itertools
import re
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest

from dispersive_kit.regularizers import dispersive_loss
from dispersive_kit.study.notebook import begin

GAP = "\n\n\n"  # between the stub of an exercise and its cases
FOLDER = Path(__file__).parents[1] / "notebooks"
PATHS = sorted(FOLDER.glob("*.ipynb"))
each_notebook = pytest.mark.parametrize("path", PATHS, ids=lambda p: p.stem)
NO_LESSON = {"00_start_here"}  # shows the way, and asks nothing
TEACHING = {
    path.stem
    for path in PATHS
    if path.stem[:2] in ("01", "02", "03", "04", "05", "06", "08", "09", "10", "11", "12", "14", "15")
}
# What a goal tells one to do
VERBS = {
    "add", "catch", "choose", "compare", "draw", "encode", "filter", "find", "hold", "keep", "know", "learn",
    "look", "measure", "meet", "mix", "predict", "put", "re-run", "read", "rebuild", "refuse", "sample", "say",
    "see", "stop", "trace", "train", "weigh", "write",
}  # fmt: skip


def read(path: Path) -> Any:
    return nbformat.read(path, as_version=4)


def code_cells(path: Path) -> list[Any]:
    return [cell for cell in read(path).cells if cell.cell_type == "code"]


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    """Every call in the code cells, by the last part of its name."""
    for cell in code_cells(path):
        for node in ast.walk(ast.parse(cell.source)):
            if isinstance(node, ast.Call):
                yield ast.unparse(node.func).rpartition(".")[2], node


def argument(call: ast.Call, name: str) -> ast.expr | None:
    return next((keyword.value for keyword in call.keywords if keyword.arg == name), None)


CONSOLE = {"90_lecture_console"}  # no lesson; its pictures, with their words, are those of tests/views/test_console.py


# ---- as files


@each_notebook
def test_the_first_code_cell_holds_typed_parameters_with_a_comment_each(path: Path) -> None:
    first = code_cells(path)[0]
    assert first.metadata.get("tags") == ["parameters"]
    assert all(isinstance(line, ast.AnnAssign) for line in ast.parse(first.source).body)
    assert all("  # " in line for line in first.source.splitlines())
    assert {"mode", "out"} <= {line.split(":")[0] for line in first.source.splitlines()}


@each_notebook
def test_nothing_of_a_run_is_committed(path: Path) -> None:
    notebook = read(path)
    assert notebook.metadata.kernelspec.name == "python3"
    assert "widgets" not in notebook.metadata
    assert not [cell.id for cell in code_cells(path) if cell.outputs or cell.execution_count is not None]


@each_notebook
def test_cells_are_few_and_short(path: Path) -> None:
    lengths = [len(cell.source.splitlines()) for cell in code_cells(path)]
    assert len(lengths) <= 25 and max(lengths) <= 30
    assert statistics.median(lengths) <= 8


def count_words(path: Path) -> int:
    """Of the text, solutions included; a formula in a line is one word, one that stands alone is none."""
    text = "\n".join(cell.source for cell in read(path).cells if cell.cell_type == "markdown")
    text = re.sub(r"```.*?```|\$\$.*?\$\$", "", text, flags=re.DOTALL)
    text = re.sub(r"<[^>]*>", "", re.sub(r"\$[^$]*\$", "formula", text))
    return sum(bool(re.search(r"\w", word)) for word in text.split())


@each_notebook
def test_a_lesson_is_neither_too_short_nor_too_long_to_read(path: Path) -> None:
    least = 1200 if path.stem in TEACHING else 300
    assert least <= count_words(path) <= 2500


@each_notebook
def test_a_goal_has_at_most_four_verbs(path: Path) -> None:
    """It is written in imperatives: the verbs are the first words of its clauses."""
    goal = re.search(r"^\*\*Goal\.\*\* (.+)$", read(path).cells[0].source, re.MULTILINE)[1]
    firsts = [clause.split()[0].lower() for clause in re.split(r"[,;:.] (?:and )?| and ", goal) if clause]
    assert firsts[0] in VERBS, f"{firsts[0]!r} is not in VERBS: add it, if it is one"
    assert sum(word in VERBS for word in firsts) <= 4, goal


@each_notebook
def test_a_lesson_has_all_its_parts(path: Path) -> None:
    text = "\n".join(cell.source for cell in read(path).cells if cell.cell_type == "markdown")
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
        alt = argument(call, "alt")
        assert alt is not None, ast.unparse(call)
        assert not isinstance(alt, ast.Constant) or len(alt.value) > 40, ast.unparse(call)


@each_notebook
def test_what_differs_between_modes_stands_in_one_cell_and_no_other_asks_for_the_mode(path: Path) -> None:
    first, *rest = code_cells(path)
    assert 'mode: str = "class"' in first.source
    assert sum(name == "in_mode" for name, _ in calls(path)) <= 1
    asked = [node for cell in rest for node in ast.walk(ast.parse(cell.source)) if isinstance(node, ast.If | ast.IfExp)]
    assert not [ast.unparse(node) for node in asked if "mode" in re.findall(r"\w+", ast.unparse(node.test))]


@each_notebook
def test_every_check_depends_on_what_the_notebook_computed(path: Path) -> None:
    for _, call in calls(path):
        if ast.unparse(call.func) == "nb.check":
            used = {node.id for node in ast.walk(call.args[1]) if isinstance(node, ast.Name)}
            assert used - set(dir(__builtins__)), ast.unparse(call)


@each_notebook
def test_no_cell_reaches_for_the_network(path: Path) -> None:
    reaching = re.compile(r"https?://|\b(requests|urllib|wget|curl|pip install|hf_hub_download)\b|download=True")
    assert not [cell.id for cell in code_cells(path) if reaching.search(cell.source)]


@each_notebook
def test_a_notebook_opens_its_run_under_its_own_name_and_ends_it(path: Path) -> None:
    begun = [call for name, call in calls(path) if name == "begin"]
    assert [ast.literal_eval(call.args[0]) for call in begun] == [path.stem]
    assert code_cells(path)[-1].source == "nb.finish()"


@each_notebook
def test_cell_ids_are_stable_and_unlike(path: Path) -> None:
    ids = [cell.id for cell in read(path).cells]
    assert len(set(ids)) == len(ids)
    assert all(re.fullmatch(r"c\d\d-\d\d[a-z]?", one) for one in ids)


# ---- their exercises

WRONG = {
    "time on the line": [
        "def time_on_the_line(log_snr): return torch.sigmoid(log_snr / 2)",
        "def time_on_the_line(log_snr): return torch.sigmoid(-log_snr)",
        "def time_on_the_line(log_snr): return torch.exp(-log_snr / 2)",
    ],
    "change of path": [
        "def line_to_gvp(x_t, t): return x_t * ((1 - t) ** 2 + t**2).sqrt()",
        "def line_to_gvp(x_t, t): return x_t / ((1 - t) + t)",
        "def line_to_gvp(x_t, t): return x_t / ((1 - t) ** 2 + t**2)",
        "def line_to_gvp(x_t, t): return x_t * torch.cos(t * math.pi / 2) / (1 - t)",
    ],
    "heun step": [
        "def heun_step(f, x, t, s): return x + (s - t) * f(x, t)",
        "def heun_step(f, x, t, s): return x + (s - t) / 2 * (f(x, t) + f(x, s))",
        "def heun_step(f, x, t, s): return x + (s - t) / 2 * (f(x, t) + f(x + (s - t) * f(x, t), t))",
        "def heun_step(f, x, t, s): return x + (t - s) / 2 * (f(x, t) + f(x + (t - s) * f(x, t), s))",
    ],
    "guidance": [
        "def guidance(weak, strong, g): return weak + g * (strong - weak)",
        "def guidance(weak, strong, g): return strong + (1 + g) * (strong - weak)",
        "def guidance(weak, strong, g): return (1 + g) * weak - g * strong",
    ],
    "adaptive norm": [
        "def adaptive_norm(z, b, s):\n"
        f"    n, b, s = torch.layer_norm(z, z.shape[-1:]), b[:, None], s[:, None]\n    return {y}"
        for y in ("n * s + b", "n * (1 + b) + s", "(n + b) * (1 + s)", "z * (1 + s) + b")
    ],
    "tap index": [
        "def tap_index(depth): return depth // 4",
        "def tap_index(depth): return depth // 4 - 1",
        "def tap_index(depth): return (depth - 1) // 4",
    ],
    "average of averages": [
        "def over_the_whole(a, b, r, s, t): return (a + b) / 2",
        "def over_the_whole(a, b, r, s, t): return (s - r) * a + (t - s) * b",
        "def over_the_whole(a, b, r, s, t): return ((t - s) * a + (s - r) * b) / (t - r)",
    ],
    "jumps": [
        "def jumps(u, x, n): return x - u(x, 0.0, 1.0)",
        "def jumps(u, x, n):\n    for k in range(n):\n        x = x - u(x, k / n, (k + 1) / n) / n\n    return x",
        "def jumps(u, x, n):\n    for k in range(n, 0, -1):\n        x = x - u(x, (k - 1) / n, k / n)\n    return x",
        "def jumps(u, x, n):\n    for k in range(n, 0, -1):\n        x = x - u(x, k / n, k / n) / n\n    return x",
    ],
    "pull": [
        "def pull(D, tau): return (torch.softmax(-D.flatten() / tau, 0).view_as(D) * D).sum()",
        "def pull(D, tau): return 2 / tau * (torch.softmax(-D / tau, 1) * D).sum()",
        "def pull(D, tau): return 2 / tau * (torch.exp(-D / tau) * D).sum()",
        "def pull(D, tau): return 2 / tau * (torch.softmax(-D.flatten(), 0).view_as(D) * D).sum()",
    ],
    "select": [
        "def mean_output(out): return out[0]",
        "def mean_output(out): return out[0].mean(0)",
        "def mean_output(out): return out[1][0]",
        "def mean_output(out): return out[0].mean(2)",
    ],
    "score": [
        "def score(x_t, x0_mean, t): return (x_t - (1 - t) * x0_mean) / t**2",
        "def score(x_t, x0_mean, t): return ((1 - t) * x0_mean - x_t) / t",
        "def score(x_t, x0_mean, t): return (x0_mean - x_t) / t**2",
    ],
    "denoise": [
        "def denoise(x_t, v, t): return x_t + t * v",
        "def denoise(x_t, v, t): return x_t - (1 - t) * v",
        "def denoise(x_t, v, t): return x_t - v",
    ],
    "cosine loss": [
        f"def cosine_loss(z, tau):\n    u = z / z.norm(dim=1, keepdim=True)\n    return {result}"
        for result in (
            "loss_by_hand(u, tau)",  # the l2 form
            "torch.exp(-u @ u.T / tau).mean().log()",  # attracts
            "torch.exp(u @ u.T / tau).log().mean()",  # the log inside
            "torch.exp(z @ z.T / tau).mean().log()",  # sees size
            "torch.exp(u @ u.T).mean().log() / tau",  # tau outside
        )
    ],
    "without the diagonal": [
        "def without_the_diagonal(L, B): return L + math.log(B)",
        "def without_the_diagonal(L, B): return math.log(math.exp(L) - 1 / B)",
        "def without_the_diagonal(L, B): return (math.exp(L) - 1 / B) / (1 - 1 / B)",
        "def without_the_diagonal(L, B): return 1 / 0",
    ],
    "epochs": [
        "def epochs(steps, batch_size, images): return steps / images",
        "def epochs(steps, batch_size, images): return steps * batch_size // images",
        "def epochs(steps, batch_size, images): return images / (steps * batch_size)",
    ],
    "warm-up and cosine": [
        "def rate(peak, k, warmup, steps): return peak * 0.5 * (1 + math.cos(math.pi * k / steps))",
        "def rate(p, k, warmup, steps): return p * min(1, k / warmup) * 0.5 * (1 + math.cos(math.pi * k / steps))",
        "def rate(peak, k, warmup, steps): return peak * min(1, (k + 1) / warmup) * math.cos(math.pi * k / steps)",
        "def rate(peak, k, warmup, steps): return peak * min(1, (k + 1) / warmup)",
    ],
    "store bytes": [
        "def store_bytes(images, C, h, w, flip): return images * (1 + flip) * C * h * w * 2",  # the mean only
        "def store_bytes(images, C, h, w, flip): return images * (1 + flip) * 2 * C * h * w",  # values, not bytes
        "def store_bytes(images, C, h, w, flip): return images * 2 * C * h * w * 2",  # no mirror images
    ],
    "sample a posterior": [
        "def draw(mean, std, eps, scale, shift): return mean * scale + std * eps - shift",
        "def draw(mean, std, eps, scale, shift): return (mean + std * eps) * scale - shift",
        "def draw(mean, std, eps, scale, shift): return (mean + std**2 * eps - shift) * scale",
        "def draw(mean, std, eps, scale, shift): return (mean + std * eps) / scale + shift",
    ],
    "gpu hours": [
        "def gpu_hours(f, epochs, images, tflops): return f * epochs * images / (tflops * 1e12)",
        "def gpu_hours(f, epochs, images, tflops): return f * images / (tflops * 1e12) / 3600",
        "def gpu_hours(f, epochs, images, tflops): return f * epochs * images / (tflops * 1e9) / 3600",
    ],
    "dispersion batch": [
        "def dispersion_batch(batch, processes, accumulation): return batch // processes",
        "def dispersion_batch(batch, processes, accumulation): return batch",
        "def dispersion_batch(batch, processes, accumulation): return batch // processes * accumulation",
    ],
    "distance along one axis": [
        "def distance_along_one_axis(m1, s1, m2, s2): return (m1 - m2) ** 2 + (s1**2 - s2**2) ** 2",
        "def distance_along_one_axis(m1, s1, m2, s2): return abs(m1 - m2) + abs(s1 - s2)",
        "def distance_along_one_axis(m1, s1, m2, s2): return (m1 - m2) ** 2",
        "def distance_along_one_axis(m1, s1, m2, s2): return (m1 - m2) ** 2 + s1**2 + s2**2",
    ],
    "unbiased MMD": [
        f"def unbiased_mmd(K_xx, K_yy, K_xy):\n    n, m = K_xy.shape\n    return {result}"
        for result in (
            "K_xx.mean() + K_yy.mean() - 2 * K_xy.mean()",  # every image against itself too
            "(K_xx.sum() - K_xx.trace()) / n**2 + (K_yy.sum() - K_yy.trace()) / m**2 - 2 * K_xy.mean()",
            "(K_xx.sum() - K_xx.trace()) / (n * (n - 1)) + (K_yy.sum() - K_yy.trace()) / (m * (m - 1)) - K_xy.mean()",
            "(K_xx.sum() - n) / (n * (n - 1)) + (K_yy.sum() - m) / (m * (m - 1)) - 2 * K_xy.mean()",  # k(x, x) is not 1
        )
    ],
    "mean distance": [
        "def mean_distance(x): return x.var(0).sum() / x.shape[1]",  # one trace
        "def mean_distance(x): return 2 * x.square().mean(0).sum() / x.shape[1]",  # not centred
        "def mean_distance(x): return 2 * x.var(0).sum()",  # not over D
        "def mean_distance(x): return 2 * x.var(0, correction=0).sum() / x.shape[1]",  # over N
    ],
    "discordant": [
        "def discordant(first, second): return float((first != second).double().mean())",
        "def discordant(first, second):\n    from scipy.stats import binomtest\n"
        "    return binomtest(int(first.sum()), int(first.sum() + second.sum())).pvalue",  # all that are right
        "def discordant(first, second):\n    from scipy.stats import binomtest\n"
        "    a, b = int((first & ~second).sum()), int((second & ~first).sum())\n"
        "    return binomtest(a, a + b, alternative='greater').pvalue",  # one-sided
    ],
    "equivalent": [
        f"def equivalent(x, margin, t):\n    mean, half = x.mean(), t * x.std() / len(x) ** 0.5\n    return {result}"
        for result in (
            "bool(mean.abs() < half)",  # no difference seen
            "bool(mean.abs() < margin)",  # however little was measured
            "bool(mean + half < margin)",  # one side
            "bool(mean.abs() + t * x.std() < margin)",  # of one pair, not of the mean
        )
    ],
    "holm": [
        "def holm(p): return (p * len(p)).clamp(max=1)",  # Bonferroni
        "def holm(p):\n    order = p.argsort()\n    times = torch.arange(len(p), 0, -1, dtype=p.dtype)\n"
        "    return (p[order] * times).cummax(0).values.clamp(max=1)",  # in another order
        "def holm(p):\n    order, adjusted = p.argsort(), torch.empty_like(p)\n"
        "    times = torch.arange(len(p), 0, -1, dtype=p.dtype)\n"
        "    adjusted[order] = (p[order] * times).clamp(max=1)\n    return adjusted",  # one below an earlier one
    ],
    "shared neighbours": [
        "def shared_neighbours(a, b): return (a == b).double().mean()",  # minds the order
        "def shared_neighbours(a, b): return (a[:, :, None] == b[:, None]).double().sum((1, 2)).mean()",  # not over k
        "def shared_neighbours(a, b): return len(set(a.flatten().tolist()) & set(b.flatten().tolist())) / a.numel()",
    ],
}


def exercises() -> dict[str, tuple[Path, str, str]]:
    """name -> (notebook, stub cell with its cases, solution), as they stand in the notebooks."""
    found = {}
    for path in PATHS:
        for cell, after in itertools.pairwise(read(path).cells):
            name = next((t[9:] for t in cell.metadata.get("tags", []) if t.startswith("exercise:")), None)
            if name:
                solutions = re.findall(r"```python\n(.+?)```", after.source, re.DOTALL)
                found[name] = path, cell.source, solutions[0]
    return found


EXERCISES = exercises()


def solved(name: str, folder: Path, answer: str | None = None) -> bool:
    """What the cell of an exercise says of the stub in it, or of an answer in its place. It needs the imports alone."""
    path, stub, _ = EXERCISES[name]
    trees = [ast.parse(cell.source).body for cell in code_cells(path)]
    imports = [ast.unparse(line) for tree in trees for line in tree if isinstance(line, ast.Import | ast.ImportFrom)]
    space: dict[str, Any] = {"nb": begin(path.stem, mode="smoke", out=str(folder))}
    exec("\n".join(imports), space)
    space["loss_by_hand"] = lambda z, tau: dispersive_loss(z, tau=tau)  # of notebook 04, where a solution calls it
    exec(f"{answer}\n\n\n{stub.partition(GAP)[2]}" if answer else stub, space)
    return space["solved"]


def test_every_exercise_has_wrong_answers() -> None:
    assert set(EXERCISES) == set(WRONG)
    assert min(len(answers) for answers in WRONG.values()) >= 3


@pytest.mark.parametrize("name", EXERCISES)
def test_the_stub_fails_and_the_solution_passes_in_six_lines(name: str, tmp_path: Path, capsys: Any) -> None:
    assert solved(name, tmp_path) is False
    assert "returns nothing yet" in capsys.readouterr().out
    solution = EXERCISES[name][2]
    assert len(solution.splitlines()) <= 6
    assert solved(name, tmp_path, solution) is True


@pytest.mark.parametrize(("name", "wrong"), [(name, w) for name, answers in WRONG.items() for w in answers])
def test_a_wrong_answer_is_refused_with_a_hint(name: str, wrong: str, tmp_path: Path, capsys: Any) -> None:
    assert solved(name, tmp_path, wrong) is False
    assert re.search(r"^not yet, case \d: .+\nhint: .{20}", capsys.readouterr().out)
