"""Which rows come when: shuffles without a table, balance, subsets, and rows held out."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from latent_stores import write_store
from scipy.stats import chisquare

from dispersive_kit.data.latents import LatentStore
from dispersive_kit.data.permutation import counted_keys, key_of, permute
from dispersive_kit.data.selection import Selection
from dispersive_kit.errors import ConfigError, DataError


@settings(deadline=None)
@given(n=st.integers(1, 3000), key=st.integers(0, 2**63 - 1))
def test_every_index_comes_once(n, key):
    assert np.array_equal(np.sort(permute(np.arange(n), n, key)), np.arange(n))


def test_a_position_needs_no_other():
    whole = permute(np.arange(1000), 1000, 7)
    assert [int(permute(i, 1000, 7)[0]) for i in (0, 17, 999)] == whole[[0, 17, 999]].tolist()
    mixed = permute([3, 5], [10, 1000], [1, 7])
    assert mixed.tolist() == [permute(3, 10, 1)[0], whole[5]]


def test_all_orders_of_four_are_equally_likely():
    keys = counted_keys(key_of("test"), np.arange(12_000))
    orders = permute(np.arange(4), 4, keys[:, None])
    _, counts = np.unique(orders, axis=0, return_counts=True)
    assert len(counts) == 24 and chisquare(counts).pvalue > 1e-4


def test_neighbouring_epochs_are_unlike():
    first, second = (permute(np.arange(5000), 5000, counted_keys(key_of("order"), epoch)) for epoch in (0, 1))
    assert (first == second).mean() < 0.002
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.06 and abs(np.corrcoef(first, np.arange(5000))[0, 1]) < 0.06


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return LatentStore(write_store(tmp_path_factory.mktemp("selection") / "store", rows=203, classes=4, shard_size=50))


def test_training_and_held_out_rows_are_all_rows_once(store):
    train, test = Selection(store), Selection(store, "test")
    parts = [selection.rows(np.arange(len(selection))) for selection in (train, test)]
    assert [len(part) for part in parts] == [183, 20]
    assert sorted(np.concatenate(parts)) == list(range(203))


def test_an_epoch_has_every_row_once_wherever_the_batches_cut_it(store):
    train = Selection(store)
    drawn = np.concatenate([train.draw(5, step, 61) for step in range(6)])  # two epochs of 183
    for epoch in (drawn[:183], drawn[183:]):
        assert sorted(epoch) == sorted(train.rows(np.arange(183)))
    assert not np.array_equal(drawn[:183], drawn[183:])
    assert np.array_equal(np.concatenate([train.draw(5, step, 122) for step in range(3)]), drawn)
    assert not np.array_equal(train.draw(6, 0, 61), drawn[:61])


def test_balanced_draws_have_every_class_equally_often_and_every_row_once_an_epoch(tmp_path):
    store = LatentStore(write_store(tmp_path / "store", rows=130, classes=3))
    labels = store.all_labels()
    rare = Selection(store, classes=["n00", "n02"], balanced=True)
    assert rare.classes == ("n00", "n02")
    drawn = rare.draw(0, 0, 200)
    assert np.bincount(rare.labels(drawn)).tolist() == [100, 100]
    for label in (0, 2):
        own = drawn[labels[drawn] == label]
        size = int((labels[rare.rows(np.arange(len(rare)))] == label).sum())
        assert len(set(own[:size])) == size and set(own[:size]) == set(own[size : 2 * size])
    assert np.array_equal(rare.draw(0, 3, 20), drawn[60:80])


def test_a_subset_has_its_classes_only_counted_from_zero(store):
    some = Selection(store, classes=["n03", "n01"])
    drawn = some.draw(0, 0, len(some))
    assert set(store.all_labels()[drawn]) == {1, 3}
    assert np.array_equal(some.labels(drawn), np.where(store.all_labels()[drawn] == 3, 0, 1))


@pytest.mark.parametrize("classes", [["n00"], ["n03", "n01"], ["n02", "n00", "n01"]])
def test_no_list_of_classes_trains_on_what_the_whole_store_holds_out(store, classes):
    held_out = Selection(store, "test")
    known = set(held_out.rows(np.arange(len(held_out))))
    train, test = Selection(store, classes=classes), Selection(store, "test", classes=classes)
    ours, others = (set(part.rows(np.arange(len(part)))) for part in (train, test))
    assert not ours & known and not ours & others
    wanted = [store.spec.classes.index(name) for name in classes]
    assert ours | others == set(np.flatnonzero(np.isin(store.all_labels(), wanted)))
    assert len(others) >= len(ours | others) // 10


def test_what_cannot_be_selected_is_refused(store, tmp_path):
    with pytest.raises(ConfigError, match=r"no class 'n09'; it has: n00, n01"):
        Selection(store, classes=["n09"])
    few = LatentStore(write_store(tmp_path / "few", rows=9))
    with pytest.raises(DataError, match="9 rows are too few"):
        Selection(few)
    lone = LatentStore(write_store(tmp_path / "lone", rows=40, classes=39))
    with pytest.raises(DataError, match="has no row to train on"):
        Selection(lone, balanced=True)


def test_a_class_that_stands_twice_is_refused(store):
    with pytest.raises(ConfigError, match="stands twice"):
        Selection(store, classes=[store.spec.classes[0]] * 2)
