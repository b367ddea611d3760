"""What a number may be called: FID and IS are names of one protocol each, and everything else says what it is."""

from collections.abc import Mapping
from typing import Any

from dispersive_kit.errors import ConfigError

INCEPTION = "inception-pool3"
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
PROTOCOL_N = 50_000
WORDS = {"FD": "FID", "CS": "IS"}  # our name -> the published one
NEEDS_REFERENCE = {"FID"}  # IS has none


def unmet(word: str, extractor: Mapping[str, Any], n: int, reference: Mapping[str, Any]) -> list[str]:
    """The conditions of `word` (FID or IS) that do not hold, in words.

    extractor, reference: as in a record, see `describe_extractor` and `describe_set`.
    """
    faults = []
    if extractor.get("name") != INCEPTION:
        faults.append(f"the features are {extractor.get('name')}, not {INCEPTION}")
    if extractor.get("weights_sha256") != INCEPTION_SHA256:
        faults.append("the weights are not the TensorFlow Inception of 2015 by their sha256")
    if n != PROTOCOL_N:
        faults.append(f"there are {n:,} images, not {PROTOCOL_N:,}")
    if word in NEEDS_REFERENCE:
        faults += _unmet_by_reference(reference)
    return faults


def _unmet_by_reference(reference: Mapping[str, Any]) -> list[str]:
    if not reference.get("data"):
        return ["the reference set has no name"]
    if whole := reference.get("drawn_from"):
        return [f"the reference is {reference['n']:,} of the {whole:,} images of {reference['data']}"]
    return []


def refuse(word: str, extractor: Mapping[str, Any], n: int, reference: Mapping[str, Any]) -> None:
    """Raises ConfigError: the number may not be called `word`; the message names every condition that is not met."""
    if faults := unmet(word, extractor, n, reference):
        ours = next(own for own, published in WORDS.items() if published == word)
        raise ConfigError(f"this is not {word}: {'; '.join(faults)}. Call it {ours}[...], which names its extractor")


def number_name(metric: str, extractor: Mapping[str, Any], n: int, reference: Mapping[str, Any]) -> str:
    """ "FD[digits-classifier48, N=500]"; FID and IS where, and only where, their conditions hold."""
    word = WORDS.get(metric)
    if word and not unmet(word, extractor, n, reference):
        return f"{word}[{_in_full(reference)}, N={n}]" if word in NEEDS_REFERENCE else f"{word}[N={n}]"
    return f"{metric}[{extractor['name']}, N={n}]"


def _in_full(reference: Mapping[str, Any]) -> str:
    """Name and split: FID to the training images and FID to the test images are two numbers."""
    return f"{reference['data']} {reference['split']}" if reference.get("split") else reference["data"]
