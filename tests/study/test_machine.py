"""Runs beside each other: in a pool of processes, with a GPU each, and as jobs."""

import os
import subprocess
from functools import partial

import pytest

from dispersive_kit.errors import ConfigError
from dispersive_kit.study.machine import in_pool
from dispersive_kit.study.run import Pipeline, Stage, run_pipeline

SUICIDE = "import os, signal, time\nos.kill(os.getppid(), signal.SIGKILL)\ntime.sleep(60)"


def touch(tmp_path, name):
    return f"echo $CUDA_VISIBLE_DEVICES >> {tmp_path / name}; sleep 0.5"


shell = partial(subprocess.run, shell=True, check=True)


def test_each_worker_has_a_gpu_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr("dispersive_kit.study.machine._visible_gpus", lambda: ("3", "5"))
    for _, future in in_pool(shell, [touch(tmp_path, str(k)) for k in range(4)]):
        future.result()
    assert {(tmp_path / str(k)).read_text().strip() for k in range(4)} == {"3", "5"}
    assert os.environ.get("CUDA_VISIBLE_DEVICES") not in ("3", "5")
    for workers, words in ((3, "3 workers for 2 GPUs"), (0, "1 or more")):
        with pytest.raises(ConfigError, match=words):
            list(in_pool(print, [1], workers))


def test_a_caller_that_stops_early_starts_nothing_more(tmp_path):
    for _, future in in_pool(shell, [touch(tmp_path, str(k)) for k in range(20)], 2):
        future.result()
        break
    assert len(list(tmp_path.iterdir())) == 2


def test_no_workers_and_a_request_that_the_cluster_does_not_know_are_refused(quick, tmp_path):
    stages = (Stage(notebook=str(quick)),)
    with pytest.raises(ValueError, match="workers"):
        Pipeline(title="t", stages=stages, workers=0)
    for wrong in ({"gpus": 1}, {"timeout_min": "an hour"}):
        asking = Pipeline(title="t", stages=stages, executor="local", cluster=wrong)
        with pytest.raises(ConfigError, match=f"cluster: .*{next(iter(wrong))}"):
            list(run_pipeline(asking, tmp_path / "out", resume=True))
    assert not (tmp_path / "out" / "quick").exists()


@pytest.mark.parametrize("executor", ["pool", "local"])
def test_a_worker_or_job_that_is_killed_is_a_failed_run_and_said_so(write_quick, tmp_path, executor):
    stage = Stage(notebook=str(write_quick("made", SUICIDE)), grid={"seed": [0, 1]})
    pipeline = Pipeline(title="t", stages=(stage,), executor=executor, workers=2)
    results = list(run_pipeline(pipeline, tmp_path / "out"))
    assert [result.status for result in results] == ["failed", "failed"]
    if executor == "pool":
        assert "killed" in results[0].error and "--resume" in results[0].error
    else:
        assert "ended without a result" in results[0].error and str(tmp_path / "out/.submitit") in results[0].error
