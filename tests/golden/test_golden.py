"""What the kit computed at version 0.1, and the files it wrote then: both are held for good.

Where the machine and torch are those that made the values, every bit is compared; elsewhere to a tolerance.
"""

import json
import shutil

import kit
import pytest
import torch
from make import FAMILIES, FILES, HERE, compute, machine
from safetensors import safe_open

TOLERANCE = {"trained": 2e-2, "trained_by_two": 2e-2, "resumed": 2e-2, "losses": 1e-5}  # elsewhere 1e-4, and no bits
DEFAULT = json.loads((FILES / "configs.json").read_text())["default"]  # every setting of 0.1 at its default


@pytest.fixture(scope="module")
def golden():
    with safe_open(HERE / "values.safetensors", "pt") as file:
        return file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def differing(family, found, made_on, expected):
    """Keys whose values are not those of 0.1, with how far the farthest is off."""
    exact, rel = made_on == machine(), TOLERANCE.get(family, 1e-4)
    wanted = {key.partition("/")[2]: value for key, value in expected.items() if key.startswith(f"{family}/")}
    off = {key: "only here" if key in found else "missing" for key in wanted.keys() ^ found.keys()}
    for key in wanted.keys() & found.keys():
        a, b = found[key], wanted[key]
        if exact and not (a.dtype == b.dtype and torch.equal(a.nan_to_num(), b.nan_to_num())):
            off[key] = f"{(a.double() - b.double()).abs().max():.2g} apart" if a.shape == b.shape else "another shape"
        elif not exact and not key.endswith("bits"):
            same = torch.allclose(
                a.double(), b.double(), rtol=rel, atol=rel * float(b.nan_to_num().abs().max()), equal_nan=True
            )
            off |= {} if same else {key: "beyond the tolerance"}
    return off


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.filterwarnings("ignore")
def test_what_is_computed_is_what_0_1_computed(golden, tmp_path, family):
    assert differing(family, compute(family, tmp_path), *golden) == {}


def test_the_verdicts_of_all_shipped_studies_follow_from_their_runs():
    plans = {plan.name: plan for plan in map(kit.load_plan, kit.shipped_plans())}
    assert len(kit.shipped_results()) >= 18
    for name, found in kit.shipped_results().items():
        assert rounded(kit.verdicts(plans[name], found["runs"])) == rounded(found["verdicts"]), name


def rounded(value):
    """As JSON, numbers to nine digits: libraries may differ in the last."""
    return json.loads(json.dumps(value), parse_float=lambda number: f"{float(number):.9g}")


def test_a_store_has_the_bytes_it_had(tmp_path):
    found, stored = kit.store_bytes(kit.write_store(tmp_path)), json.loads((FILES / "store.json").read_text())
    assert found == stored


def test_a_store_of_0_1_is_read(tmp_path):
    made = kit.read_store(kit.write_store(tmp_path))
    assert torch.equal(kit.read_store(FILES / "store"), made)


@pytest.mark.parametrize("name", json.loads((FILES / "configs.json").read_text()))
def test_a_config_of_0_1_is_read_and_one_that_uses_a_retired_setting_is_refused_by_its_name(tmp_path, name):
    stored = json.loads((FILES / "configs.json").read_text())[name]
    (tmp_path / "config.json").write_text(json.dumps(stored))
    if used := [key for key in stored.keys() - kit.all_settings(kit.config("digits")) if stored[key] != DEFAULT[key]]:
        with pytest.raises(kit.KitError, match=used[0]):
            kit.all_settings(kit.read_config(tmp_path))
    else:
        same_settings(stored, kit.all_settings(kit.read_config(tmp_path)), DEFAULT)


def same_settings(stored, read, default):
    """Settings as stored, but for those that are no more and were at their default."""
    for setting, value in stored.items():
        if isinstance(value, dict):
            same_settings(value, read[setting], default[setting])
        else:
            assert read.get(setting, default[setting]) == value, setting


def test_a_plan_of_0_1_has_the_hash_and_the_runs_it_had():
    stored, plan = json.loads((FILES / "plan.json").read_text()), kit.load_plan(str(FILES / "small.yaml"))
    assert plan.sha256 == stored["sha256"]
    assert [vars(c) for c in plan.contrasts] == [{"against": "base", **old} for old in stored["contrasts"]]
    assert {cell.name for cell in plan.cells()} == stored["cells"].keys()
    for cell in plan.cells():
        same_settings(stored["cells"][cell.name], kit.all_settings(plan.config(cell)), DEFAULT)


def test_the_folder_of_a_notebook_run_by_0_1_is_read(tmp_path):
    folder = shutil.copytree(FILES / "notebook-run", tmp_path / "run")
    result, stage = kit.read_result(folder).model_dump(), kit.read_task(folder)
    assert result["numbers"][0]["value"] == 3.5 and stage.status == "ok"
    assert result["sentences"] == ["It ran."] and stage.parameters == {"seed": 2}
