"""What the package and the notebooks promise: nothing is unpickled, YAML holds plain values, no address is fetched."""

import ast
import re
from pathlib import Path

import nbformat
import pytest

PACKAGE = Path(__file__).parents[2] / "dispersive_kit"
SOURCES = sorted([*PACKAGE.rglob("*.py"), *(PACKAGE.parent / "notebooks").glob("*.ipynb")])
UNPICKLING = re.compile(r"(c?pickle|dill|cloudpickle|joblib|shelve|marshal|torch\.hub)\.\w+|(np|numpy|torch)\.load")
FETCHING = {"requests", "urllib.request", "http.client", "httpx", "aiohttp", "ftplib", "socket"}


def nodes(file):
    """Of the syntax tree of a module, or of the code cells of a notebook."""
    text = file.read_text()
    if file.suffix == ".ipynb":
        cells = nbformat.reads(text, as_version=4).cells
        text = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
    return ast.walk(ast.parse(text))


def calls(file):
    return (node for node in nodes(file) if isinstance(node, ast.Call))


def faults(file):
    for call in calls(file):
        name, options = ast.unparse(call.func), {k.arg: ast.unparse(k.value) for k in call.keywords}
        if name.startswith("yaml.") and name not in ("yaml.safe_load", "yaml.safe_dump", "yaml.YAMLError"):
            yield ast.unparse(call)
        if UNPICKLING.fullmatch(name):
            safe = {"torch.load": ("weights_only", "True"), "np.load": ("allow_pickle", "False")}.get(name)
            if safe is None or options.get(safe[0]) != safe[1]:
                yield ast.unparse(call)


def imported(file):
    for node in nodes(file):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(PACKAGE.parent)))
def test_a_source_unpickles_nothing_and_fetches_nothing(file):
    assert list(faults(file)) == []
    assert not re.search(r"yaml\.\w*(?<!Safe)Loader", file.read_text())
    assert FETCHING.isdisjoint(imported(file))


def test_the_pages_name_no_address():
    pages = [*PACKAGE.rglob("*.j2"), *PACKAGE.rglob("*.html")]
    assert pages and not [page for page in pages if re.search(r"(src|href)=.?https?:|@import|url\(", page.read_text())]
