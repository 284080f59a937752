"""One stored array read a chunk at a time, and records gathered from chunks.

A chunk here is all that is stored of the records ``[number * records, (number + 1) * records)``; where
an array is also cut along other axes, that is several stored keys, read together. Whole chunks are the
only thing that is ever read: Zarr's ``oindex`` costs about a millisecond a record.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise, product
from math import prod
from typing import Any

import numpy as np
import zarr

from ..errors import CorruptChunk, DatasetError
from ..spec import Array
from .store import chunk_exists


@dataclass(frozen=True, eq=False)
class ChunkReader:
    """Reads chunks of one array with records on axis 0.

    ``every_chunk`` says that the writer stored every chunk, also those that hold only the fill value, so
    that a missing key is a lost chunk and not an economy.
    """

    array: zarr.Array
    name: str
    url: str
    every_chunk: bool

    @property
    def length(self) -> int:
        """Number of records."""
        return int(self.array.shape[0])

    @property
    def record_shape(self) -> tuple[int, ...]:
        return tuple(int(size) for size in self.array.shape[1:])

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype in this machine's byte order."""
        dtype: np.dtype[Any] = np.dtype(self.array.dtype)
        return dtype.newbyteorder("=")

    @property
    def record_bytes(self) -> int:
        """Decoded size of one record."""
        return prod(self.record_shape) * self.dtype.itemsize

    @property
    def chunk_records(self) -> int:
        """Records in a chunk (the last chunk may hold fewer)."""
        return int(self.array.chunks[0])

    def read(self, number: int) -> Array:
        """Chunk ``number`` decoded, shape (records, *record_shape); the last one has only its real records.

        Raises CorruptChunk, with the array's name and the chunk's key, where bytes are missing or cannot be
        decoded.
        """
        lo = number * self.chunk_records
        hi = min(lo + self.chunk_records, self.length)
        parts = self._parts(lo, hi)
        if self.every_chunk:
            for key in parts:
                if not chunk_exists(self.array, key):
                    raise CorruptChunk(
                        f"{self.url}: chunk {key} of array '{self.name}' is missing, although every chunk was "
                        "written. Copy the dataset again, or ingest it again."
                    )
        try:
            return np.ascontiguousarray(self.array[lo:hi], self.dtype)
        except Exception as error:  # codecs and stores raise whatever they like
            key = next((key for key, part in parts.items() if not self._readable(part)), next(iter(parts)))
            raise CorruptChunk(
                f"{self.url}: chunk {key} of array '{self.name}' (records {lo}..{hi - 1}) cannot be decoded: "
                f"{error}. Copy the dataset again, or ingest it again."
            ) from error

    def _parts(self, lo: int, hi: int) -> dict[str, tuple[slice, ...]]:
        """Stored keys that hold the records [lo, hi), and the part of the array that each key covers."""
        stored = self.array.shards or self.array.chunks
        axes = [range(lo // stored[0], (hi - 1) // stored[0] + 1)]
        axes += [range(-(-size // step)) for size, step in zip(self.array.shape[1:], stored[1:], strict=True)]
        return {
            self.array.metadata.encode_chunk_key(at): (
                slice(lo, hi),
                *(slice(i * step, (i + 1) * step) for i, step in zip(at[1:], stored[1:], strict=True)),
            )
            for at in product(*axes)
        }

    def _readable(self, part: tuple[slice, ...]) -> bool:
        try:
            self.array[part]
        except Exception:  # the same errors as in `read`, which reports them
            return False
        return True


def gather(fetch: Callable[[int], Array], rows: Array, chunk: int, out: Array) -> None:
    """``out[i] = record rows[i]``, calling ``fetch(number)`` once for each chunk that is touched.

    ``rows`` are int64 record numbers in any order, repeats included; ``out`` has shape (len(rows), *record).
    """
    order = np.argsort(rows, kind="stable")
    ordered = rows[order]
    numbers = ordered // chunk
    cuts = [0, *(np.flatnonzero(np.diff(numbers)) + 1).tolist(), len(rows)]
    for lo, hi in pairwise(cuts):
        if lo < hi:
            number = int(numbers[lo])
            out[order[lo:hi]] = fetch(number)[ordered[lo:hi] - number * chunk]


def checked_rows(rows: Any, length: int) -> Array:
    """``rows`` as int64 record numbers, or DatasetError: whole numbers in ``0..length-1``, one axis."""
    array = np.asarray(rows)
    if array.size == 0:
        return np.empty(0, np.int64)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise DatasetError(
            f"record indices are whole numbers on one axis; these have dtype {array.dtype} and shape {array.shape}."
        )
    if array.min() < 0 or array.max() >= length:
        wrong = array[(array < 0) | (array >= length)][0]
        raise DatasetError(f"record index {wrong} is outside 0..{length - 1}: this dataset has {length} records.")
    return array.astype(np.int64)
