"""Files from elsewhere: an error of the kit, naming the file, in under a second; names are shown and not obeyed."""

import time

import pytest

from dispersive_kit.cli import main
from dispersive_kit.errors import ConfigError, DataError
from dispersive_kit.study.notebook import read_plain, read_result
from dispersive_kit.study.plan import load_plan
from dispersive_kit.study.report import read_task
from dispersive_kit.study.run import _check_parameters, _open

LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
BAD_YAML = {
    "a billion laughs": (LAUGHS, "with its aliases written out it is too long"),
    "a list of itself": ("title: &a [*a]", "Circular reference"),
    "too deep": ("[" * 1_000, "recursion"),
    "code": ("title: !!python/object/apply:os.system ['touch owned']", "not YAML of plain values"),
    "not closed": ("title: [", "not YAML"),
    "no text": (b"\xff\xfe\x00", "not YAML"),
    "a date that is none": ("title: 2026-99-99", "not YAML"),
    "a list": ("[1, 2]", "valid dictionary"),
    "nothing": ("", "valid dictionary"),
}


@pytest.mark.parametrize("load", [load_plan, lambda name: _open(name, (), {})], ids=["plan", "pipeline"])
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
        _open("demos.yaml", (), {})


BAD_JSON = ["", "{", "[]", "null", '{"name": 3, "notebook": []}', "[" * 100_000]


@pytest.mark.parametrize("text", BAD_JSON)
def test_a_damaged_run_or_notebook_is_refused_by_name(tmp_path, capsys, text):
    for name, read in {"stage.json": read_task, "result.json": read_result}.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(DataError, match=name):
            read(tmp_path)
    for document in (text, "{}", '{"cells": 3, "nbformat": 4}', '{"cells": [{"cell_type": "x"}]}'):
        (tmp_path / "made.ipynb").write_text(document)
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


def test_what_a_terminal_obeys_in_a_name_is_shown_and_not_printed_raw(tmp_path, capsys):
    escape = "\x1b]0;owned\x07\x1b[31mred"
    commands = [["study", "run", escape], ["run", f"{escape}.yaml"], ["run", escape], ["evaluate", escape]]
    (tmp_path / "file").write_text("")
    commands += [["study", "report", "1-noise-floor", "--out", f"{tmp_path / 'file'}/{escape}"]]
    for command in commands:
        with pytest.raises(SystemExit):
            main(command)
    said = "".join(capsys.readouterr())
    assert "\x1b" not in said and "\x07" not in said and said.count("\\x1b[31mred") >= 5
