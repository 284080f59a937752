"""Feed: the batch of every training step, read ahead of it.

    step    0  1  2  3 | 4  5  6  7 | ...     steps_per_epoch = len(dataset) // batch (4 here); the records
    epoch   0          | 1                    that are left over in one epoch's order are dropped

The rows of a step depend on (seed, epoch) alone, never on ranks or threads. A rank asks for its rows
[lo, hi) of each batch; one background thread reads the same rows of the next few steps.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any

from ..errors import DatasetError, SettingError
from ..spec import Array
from .cache import ChunkCache
from .dataset import Dataset
from .order import epoch_order

CACHE_BYTES = 256 * 2**20
COPY_BYTES = 256 * 2**10  # a batch smaller than this costs less to copy from memory than to hand to a thread
CLOSED = "Feed: this feed is closed. Make another one."
STREAMS = 64  # read-ahead is kept for this many different (lo, hi)

Rows = tuple[int, int]


class Feed:
    """Batches of a dataset by step. Safe to call from several threads; pickles as its description.

    ``shuffle`` mixes chunks, and records within ``window`` chunks. ``ahead`` steps are read ahead (0: none).
    ``fields`` are the fields of a batch (None: all). ``cache_bytes`` bounds the decoded chunks in memory. ``like``: a
    feed of the same records whose chunks in memory are used, if it has the same fields.
    Raises DatasetError for a dataset smaller than one batch, SettingError for sizes out of range.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        window: int = 8,
        ahead: int = 2,
        fields: Iterable[str] | None = None,
        cache_bytes: int = CACHE_BYTES,
        like: Feed | None = None,
    ) -> None:
        for name, value, least in (("batch", batch, 1), ("window", window, 1), ("ahead", ahead, 0)):
            if value < least:
                raise SettingError(f"Feed: {name}={value} must be {least} or more.")
        if len(dataset) < batch:
            raise DatasetError(
                f"{dataset.address}: {len(dataset)} records are fewer than one batch of {batch}. "
                "Choose a smaller batch, or more data."
            )
        self.dataset, self.batch_size, self.seed, self.shuffle = dataset, batch, seed, shuffle
        self.window, self.ahead, self.cache_bytes = window, ahead, cache_bytes
        self.fields = dataset.fields if fields is None else tuple(fields)
        lent = like._lent(self.fields, cache_bytes) if like is not None else None
        self.cache = lent or ChunkCache(dataset.readers_of(self.fields), cache_bytes)
        self._record_bytes = sum(reader.record_bytes for reader in dataset.readers_of(self.fields).values())
        self._lock = threading.Lock()
        self._orders: OrderedDict[int, Array] = OrderedDict()
        self._coming: OrderedDict[Rows, dict[int, Future[dict[str, Array]]]] = OrderedDict()
        self._thread: ThreadPoolExecutor | None = None
        self._closed = False

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in an epoch; the remainder is dropped."""
        return len(self.dataset) // self.batch_size

    def rows(self, step: int) -> Array:
        """Indices into the dataset (int64, shape (batch,)) of the batch of ``step``, counted over epochs."""
        if step < 0:
            raise SettingError(f"Feed: step={step} must be 0 or more.")
        epoch, position = divmod(step, self.steps_per_epoch)
        with self._lock:
            if epoch not in self._orders:
                self._orders[epoch] = epoch_order(
                    len(self.dataset),
                    self.dataset.chunk_records,
                    seed=self.seed,
                    epoch=epoch,
                    window=self.window,
                    shuffle=self.shuffle,
                    subset=self.dataset.subset,
                )
                self._orders[epoch].setflags(write=False)  # callers get views of it
                while len(self._orders) > 2:
                    self._orders.popitem(last=False)
            order = self._orders[epoch]
        return order[position * self.batch_size : (position + 1) * self.batch_size]

    def batch(self, step: int, lo: int = 0, hi: int | None = None) -> dict[str, Array]:
        """Rows [lo, hi) of the batch of ``step``: one array a field, shape (hi - lo, *record), the caller's own.

        Raises what reading raises (CorruptChunk ...), also if it was raised while reading ahead: to the caller
        of the step that it belongs to.
        """
        hi = self.batch_size if hi is None else hi
        if not 0 <= lo <= hi <= self.batch_size:
            raise SettingError(f"Feed: rows [{lo}, {hi}) are not inside a batch of {self.batch_size}.")
        if self._closed:
            raise SettingError(CLOSED)
        if self.ahead == 0 or (self.cache.complete and (hi - lo) * self._record_bytes <= COPY_BYTES):
            return self._read(step, lo, hi)
        try:
            return self._reading_ahead(step, (lo, hi)).result()
        except CancelledError:
            raise SettingError(CLOSED) from None

    def close(self) -> None:
        """Stop reading ahead and forget what is in memory. A closed feed gives no more batches."""
        with self._lock:
            self._closed = True
            thread, self._thread = self._thread, None
            self._coming.clear()
            self._orders.clear()
        if thread is not None:
            thread.shutdown(wait=True, cancel_futures=True)
        self.cache = ChunkCache({}, 0)

    def __enter__(self) -> Feed:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {
            "dataset": self.dataset,
            "batch": self.batch_size,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "window": self.window,
            "ahead": self.ahead,
            "fields": self.fields,
            "cache_bytes": self.cache_bytes,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def __repr__(self) -> str:
        how = f"shuffled by seed {self.seed} in windows of {self.window} chunks" if self.shuffle else "in stored order"
        return f"Feed({self.dataset!r}, batch={self.batch_size}, {self.steps_per_epoch} steps an epoch, {how})"

    def _lent(self, fields: tuple[str, ...], cache_bytes: int) -> ChunkCache | None:
        """The chunks in memory, for a feed of these fields and this size; None if this one differs or is closed."""
        cache = self.cache  # taken first: a feed that is open after that has not put an empty one in its place
        return cache if (fields, cache_bytes) == (self.fields, self.cache_bytes) and not self._closed else None

    def _read(self, step: int, lo: int, hi: int) -> dict[str, Array]:
        rows = self.rows(step)[lo:hi]
        subset = self.dataset.subset
        return self.cache.gather(rows if subset is None else subset[rows])

    def _reading_ahead(self, step: int, rows: Rows) -> Future[dict[str, Array]]:
        """What the thread has read, or will read, for this step; and ask it for the steps that follow."""
        with self._lock:
            if self._closed:
                raise SettingError(CLOSED)
            if self._thread is None:
                self._thread = ThreadPoolExecutor(1, thread_name_prefix="rapydli-feed")
            coming = self._coming.setdefault(rows, {})
            self._coming.move_to_end(rows)
            for other in [other for other in coming if not step <= other <= step + self.ahead]:
                coming.pop(other).cancel()
            for wanted in range(step, step + 1 + self.ahead):
                if wanted not in coming:
                    coming[wanted] = self._thread.submit(self._read, wanted, *rows)
            while len(self._coming) > STREAMS:
                for stale in self._coming.popitem(last=False)[1].values():
                    stale.cancel()
            return coming.pop(step)
