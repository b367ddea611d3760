"""kill -9 in the middle, then the same command again: what was done is skipped, the results are those of no kill."""

import random
import re

import warm
import yaml

from dispersive_kit.study.notebook import read_result

# A line when a run begins and one when it ends; the run called `victim` waits, so that it is killed in its middle.
MARK = "open({marks!r}, 'a').write(f'{{pathlib.Path(out).name}} {word}\\n')"
WAIT = "if pathlib.Path(out).name in {victims!r} and not pathlib.Path({go!r}).exists():\n    time.sleep(900)"


class Killed:
    """A pipeline of quick notebooks that is killed once all `victims` run, and then run again."""

    def __init__(self, folder, write_quick, pipeline, victims, options=()):
        self.folder, self.marks, self.go = folder, folder / "marks", folder / "go"
        first = "import pathlib, time\n" + MARK.format(marks=str(self.marks), word="begun")
        wait = WAIT.format(victims=victims, go=str(self.go))
        last = MARK.format(marks=str(self.marks), word="ended")
        notebook = write_quick("quick", first, wait, last)
        for stage in pipeline["stages"]:
            stage["notebook"] = str(notebook)
        (folder / "p.yaml").write_text(yaml.safe_dump(pipeline))
        self.marks.write_text("")
        command = ["dispersive-kit", "run", folder / "p.yaml", *options, "--out", folder / "out", "--resume"]
        process = warm.start(*command)
        try:
            process.until(lambda: all(self.times(name, "begun") for name in victims))
        finally:
            process.kill()
        self.finished = {file: file.stat() for file in (folder / "out").rglob("result.json")}
        self.go.touch()
        self.said = warm.run(*command)

    def times(self, name, word):
        """How often the run `name` began or ended."""
        return self.marks.read_text().splitlines().count(f"{name} {word}")


def drawn(seed):
    return random.Random(seed).random() + 1.5


def test_a_pipeline_goes_on_after_a_kill(tmp_path, write_quick):
    stages = [{"name": f"stage-{k}", "parameters": {"seed": k}} for k in range(3)]
    run = Killed(tmp_path, write_quick, {"title": "t", "stages": stages}, ["stage-1"])
    assert len(run.finished) == 1
    assert all(file.stat() == before for file, before in run.finished.items())
    assert [run.times(f"stage-{k}", "begun") for k in range(3)] == [1, 2, 1]
    assert [run.times(f"stage-{k}", "ended") for k in range(3)] == [1, 1, 1]
    assert run.said.count("skipped") == 1 and "[3/3] stage-2: ok" in run.said
    for k in range(3):
        assert read_result(tmp_path / "out" / f"stage-{k}").numbers[0].value == drawn(k)


def test_a_sweep_goes_on_after_a_kill(tmp_path, write_quick):
    grid = {"mode": ["class", "full"], "seed": [0, 1, 2]}
    pipeline = {"title": "t", "stages": [{"name": "sweep", "grid": grid}]}
    victims = ["mode=class,seed=1", "mode=class,seed=2"]
    run = Killed(tmp_path, write_quick, pipeline, victims, ["--workers", "2"])
    assert len(run.finished) == 1
    assert all(file.stat() == before for file, before in run.finished.items())
    names = [f"mode={mode},seed={seed}" for mode in grid["mode"] for seed in grid["seed"]]
    assert [run.times(name, "ended") for name in names] == [1] * 6
    assert {name for name in names if run.times(name, "begun") == 2} == set(victims)
    assert run.said.count("skipped") == 1 and run.said.count(": ok") == 5
    mean = sum(map(drawn, range(3))) / 3
    for mode in grid["mode"]:
        assert re.search(rf"^drawn, mode = {mode} +{mean:.3g} .* mean of 3$", run.said, re.MULTILINE)
