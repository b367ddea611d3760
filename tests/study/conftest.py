import sys
from pathlib import Path

import nbformat
import pytest

sys.path.append(str(Path(__file__).parents[1] / "data"))  # for `import latent_stores`

PARAMETERS = """mode: str = "class"  # mode
value: float = 1.5  # a number
seed: int = 0  # seed
out: str = ""  # folder"""
BEGIN = "from dispersive_kit.study import begin\nnb = begin('made', mode=mode, out=out)"


@pytest.fixture(scope="module")
def write_notebook(tmp_path_factory):
    """A function that writes a notebook with parameters, the cells given and, unless they are `bare`, nb = begin()."""

    folder = tmp_path_factory.mktemp("notebooks")

    def write(name: str, *cells: str, bare: bool = False) -> Path:
        notebook = nbformat.v4.new_notebook()
        notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
        first = nbformat.v4.new_code_cell(PARAMETERS)
        first.metadata["tags"] = ["parameters"]
        notebook.cells = [first, *map(nbformat.v4.new_code_cell, cells if bare else (BEGIN, *cells))]
        file = folder / f"{name}.ipynb"
        nbformat.write(notebook, file)
        return file

    return write


# A notebook that needs no import of the kit, so that its kernel is soon up.
QUICK = """
import json, pathlib, random
folder = pathlib.Path(out)
number = {"name": "drawn", "value": random.Random(seed).random() + value, "note": "", "record": None}
result = {"notebook": "quick", "mode": mode, "seconds": 0.1, "peak_gib": None,
          "checks": [], "numbers": [number], "sentences": []}
(folder / "result.json").write_text(json.dumps(result))
"""


@pytest.fixture(scope="module")
def write_quick(write_notebook):
    """A function that writes a notebook which records one number, drawn from its seed; with cells before that."""
    return lambda name, *cells: write_notebook(name, *cells, QUICK, bare=True)


@pytest.fixture(scope="module")
def quick(write_quick):
    """Such a notebook, called quick.ipynb."""
    return write_quick("quick")


@pytest.fixture(scope="session")
def small_plan():
    """A whole study of two arms and six seeds, of some seconds."""
    return {
        "title": "A small study",
        "question": "Does everything run?",
        "train": {"preset": "smoke", "steps": 12, "checkpoint_every": 4, "preview_images": 0},
        "arms": {"base": {}, "paper": {"regularizer.preset": "paper"}},
        "reference": "base",
        "conditions": {"one": {"learning_rate": 0.004}},
        "seeds": [0, 1, 2, 3, 4, 5],
        "evaluation": {"extractor": "pixels-pca32", "num": 40, "num_steps": 2},
        "primary": {"arm": "paper", "measure": "frechet"},
        "co_primary": {"arm": "paper", "measure": "held_out"},
        "secondaries": [],
        "margin": {"frechet": 0.2, "held_out": 0.05},
        "margin_from": "nothing: a trial",
        "tuning": {"trials": {}, "seeds": [], "note": "none"},
        "stop_rule": "six pairs",
        "cpu_hours": 0.01,
    }
