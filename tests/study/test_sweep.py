import json
import os
import subprocess
import threading
from functools import partial

import pytest
from filelock import FileLock
from scipy import stats

from dispersive_kit.data.files import write_json
from dispersive_kit.errors import ConfigError
from dispersive_kit.study.execute import input_hash, lock_of, run_notebook
from dispersive_kit.study.pipeline import Stage, run_pipeline
from dispersive_kit.study.sweep import Executor, Task, expand, in_pool, run_tasks, write_aggregate


def test_a_grid_is_every_combination_each_with_a_name_for_its_folder():
    points = expand({"preset": ["paper", "none"], "at": ["blocks.2", "DiT-S/2"]})
    assert [name for name, _ in points][:2] == ["preset=paper,at=blocks.2", "preset=paper,at=DiT-S-2"]
    assert points[3][1] == {"preset": "none", "at": "DiT-S/2"} and expand({}) == [("", {})]
    with pytest.raises(ConfigError, match="would share the folder 'at=a-b'"):
        expand({"at": ["a/b", "a-b"]})


def test_each_worker_has_a_gpu_of_its_own(write_quick, tmp_path):
    seen = "import os, time\nopen(out + '/gpu', 'w').write(os.environ['CUDA_VISIBLE_DEVICES'])\ntime.sleep(0.5)"
    notebook = write_quick("made", seen)
    tasks = [Task(f"run-{k}", notebook, {"seed": k}) for k in range(4)]
    results = list(run_tasks(tasks, tmp_path / "out", Executor(gpus=("3", "5"))))
    assert [result.status for result in results] == ["ok"] * 4
    used = [(tmp_path / "out" / task.name / "gpu").read_text() for task in tasks]
    assert set(used) == {"3", "5"} and os.environ.get("CUDA_VISIBLE_DEVICES") not in ("3", "5")
    with pytest.raises(ConfigError, match="3 workers for 2 GPUs"):
        list(run_tasks(tasks, tmp_path / "out", Executor(gpus=("3", "5"), workers=3)))


def test_no_workers_are_refused():
    for wrong in (0, -1):
        with pytest.raises(ConfigError, match="1 or more"):
            Executor(workers=wrong)


def test_a_request_that_the_cluster_does_not_know_is_refused_and_named(write_quick, tmp_path):
    tasks = [Task("run", write_quick("made"), {})]
    for wrong in ({"gpus": 1}, {"timeout_min": "an hour"}):
        with pytest.raises(ConfigError, match=f"cluster: .*{next(iter(wrong))}"):
            list(run_tasks(tasks, tmp_path / "out", Executor(kind="local", request=wrong)))
    assert not (tmp_path / "out" / "run").exists()


@pytest.fixture
def ended(write_quick, tmp_path):
    """A function that makes run folders as `run_notebook` leaves them, and gives their tasks."""
    notebook = write_quick("made")

    def make(values, *, mode="class", status="ok", of="paper"):
        tasks = []
        for seed, value in enumerate(values):
            task = Task(f"sweep/{of},{status},{mode},{seed}", notebook, {"seed": seed, "mode": of})
            folder = tmp_path / task.name
            folder.mkdir(parents=True)
            key = input_hash(notebook, task.parameters)
            write_json(folder / "stage.json", {"key": key, "status": status, "error": "of some kind"})
            number = {"name": "FD", "value": value, "note": "", "record": None}
            result = {"notebook": "made", "mode": mode, "seconds": 1, "peak_gib": 1, "numbers": [number]}
            write_json(folder / "result.json", {**result, "checks": [], "sentences": []})
            tasks.append(task)
        return tasks

    return make


def test_a_smoke_or_failed_run_never_enters_an_aggregate(ended, tmp_path):
    values = [3.0, 4.0, 8.0]
    tasks = [*ended(values), *ended([1e9], mode="smoke"), *ended([1e9], status="failed"), *ended([7.0], of="none")]
    never = Task("sweep/never", tasks[0].notebook, {"seed": 9})
    write_aggregate([*tasks, never], {"seed": [], "mode": []}, tmp_path)
    aggregate = json.loads((tmp_path / "sweep" / "aggregate.json").read_text())
    paper, none = aggregate["groups"]
    interval = stats.ttest_1samp(values, 0).confidence_interval()
    assert paper["point"] == {"mode": "paper"} and len(paper["runs"]) == 3
    assert paper["numbers"][0] == pytest.approx(
        {"name": "FD", "mean": 5.0, "n": 3, "low": interval.low, "high": interval.high}
    )
    assert none["numbers"] == [{"name": "FD", "mean": 7.0, "n": 1}]  # one run has no interval
    assert [(one["run"].split(",")[1:3], one["why"]) for one in aggregate["left_out"]] == [
        (["ok", "smoke"], "smoke mode"),
        (["failed", "class"], "failed: of some kind"),
        ([], "not run"),
    ]


def test_a_result_of_earlier_inputs_never_enters_an_aggregate(ended, write_quick, tmp_path):
    tasks = ended([3.0])
    write_quick("made", "changed = True")
    write_aggregate(tasks, {"seed": []}, tmp_path)
    assert json.loads((tmp_path / "sweep" / "aggregate.json").read_text())["groups"] == []


def test_a_worker_that_is_killed_is_a_failed_run_and_said_so(write_quick, tmp_path):
    suicide = "import os, signal, time\nos.kill(os.getppid(), signal.SIGKILL)\ntime.sleep(60)"
    stages = [Stage(str(write_quick("made", suicide)), grid={"seed": [0, 1]})]
    results = list(run_pipeline(stages, tmp_path / "out", executor=Executor(workers=2)))
    assert [result.status for result in results] == ["failed", "failed"]
    assert "killed" in results[0].error and "--resume" in results[0].error


def test_a_job_that_is_killed_is_a_failed_run_and_its_log_named(write_quick, tmp_path):
    suicide = "import os, signal, time\nos.kill(os.getppid(), signal.SIGKILL)\ntime.sleep(60)"
    stages = [Stage(str(write_quick("made", suicide)))]
    results = list(run_pipeline(stages, tmp_path / "out", executor=Executor(kind="local")))
    assert results[0].status == "failed" and "ended without a result" in results[0].error
    assert str(tmp_path / "out" / ".submitit") in results[0].error


def test_a_run_waits_for_another_one_in_its_folder_and_does_not_repeat_it(write_quick, tmp_path):
    notebook, folder, results = write_quick("made"), tmp_path / "run", []
    with FileLock(lock_of(folder)):
        waiting = threading.Thread(target=lambda: results.append(run_notebook(str(notebook), folder)))
        waiting.start()
        waiting.join(1.0)
        assert waiting.is_alive() and not folder.exists()
        folder.mkdir()
        write_json(folder / "stage.json", {"key": input_hash(notebook, {}), "status": "ok"})
        write_json(folder / "result.json", {})
    waiting.join()
    assert [result.status for result in results] == ["skipped"]


def test_a_caller_that_stops_early_starts_nothing_more(tmp_path):
    work = [f"touch {tmp_path / str(k)}; sleep 0.5" for k in range(20)]
    for _, future in in_pool(partial(subprocess.run, shell=True, check=True), work, 2):
        future.result()
        break
    assert 2 <= len(list(tmp_path.iterdir())) <= 4  # what ran, and what was begun just then
