"""The table of contents, read from the notebooks that are there."""

import re
from dataclasses import dataclass
from pathlib import Path

from dispersive_kit.study.lookup import notebooks_folder


@dataclass(frozen=True)
class Entry:
    """A notebook: file name without suffix, heading, and what it says its goal is."""

    name: str
    title: str
    goal: str


def contents(folder: Path | None = None) -> list[Entry]:
    """An entry for each notebook of `folder`, by default those of the kit, in order."""
    import nbformat

    found = sorted((folder or notebooks_folder()).glob("*.ipynb"))
    return [_entry(path.stem, nbformat.read(path, as_version=4).cells[0].source) for path in found]


def _entry(name: str, opening: str) -> Entry:
    title = re.search(r"^# (.+)$", opening, re.MULTILINE)
    goal = re.search(r"\*\*Goal\.\*\* (.+)$", opening, re.MULTILINE)
    return Entry(name, title[1] if title else name, goal[1] if goal else "")


def contents_markdown(entries: list[Entry]) -> str:
    """The entries as a Markdown table; one that lies in the current folder, as in JupyterLab, is a link."""
    rows = [f"| {_link(entry)} | {entry.goal} |" for entry in entries]
    return "\n".join(["| Notebook | Goal |", "|:--|:--|", *rows])


def _link(entry: Entry) -> str:
    file = f"{entry.name}.ipynb"
    return f"[{entry.title}]({file})" if Path(file).is_file() else entry.title
