"""`make site`, as python data/make_site.py RUN SITE: executed notebooks, report and console as static pages.

RUN is the folder of `dispersive-kit run quick --mode class --out RUN`. The pages fetch nothing.
"""

import html
import json
import re
import shutil
import sys
from pathlib import Path

from dispersive_kit.views.console import write_console

PICTURE = re.compile(r'<img [^>]*src="data:image/png;base64,[^>]*>')


def card(page: Path, site: Path) -> str:
    """Title, goal and first picture of an executed notebook, which is copied into the site."""
    (to := site / page.parent.name / page.name).parent.mkdir()
    shutil.copyfile(page, to)
    cells = json.loads(page.with_suffix(".ipynb").read_text(encoding="utf-8"))["cells"]
    text = "".join(next(cell["source"] for cell in cells if cell["cell_type"] == "markdown"))
    picture = PICTURE.search(page.read_text(encoding="utf-8"))
    title = text.partition("\n")[0].removeprefix("# ")
    goal = re.sub(r"\$\\?(.*?)\$", r"\1", re.search(r"Goal\.\*\* (.*)", text)[1])  # $\tau$ is read as tau
    shown = f'<figure style="max-width: 30rem">{picture[0]}</figure>' if picture else ""
    link = f'<h2><a href="{to.relative_to(site)}">{html.escape(title)}</a></h2>'
    return f"{link}<p>{html.escape(goal)}</p>{shown}"


def main() -> None:
    run, site = map(Path, sys.argv[1:])
    if (site / "index.html").exists():  # a site: all of it is made here
        shutil.rmtree(site)
    site.mkdir(parents=True)
    cards = [card(page, site) for page in sorted(run.glob("*/notebook.html"))]
    shutil.copyfile(run / "report.html", site / "report.html")
    write_console(site / "console.html")
    head = (run / "report.html").read_text(encoding="utf-8").partition("<body>")[0]  # its style, and what it may fetch
    title = "dispersive_kit: the notebooks"
    also = '<p><a href="console.html">Lecture console: the demos, which move in the browser</a> · '
    also += '<a href="report.html">Report: what each notebook measured</a></p>'
    page = re.sub("<title>.*?</title>", f"<title>{title}</title>", head) + f"<body>\n<h1>{title}</h1>\n{also}\n"
    page += "\n".join(cards) + "\n</body></html>\n"
    (site / "index.html").write_text(page, encoding="utf-8")
    print(f"{len(cards)} notebooks: {site / 'index.html'}")


if __name__ == "__main__":
    main()
