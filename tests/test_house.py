"""What the repository promises about itself."""

import re
import statistics
import subprocess
import sys
import tomllib
from pathlib import Path

import yaml

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


def test_importing_the_kit_is_light():
    """Beyond torch: under 0.3 s, and none of the heavy packages."""
    code = (
        "import sys, time, torch; t = time.process_time(); import dispersive_kit; t = time.process_time() - t\n"
        "heavy = {'matplotlib', 'papermill', 'anywidget', 'diffusers', 'umap', 'sklearn', 'scipy', 'accelerate',"
        " 'tyro', 'torchvision', 'seaborn'}\n"
        "print(t); print(sorted(heavy & set(sys.modules)))"
    )
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(3)]
    seconds, heavy = zip(*(run.stdout.split("\n")[:2] for run in runs), strict=True)
    assert min(map(float, seconds)) < 0.3
    assert set(heavy) == {"[]"}


def test_files_are_short_enough_to_read():
    lines = {p: len(p.read_text().splitlines()) for p in (ROOT / "dispersive_kit").rglob("*.py")}
    assert {str(p): n for p, n in lines.items() if n > 620} == {}
    assert statistics.median(lines.values()) < 120


def test_the_readme_shows_the_commands_that_exist():
    readme = (ROOT / "README.md").read_text()
    for target in ("make demo", "make test", "make lab"):
        assert target in readme
    for picture in re.findall(r"\]\(([^)]+\.png)\)", readme):
        assert (ROOT / picture).is_file(), picture


def test_the_repository_stays_under_25_megabytes():
    listed = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, text=True, check=True)
    tracked = [file for name in listed.stdout.split("\0") if name and (file := ROOT / name).is_file()]
    sizes = {str(file): file.stat().st_size for file in tracked}
    assert sizes and sum(sizes.values()) < 25e6, sorted(sizes.items(), key=lambda item: -item[1])[:5]
