"""What is ready for a GPU, tried without one."""

import ast
import functools
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import tyro
import warm

from dispersive_kit.cli import COMMANDS
from dispersive_kit.study.plan import load_plan
from dispersive_kit.training import train_preset

sys.path.insert(0, str(Path(__file__).with_name("data")))  # for the processes that tests start, too

from encode_jobs import write_photos

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
    command = ["make", "--no-print-directory", "gpu", f"PYTHON={sys.executable}", "VENV=none"]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode().startswith("no GPU that PyTorch can use here")


def test_what_a_bare_machine_runs_needs_torch_alone():
    own = tuple(f"dispersive_kit.{room}" for room in ("regularizers", "models", "diffusion", "errors"))
    known = {*sys.stdlib_module_names, "torch", "pytest", "public_style", "nets"}
    files = [BENCH, BENCH.with_name("public_style.py"), ROOT / "tests/gpu/test_plugin.py", ROOT / "tests/nets.py"]
    for file in (*files, *(file for room in own for file in ROOT.glob(f"{room.replace('.', '/')}/*.py"))):
        imports = [node for node in ast.parse(file.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
        names = {n for i in imports for n in ([a.name for a in i.names] if isinstance(i, ast.Import) else [i.module])}
        assert {n.split(".")[0] for n in names if not n.startswith(own)} <= known, file


# ---- the page of commands


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A folder in which a shell has run the page, with programs that only write down how they were called."""
    folder, text = tmp_path_factory.mktemp("page"), (ROOT / "notebooks" / "GPU.md").read_text()
    script = "\n".join(re.findall(r"```sh\n(.*?)```", text, flags=re.DOTALL))
    script = re.sub(r"IMAGES=\S+", "IMAGES=photos", script)
    script = re.sub(r"VAE=\S+", "VAE=small_autoencoders:patches", script)
    for program in ("dispersive-kit", "accelerate", "torchrun", "python", "pip", "make"):
        (folder / "bin" / program).parent.mkdir(exist_ok=True)
        (folder / "bin" / program).write_text(f'#!/bin/sh\necho {program} "$@" >> "{folder}/calls"\n')
        (folder / "bin" / program).chmod(0o755)
    environment = {**os.environ, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}
    subprocess.run(["bash", "-euc", script], cwd=folder, env=environment, check=True, timeout=60)
    return folder


def commands(page):
    """(arguments of the kit, whether on several processes) of each different call; seeds are all the first one."""
    lines = dict.fromkeys(
        re.sub(r"(seed |-)[1-5]\b", r"\g<1>0", line) for line in (page / "calls").read_text().splitlines()
    )
    launched = [re.sub(r"^(accelerate|torchrun) .* -m dispersive_kit\.cli( --)? ", "launched ", line) for line in lines]
    return [(words[1:], words[0] == "launched") for words in map(str.split, launched)
            if words[0] in ("launched", "dispersive-kit")]  # fmt: skip


def test_every_command_of_the_page_is_one_of_the_kit(page):
    seen = []

    def recorder(name):
        return functools.wraps(COMMANDS[name])(lambda *_, **__: seen.append(name))

    for words, _ in commands(page):
        tyro.extras.subcommand_cli_from_dict({name: recorder(name) for name in COMMANDS}, args=words)
    assert Counter(seen) == {"doctor": 1, "encode": 2, "check": 1, "train": 7, "sample": 3, "study": 1}


def test_the_plan_of_the_page_has_the_arms_of_the_presets(page):
    plan = load_plan(str(page / "sit-b2.yaml"))
    assert (["study", "run", "sit-b2.yaml", "--out", "runs/sit-b2"], False) in commands(page)
    assert len(plan.cells()) == 18
    for cell in plan.cells():
        wanted = train_preset(f"imagenet-b2-{cell.arm}", seed=cell.seed, compile_blocks=True)
        assert plan.config(cell) == wanted


TOY = {
    "encode": "--image-size 32 --shard-size 16",
    "check": "",
    "train": "--steps 2 --set model=DiT-T/2 --set batch_size=32 --set compile_blocks=false --set preview_images=0",
    "sample": "--num 8 --num-steps 2",
}


def test_the_first_steps_of_the_page_run_at_toy_size(page, monkeypatch):
    monkeypatch.chdir(page)
    write_photos(page / "photos", ["n01", "n02", "n03"], 60)
    calls = [call for call in commands(page) if call[0][0] in TOY and not re.search("base|placebo", str(call))]
    kinds = [(words[0], several) for words, several in calls]
    assert kinds[:4] == [("encode", False), ("encode", True), ("check", False), ("train", True)]
    assert kinds[4:] == [("train", False), ("train", True), ("sample", True)]
    for words, several in [*calls[:4], calls[-1]]:
        printed = warm.run("dispersive-kit", *words, *TOY[words[0]].split(), processes=2 if several else 1)
    assert "8 images of b2-paper-0 at step 2" in printed
    assert json.loads((page / "runs" / "b2-paper-0" / "run.json").read_text())["dispersion_batch"] == 16
