"""The notebooks as files, their checks and their exercises. That they run, nbmake and the pipeline show."""

import ast
import itertools
import os
import re
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
import nbformat
import pytest
import torch

from dispersive_kit.errors import ConfigError
from dispersive_kit.study.contents import contents, contents_markdown
from dispersive_kit.study.exercises import EXERCISES, judge
from dispersive_kit.study.modes import SETTINGS
from dispersive_kit.study.notebook import MODE_VARIABLE, CheckError

FOLDER = Path(__file__).parents[1] / "notebooks"
PATHS = sorted(FOLDER.glob("*.ipynb"))
each_notebook = pytest.mark.parametrize("path", PATHS, ids=lambda p: p.stem)
NO_LESSON = {"00_start_here"}  # shows the way, and asks nothing


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
    assert len(lengths) <= 25
    assert max(lengths) <= 30


@each_notebook
def test_half_of_the_cells_have_at_most_eight_lines(path: Path) -> None:
    assert statistics.median(len(cell.source.splitlines()) for cell in code_cells(path)) <= 8


@each_notebook
def test_a_lesson_has_all_its_parts(path: Path) -> None:
    text = "\n".join(cell.source for cell in read(path).cells if cell.cell_type == "markdown")
    assert re.match(rf"# {path.stem[:2]} · .+\n\n\*\*Goal\.\*\* ", text)
    if path.stem not in NO_LESSON:
        headings = re.findall(r"^## (.+)$", text, re.MULTILINE)
        assert headings == ["Predict", "Do", "Check", "So what", "Exercises"]
        assert "<details><summary>Solution</summary>" in text


@each_notebook
def test_every_figure_has_alternative_text(path: Path) -> None:
    figures = [call for name, call in calls(path) if name in ("show", "explore", "scrub")]
    assert figures
    for call in figures:
        alt = argument(call, "alt")
        assert alt is not None, ast.unparse(call)
        assert not isinstance(alt, ast.Constant) or len(alt.value) > 40, ast.unparse(call)


@each_notebook
def test_no_cell_reaches_for_the_network(path: Path) -> None:
    reaching = re.compile(r"https?://|\b(requests|urllib|wget|curl|pip install|hf_hub_download)\b|download=True")
    assert not [cell.id for cell in code_cells(path) if reaching.search(cell.source)]


@each_notebook
def test_a_notebook_opens_its_run_under_its_own_name_and_ends_it(path: Path) -> None:
    begun = [call for name, call in calls(path) if name == "begin"]
    assert [ast.literal_eval(call.args[0]) for call in begun] == [path.stem]
    assert code_cells(path)[-1].source == "nb.finish()"
    assert path.stem in SETTINGS


@each_notebook
def test_cell_ids_are_stable_and_unlike(path: Path) -> None:
    ids = [cell.id for cell in read(path).cells]
    assert len(set(ids)) == len(ids)
    assert all(re.fullmatch(r"c\d\d-\d\d", one) for one in ids)


def test_the_contents_list_the_notebooks_that_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = contents(FOLDER)
    assert [entry.name for entry in entries] == [path.stem for path in PATHS]
    assert all(entry.title.startswith(entry.name[:2]) and entry.goal for entry in entries)
    monkeypatch.chdir(FOLDER)
    assert f"]({PATHS[0].name})" in contents_markdown(entries)
    monkeypatch.chdir(FOLDER.parent)
    assert ".ipynb" not in contents_markdown(entries)  # no dead link in an executed copy elsewhere


# ---- their checks: run in smoke mode, then every check again on a wrong quantity

BROKEN = {
    "02_denoiser_2d": {
        "the exact velocity is the one Bayes' rule gives by brute force": "bayes_gap = bayes_gap + 0.05",
        "all arms but the placebo start from the same network": (
            "errors = {**errors, 'paper preset': [(0, field_error(new_model(1.001)))]}"
        ),
        "the learned field is near the exact one": "error = {**error, 'base': field_error(models['base'][0])}",
        "and at least three times nearer than the untrained one": (
            "error = {**error, 'base': 0.5 * errors['base'][0][1]}"
        ),
        "no network beats the exact field in the loss": (
            "losses = {**losses, 'exact': denoising_loss(lambda x, t: 0.5 * exact_velocity(x, t))}"
        ),
        "training brought the samples nearer to the data": "w2 = {**w2, 'trained': wasserstein_2(noise, real)}",
        "the loss made the tapped features larger": "rms = {**rms, 'paper preset': rms['base']}",
    },
    "04_dispersive_loss": {
        "three lines equal the library": "by_hand = loss_by_hand(z, tau=0.51)",
        "the formula equals autograd": "formula = gradient_by_hand(z, tau=0.5) / 2",
        "and autograd equals finite differences, in float64": (
            "half = lambda z: (z / 2 + z.detach() / 2)\n"
            "numeric = torch.autograd.gradcheck(lambda z: dispersive_loss(half(z)), leaf, raise_exception=False)"
        ),
        "far apart, the loss is -log B": "far = {B: loss_by_hand(x, tau=0.5).item() for B, x in clouds.items()}",
        "the library knows the same floor": "far = {B: value - 0.001 for B, value in far.items()}",
        "the diagonal is what makes it": "rebuilt = {B: float(excluded[B]) for B in batches}",
        "three times the size is a ninth of the temperature": "retuned = loss_by_hand(z, tau=0.5 / 3)",
        "<z, gradient> is as predicted": "predicted = predicted / 2",
        "and negative": "outward = -outward",
        "1: uniformity and the diagonal": "with_diagonal = uniformity",
        "2: cosine at half the temperature, shifted": (
            "cosine = dispersive_loss(z, kind='infonce_cosine', tau=tau) - 2 / tau"
        ),
        "3: the log inside gives less (Jensen)": "log_inside = by_hand + 0.01",
        "at the floor the gradient is gone": "held = free_of",
        "without the diagonal it is not": "free_of = held",
        "under l2 free points never stop growing": "rms = {**rms, 'l2': [*rms['l2'], rms['l2'][-1]]}",
        "under cosine they do not grow": "rms = {**rms, 'cosine': rms['l2']}",
        "with shared weights l2 lowers the rank": "rank = {**rank, 'l2': rank['cosine']}",
        "and cosine raises it": "rank = {**rank, 'cosine': rank['l2']}",
    },
    "09_dispersion": {
        "RankMe by hand is the library's": "library = 1.001 * library",
        "the Gaussian null has the same mean distance": "apart = apart + 0.3",
        "and knows no classes": "known = max(float(s.values['fisher_ratio'].max()) for s in sweeps.values())",
        "clean images show theirs at every block": "clean = {arm: float(f[-1].min()) for arm, f in fisher.items()}",
        "uniformity does not see size": "size = size + 1e-3",
        "noise alone has no signal": "draws = draws + torch.randn(400, 32)",
        "with the loss, training ended at the floor": "last = {arm: lines[0] for arm, lines in metrics.items()}",
    },
    "10_linear_probes": {
        "ridge by hand is the library's": "library = ridge(chosen.train, [1e4])(chosen.test.rows)[0]",
        "a label given to the network leaks": "leaky = at_most_noise(False)",
        "the null class hides it": "honest = at_most_noise(True)",
        "shuffled labels are at chance": "control = {**control, 'shuffled labels': results['base']}",
        "validation chose, not the test": "top = {arm: result.accuracy + 0.01 for arm, result in results.items()}",
        "pixels alone know a good deal": "control = {**control, 'raw pixels': control['shuffled labels']}",
    },
    "11_umap": {
        "UMAP of 8 X is UMAP of X, to the last digit": "panels = {**panels, 'UMAP of 8 X': panels['UMAP'] + 1e-3}",
        "PCA of 8 X is 8 times PCA of X": "eightfold = projection.pca(9 * x) / 8",
        "a class drawn together tenfold keeps its patch": "kept = kept / 10",
        "densMAP sees that it shrank": "kept_dens = kept",
        "the stored pictures are of these features": (
            "least = projection.trustworthiness(features['base'], grid[plain][::-1])"
        ),
        "the arms share neighbours beyond chance": (
            "shared = mutual_knn(features['base'], torch.randn(len(labels), 8))"
        ),
    },
}


def checks_of(name: str) -> dict[str, str]:
    """promise -> the statement that checks it."""
    found = {}
    for cell in code_cells(FOLDER / f"{name}.ipynb"):
        for node in ast.parse(cell.source).body:
            if isinstance(node, ast.Expr) and ast.unparse(node).startswith("nb.check("):
                found[ast.literal_eval(node.value.args[0])] = ast.unparse(node)  # type: ignore[attr-defined]
    return found


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A function that runs a notebook in smoke mode, once, and gives what its cells left behind."""
    matplotlib.use("Agg")
    threads, before = torch.get_num_threads(), os.environ.pop(MODE_VARIABLE, None)
    done: dict[str, dict[str, Any]] = {}

    def run(name: str) -> dict[str, Any]:
        if name not in done:
            space: dict[str, Any] = {"__name__": name}
            first, *rest = code_cells(FOLDER / f"{name}.ipynb")
            exec(first.source, space)
            space |= {"mode": "smoke", "out": str(tmp_path_factory.mktemp(name))}
            for cell in rest:
                exec(cell.source, space)
            done[name] = space
        return done[name]

    yield run
    torch.set_num_threads(threads)
    if before is not None:
        os.environ[MODE_VARIABLE] = before


@pytest.mark.parametrize("name", BROKEN)
def test_every_check_has_its_perturbation(name: str) -> None:
    assert list(BROKEN[name]) == list(checks_of(name))


CASES = [(name, promise) for name, broken in BROKEN.items() for promise in broken]


@pytest.mark.xdist_group("executed notebooks")
@pytest.mark.parametrize(("name", "promise"), CASES, ids=lambda value: value)
def test_a_check_fails_when_its_quantity_is_perturbed(executed: Any, name: str, promise: str) -> None:
    space = dict(executed(name))
    exec(checks_of(name)[promise], space)  # holds as it is
    exec(BROKEN[name][promise], space)
    with pytest.raises(CheckError, match=re.escape(promise)):
        exec(checks_of(name)[promise], space)


# ---- their exercises

WRONG = {
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
    "shared neighbours": [
        "def shared_neighbours(a, b): return (a == b).double().mean()",  # minds the order
        "def shared_neighbours(a, b): return (a[:, :, None] == b[:, None]).double().sum((1, 2)).mean()",  # not over k
        "def shared_neighbours(a, b): return len(set(a.flatten().tolist()) & set(b.flatten().tolist())) / a.numel()",
    ],
}


def exercises() -> dict[str, tuple[str, str]]:
    """name -> (stub cell, solution), as they stand in the notebooks."""
    found = {}
    for path in PATHS:
        cells = read(path).cells
        for cell, after in itertools.pairwise(cells):
            name = next((t[9:] for t in cell.metadata.get("tags", []) if t.startswith("exercise:")), None)
            if name:
                found[name] = cell.source, re.search(r"```python\n(.+?)```", after.source, re.DOTALL)[1]  # type: ignore[index]
    return found


def answer_of(source: str) -> bool:
    """What `judge` says of an answer put in the place of the stub."""
    from dispersive_kit.regularizers import dispersive_loss

    space: dict[str, Any] = {"math": __import__("math"), "torch": torch, "Tensor": torch.Tensor, "judge": judge}
    space["loss_by_hand"] = lambda z, tau: dispersive_loss(z, tau=tau)
    exec(source, space)
    return space["solved"]


def test_every_exercise_of_the_kit_is_set_in_a_notebook() -> None:
    assert set(exercises()) == set(EXERCISES) == set(WRONG)
    assert min(len(answers) for answers in WRONG.values()) >= 3


@pytest.mark.parametrize("name", EXERCISES)
def test_the_stub_fails_and_the_solution_passes_in_six_lines(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    stub, solution = exercises()[name]
    assert answer_of(stub) is False
    assert "returns nothing yet" in capsys.readouterr().out
    assert len(solution.splitlines()) <= 6
    assert answer_of(f"{solution}\n{stub.splitlines()[-1]}") is True


@pytest.mark.parametrize(("name", "wrong"), [(name, w) for name, answers in WRONG.items() for w in answers])
def test_a_wrong_answer_is_refused_with_a_hint(name: str, wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    stub, _ = exercises()[name]
    assert answer_of(f"{wrong}\n{stub.splitlines()[-1]}") is False
    assert EXERCISES[name].hint in capsys.readouterr().out


def test_an_exercise_of_another_name_is_refused() -> None:
    with pytest.raises(ConfigError, match="there are: score"):
        judge("scores", lambda: None)
