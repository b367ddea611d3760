"""Time and peak memory of notebooks, as the README's table has them.

    python tests/benchmarks/measure_notebooks.py 06 --mode class

Run it on a quiet machine. Without names it measures every notebook there is.
"""

import argparse
import tempfile
from pathlib import Path

from dispersive_kit.study.notebook import find_notebook, notebooks_folder, read_result
from dispersive_kit.study.report import read_task
from dispersive_kit.study.run import run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="notebooks by number; all if none is given")
    parser.add_argument("--mode", default="class", choices=["smoke", "class", "full"])
    given = parser.parse_args()
    for notebook in map(find_notebook, given.names or sorted(p.stem for p in notebooks_folder().glob("*.ipynb"))):
        with tempfile.TemporaryDirectory() as folder:
            run(str(notebook), Path(folder), mode=given.mode)
            done = Path(folder) / notebook.stem
            print(
                f"{notebook.stem} | {read_task(done).seconds:.0f} s | {read_result(done).peak_gib:.2f} GiB", flush=True
            )


if __name__ == "__main__":
    main()
