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


def test_runs_are_listed_shown_and_compared(runs, capsys):
    def said(*words):
        main(["runs", *words, "--folder", str(runs)])
        return capsys.readouterr().out.splitlines()

    table = said("list")
    assert table[0].split()[:4] == ["run", "status", "mode", "time"]
    states = {line.split()[0]: line.split()[1] for line in table[1:]}
    names = [f"mine/seeds/seed={seed}" for seed in range(3)]
    assert states == {"killed": "killed", names[0]: "ok", names[1]: "ok", names[2]: "failed"}
    shown = {line.rsplit("  ", 1)[0].strip(): line.rsplit("  ", 1)[-1].strip() for line in said("show", names[1])}
    assert shown["status"] == "ok" and shown["parameter seed"] == "1" and float(shown["drawn"]) > 1.5
    assert any("two is too many" in line for line in said("show", names[2]))
    compared = said("compare", names[0], names[1])
    assert compared[0].split() == names[:2]
    differing = {line.split("  ")[0] for line in compared[1:]}
    assert {"parameter seed", "drawn"} <= differing <= {"parameter seed", "drawn", "time", "started"}
    for wrong in (["show", "nothing"], ["show", "../runs"], ["show"], ["compare", names[0]], ["list", names[0]]):
        with pytest.raises(SystemExit) as ended:
            said(*wrong)
        assert ended.value.code == 2
