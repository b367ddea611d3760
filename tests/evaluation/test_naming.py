"""FID and IS are words for one protocol each; the kit does not lend them."""

import numpy as np
import pytest
import torch
from torch_fidelity.metric_isc import isc_features_to_metric

from dispersive_kit.errors import ConfigError
from dispersive_kit.evaluation import Record
from dispersive_kit.evaluation.distances import half_samples
from dispersive_kit.evaluation.naming import INCEPTION, INCEPTION_SHA256, number_name, refuse
from dispersive_kit.evaluation.scores import classifier_score

TRUE = {"name": INCEPTION, "weights_sha256": INCEPTION_SHA256}
WHOLE = {"data": "cifar10", "split": "train", "n": 50_000}
FAULTS = {
    "not inception-pool3": ({**TRUE, "name": "effnet-lite0"}, 50_000, WHOLE),
    "inception-pool3/pca64": ({**TRUE, "name": f"{INCEPTION}/pca64"}, 50_000, WHOLE),
    "sha256": ({**TRUE, "weights_sha256": "0" * 64}, 50_000, WHOLE),
    "2,000 images": (TRUE, 2_000, WHOLE),
    "no name": (TRUE, 50_000, {}),
    "2,000 of the 50,000 images of cifar10": (TRUE, 50_000, {**WHOLE, "n": 2_000, "drawn_from": 50_000}),
}


@pytest.mark.parametrize("words", FAULTS)
def test_fid_is_refused_with_the_condition_that_fails(words):
    with pytest.raises(ConfigError, match=f"this is not FID: .*{words}"):
        refuse("FID", *FAULTS[words])
    assert number_name("FD", *FAULTS[words]).startswith("FD[")


@pytest.mark.parametrize("word", ["FID", "IS"])
def test_a_record_cannot_be_given_the_word(word):
    extractor = {"name": "digits-classifier48", "weights_sha256": "0" * 64}
    with pytest.raises(ConfigError, match=f"this is not {word}: .*digits-classifier48.*500 images"):
        Record(f"{word}[digits]", 3.0, 2.0, 4.0, 1.0, 500, 500, {"extractor": extractor})
    with pytest.raises(ConfigError, match=f"this is not {word}"):
        Record(word, 3.0, 2.0, 4.0, 1.0, 50_000, 500)


def test_where_every_condition_holds_the_words_are_used():
    assert number_name("FD", TRUE, 50_000, {"data": "imagenet256"}) == "FID[imagenet256, N=50000]"
    assert number_name("FD", TRUE, 50_000, WHOLE) == "FID[cifar10 train, N=50000]"
    assert number_name("CS", TRUE, 50_000, {}) == "IS[N=50000]"
    protocol = {"extractor": TRUE, "reference": {"data": "imagenet256"}}
    assert Record("FID[imagenet256, N=50000]", 3.0, 2.9, 3.1, 1.0, 50_000, 50_000, protocol).value == 3


def test_other_metrics_keep_their_names():
    assert number_name("KID", TRUE, 50_000, WHOLE) == "KID[inception-pool3, N=50000]"


def logits(n=400, k=10, seed=0):
    return 3 * np.random.default_rng(seed).normal(size=(n, k))


@pytest.mark.parametrize("splits", [1, 10])
def test_the_score_equals_torch_fidelity(splits):
    expected = isc_features_to_metric(torch.from_numpy(logits()), splits=splits, shuffle=False)
    score, _ = classifier_score(logits(), np.zeros((0, 400), dtype=bool), splits=splits)
    assert score == pytest.approx(expected["inception_score_mean"], rel=1e-9)


def test_the_score_runs_from_one_to_the_number_of_classes():
    none = np.zeros((0, 40), dtype=bool)
    sure = 500.0 * np.eye(8)[np.arange(40) % 8]
    assert classifier_score(sure, none)[0] == pytest.approx(8)
    assert classifier_score(np.repeat(logits(1, 8), 40, axis=0), none)[0] == pytest.approx(1)


def test_the_score_on_halves_is_that_of_the_halves():
    halves = half_samples(400, 3)
    _, on_halves = classifier_score(logits(), halves)
    alone = [classifier_score(logits()[half], halves[:0, :200])[0] for half in halves]
    np.testing.assert_allclose(on_halves, alone)
