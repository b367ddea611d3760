"""Time and peak memory of notebooks, as the README's table has them.

    python tests/benchmarks/measure_notebooks.py 06 --mode class

Run it on a quiet machine. Without names it measures every notebook there is.
"""

import tempfile
from pathlib import Path
from typing import Literal

import tyro

from dispersive_kit.study.notebook import find_notebook, notebooks_folder, read_result
from dispersive_kit.study.report import read_task
from dispersive_kit.study.run import run


def main(names: tyro.conf.Positional[tuple[str, ...]] = (), mode: Literal["smoke", "class", "full"] = "class") -> None:
    for notebook in map(find_notebook, names or sorted(p.stem for p in notebooks_folder().glob("*.ipynb"))):
        with tempfile.TemporaryDirectory() as folder:
            run(str(notebook), Path(folder), mode=mode)
            done = Path(folder) / notebook.stem
            seconds, gib = read_task(done).seconds, read_result(done).peak_gib
            print(f"{notebook.stem} | {seconds:.0f} s | {gib:.2f} GiB", flush=True)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
