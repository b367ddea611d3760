"""A shuffle without a table: position -> index, computed where it is needed."""

import hashlib

import numpy as np
from numpy.typing import ArrayLike, NDArray

ROUNDS = 32


def key_of(*parts: object) -> int:
    """A 63-bit key for whatever the parts say."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def counted_keys(key: int, counter: ArrayLike) -> NDArray[np.uint64]:
    """A key for each count, unlike those of its neighbours."""
    return _mix(np.atleast_1d(np.uint64(key)) + _mix(np.atleast_1d(counter).astype(np.uint64)))


def permute(position: ArrayLike, n: ArrayLike, key: ArrayLike) -> NDArray[np.int64]:
    """Where `position` goes in the permutation of 0..n-1 that `key` names; the three are broadcast together.

    The swap-or-not shuffle: in each round x has a partner K - x mod n, and one bit, drawn for the pair, says whether
    the two change places. Hoang, Morris & Rogaway (arXiv 1208.1176); any n, and no memory however large it is.
    """
    arrays = np.broadcast_arrays(np.atleast_1d(position), n, key)
    x, size, seed = (np.array(a, dtype=np.uint64) for a in arrays)
    for number in range(ROUNDS):
        round_key = _mix(seed + np.uint64(number + 1))
        partner = (round_key % size + size - x) % size
        swaps = _mix(np.maximum(x, partner) ^ (round_key << np.uint64(1))) & np.uint64(1)
        x = np.where(swaps == 1, partner, x)
    return x.astype(np.int64)


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finalizer of splitmix64 (Steele et al. 2014); unsigned overflow is meant."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
