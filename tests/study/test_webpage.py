import re
from pathlib import Path

import nbformat
import pytest

from dispersive_kit.study.webpage import to_html, write_page

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_every_formula_of_a_lesson_is_drawn_by_the_browser_alone(path: Path) -> None:
    text = "\n\n".join(cell.source for cell in nbformat.read(path, 4).cells if cell.cell_type == "markdown")
    page = re.sub(r"<(code|pre)\b.*?</\1>", "", to_html(text), flags=re.DOTALL)
    assert not re.findall(r"\\[A-Za-z]+|\$[^$\n]*\$", page)
    assert ("<math" in page) == (re.search(r"\$[^$]+\$", text) is not None)


def test_a_page_has_its_formulas_as_mathml_and_no_address(tmp_path: Path) -> None:
    cells = [nbformat.v4.new_markdown_cell(r"Below $-\log B$ it cannot sink." + "\n\n" + r"$$\frac{a_i}{2} < b$$")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "notebook.ipynb")
    write_page(tmp_path / "notebook.ipynb")
    page = (tmp_path / "notebook.html").read_text(encoding="utf-8")
    assert "<mi>log</mi><mspace" in page and '<math display="block">' in page and "<mfrac>" in page
    assert "$" not in page and "://" not in page
