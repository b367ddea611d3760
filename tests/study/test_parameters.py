import json
import sys

import pytest

from dispersive_kit.cli import main
from dispersive_kit.errors import ConfigError
from dispersive_kit.study.lookup import check_parameters, folder_within, parse_parameters, safe_name


@pytest.fixture
def made(write_quick):
    return write_quick("made")


@pytest.mark.parametrize("good", [{}, {"value": 2}, {"value": 2.5}, {"seed": -1}, {"mode": "full"}])
def test_right_parameters_pass_and_an_integer_will_do_for_a_float(made, good):
    check_parameters(made, good)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"values": 1.0}, "no parameter 'values'; it has: mode, value, seed"),
        ({"value": "much"}, "value is float, got 'much'"),
        ({"seed": 1.0}, "seed is int"),
        ({"seed": True}, r"seed is int, got True \(bool\)"),
        ({"seed": None}, "seed is int"),
        ({"mode": 3}, "mode is str"),
        ({"out": "/tmp/elsewhere"}, "--out"),
    ],
)
def test_a_wrong_name_or_type_is_refused(made, wrong, words):
    with pytest.raises(ConfigError, match=words):
        check_parameters(made, wrong)


def test_what_is_typed_is_read_as_the_notebook_declares_it(made):
    typed = parse_parameters(made, ("seed=3", "value=1e-3", "mode=3"))
    assert typed == {"seed": 3, "value": 0.001, "mode": "3"}
    for wrong in ("seed", "sed=3"):
        with pytest.raises(ConfigError):
            parse_parameters(made, (wrong,))


@pytest.fixture
def traced_kernel(tmp_path, monkeypatch):
    """A kernel "python3" that leaves a file behind when it is started, and ends."""
    spec = tmp_path / "jupyter" / "kernels" / "python3"
    spec.mkdir(parents=True)
    started = tmp_path / "kernel-started"
    argv = [sys.executable, "-c", f"open({str(started)!r}, 'w')", "{connection_file}"]
    (spec / "kernel.json").write_text(json.dumps({"argv": argv, "display_name": "Python 3", "language": "python"}))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    return started


@pytest.mark.parametrize(
    ("options", "words", "starts"),
    [
        (["-p", "sed=3"], "no parameter 'sed'", False),
        (["-p", "seed=three"], "seed is int, got 'three'", False),
        (["-p", "seed=3"], "failed", True),  # the traced kernel is no real one
    ],
)
def test_the_command_ends_with_status_2_before_a_kernel_starts(
    made, tmp_path, traced_kernel, capsys, options, words, starts
):
    with pytest.raises(SystemExit) as ended:
        main(["run", str(made), "--out", str(tmp_path / "run"), *options])
    assert ended.value.code == 2 and words in capsys.readouterr().err
    assert traced_kernel.exists() == starts == (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["..", ".", "", "a/b", "../a", "/etc", "a\\b", ".hidden", "-p", "a b", "a\n", "~"])
def test_a_name_that_could_leave_its_folder_is_refused(name):
    with pytest.raises(ConfigError, match="letters"):
        safe_name(name)


def test_a_folder_stays_within_its_parent_links_included(tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "link").symlink_to(tmp_path)
    assert folder_within(tmp_path / "runs", "demo/seed=0") == tmp_path / "runs" / "demo" / "seed=0"
    for wrong in ("../a", "demo/../../a", "/etc", "demo//a", "link/a"):
        with pytest.raises(ConfigError):
            folder_within(tmp_path / "runs", wrong)
