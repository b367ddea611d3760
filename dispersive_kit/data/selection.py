"""Which rows of a store a run trains on or holds out, and the order in which they come."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dispersive_kit.data.latents import LatentStore
from dispersive_kit.data.permutation import counted_keys, key_of, permute
from dispersive_kit.errors import ConfigError, DataError

HELD_OUT_ROWS = 512  # at most; at most a tenth. ImageNet gives up 0.04 % of its images for them
Rows = NDArray[np.int64]


class Selection:
    """The training or the held-out part ("test") of a store, of all classes or of those named.

    The split is one fixed shuffle of the whole store, the same for every seed and list of classes: its first rows are
    held out, of a list of classes the first of theirs, and so no list trains on what the whole store holds out.
    Without a list of classes and without balance nothing is kept that grows with the store.

    Args:
        classes: names; labels are then counted within this list. balanced: every class equally often.

    Raises:
        ConfigError: an unknown class. DataError: too few rows to hold any out, or a class without rows.
    """

    def __init__(
        self, store: LatentStore, part: str = "train", *, classes: Sequence[str] = (), balanced: bool = False
    ) -> None:
        known = store.spec.classes
        if unknown := [name for name in classes if name not in known]:
            raise ConfigError(f"{store.path} has no class {unknown[0]!r}; it has: {', '.join(known[:20])}")
        if len(set(classes)) < len(classes):
            raise ConfigError(f"a class stands twice in {list(classes)}")
        self.store, self.part = store, part
        self.classes = tuple(classes) or known
        self._new_label = np.full(len(known), -1)
        self._new_label[[known.index(name) for name in self.classes]] = np.arange(len(self.classes))
        self._chosen = self._in_order() if classes else None
        self._total = len(store) if self._chosen is None else len(self._chosen)
        held_out = self._held_out()
        if held_out == 0:
            raise DataError(f"{store.path}: {self._total} rows are too few to hold out a tenth of them")
        self._first, self._count = (0, held_out) if part == "test" else (held_out, self._total - held_out)
        self._by_class = self._group() if balanced else None

    def __len__(self) -> int:
        return self._count

    def rows(self, index: Rows) -> Rows:
        """Row numbers in the store of `index` in 0..len - 1."""
        place = self._first + index
        return permute(place, self._total, key_of("split")) if self._chosen is None else self._chosen[place]

    def labels(self, rows: Rows) -> Rows:
        """Labels of these rows of the store, counted within `classes`."""
        return self._new_label[self.store.labels(rows)]

    def draw(self, seed: int, step: int, size: int) -> Rows:
        """The rows (size,) of one step: each epoch is one permutation, of the selection or of each class."""
        position = np.arange(step * size, (step + 1) * size)
        if self._by_class is None:
            epoch, place = np.divmod(position, self._count)
            return self.rows(permute(place, self._count, counted_keys(key_of(seed, "order"), epoch)))
        rows, starts = self._by_class
        turn, place = np.divmod(position, len(self.classes))  # every class once a turn
        label = permute(place, len(self.classes), counted_keys(key_of(seed, "turns"), turn))
        sizes = np.diff(starts)[label]
        epoch, place = np.divmod(turn, sizes)
        keys = counted_keys(key_of(seed, "within"), epoch * len(self.classes) + label)
        return rows[starts[label] + permute(place, sizes, keys)]

    def _in_order(self) -> Rows:
        """The rows of `classes`, in the order of the shuffle of the whole store."""
        shuffled = permute(np.arange(len(self.store)), len(self.store), key_of("split"))
        return shuffled[self._new_label[self.store.all_labels()[shuffled]] >= 0]

    def _held_out(self) -> int:
        """A tenth, at most HELD_OUT_ROWS; of a list of classes no fewer than the whole store holds out of them."""
        own = min(HELD_OUT_ROWS, self._total // 10)
        if self._chosen is None:
            return own
        n = len(self.store)
        first = permute(np.arange(min(HELD_OUT_ROWS, n // 10)), n, key_of("split"))
        return max(own, int((self._new_label[self.store.labels(first)] >= 0).sum()))

    def _group(self) -> tuple[Rows, Rows]:
        """The rows of the selection, class after class, and where each class begins."""
        rows = self.rows(np.arange(self._count))
        labels = self._new_label[self.store.all_labels()[rows]]
        sizes = np.bincount(labels, minlength=len(self.classes))
        if (sizes == 0).any():
            empty = self.classes[int(sizes.argmin())]
            raise DataError(f"{self.store.path}: class {empty!r} has no row to train on, so it cannot be balanced")
        return rows[labels.argsort(kind="stable")], np.concatenate([[0], sizes.cumsum()])
