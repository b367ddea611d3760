"""`make site`: what it makes of executed notebooks."""

import re
import runpy
import sys
from pathlib import Path

import nbformat.v4 as v4
import pytest

from dispersive_kit.study.report import write_notebook_page

ROOT = Path(__file__).parents[1]
PICTURE = '<img alt="a dot" src="data:image/png;base64,iVBORw0KGgo="/>'


@pytest.fixture
def site(tmp_path, monkeypatch):
    run = tmp_path / "run"
    for name, goal in (("01_noise", "Learn what $t$ means."), ("04_loss", r"See what $\tau$ does.")):
        (run / name).mkdir(parents=True)
        shown = v4.new_output("display_data", data={"text/html": PICTURE})
        cells = [v4.new_markdown_cell(f"# {name}\n\n**Goal.** {goal}"), v4.new_code_cell("1", outputs=[shown])]
        (run / name / "notebook.ipynb").write_text(v4.writes(v4.new_notebook(cells=cells)))
        write_notebook_page(run / name / "notebook.ipynb")
    head = (run / "01_noise" / "notebook.html").read_text().partition("<body>")[0]
    link = '<a href="01_noise/notebook.html">executed notebook</a>'
    (run / "report.html").write_text(f"{head}<body>{link}</body></html>")
    monkeypatch.setattr(sys, "argv", ["make_site.py", str(run), str(tmp_path / "site")])
    for _ in range(2):  # the second time in place of the first
        runpy.run_path(str(ROOT / "data" / "make_site.py"), run_name="__main__")
    return tmp_path / "site"


def test_the_site_has_a_card_for_each_notebook_and_only_links_that_lead_somewhere(site):
    index = (site / "index.html").read_text()
    assert index.count(PICTURE) == 2
    assert "Learn what t means." in index and "See what tau does." in index
    pages = list(site.rglob("*.html"))
    assert len(pages) == 5
    for page in pages:
        text = page.read_text()
        assert "Content-Security-Policy" in text and "default-src 'none'" in text, page  # nothing is fetched
        for link in re.findall(r'<a href="([^"#]+)"', text) if page.name in ("index.html", "report.html") else ():
            assert (page.parent / link).is_file(), link
