"""`make site` and `make slides`, as python data/make_site.py RUN SITE [slides]: static pages, which fetch nothing.

RUN is the folder of `dispersive-kit run quick --mode class --out RUN`. SITE gets notebooks, report and console; or a
deck for each session of COURSE.md, of the cells with a `slide_type`: a text begins a slide, figures follow on it.
"""

import html
import re
import shutil
import sys
from pathlib import Path

from nbconvert import HTMLExporter
from nbformat import read, v4

from dispersive_kit.study.notebook import notebooks_folder
from dispersive_kit.study.report import with_formulas
from dispersive_kit.views.console import write_console

PICTURE = re.compile(r'<img (?=[^>]*alt="[^"])[^>]*src="data:image/png;base64,[^>]*>')  # one with words


def card(page: Path, site: Path) -> str:
    """Title, goal and first picture of an executed notebook, which is copied into the site."""
    shown, first = page.read_text("utf-8"), read(page.with_suffix(".ipynb"), 4).cells[0].source
    (to := site / page.parent.name / page.name).parent.mkdir()
    shutil.copyfile(page, to)
    title, goal = re.match(r"# (.*)\n\n\*\*Goal\.\*\* (.*)", first).groups()
    picture = PICTURE.search(shown)
    figure = f"<figure>{picture[0]}</figure>" if picture else ""
    link = f'<h2><a href="{to.relative_to(site)}">{html.escape(title)}</a></h2>'
    return f"<section>{link}<p>{with_formulas(html.escape(goal))}</p>{figure}</section>"


def decks(run: Path, folder: Path) -> None:
    """session-1.html and so on: goals, slides, what to ask. Of a text the heading and two paragraphs or formulas."""
    folder.mkdir(parents=True, exist_ok=True)
    course, start = notebooks_folder() / "COURSE.md", Path(__file__).with_name("deck.html")
    text = course.read_text("utf-8")
    for number, row in re.findall(r"^\| (\d)\. (.*)", text, re.MULTILINE):
        told = re.search(rf"## Session {number}\. (.*?)\n\n(.*?)\n\n.*?(\*\*Ask\.\*\*.*?)\n\n", text, re.DOTALL)
        names = [name for name in dict.fromkeys(re.findall(r"\d\d_\w+", row)) if (run / name).exists()]
        cells = [cell for name in names for cell in read(run / name / "notebook.ipynb", 4).cells]
        cells = [cell for cell in cells if "slideshow" in cell.metadata]
        for cell in cells:
            parts = cell.source.removeprefix("## Do\n\n").split("\n\n")
            cell.source = "\n\n".join(parts[: 4 if parts[2:] and parts[2][-1] in ",:" else 3])  # a sentence stays whole
            if cell.cell_type == "code":  # of it the figures
                cell.outputs = [one for one in cell.outputs if "text/html" in one.get("data", {})]
                cell.metadata["transient"] = {"remove_source": True}
        ends = [v4.new_markdown_cell(words) for words in (f"# {told[1]}\n\n{told[2]}", told[3])]
        page = v4.new_notebook(cells=[ends[0], *cells, ends[1]])
        body = HTMLExporter(template_name="basic").from_notebook_node(page)[0]
        body = re.sub(r'<div class="cell [^"]*text_cell', r"</section><section>\g<0>", body).removeprefix("</section>")
        (folder / f"session-{number}.html").write_text(start.read_text() + with_formulas(body), "utf-8")


def main(run: Path, site: Path) -> None:
    if (site / "index.html").exists():  # a site: all of it is made here
        shutil.rmtree(site)
    site.mkdir(parents=True)
    cards = [card(page, site) for page in sorted(run.glob("*/notebook.html")) if ".earlier-" not in page.parent.name]
    shutil.copyfile(run / "report.html", site / "report.html")
    write_console(site / "console.html")
    head = (run / "report.html").read_text("utf-8").partition("<body>")[0]  # its style, and what it may fetch
    title = "dispersive_kit: the notebooks"
    also = '<p><a href="console.html">Lecture console: the demos, which move in the browser</a> · '
    also += '<a href="report.html">Report: what each notebook measured</a></p>'
    page = re.sub("<title>.*?</title>", f"<title>{title}</title>", head) + f"<body>\n<h1>{title}</h1>\n{also}\n"
    page += '<div style="display: grid; grid-template-columns: repeat(auto-fill, minmax(20rem, 1fr)); gap: 0 2rem">\n'
    (site / "index.html").write_text(page + "\n".join(cards) + "\n</div>\n</body></html>\n", "utf-8")
    print(f"{len(cards)} notebooks: {site / 'index.html'}")


if __name__ == "__main__":
    (decks if sys.argv[3:] else main)(*map(Path, sys.argv[1:3]))
