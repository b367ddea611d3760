"""An executed notebook as one HTML page that fetches nothing."""

import re
from pathlib import Path
from typing import Any

import jinja2

# A browser that shows the page fetches nothing and runs nothing, whatever a cell put into its output.
OFFLINE = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"

PAGE = jinja2.Template(Path(__file__).with_name("notebook.html.j2").read_text(encoding="utf-8"), autoescape=True)


def write_page(notebook: Path) -> None:
    """Write NOTEBOOK.html beside an executed notebook, if it is there."""
    if not notebook.is_file():
        return
    import nbformat
    from nbconvert import HTMLExporter
    from pygments.formatters import HtmlFormatter

    document = nbformat.read(notebook, as_version=4)
    for cell in document.cells:
        cell.outputs = [output for output in cell.get("outputs", []) if not _is_widget(output)]
    body, _ = HTMLExporter(template_name="basic", filters={"markdown2html": to_html}).from_notebook_node(document)
    style = HtmlFormatter(style="default").get_style_defs(".highlight")
    page = PAGE.render(title=notebook.parent.name, body=body, style=style, offline=OFFLINE)
    notebook.with_suffix(".html").write_text(page, encoding="utf-8")


def to_html(markdown: str) -> str:
    """Markdown as HTML, its formulas as MathML, which a browser draws by itself: the usual MathJax would be fetched."""
    from latex2mathml.converter import convert
    from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath

    class Renderer(IPythonRenderer):
        def inline_math(self, body: str, display: str = "inline") -> str:
            mathml = convert(body, xmlns="", display=display).replace(' xmlns=""', "")  # HTML needs none
            return re.sub(r"(<mi>[a-z]{2,}</mi>)(?=<m(i|n|sub|sup|frac)\b)", r'\1<mspace width="0.17em" />', mathml)

        def block_math(self, body: str) -> str:
            return self.inline_math(body, "block")

    return MarkdownWithMath(renderer=Renderer(escape=False)).render(markdown)


def _is_widget(output: dict[str, Any]) -> bool:
    """Whether there is nothing to see without a kernel; the figure before each widget stays."""
    return any(kind.startswith("application/vnd.jupyter.widget") for kind in output.get("data", {}))
