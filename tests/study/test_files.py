"""Files from elsewhere: an error of the kit, naming the file, in under a second; names are shown and not obeyed."""

import json
import os
import time

import pytest

from dispersive_kit.cli import main
from dispersive_kit.errors import ConfigError, DataError
from dispersive_kit.study.notebook import read_plain, read_result
from dispersive_kit.study.plan import load_plan
from dispersive_kit.study.run import _check_parameters, _load_pipeline

LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
BAD_YAML = {
    "a billion laughs": (LAUGHS, "it holds itself, or more than 100,000 values"),
    "a list of itself": ("title: &a [*a]", "it holds itself, or more than 100,000 values"),
    "a mapping of itself": ("title: &a {b: {c: *a}}", "it holds itself, or more than 100,000 values"),
    "too deep": ("[" * 100_000, "recursion"),
    "code": ("title: !!python/object/apply:os.system ['touch owned']", "not YAML of plain values"),
    "not closed": ("title: [", "not YAML"),
    "no text": (b"\xff\xfe\x00", "not YAML"),
    "a date that is none": ("title: 2026-99-99", "not YAML"),
    "a list": ("[1, 2]", "valid dictionary"),
    "nothing": ("", "valid dictionary"),
    "a number": ("12", "valid dictionary"),
}


@pytest.mark.parametrize("load", [load_plan, _load_pipeline], ids=["plan", "pipeline"])
@pytest.mark.parametrize("kind", BAD_YAML)
def test_a_plan_or_pipeline_of_another_form_is_refused_at_once(tmp_path, monkeypatch, load, kind):
    """mutation: aliases stand for what they like; the laughs then take all memory"""
    monkeypatch.chdir(tmp_path)
    text, words = BAD_YAML[kind]
    (tmp_path / "made.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    began = time.process_time()
    with pytest.raises(ConfigError, match=rf"made\.yaml(?s:.*){words}"):
        load("made.yaml")
    assert time.process_time() - began < 1 and not (tmp_path / "owned").exists()


def test_small_aliases_are_allowed_and_a_missing_file_is_named(tmp_path):
    (tmp_path / "a.yaml").write_text("a: &a {x: 0.5}\nb: [*a, *a]\nc: {<<: *a}")
    assert read_plain(tmp_path / "a.yaml") == {"a": {"x": 0.5}, "b": [{"x": 0.5}] * 2, "c": {"x": 0.5}}
    with pytest.raises(ConfigError, match=r"no plan 'nowhere'; shipped are: 1-noise-floor.*No such file"):
        load_plan("nowhere")
    with pytest.raises(ConfigError, match=r"no pipeline 'demos\.yaml'.*demo, digits"):
        _load_pipeline("demos.yaml")


BAD_JSON = ["", "{", "[]", "12", "null", '{"name": 3, "notebook": []}', "[" * 100_000, "\x00"]
BAD_JSON += ['{"name": "n", "notebook": "n", "mode": "full", "status": "ok", "seconds": "NaN or less"}']


@pytest.mark.parametrize("text", BAD_JSON)
def test_a_damaged_run_is_named_and_the_others_are_listed_all_the_same(tmp_path, monkeypatch, capsys, text):
    for name in ("broken", "sound"):
        (tmp_path / name).mkdir()
    (tmp_path / "broken" / "stage.json").write_text(text)
    (tmp_path / "sound" / "stage.json").write_text(json.dumps({"name": "sound", "status": "ok"}))
    monkeypatch.setenv("DISPERSIVE_KIT_RUNS", str(tmp_path))
    main(["runs", "list"])
    _, broken, sound = capsys.readouterr().out.splitlines()
    assert broken.startswith("broken") and str(tmp_path / "broken" / "stage.json") in broken
    assert sound.split() == ["sound", "ok"]
    (tmp_path / "broken" / "result.json").write_text(text)
    with pytest.raises(DataError, match=r"result\.json"):
        read_result(tmp_path / "broken")


def test_a_folder_that_cannot_be_listed_is_named_and_not_left_out(tmp_path, monkeypatch, capsys):
    """mutation: Path.rglob, which says nothing of it"""
    (tmp_path / "closed" / "run").mkdir(parents=True)
    listing = os.scandir

    def scandir(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return listing(path)

    monkeypatch.setattr(os, "scandir", scandir)
    monkeypatch.setenv("DISPERSIVE_KIT_RUNS", str(tmp_path))
    with pytest.raises(SystemExit):
        main(["runs", "list"])
    assert f"{tmp_path / 'closed'} cannot be listed (Permission denied)" in capsys.readouterr().err


@pytest.mark.parametrize("text", [*BAD_JSON, "{}", '{"cells": 3, "nbformat": 4}', '{"cells": [{"cell_type": "x"}]}'])
def test_a_notebook_that_is_none_is_refused_by_name(tmp_path, capsys, text):
    (tmp_path / "made.ipynb").write_text(text)
    with pytest.raises(SystemExit) as ended:
        main(["run", str(tmp_path / "made.ipynb"), "--out", str(tmp_path / "out")])
    assert ended.value.code == 2 and "made.ipynb is not a notebook" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ({"out": "2026"}, "no parameter 'out'.*--out"),
        ({"seed": "1e1"}, "seed is int, got '1e1'"),
        ({"seed": "three"}, "seed is int, got 'three'"),
        ({"seed": "true"}, "seed is int"),
        ({"seed": "1" * 5000}, "seed is int"),
        ({"seed": ""}, "seed is int"),
        ({"value": "nan"}, "value is float"),
        ({"value": "[" * 100_000}, "value is float"),
        ({"values": "1"}, "no parameter 'values'; it has: mode, value, seed"),
    ],
)
def test_what_is_typed_in_another_form_is_refused(quick, typed, words):
    with pytest.raises(ConfigError, match=words):
        _check_parameters(quick, typed, typed=True)


ESCAPE = "\x1b]0;owned\x07\x1b[31mred"


def test_what_a_terminal_obeys_in_a_name_is_shown_and_not_printed_raw(tmp_path, monkeypatch, capsys):
    for text in ('{"name": "x", "status": "ok"}', "{"):
        folder = tmp_path / f"{ESCAPE}{len(text)}"
        folder.mkdir()
        (folder / "stage.json").write_text(text)
    told = {"name": "x", "status": "ok", "parameters": {"mode": ESCAPE}, "environment": {"device": ESCAPE + "\n"}}
    (tmp_path / "stage.json").write_text(json.dumps(told))
    monkeypatch.setenv("DISPERSIVE_KIT_RUNS", str(tmp_path))
    main(["runs", "list"])
    commands = [["study", "run", ESCAPE], ["run", f"{ESCAPE}.yaml"], ["run", ESCAPE], ["evaluate", ESCAPE]]
    commands += [["study", "report", "1-noise-floor", "--out", f"{tmp_path / 'stage.json'}/{ESCAPE}"]]
    for command in commands:
        with pytest.raises(SystemExit):
            main(command)
    said = "".join(capsys.readouterr())
    assert "\x1b" not in said and "\x07" not in said and said.count("\\x1b[31mred") >= 6
