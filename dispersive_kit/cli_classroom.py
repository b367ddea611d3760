"""The commands for a class: dispersive-kit lab | console | artefacts."""

from pathlib import Path
from typing import Annotated, Literal

import tyro

from dispersive_kit.errors import DataError


def lab(port: int = 8888, browser: bool = True, allow_root: bool = False) -> None:
    """Open the notebooks in JupyterLab: on this machine alone, with a token.

    Args:
        port: The port to listen on.
        browser: Open a browser; otherwise the address is printed.
        allow_root: Run even as root, as one may be in a container.
    """
    from dispersive_kit.study.lab import serve_lab

    serve_lab(port, browser=browser, allow_root=allow_root)


def console(out: Path | None = None, port: int = 8889, browser: bool = True, allow_root: bool = False) -> None:
    """Open all demos in large type for a lecture: in Voila, on this machine alone, or as one HTML file.

    Args:
        out: Write the console as one file that needs neither Python nor a network, instead of serving it.
        port: The port to listen on.
        browser: Open a browser; otherwise the address is printed.
        allow_root: Run even as root, as one may be in a container.
    """
    if out is not None:
        from dispersive_kit.views.console import write_console

        size = write_console(out)
        print(f"{out}: {size / 1e6:.1f} MB, open it in any browser")
        return
    from dispersive_kit.study.lab import CONSOLE, serve_lab

    serve_lab(port, browser=browser, allow_root=allow_root, page=CONSOLE)


def artefacts(
    action: Annotated[Literal["check", "build", "seal"], tyro.conf.Positional],
    what: Annotated[tuple[Literal["classroom", "umap"], ...], tyro.conf.Positional] = (),
) -> None:
    """The small files that the package ships: check them, build them anew, or list them as they are.

    Trained runs are made by the commands in their run.json and `dispersive-kit export`; then seal.

    Args:
        action: check every file against its sha256; build files, and seal; or seal: list the sha256 of what is there.
        what: What to build: classroom (samples and maps, 2 minutes) or umap (10 minutes); both if not given.
    """
    from dispersive_kit.analysis import classroom, umap_grid
    from dispersive_kit.data.artefacts import FOLDER, faults, seal

    if action == "check":
        if found := faults():
            raise DataError("; ".join(found))
        print(f"{FOLDER}: every file is the one that was listed")
        return
    if action == "build":
        makers = {"classroom": classroom.build, "umap": umap_grid.build}
        for name in what or makers:
            makers[name]()
    print(f"{FOLDER}: {seal() / 1e6:.1f} MB listed")
