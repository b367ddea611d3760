"""What the repository promises about itself."""

import ast
import re
import statistics
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from dispersive_kit.cli import COMMANDS, main
from dispersive_kit.training.config import RegularizerConfig, TrainConfig

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CONDA_NAMES = {"torch": "pytorch"}  # where conda-forge's name differs


def test_environment_yml_agrees_with_pyproject():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    conda = {d for d in environment if isinstance(d, str)} - {"pip"}
    wanted = {f"python{PROJECT['requires-python']}"}
    extras = PROJECT["optional-dependencies"]
    for requirement in PROJECT["dependencies"] + extras["notebooks"] + extras["latents"]:
        name, bound = re.fullmatch(r"([\w-]+)(>=[\d.]+)", requirement).groups()
        wanted.add(CONDA_NAMES.get(name, name) + bound)
    assert conda == wanted


def test_every_direct_dependency_is_pinned_to_a_version_in_range():
    pins = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")
    )
    pins = {name.lower().replace("_", "-"): version for name, version in pins.items()}
    extras = [r for group in PROJECT["optional-dependencies"].values() for r in group]
    for requirement in PROJECT["dependencies"] + extras:
        if requirement.startswith("dispersive-kit"):
            continue
        name, bound = requirement.lower().split(">=")
        assert as_numbers(pins[name]) >= as_numbers(bound), name


def as_numbers(version):
    return [int(n) for n in re.findall(r"\d+", version)]


@pytest.mark.xdist_group("together")
def test_tests_of_one_group_run_in_one_worker(request):
    """pytest 9.2 with pytest-xdist 3.8 ignores groups: two browsers then ran beside each other, unnoticed."""
    assert request.node.nodeid.endswith("@together") or not getattr(request.config.option, "loadgroup", False)


def test_importing_the_kit_is_light():
    """Beyond torch: under 0.1 s, and none of the heavy packages."""
    code = (
        "import sys, time, torch; t = time.process_time(); from dispersive_kit import *; t = time.process_time() - t\n"
        "heavy = {'matplotlib', 'papermill', 'anywidget', 'diffusers', 'umap', 'sklearn', 'scipy', 'accelerate',"
        " 'tyro', 'torchvision', 'seaborn', 'pydantic'}\n"
        "print(t); print(sorted(heavy & set(sys.modules)))"
    )
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(3)]
    seconds, heavy = zip(*(run.stdout.split("\n")[:2] for run in runs), strict=True)
    assert min(map(float, seconds)) < 0.1
    assert set(heavy) == {"[]"}


# A change that passes one of these takes something away first, or says here why the kit needs more. Two stand above
# what is aimed at (9,000 lines of the package, 10,500 of tests). The second rose twice: a fault of files, folders,
# streams or names has a test of its kind, what runs on a GPU is tried on a CPU (12,700 lines before), and most of the
# 50 faults that reviews found have a test (12,818). Scripts rose from 300: they also write course, slides and site.
BUDGET = {
    "lines of the package": 10_419,
    "files of the package": 65,
    "public names": 330,
    "settings of a training": 45,
    "flags": 54,
    "commands": 11,
    "lines of the longest file": 400,
    "lines of the median function": 12,
    "lines of the browser module": 1_000,
    "lines of scripts that make artefacts": 360,
    "lines of tests": 13_183,
    "longest line": 120,
}


def test_a_broad_except_says_why_it_is_one():
    """And shows the error that it caught; mutation: one without its comment."""
    for file, lines in lines_of((ROOT / "dispersive_kit").rglob("*.py")).items():
        for number, line in enumerate(lines):
            if re.match(r"\s*except( (Base)?Exception| RuntimeError)?( as \w+)?:", line):
                assert "  # " in line or lines[number + 1].strip() == "raise", f"{file}:{number + 1}"
                assert re.search(r"\{error|error\)|format_exc|raise$", "\n".join(lines[number + 1 : number + 5])), file


def lines_of(files):
    return {file: file.read_text(encoding="utf-8").splitlines() for file in files}


def functions_of(tree):
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def flags_of(command, capsys):
    """The options that `command --help` lists; --flip/--no-flip is one."""
    with pytest.raises(SystemExit):
        main([command, "--help"])
    options = re.findall(r"^(?:│ |  )(?:-\w[^,\n]*, )?--([\w-]+)", capsys.readouterr().out, flags=re.MULTILINE)
    return [name for name in options if name != "help"]


def test_the_house_stays_within_its_budgets(capsys):
    package = lines_of((ROOT / "dispersive_kit").rglob("*.py"))
    trees = [ast.parse("\n".join(lines)) for lines in package.values()]
    public = [
        node.name
        for tree in trees
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
    ]
    lengths = [f.end_lineno - f.lineno + 1 for tree in trees for f in functions_of(tree)]
    settings = [*TrainConfig.model_fields, *RegularizerConfig.model_fields]
    settings.remove("regularizer")
    scripts = lines_of((ROOT / "data").glob("*.py"))
    browser = lines_of((ROOT / "dispersive_kit").rglob("*.js"))
    tests = lines_of((ROOT / "tests").rglob("*.py"))
    found = {
        "lines of the package": sum(map(len, package.values())),
        "files of the package": len(package),
        "public names": len(public),
        "settings of a training": len(settings),
        "flags": sum(len(flags_of(name, capsys)) for name in COMMANDS),
        "commands": len(COMMANDS),
        "lines of the longest file": max(map(len, package.values())),
        "lines of the median function": statistics.median(lengths),
        "lines of the browser module": sum(map(len, browser.values())),
        "lines of scripts that make artefacts": sum(map(len, scripts.values())),
        "lines of tests": sum(map(len, tests.values())),
        "longest line": max(len(line) for lines in (package | tests | browser | scripts).values() for line in lines),
    }
    assert found.keys() == BUDGET.keys()
    assert {name: (n, BUDGET[name]) for name, n in found.items() if n > BUDGET[name]} == {}


def test_every_command_and_flag_that_is_named_somewhere_exists(capsys):
    """In pages, notebooks, docstrings and messages; mutation: a command or flag that went and is still recommended."""
    known = {
        "no-flip",
        "no-browser",
        "help",
        "version",
        *(flag for name in COMMANDS for flag in flags_of(name, capsys)),
    }
    known |= {"nproc_per_node", "multi_gpu", "cpu", "num_processes"}  # of torchrun and accelerate
    known |= {"array", "gpus", "wrap"}  # of sbatch
    pages = [ROOT / name for name in ("README.md", "data/README.md", "CONTRIBUTING.md", "notebooks/COURSE.md")]
    pages += [*(ROOT / "notebooks").rglob("*.ipynb"), *(ROOT / "dispersive_kit").rglob("*.py")]
    for page in pages:
        text = page.read_text(encoding="utf-8")
        named = set(re.findall(r"dispersive-kit (\w+)", text))
        assert named <= COMMANDS.keys(), (page, named - COMMANDS.keys())
        if page.suffix == ".py":  # sentences, not the arguments of other programs
            strings = [n.value for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Constant)]
            text = "\n".join(s for s in strings if isinstance(s, str) and not s.startswith("--") and " " in s)
        flags = set(re.findall(r"(?<![\w-])--([a-z][\w-]+)\b", text))
        assert flags <= known, (page, flags - known)


def test_the_readme_shows_the_commands_that_exist():
    readme = (ROOT / "README.md").read_text()
    for target in ("make demo", "make test", "make lab"):
        assert target in readme
    for notebook in re.findall(r"\b\d\d_\w+", readme + (ROOT / "notebooks/COURSE.md").read_text()):
        assert (ROOT / "notebooks" / f"{notebook}.ipynb").is_file(), notebook
    for picture in re.findall(r"\]\(([^)]+\.png)\)", readme):
        assert (ROOT / picture).is_file(), picture


def test_the_repository_stays_under_25_megabytes():
    listed = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, text=True, check=True)
    tracked = [file for name in listed.stdout.split("\0") if name and (file := ROOT / name).is_file()]
    sizes = {str(file): file.stat().st_size for file in tracked}
    assert sizes and sum(sizes.values()) < 25e6, sorted(sizes.items(), key=lambda item: -item[1])[:5]
