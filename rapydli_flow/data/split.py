"""Cut a dataset in two by chance: pure functions of the seed and the record numbers."""

from __future__ import annotations

import numpy as np

from ..errors import DatasetError
from ..random import stream_of
from ..spec import Array
from .order import hash_of

SPLIT = stream_of("data/split")


def split_positions(records: Array, fraction: float, *, seed: int, labels: Array | None = None) -> tuple[Array, Array]:
    """Sorted positions of the two parts; the first has exactly ``round(fraction * len(records))``.

    ``records`` are int64 record numbers, which key the draw. With ``labels`` (one value for each record)
    each class gives its share to the first part, rounded by largest remainder: no class is off by one or
    more. Raises DatasetError where a part would be empty.
    """
    count = len(records)
    size = round(fraction * count)
    if not 0 < size < count:
        raise DatasetError(
            f"split({fraction:g}) of {count} records gives parts of {size} and {count - size}: both need a record. "
            "The fraction is between 0 and 1, and is the first part's."
        )
    keys = hash_of(records, seed, 0, SPLIT)
    if labels is None:
        chosen = np.argsort(keys, kind="stable")[:size]
    else:
        classes, member = np.unique(labels, return_inverse=True)
        share = fraction * np.bincount(member, minlength=len(classes))
        quota = np.floor(np.round(share, 9)).astype(np.int64)
        quota[np.argsort(quota - share, kind="stable")[: size - quota.sum()]] += 1
        by_class = np.lexsort((keys, member))  # classes one after the other, each in random order
        first = np.searchsorted(member[by_class], np.arange(len(classes)))
        rank = np.arange(count) - first[member[by_class]]
        chosen = by_class[rank < quota[member[by_class]]]
    inside = np.zeros(count, np.bool_)
    inside[chosen] = True
    return np.flatnonzero(inside), np.flatnonzero(~inside)
