"""`make site` and `make slides`: what they make of executed notebooks."""

import html
import re
import runpy
import shutil
import sys
from pathlib import Path

import nbformat.v4 as v4
import pytest

from dispersive_kit.study.report import write_notebook_page

ROOT = Path(__file__).parents[1]
PICTURE = '<img alt="a dot" src="data:image/png;base64,iVBORw0KGgo="/>'


def make(*args):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["make_site.py", *map(str, args)])
        runpy.run_path(str(ROOT / "data" / "make_site.py"), run_name="__main__")


def words(page):
    return html.unescape(re.sub("<[^>]*>", "", page))


@pytest.fixture
def run(tmp_path):
    run, on_a_slide = tmp_path / "run", {"slideshow": {"slide_type": "slide"}}
    for name, goal in (("01_noise", "Learn what $t$ means."), ("04_dispersive_loss", r"See what $\tau$ does.")):
        (run / name).mkdir(parents=True)
        shown = v4.new_output("display_data", data={"text/html": PICTURE})
        cells = [
            v4.new_markdown_cell(f"# {name}\n\n**Goal.** {goal}"),
            v4.new_markdown_cell(f"### A slide\n\n{goal}\n\n$$z_i < 1$$\n\nNot on it.", metadata=on_a_slide),
            v4.new_code_cell("price = '$1 or $2'", outputs=[shown], metadata=on_a_slide),
        ]
        (run / name / "notebook.ipynb").write_text(v4.writes(v4.new_notebook(cells=cells)))
        write_notebook_page(run / name / "notebook.ipynb", run / name / "notebook.ipynb")
    head = (run / "01_noise" / "notebook.html").read_text().partition("<body>")[0]
    link = '<a href="01_noise/notebook.html">executed notebook</a>'
    (run / "report.html").write_text(f"{head}<body>{link}</body></html>")
    return run


def test_the_site_has_a_card_for_each_notebook_and_only_links_that_lead_somewhere(run, tmp_path):
    site = tmp_path / "site"
    shutil.copytree(run / "01_noise", run / "01_noise.earlier-1")  # of a version before, see `_run_task`
    for _ in range(2):  # the second time in place of the first
        make(run, site)
    index = (site / "index.html").read_text()
    assert index.count(PICTURE) == index.count("<math") == 2  # letters in the goals are MathML
    assert "Learn what t means." in words(index) and "See what τ does." in words(index)
    assert "$1 or $2" in words((site / "01_noise" / "notebook.html").read_text())  # code is no formula
    pages = list(site.rglob("*.html"))
    assert len(pages) == 5
    for page in pages:
        text = page.read_text()
        assert "Content-Security-Policy" in text and "default-src 'none'" in text, page  # nothing is fetched
        for link in re.findall(r'<a href="([^"#]+)"', text) if page.name in ("index.html", "report.html") else ():
            assert (page.parent / link).is_file(), link


def test_a_deck_shows_slides_and_formulas_and_fetches_nothing(run, tmp_path):
    """Of the second session; mutation: formulas left as they are, code on a slide, or a picture from elsewhere."""
    make(run, tmp_path / "decks", "slides")
    assert len(list((tmp_path / "decks").glob("session-*.html"))) == 4
    deck = (tmp_path / "decks" / "session-2.html").read_text()
    first, slide, last = re.findall("<section>(.*?)</section>", deck + "</section>", re.DOTALL)
    assert "Goals." in first and "Ask." in last
    assert "See what τ does." in words(slide) and "zi<1" in words(slide) and PICTURE in slide
    assert slide.count("<math") == 2 and "$" not in slide  # neither a formula as it is written, nor code
    assert "Not on it" not in deck and "default-src 'none'" in deck
    assert not re.findall(r"""(?:src|href)=["'](?!data:|#)|@import|url\(|(?<!xmlns="http)://""", deck)
