"""Decoded chunks kept in memory, within a budget of bytes, and records gathered from them.

    arrays fit the budget   each array is kept whole and filled in as chunks are first touched: gathering
                            is then one `take`
    they do not             the most recently used chunks are kept: with a shuffle window of a few chunks
                            each chunk is decoded once an epoch

Safe to call from several threads: two that miss one chunk at the same moment both decode it.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping
from functools import partial

import numpy as np

from ..spec import Array
from .chunks import ChunkReader, gather


class _Whole:
    """One array kept whole, filled in chunk by chunk."""

    def __init__(self, reader: ChunkReader) -> None:
        self.reader = reader
        self.records = np.empty((reader.length, *reader.record_shape), reader.dtype)
        self.here = np.zeros(-(-reader.length // reader.chunk_records), np.bool_)
        self.full = False

    def gather(self, rows: Array) -> Array:
        if not self.full:
            chunk = self.reader.chunk_records
            numbers = np.unique(rows // chunk)
            for number in numbers[~self.here[numbers]]:
                block = self.reader.read(int(number))
                self.records[number * chunk : number * chunk + len(block)] = block
                self.here[number] = True  # after the records, so that another thread never reads a gap
            self.full = bool(self.here.all())
        return self.records.take(rows, axis=0)


class ChunkCache:
    """Records of several arrays, through a cache of ``size_bytes`` decoded bytes."""

    def __init__(self, readers: Mapping[str, ChunkReader], size_bytes: int) -> None:
        self._readers = dict(readers)
        self._limit = size_bytes
        self._lock = threading.Lock()
        self._recent: OrderedDict[tuple[str, int], Array] = OrderedDict()
        self._held = 0
        fits = sum(reader.length * reader.record_bytes for reader in readers.values()) <= size_bytes
        self._whole = {name: _Whole(reader) for name, reader in readers.items()} if fits else {}

    @property
    def complete(self) -> bool:
        """Is everything in memory, so that no record costs a read any more?"""
        return bool(self._whole) and all(whole.full for whole in self._whole.values())

    @property
    def held_bytes(self) -> int:
        """Decoded bytes held: never more than the budget."""
        if self._whole:
            return sum(whole.records.nbytes for whole in self._whole.values())
        return self._held

    def share(self, rows: Array) -> float:
        """The part of the bytes of records ``rows`` (int64) that is in memory, from 0 to 1."""
        held_bytes = all_bytes = 0
        for name, reader in self._readers.items():
            numbers, counts = np.unique(rows // reader.chunk_records, return_counts=True)
            here = self._whole[name].here[numbers] if self._whole else self._here(name, numbers)
            held_bytes += reader.record_bytes * int(counts[here].sum())
            all_bytes += reader.record_bytes * len(rows)
        return held_bytes / all_bytes if all_bytes else 0.0

    def _here(self, name: str, numbers: Array) -> Array:
        with self._lock:
            return np.array([(name, int(number)) in self._recent for number in numbers], np.bool_)

    def gather(self, rows: Array) -> dict[str, Array]:
        """The records ``rows`` (int64, in this order) of every array, in new memory."""
        if self._whole:
            return {name: whole.gather(rows) for name, whole in self._whole.items()}
        result = {}
        for name, reader in self._readers.items():
            out = np.empty((len(rows), *reader.record_shape), reader.dtype)
            gather(partial(self._chunk, name), rows, reader.chunk_records, out)
            result[name] = out
        return result

    def _chunk(self, name: str, number: int) -> Array:
        with self._lock:
            block = self._recent.get((name, number))
            if block is not None:
                self._recent.move_to_end((name, number))
                return block
        block = self._readers[name].read(number)
        with self._lock:
            if (name, number) not in self._recent and block.nbytes <= self._limit:
                self._recent[name, number] = block
                self._held += block.nbytes
                while self._held > self._limit:
                    self._held -= self._recent.popitem(last=False)[1].nbytes
        return block
