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
from dispersive_kit.study.exercises import EXERCISES, judge
from dispersive_kit.study.modes import SETTINGS
from dispersive_kit.study.notebook import MODE_VARIABLE, CheckError

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
    assert len(lengths) <= 25
    assert max(lengths) <= 30


@each_notebook
def test_half_of_the_cells_have_at_most_eight_lines(path: Path) -> None:
    assert statistics.median(len(cell.source.splitlines()) for cell in code_cells(path)) <= 8


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
def test_the_mode_is_for_the_package_and_no_cell_asks_for_it(path: Path) -> None:
    """What differs between modes lies in study/modes.py."""
    first, *rest = code_cells(path)
    assert 'mode: str = "class"' in first.source
    asked = [node for cell in rest for node in ast.walk(ast.parse(cell.source)) if isinstance(node, ast.If | ast.IfExp)]
    assert not [ast.unparse(node) for node in asked if "mode" in re.findall(r"\w+", ast.unparse(node.test))]


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


# ---- their checks: run in smoke mode, then every check again on a wrong quantity

BROKEN = {
    "00_start_here": {"this machine is ready": "wrong = ['memory']"},
    "01_noise": {
        "one line equals the library": "by_hand = x_t_by_hand(x0, eps, t + 0.01)",
        "moments equal the closed form": "worst = standard_errors(x**2, 1.3 * variance).abs().max()",
        "the velocity is the derivative": "gaps = {**gaps, 'half': velocity_gap(PATHS['VP'], h=0.05)}",
        "at one log-SNR all paths show one picture": "apart = float((1.001 * x0 - pictures['GVP']).abs().max())",
        "at one t they do not": "half_way = half_way[:2]",
        "uniform t is a logistic log-SNR": "uniform = width['GVP, t uniform']",
        "logit-normal t is a Gaussian one": "logit_normal = width['GVP, t uniform']",
    },
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
    "03_samplers": {
        "four lines equal the library": "by_hand = euler_by_hand(exact_velocity, noise, steps_down(9))",
        "two lines equal the library's guidance": "one_by_one = guided_by_hand(noise, half, y, w=2.0)",
        "the error falls with the right order": "gaps = [abs(orders['euler'] - 2)]",
        "16 evaluations: rk4 beats heun beats euler": "at_16 = {**at_16, 'heun': at_16['euler']}",
        "in the end all samples are as good as real ones": "best = quality['euler'][0]",
        "fresh noise forgets a wrong start": "forgot = carried",
        "guidance narrows the class": "pushed = once",
        "and leaves the data": (
            "outside = float((torch.cdist(once, DATA.means.double()).amin(1) > 3 * DATA.std).double().mean())"
        ),
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
    "05_dit_anatomy": {
        "patches times a matrix are the library's tokens": "token_gap = (tokens(x.mT) - tokens(x)).abs().max()",
        "so is the condition": "condition_gap = (condition(t + 0.01, y) - condition(t, y)).abs().max()",
        "and the block": "block_gap = (block(z, c, 'blocks.1') - model.blocks[0](z, c)).abs().max()",
        "30 lines have parity with the library's DiT": "parity = (dit(x, t, y.flip(0)) - library).abs().max()",
        "the tap is the block's raw output": "tap_gap = (F.layer_norm(tapped, (96,)) - stream).abs().max()",
        "of the published B/2 it is the third block": "taps = {**taps, 'DiT-B/2': taps['DiT-S/2']}",
        "a newborn DiT returns zeros": "first_words = library",
        "since its blocks pass their input on": "fed = newborn.x_embedder(x)",
        "training opened the gates": "opened = 0.0",
    },
    "06_does_it_help": {
        "both arms logged the same steps": "metrics = {**metrics, 'base': metrics['base'][1:]}",
        "the loss never passed its floor": "metrics = {**metrics, 'paper': [{**metrics['paper'][0], 'gap': -1e-3}]}",
        "the base arm is a real model: it beats pixel-Gaussian samples": "ratio, if_trained = 1.4, True",
        "nothing is better than real: the base arm is not far below the floor": (
            "records = {**records, 'base': measure(held_out.images)}"
        ),
        "the verdicts follow from the runs": (
            "study = {**study, 'runs': [{**r, 'values': {k: v + r['seed'] for k, v in r['values'].items()}}\n"
            "                           for r in study['runs']]}"
        ),
        "no run was left out": "noise = {**noise, 'runs': noise['runs'][1:]}",
        "the test by hand is the library's": "by_hand = sign_flip_by_hand(x[:5])",
        "five pairs cannot reach 0.05": "by_five = sign_flip_by_hand([1.0] * 6)",
        "your seed gives the number of the study, to a tenth": "off, if_trained = 0.11, True",
    },
    "14_one_step_meanflow": {
        "the identity holds for the exact u": "gap = (left - v).abs().max() / left.abs().max()",
        "six lines equal the library": "by_hand = meanflow_loss(new_model(), 1.01 * x0, draws)",
        "a hook inside the product is refused": "refusal = ''",
        "both MeanFlow arms start from the same network": "same_start = torch.equal(noise, 2 * noise)",
        "one step: MeanFlow beats flow matching": "share = flow[1] / flow[1]",
        "its one step is near its eight": "mean = {**mean, 1: 3 * mean[8]}",
        "in eight steps flow matching is there too": "flow = {**flow, 8: flow[1]}",
    },
    "15_your_own_model": {
        "by hand equals the kit, on three models": "apart = abs(loss_by_hand(kept, tau=0.4) - loss_by_hand(kept))",
        "the pull is as autograd says": "by_formula = by_formula * 31 / 32",
        "the loss moves what is before the tap": "before = moved('unet', 'conv_in')",
        "and nothing behind it": "behind = behind - moved('unet', 'up_blocks.1')",
        "every misuse is refused": "refused = {**refused, 'a batch of one': refusal(lambda: use(mlp, '2', rows=2))}",
        "a wrong path is told the right one": "refused = {'a wrong path': refusal(lambda: Dispersive(unet, 'middle'))}",
        "the others name their tap": "named = named[1:]",
        "a working use is not refused": "mlp = broken",
        "a copy does not overwrite the capture": "unharmed = False",
        "the state_dict is unchanged": "same_keys = list(unet.state_dict()) == keys",
        "in eval the loss is zero": "in_eval = pairs['mlp'][1].item()",
        "remove leaves no hook": "left_over = 1",
    },
    "12_imagenet_latents": {
        "damaged files are left out, and listed": "left_out = left_out[1:]",
        "stopped and taken up again, the store has the same bytes": "again = [*again, ('one', 'other')]",
        "what is read is the encoder's own posterior, to half precision": (
            "gap = float((store.read(rows[:4], np.full(4, True)).float() - own).abs().max() / own.abs().max())"
        ),
        "the decoder gives the images back": "quality = psnr(255 - originals, decoded)",
        "x0 has about the spread of the noise": (
            "spread = float(posterior[:, 0].float().std() / spec.autoencoder.scale)"
        ),
        "no row comes twice in an epoch": "epoch = np.append(epoch[1:], epoch[1])",
        "one flipped bit is refused, and the shard named": (
            "refusals = {**refusals, 'flip_one_bit': refusal(lambda folder: None)}"
        ),
        "a changed scale is refused": "refusals = {**refusals, 'change_the_scale': refusal(flip_one_bit)}",
    },
    "13_imagenet_train": {
        "eighty epochs are counted": ("costs = {**costs, 'S': {**costs['S'], 'images': 79 * IMAGENET_IMAGES}}"),
        "most operations are those of the blocks' matrices": "share = by_hand / costs['B']['flops']",
        "training lowered the held-out loss": "held = {**held, 'base': held['base'][::-1]}",
        "stopped and taken up again, every number is the same": "different = 1",
        "x0 has about the spread of the noise": "spread = float(x0.std() / spec.autoencoder.scale)",
        "no arm is nearer to the held-out images than half of what real ones are": (
            "records = {**records, 'base': panel.measure(held_out.images)[0]}"
        ),
    },
    "07_cifar10": {
        "a few images are learnt by heart": "share = 1.0",
        "a stopped training ends in the same bits as one that never stopped": "largest = 1e-9",
        "both arms logged the same steps": "logged = {**logged, 'paper': logged['paper'][1:]}",
        "the loss never passed its floor": "metrics = {**metrics, 'paper': [{'step': 1, 'gap': -1}]}",
        "an image does not depend on what is drawn beside it": "again = 255 - again",
    },
    "08_evaluate": {
        "singular values by hand equal the library": "by_hand = by_hand + frechet_distance(some, some + 0.01)",
        "a set is at distance zero from itself": "itself = frechet_distance(reference, reference[1:])",
        "a shift costs its square": "moved = frechet_distance(reference, reference + 0.51)",
        "the floor falls with more images": "smaller = larger",
        "the fewest steps are not enough": ("distances = {**distances, (base, few, 1.0): distances[base, many, 1.0]}"),
        "the base arm is nearer than a pixel Gaussian": "values = {**values, base: values['pixel Gaussian']}",
        "recall sees missing classes": "missing = values['copies']",
        "precision does not": "missing = values['pixel Gaussian']",
        "no distance to held-out images sees copies": "values = {**values, 'copies': values['pixel Gaussian']}",
        "the nearest training image does": "checked = {**checked, 'copies': checked[base]}",
        "and finds nothing wrong with fresh images": "fresh = checked['copies'][0]",
        "the record has what it takes": "record = panels['copies'][0]",
        "the word FID is refused": "refusal = ''",
    },
    "09_dispersion": {
        "RankMe by hand is the library's": "library = 1.001 * library",
        "the Gaussian null has the same mean distance": "apart = apart + 0.3",
        "and knows no classes": "known = max(float(s.values['fisher_ratio'].max()) for s in sweeps.values())",
        "clean images show theirs at every block": "clean = {arm: float(f[-1].min()) for arm, f in fisher.items()}",
        "uniformity does not see size": "size = size + 1e-3",
        "noise alone has no signal": "draws = draws + torch.randn(400, 32)",
        "the CIFAR-10 numbers are of the weights in this package": (
            "measured_on = {**measured_on, 'base': measured_on['with loss']}"
        ),
        "with the loss, training ended at the floor": "last = dict.fromkeys(last, last['base'])",
    },
    "10_linear_probes": {
        "ridge by hand is the library's": "library = ridge(chosen.train, [1e4])(chosen.test.rows)[0]",
        "a label given to the network leaks": "leaky = at_most_noise(False)",
        "the null class hides it": "honest = at_most_noise(True)",
        "shuffled labels are at chance": "control = {**control, 'shuffled labels': results['base']}",
        "validation chose, not the test": "top = {arm: result.accuracy + 0.01 for arm, result in results.items()}",
        "pixels alone know a good deal": "control = {**control, 'raw pixels': control['shuffled labels']}",
    },
    "90_lecture_console": {
        "the offline console is at most 3 MB": "size = 10 * size",
    },
    "11_umap": {
        "trustworthiness by hand is the library's": "by_hand = trust_by_hand(features['base'], some, k=14)",
        "UMAP of 8 X is UMAP of X, to the last digit": "same = {**same, '8 X': same['X'] + 1e-3}",
        "PCA of 8 X is 8 times PCA of X": "eightfold = projection.pca(9 * features['base']) / 8",
        "a class drawn together tenfold keeps its patch": "kept = kept / 10",
        "densMAP sees that it shrank": "kept_dens = kept",
        "classes equally far apart are drawn at unequal distances": "stretched = unequal['features']",
        "the stored pictures are of these features": (
            "least = projection.trustworthiness(features['base'], grid[plain][::-1])"
        ),
        "the arms share neighbours beyond chance": (
            "shared = mutual_knn(features['base'], torch.randn(len(labels), 8))"
        ),
    },
    "16_what_may_we_claim": {
        "the verdicts follow from the runs": (
            "opened = [(p, {**one, 'verdicts': [{**v, 'word': '?'} for v in one['verdicts']]}) for p, one in opened]"
        ),
        "the ratio by hand is the verdict's": "by_hand = 1.001 * by_hand",
        "each run carries the hash of its plan": (
            "opened = [(p, {**one, 'runs': [{**r, 'id': r['id'][1:]} for r in one['runs']]}) for p, one in opened]"
        ),
        "no study was cut short": "opened = [(p, {**one, 'runs': one['runs'][1:]}) for p, one in opened]",
        "the best of ten is mostly luck": "luck = ((settings[:, :1].amin(1) - alone) < -0.05).double().mean().item()",
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


@each_notebook
def test_every_check_has_its_perturbation(path: Path) -> None:
    assert list(BROKEN[path.stem]) == list(checks_of(path.stem))


# The checks of one notebook in one worker: it is executed once.
CASES = [
    pytest.param(name, promise, marks=pytest.mark.xdist_group(name))
    for name, broken in BROKEN.items()
    for promise in broken
]


@pytest.mark.parametrize(("name", "promise"), CASES, ids=lambda value: value)
def test_a_check_fails_when_its_quantity_is_perturbed(executed: Any, name: str, promise: str) -> None:
    space = dict(executed(name))
    exec(checks_of(name)[promise], space)  # holds as it is
    exec(BROKEN[name][promise], space)
    with pytest.raises(CheckError, match=re.escape(promise)):
        exec(checks_of(name)[promise], space)


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
    with pytest.raises(ConfigError, match=r"there are: .*score"):
        judge("scores", lambda: None)
