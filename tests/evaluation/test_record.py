"""FID is the word for one protocol; the kit does not lend it."""

import pytest

from dispersive_kit.errors import ConfigError
from dispersive_kit.evaluation import Record
from dispersive_kit.evaluation.record import INCEPTION, INCEPTION_SHA256, number_name, refuse_fid

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
        refuse_fid(*FAULTS[words])
    assert number_name("FD", *FAULTS[words]).startswith("FD[")


def test_a_record_cannot_be_given_the_word():
    extractor = {"name": "digits-classifier48", "weights_sha256": "0" * 64}
    with pytest.raises(ConfigError, match=r"this is not FID: .*digits-classifier48.*500 images"):
        Record("FID[digits]", 3.0, 2.0, 4.0, 1.0, 500, 500, {"extractor": extractor})
    with pytest.raises(ConfigError, match="this is not FID"):
        Record("FID", 3.0, 2.0, 4.0, 1.0, 50_000, 500)


def test_where_every_condition_holds_the_word_is_used():
    assert number_name("FD", TRUE, 50_000, {"data": "imagenet256"}) == "FID[imagenet256, N=50000]"
    assert number_name("FD", TRUE, 50_000, WHOLE) == "FID[cifar10 train, N=50000]"
    protocol = {"extractor": TRUE, "reference": {"data": "imagenet256"}}
    assert Record("FID[imagenet256, N=50000]", 3.0, 2.9, 3.1, 1.0, 50_000, 50_000, protocol).value == 3
    assert number_name("KID", TRUE, 50_000, WHOLE) == "KID[inception-pool3, N=50000]"
