"""What is ready for a GPU, tried without one."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import warm

ROOT = Path(__file__).parents[1]
BENCH = ROOT / "tests" / "benchmarks" / "bench_gpu.py"


def test_the_benchmark_runs_to_its_end_at_toy_size(tmp_path):
    printed = warm.run(BENCH, "--device", "cpu", "--tiny", "--out", tmp_path / "bench.json")
    rows = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert [sum(part in row["what"] for row in rows) for part in ("peak", "batch", "Heun", "alone")] == [1, 6, 6, 2]
    assert all(row["value"] > 0 and row["what"] in printed for row in rows)
    assert not any("fail" in name for row in rows for name in row)
    disperses = [row for row in rows if row["what"].endswith("+ loss")]
    assert len(disperses) == 3 and all(row.keys() >= {"loss's share of the step"} for row in disperses)


def test_make_gpu_says_that_there_is_none_and_is_content():
    command = ["make", "gpu", f"PYTHON={sys.executable}", "VENV=none"]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode().startswith("no GPU that PyTorch can use here")


def test_what_a_bare_machine_runs_needs_torch_alone():
    rooms = [
        f for room in ("regularizers", "models", "diffusion") for f in (ROOT / "dispersive_kit" / room).glob("*.py")
    ]
    for file in [*rooms, BENCH, BENCH.with_name("public_style.py"), ROOT / "tests" / "gpu" / "test_plugin.py"]:
        imports = [node for node in ast.parse(file.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
        names = {n for i in imports for n in ([a.name for a in i.names] if isinstance(i, ast.Import) else [i.module])}
        others = {
            n for n in names if n.split(".")[0] not in {*sys.stdlib_module_names, "torch", "pytest", "public_style"}
        }
        room = (
            "dispersive_kit.regularizers",
            "dispersive_kit.models",
            "dispersive_kit.diffusion",
            "dispersive_kit.errors",
        )
        assert {n for n in others if not n.startswith(room)} == set(), file
