"""Probes: the path equals scikit-learn's, choices never see the test, and controls are at chance."""

import copy
import math

import pytest
import torch
from sklearn.linear_model import Ridge
from sklearn.neighbors import KNeighborsClassifier

from dispersive_kit.analysis import (
    Split,
    Splits,
    candidates,
    choose_and_test,
    encoder,
    extract,
    mcnemar,
    probes,
    raw_pixels,
    shuffled,
)
from dispersive_kit.data import load_images
from dispersive_kit.diffusion.paths import DDPMPath, LinearPath
from dispersive_kit.errors import ConfigError, DataError

EXPECTED = {  # chosen (level, block), test accuracy, sum of validation accuracies
    ("network", "ridge"): ((0, 0), 0.72, 3.325),
    ("network", "knn"): ((0, 2), 0.32, 1.625),
    ("pixels", "ridge"): ((0, 0), 0.86, 1.635),
    ("pixels", "knn"): ((0, 0), 0.8867, 1.72),
}


def splits(noise: float = 1.0, draws: int = 2, classes: int = 4, seed: int = 0) -> Splits:
    """Classes on a simplex in 12 dimensions, with noise that differs by draw."""
    g = torch.Generator().manual_seed(seed)

    def part(n: int) -> Split:
        y = torch.arange(n) % classes
        x = 3 * torch.eye(12)[y] + noise * torch.randn(draws, n, 12, generator=g)
        return Split(x * torch.arange(1, 13), y)

    return Splits(part(200), part(100), part(300))


@pytest.mark.parametrize("rows", [200, 5], ids=["n > D", "n < D"])
def test_the_ridge_path_is_scikit_learns_at_every_lambda(rows):
    parts = splits(noise=2.0)
    parts = Splits(Split(parts.train.x[:, :rows], parts.train.y[:rows]), parts.validation, parts.test)
    scaled = probes.standardise(parts.train)
    x, y = scaled(parts.train.rows).numpy(), torch.nn.functional.one_hot(parts.train.row_labels).numpy()
    lambdas = (1e-3, 1.0, 30.0)
    ours = probes.ridge(parts.train, lambdas)(parts.test.rows)
    for one, predicted in zip(lambdas, ours, strict=True):
        theirs = Ridge(alpha=one * len(x)).fit(x, y).predict(scaled(parts.test.rows).numpy()).argmax(1)
        assert (predicted.numpy() == theirs).all()


def test_the_neighbour_vote_is_scikit_learns_also_far_from_zero():
    parts = splits(noise=2.0)
    theirs = KNeighborsClassifier(5).fit(parts.train.rows.numpy(), parts.train.row_labels.numpy())
    expected = torch.from_numpy(theirs.predict(parts.test.rows.numpy()))
    for far in (0.0, 1e6):
        moved = Split(parts.train.x.double() + far, parts.train.y)
        assert torch.equal(probes._knn(moved)(parts.test.rows + far)[0], expected)


def test_training_statistics_alone_standardise_and_a_dead_channel_becomes_zero():
    train = Split(torch.tensor([[[1.0, 5.0], [3.0, 5.0]]]), torch.tensor([0, 1]))
    assert probes.standardise(train)(torch.tensor([[2.0, 9.0]])).tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("kind", probes.PROBES)
def test_every_probe_finds_separable_classes_and_is_at_chance_with_shuffled_labels(kind):
    result, _ = choose_and_test(kind, {"all": splits(noise=0.3)})
    assert result.accuracy > 0.99 and result.low > 0.98 and result.right.shape == (300,)
    result, _ = choose_and_test(kind, {"all": shuffled(splits(noise=0.3))})
    assert result.accuracy < 0.45  # a quarter, and the few labels that fell into place


def test_validation_chooses_and_the_test_set_has_no_say():
    good, bad = splits(noise=0.3), splits(noise=20.0, seed=1)
    spoilt = Splits(bad.train, bad.validation, good.test)
    result, validation = choose_and_test(
        "ridge", {"good": Splits(good.train, good.validation, bad.test), "bad": spoilt}
    )
    assert result.chosen == "good" and validation["good"] > validation["bad"]
    assert result.accuracy < 0.5 < result.validation


def test_of_equal_settings_the_strongest_shrinkage_is_taken():
    parts = splits(noise=0.01)  # every lambda is right everywhere
    result, validation = choose_and_test("ridge", {"all": parts})
    strongest = (probes.ridge(parts.train, [max(probes.LAMBDAS)])(parts.test.rows)[0] == parts.test.row_labels).double()
    assert validation == {"all": 1} and result.accuracy == float(strongest.mean())


def test_no_training_image_is_seen_under_the_noise_of_a_test_image(digits):
    parts = [digits.subset(torch.arange(60))] * 3
    cells = candidates(raw_pixels(2), parts, (-6.0,), draws=2)
    noise = [part.x[:, 0].flatten() for part in (cells[0, 0].train, cells[0, 0].validation, cells[0, 0].test)]
    correlation = torch.corrcoef(torch.stack(noise)) - torch.eye(3)
    assert correlation.abs().max() < 0.3


def test_candidates_are_every_level_and_block_of_the_same_images(network, digits):
    parts = [digits.subset(torch.arange(i, i + 20)) for i in (0, 20, 40)]
    cells = candidates(encoder(network), parts, (math.inf, 0.0), pool="mean", draws=2)
    assert list(cells) == [(level, block) for level in range(2) for block in range(3)]
    assert cells[0, 0].train.x.shape == (1, 20, 24) and cells[1, 2].test.x.shape == (2, 20, 24)
    assert torch.equal(cells[1, 2].test.y, parts[2].labels)


def test_mcnemar_counts_only_where_two_arms_differ():
    first = torch.tensor([True] * 50 + [True] * 9 + [False] * 1 + [False] * 5)
    second = torch.tensor([True] * 50 + [False] * 9 + [True] * 1 + [False] * 5)
    assert mcnemar(first, second) == pytest.approx(2 * (1 + 10) / 2**10)
    assert mcnemar(first, first) == 1.0


def test_a_label_given_to_the_network_leaks_into_its_features_and_the_null_class_does_not(network):
    train, test = load_images("digits").subset(torch.arange(600)), load_images("digits", "test")
    network = copy.deepcopy(network)
    network.y_embedder.embedding_table.weight.data.mul_(50)  # as training would

    def accuracy(with_labels: bool) -> float:
        parts = []
        for data in (train, test):
            encode = encoder(network, y=data.labels if with_labels else None)
            x = extract(encode, data.images, (-8.0,), pool="mean", seed=len(parts))[0][:, -1]  # next to pure noise
            parts.append(Split(x, data.labels))
        return choose_and_test("ridge", {0: Splits(parts[0], parts[1], parts[1])})[0].accuracy

    assert accuracy(with_labels=True) > 0.6
    assert accuracy(with_labels=False) < 0.2


def test_what_does_not_fit_is_refused_by_name():
    parts = splits()
    with pytest.raises(ConfigError, match="ridge, knn"):
        choose_and_test("forest", {0: parts})
    with pytest.raises(DataError, match=r"\(draws, N, D\)"):
        Split(parts.train.x[0], parts.train.y)


def test_accuracies_on_fixed_digits_do_not_change(network):
    parts = [load_images("digits").subset(torch.arange(a, b)) for a, b in ((0, 150), (150, 250), (250, 400))]
    for name, encode, pool in (("network", encoder(network), "mean"), ("pixels", raw_pixels(2), "tokens")):
        cells = candidates(encode, parts, (math.inf, 1.0), pool=pool, draws=2)
        for kind in probes.PROBES:
            result, validation = choose_and_test(kind, cells)
            chosen, *numbers = EXPECTED[name, kind]
            assert result.chosen == chosen, (name, kind)
            found = result.accuracy, sum(validation.values())
            assert found == pytest.approx(numbers, abs=0.015), (name, kind)  # one image in a hundred


def test_a_level_of_noise_is_at_another_time_on_another_path(network, digits):
    parts = [digits.subset(torch.arange(20)), digits.subset(torch.arange(20, 30)), digits.subset(torch.arange(30, 40))]
    seen = []

    def encode(x, t, where):
        seen.append(t[0].item())
        return encoder(network)(x, t, where)

    for path in (LinearPath(), DDPMPath()):
        candidates(encode, parts, (0.0,), path=path)
        log_snr = path.log_snr(torch.tensor(seen[-1], dtype=torch.float64))
        assert abs(float(log_snr)) < 1e-6
    assert seen[0] == 0.5 and seen[-1] < 0.4
