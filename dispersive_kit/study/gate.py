"""The gate after every headless run: errors in widgets and threads do not stop a notebook, but they fail it here."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

MARK = "Traceback (most recent call last)"


def tracebacks(notebook: Path) -> list[str]:
    """What went wrong in an executed notebook without stopping it, one line each; empty if nothing did.

    Looked at: stderr of every cell (threads, observers, logging), outputs of type error, and the outputs that Output
    widgets hold in the saved widget state (`@interact`, `with output:`).
    """
    import nbformat

    document = nbformat.read(notebook, as_version=4)
    return [line for output in _outputs(document) if (line := _fault(output))]


def _outputs(document: Any) -> Iterator[dict[str, Any]]:
    for cell in document.cells:
        if cell.cell_type == "code":
            yield from cell.outputs
    widgets = document.metadata.get("widgets", {}).get("application/vnd.jupyter.widget-state+json", {})
    for model in widgets.get("state", {}).values():
        yield from model.get("state", {}).get("outputs", None) or ()


def _fault(output: dict[str, Any]) -> str:
    if output.get("output_type") == "error":
        return f"{output.get('ename')}: {output.get('evalue')}"
    if output.get("output_type") == "stream":
        text = output.get("text", "")
        text = "".join(text) if isinstance(text, list) else text
        if MARK in text:
            return text.strip().splitlines()[-1]
    return ""
