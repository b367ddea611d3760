"""A store is read as it was written, or refused by name."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import small_autoencoders
import torch
from encode_jobs import make
from hypothesis import given, settings
from hypothesis import strategies as st
from latent_stores import write_store
from safetensors.torch import load_file

from dispersive_kit.data.autoencoders import load_autoencoder, load_named, register_autoencoder
from dispersive_kit.data.encode import _mean_and_std, _moments
from dispersive_kit.data.latents import LatentStore, Selection, _map_shard, _shuffled, is_store
from dispersive_kit.errors import DataError

HELD_OUT = [1910, 3447, 3851, 773, 703, 596, 1919, 1103]  # the first rows held out of 5,000, since version 0.1


@pytest.fixture(scope="module")
def store(photos, tmp_path_factory):
    return make(photos, tmp_path_factory.mktemp("latents") / "store", "patches")


@pytest.fixture
def copied(store, tmp_path):
    return shutil.copytree(store.path, tmp_path / "store")


def test_rows_are_read_in_any_order_as_they_lie_in_the_files(store):
    files = [load_file(store.path / shard.file) for shard in store.spec.shards]
    posterior, labels = (torch.cat([file[name] for file in files]) for name in ("posterior", "labels"))
    rows = np.random.default_rng(0).integers(0, 30, 100)
    flipped = np.arange(100) % 3 == 0
    assert torch.equal(store.read(rows, flipped), posterior[rows, torch.from_numpy(flipped).long()])
    assert torch.equal(store.read(rows), posterior[rows, 0])
    assert np.array_equal(store.labels(rows), labels[rows])


def test_moments_are_those_of_draws_from_the_posterior():
    mean, std = torch.randn(300, 2, 3, 4, 4), torch.rand(300, 2, 3, 4, 4)
    found = _mean_and_std([_moments(torch.stack([mean, std], dim=2))])
    draws = mean + std * torch.randn(20, *mean.shape)
    torch.testing.assert_close(torch.tensor(found[0]), mean.mean((0, 1, 3, 4)).double(), check_dtype=False)
    torch.testing.assert_close(torch.tensor(found[1]), draws.std((0, 1, 2, 4, 5)), rtol=5e-3, atol=0)


def test_a_whole_store_passes_its_check_and_shows_its_images(store):
    assert [*store.check()] == ["checksums of 5 shards", "30 rows of 3 classes, 0 files left out"]
    grid = store.decoded_grid(load_autoencoder("patches"))
    assert grid.shape == (16, 3, 16, 16) and grid.dtype == torch.uint8
    assert grid.float().std() > 1  # patches of noise, averaged: not all grey


# ---- faults


@pytest.mark.parametrize("place", [-100, -1])
def test_a_changed_bit_of_a_shard_is_refused_by_name(copied, place):
    file = copied / "shard-00004.safetensors"
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"shard-00004\.safetensors.* damaged"):
        LatentStore(copied).verify()


def test_whatever_bit_of_a_header_is_changed_the_shard_is_refused_by_name(store, tmp_path):
    content, spec = (store.path / "shard-00004.safetensors").read_bytes(), store.spec
    for bit in range(8 * (8 + int.from_bytes(content[:8], "little"))):
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        (tmp_path / spec.shards[4].file).write_bytes(changed)
        with pytest.raises(DataError, match=r"shard-00004\.safetensors is damaged"):
            _map_shard(tmp_path, spec.shards[4], spec)


@pytest.mark.parametrize("spoil", [lambda f: f.write_bytes(f.read_bytes()[:-5]), lambda f: f.unlink()])
def test_a_truncated_or_missing_shard_is_refused_by_name(copied, spoil):
    spoil(copied / "shard-00003.safetensors")
    with pytest.raises(DataError, match=r"shard-00003\.safetensors is (truncated|missing)"):
        LatentStore(copied)


def shards(spec):
    return spec["shards"][2]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda spec: spec["autoencoder"].update(scale=0.18125), r"changed after it was written .* scale 0\.18125"),
        (lambda spec: spec.update(dtype="float32"), r"dtype = 'float32': .*'float16'"),
        (lambda spec: shards(spec).update(rows="many"), r"shards\.2\.rows = 'many'"),
        (lambda spec: shards(spec).update(sha256=["a"]), r"shards\.2\.sha256 = \['a'\]"),
        (lambda spec: shards(spec).update(file="../shard-00002.safetensors"), r"shards\.2\.file = '\.\./shard"),
        (lambda spec: shards(spec).update(file="/etc/shard-0.safetensors"), r"shards\.2\.file = '/etc"),
        (lambda spec: spec.update(classes=None), r"classes = None"),
        (lambda spec: spec.update(shards={}), r"shards = \{\}"),
        (lambda spec: spec["autoencoder"].update(weights_sha256=[]), r"autoencoder\.weights_sha256 = \[\]"),
        (lambda spec: spec["autoencoder"].update(scale=0), r"autoencoder\.scale = 0"),
        (lambda spec: spec["images"].clear(), r"images\.left_out: Field required|changed after"),
        (lambda spec: spec.update(colour="red"), r"colour = 'red': Unexpected keyword argument"),
        (lambda spec: spec.update(format="another"), r"format = 'another'"),
        (lambda spec: spec.pop("spec_sha256"), r"changed after it was written"),
    ],
)
def test_a_spec_that_was_edited_is_refused_with_the_field(copied, change, said):
    fields = json.loads((copied / "spec.json").read_text())
    change(fields)
    (copied / "spec.json").write_text(json.dumps(fields))
    with pytest.raises(DataError, match=r"spec\.json is damaged: .*" + said):
        LatentStore(copied)


WRONG = ["", "[]", "null", "7", '{"card": ', "[" * 100_000, "\xff"]


@pytest.mark.parametrize("content", WRONG)
def test_json_of_another_form_is_refused_by_name_wherever_it_is_read(photos, copied, content):
    for name in ("spec.json", "records/shard-00001.safetensors.json", "records/plan.json"):
        file = copied / name
        whole = file.read_bytes()
        file.write_bytes(content.encode("latin-1"))
        with pytest.raises(DataError, match=f"{file.name} is damaged"):
            LatentStore(copied) if name == "spec.json" else make(photos, copied, "patches")
        file.write_bytes(whole)


def test_what_is_no_store_is_refused(tmp_path):
    (tmp_path / "records").mkdir()  # a class of images may have this name
    assert not is_store(tmp_path)
    with pytest.raises(DataError, match="is no store of latents"):
        LatentStore(tmp_path)


@pytest.mark.parametrize(
    ("replacement", "said"),
    [("slow patches", "kind is 'SlowPatches', not 'Patches'"), ("rescaled", "scale is 0.6, not 0.5")],
)
def test_another_autoencoder_is_refused_with_the_difference(store, replacement, said):
    @register_autoencoder("rescaled")
    class Patches(small_autoencoders.Patches):
        scale = 0.6

    load_named(store.spec.autoencoder)
    moved = dataclasses.replace(store.spec.autoencoder, id="/no/longer/here")
    lost = r"no/longer/here.*cannot be loaded .*if it was moved, its new place with --vae"
    with pytest.raises(DataError, match=lost):
        load_named(moved)
    with pytest.raises(DataError, match=said):
        load_named(store.spec.autoencoder, path=replacement)


# ---- memory


def anonymous_kb():
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"RssAnon:\s+(\d+) kB", status)[1])


def test_anonymous_memory_does_not_grow_with_what_is_read(tmp_path):
    store = LatentStore(write_store(tmp_path / "store", rows=1000, shape=(4, 32, 32), shard_size=250))  # 33 MB
    rng = np.random.default_rng(0)

    def read_steps(steps):
        for _ in range(steps):
            store.read(rng.integers(0, 1000, 64), rng.random(64) < 0.5)
            Selection(store).draw(0, 0, 64)

    read_steps(5)
    before = anonymous_kb()
    read_steps(200)
    assert anonymous_kb() - before < 8_000  # kB; what was read passed through as 210 MB


# ---- selections


@settings(max_examples=50, deadline=None)
@given(n=st.integers(1, 3000), key=st.integers(0, 2**63 - 1))
def test_a_shuffle_has_every_index_once_and_a_position_needs_no_other(n, key):
    key = np.array([key], dtype=np.uint64)
    whole = _shuffled(np.arange(n), n, key)
    assert np.array_equal(np.sort(whole), np.arange(n))
    some = np.array([0, n // 3, n - 1])
    assert np.array_equal(_shuffled(some, n, key), whole[some])


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    return LatentStore(write_store(tmp_path_factory.mktemp("large") / "store", rows=5000, shape=(1, 1, 1)))


def test_training_and_held_out_rows_are_all_rows_once_and_those_of_before(large):
    parts = [selection.rows(np.arange(len(selection))) for selection in (Selection(large), Selection(large, "test"))]
    assert [len(part) for part in parts] == [4500, 500]
    assert sorted(np.concatenate(parts)) == list(range(5000))
    assert parts[1][:8].tolist() == HELD_OUT  # a run of an earlier version must not be measured on what it was fed


def test_an_epoch_has_every_row_once_wherever_the_batches_cut_it(large):
    train = Selection(large)
    drawn = np.concatenate([train.draw(5, step, 1500) for step in range(6)])  # two epochs of 4,500
    first, second = drawn[:4500], drawn[4500:]
    assert set(first) == set(second) == set(train.rows(np.arange(4500)))
    assert (first == second).mean() < 0.002 and abs(np.corrcoef(first, second)[0, 1]) < 0.06
    assert np.array_equal(np.concatenate([train.draw(5, step, 3000) for step in range(3)]), drawn)
    assert not np.array_equal(train.draw(6, 0, 1500), drawn[:1500])


def test_too_few_rows_to_hold_any_out_are_refused(tmp_path):
    with pytest.raises(DataError, match="9 rows are too few"):
        Selection(LatentStore(write_store(tmp_path / "few", rows=9)))
