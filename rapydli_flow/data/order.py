"""The order in which an epoch visits records: a pure function of (seed, epoch) and the chunks.

    chunks        0 1 2 3 4 5 6 7        sorted by a hash of (seed, epoch, chunk number)
    shuffled      5 2 7 0 | 3 6 1 4      cut into windows of `window` chunks (4 here)
    records       each window's records sorted by a hash of (seed, epoch, record number)

So a reader needs `window` chunks at a time, and each chunk once an epoch. Keys are hashes of counters
(`rapydli_flow.random`), sorted stably: the order is the same on every machine and NumPy version, and
does not know how many ranks there are.
"""

from __future__ import annotations

import numpy as np

from ..errors import SettingError
from ..random import random_bits, stream_of
from ..spec import Array

CHUNKS, RECORDS = stream_of("data/order/chunks"), stream_of("data/order/records")


def epoch_order(
    dataset_size: int,
    chunk: int,
    *,
    seed: int,
    epoch: int,
    window: int = 8,
    shuffle: bool = True,
    subset: Array | None = None,
) -> Array:
    """Positions 0..dataset_size-1 in the order of this epoch: an int64 permutation.

    ``chunk`` is the number of records in a chunk, ``window`` the number of chunks that are mixed. Where the
    dataset is a subset, ``subset`` has the record number of each position: chunks are those of the array
    underneath. Raises SettingError for sizes below 1 and seeds outside 0..2**64-1.
    """
    for name, value in (("chunk", chunk), ("window", window)):
        if value < 1:
            raise SettingError(f"epoch_order: {name}={value} must be 1 or more.")
    if not shuffle:
        return np.arange(dataset_size, dtype=np.int64)
    records = np.arange(dataset_size, dtype=np.int64) if subset is None else subset
    numbers, member = np.unique(records // chunk, return_inverse=True)
    place = np.empty(len(numbers), np.int64)
    place[np.argsort(hash_of(numbers, seed, epoch, CHUNKS), kind="stable")] = np.arange(len(numbers))
    return np.lexsort((hash_of(records, seed, epoch, RECORDS), place[member] // window)).astype(np.int64, copy=False)


def hash_of(numbers: Array, seed: int, epoch: int, stream: int) -> Array:
    """uint64 sort keys of record or chunk numbers."""
    if not 0 <= seed < 2**64:
        raise SettingError(f"seed={seed} is outside 0..2**64-1.")
    with np.errstate(over="ignore"):
        bits = random_bits(np.uint64(seed), np.uint64(epoch), np.uint64(stream), numbers.astype(np.uint64))
    return np.asarray(bits)
