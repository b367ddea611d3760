"""Time and peak memory of notebooks, written into the table from which `dispersive-kit run` estimates.

    python tests/benchmarks/measure_notebooks.py 06 --modes smoke class

Run it on a quiet machine. Without names it measures every notebook there is.
"""

import argparse
import os
import tempfile
from pathlib import Path

from dispersive_kit.data.files import write_json
from dispersive_kit.study.estimates import TABLE, measured
from dispersive_kit.study.execute import run_notebook
from dispersive_kit.study.lookup import find_notebook, notebooks_folder
from dispersive_kit.study.schema import read_result


def measure(notebook: Path, mode: str) -> dict[str, float]:
    """Seconds from start to end, kernel start among them, and the kernel's peak memory."""
    with tempfile.TemporaryDirectory() as folder:
        run = run_notebook(str(notebook), Path(folder) / "run", {"mode": mode})
        if run.status != "ok":
            raise SystemExit(f"{notebook.stem} in {mode} mode: {run.error}")
        return {"seconds": round(run.seconds), "peak_gib": read_result(run.folder)["peak_gib"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="notebooks by number; all if none is given")
    parser.add_argument("--modes", nargs="+", default=["smoke", "class"], choices=["smoke", "class", "full"])
    parser.add_argument("--machine", default=f"{os.cpu_count()} CPU cores", help="what this is, for the table")
    given = parser.parse_args()
    table = {**measured(), "machine": given.machine}
    for notebook in map(find_notebook, given.names or sorted(p.stem for p in notebooks_folder().glob("*.ipynb"))):
        for mode in given.modes:
            found = table["notebooks"].setdefault(notebook.stem, {})[mode] = measure(notebook, mode)
            print(f"{notebook.stem:<24} {mode:<6} {found['seconds']:>5} s {found['peak_gib']:>6} GiB", flush=True)
            table["notebooks"] = dict(sorted(table["notebooks"].items()))
            write_json(TABLE, table)


if __name__ == "__main__":
    main()
