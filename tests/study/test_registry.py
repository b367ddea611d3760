import json

import pytest

from dispersive_kit.cli import main
from dispersive_kit.study.pipeline import Stage, run_pipeline


@pytest.fixture
def runs(write_quick, tmp_path):
    """Two runs that ended well, one that failed, and one that was killed."""
    broken = write_quick("broken", "assert seed != 2, 'two is too many'")
    stages = [Stage(str(broken), name="seeds", grid={"seed": [0, 1, 2]})]
    list(run_pipeline(stages, tmp_path / "runs" / "mine"))
    killed = tmp_path / "runs" / "killed"
    killed.mkdir()
    (killed / "stage.json").write_text(json.dumps({"name": "killed", "status": "running", "parameters": {"seed": 7}}))
    return tmp_path / "runs"


def test_runs_are_listed_with_how_they_ended(runs, monkeypatch, capsys):
    monkeypatch.setenv("DISPERSIVE_KIT_RUNS", str(runs))
    main(["runs", "list"])
    table = capsys.readouterr().out.splitlines()
    assert table[0].split()[:4] == ["run", "status", "mode", "time"]
    states = {line.split()[0]: line.split()[1] for line in table[1:]}
    names = [f"mine/seeds/seed={seed}" for seed in range(3)]
    assert states == {"killed": "killed", names[0]: "ok", names[1]: "ok", names[2]: "failed"}
