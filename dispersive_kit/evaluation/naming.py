"""What a number may be called: FID and IS are names of one protocol each, and everything else says what it is."""

from collections.abc import Mapping
from typing import Any

from dispersive_kit.errors import ConfigError

INCEPTION = "inception-pool3"
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
PROTOCOL_N = 50_000
WORDS = {"FD": "FID", "CS": "IS"}  # our name -> the published one
NEEDS_REFERENCE = {"FID"}  # IS has none


def unmet(word: str, extractor: Mapping[str, Any], n: int, reference: str | None) -> list[str]:
    """The conditions of `word` (FID or IS) that do not hold, in words.

    extractor: its name and weights_sha256, as in a record. reference: the name of the reference set.
    """
    faults = []
    if extractor.get("name") != INCEPTION:
        faults.append(f"the features are {extractor.get('name')}, not {INCEPTION}")
    if extractor.get("weights_sha256") != INCEPTION_SHA256:
        faults.append("the weights are not the TensorFlow Inception of 2015 by their sha256")
    if n != PROTOCOL_N:
        faults.append(f"there are {n:,} images, not {PROTOCOL_N:,}")
    if word in NEEDS_REFERENCE and not reference:
        faults.append("the reference set has no name")
    return faults


def refuse(word: str, extractor: Mapping[str, Any], n: int, reference: str | None) -> None:
    """Raises ConfigError: the number may not be called `word`; the message names every condition that is not met."""
    if faults := unmet(word, extractor, n, reference):
        ours = next(own for own, published in WORDS.items() if published == word)
        raise ConfigError(f"this is not {word}: {'; '.join(faults)}. Call it {ours}[...], which names its extractor")


def number_name(metric: str, extractor: Mapping[str, Any], n: int, reference: str | None) -> str:
    """ "FD[digits-classifier48, N=500]"; FID and IS where, and only where, their conditions hold."""
    word = WORDS.get(metric)
    if word and not unmet(word, extractor, n, reference):
        return f"{word}[{reference}, N={n}]" if word in NEEDS_REFERENCE else f"{word}[N={n}]"
    return f"{metric}[{extractor['name']}, N={n}]"
