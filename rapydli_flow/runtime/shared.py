"""Ranks of one host meet in shared memory.

One file in /dev/shm, mapped by all ranks and unlinked as soon as they all have it, so that nothing is
left behind whatever happens to them:

    [ arrivals: one counter a rank ]  [ slot 0 of rank 0 | slot 0 of rank 1 | ... ]  [ slot 1 of ... ]

To gather for the i-th time a rank copies its part into its slot ``i % 2``, raises its counter to i, and
waits until all counters are at least i. Two slots are enough: a rank that has arrived at i + 1 has read
everything of i - 1... i, so slot ``i % 2`` may be written again at i + 2.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numba import njit

from cpu_kernels.driver import add, look, sched_yield

from ..errors import RunLost, SettingError
from ..spec import Array
from .transport import TIMEOUT_S, Transport

LINE = 8  # int64 values in a cache line
SPINS = 200  # looks before this core is offered to others
LOOKS = 20_000  # looks before Python is asked whether to go on: some 10 ms


@njit(nogil=True, cache=True)
def _arrive(counters, at):  # type: ignore[no-untyped-def]
    """Raise a counter: all that this rank wrote before is seen before it."""
    add(counters, at, 1)


@njit(nogil=True, cache=True)
def _wait(counters, ranks, goal, looks):  # type: ignore[no-untyped-def]
    """Look, then yield, until all counters reach ``goal``; -1, or a rank that is missing after ``looks``."""
    for rank in range(ranks):
        spins = 0
        while look(counters, rank * LINE) < goal:
            spins += 1
            if spins > SPINS:
                sched_yield()
            if spins > looks:
                return rank
    return -1


def folder() -> Path:
    """Where memory that processes share is kept."""
    return Path("/dev/shm") if Path("/dev/shm").is_dir() else Path(tempfile.gettempdir())


class SharedMemory(Transport):
    """Rank ``rank`` of ``ranks`` on this host. Rank 0 creates ``name``; `joined` is called when all have it."""

    def __init__(self, name: str, rank: int, ranks: int, capacity_bytes: int, *, timeout_s: float = TIMEOUT_S) -> None:
        self.rank, self.ranks, self.timeout_s = rank, ranks, timeout_s
        self.path = folder() / f"rapydli-{name}"
        self.capacity = -(-max(capacity_bytes, 64) // 4096) * 4096
        self._head = -(-ranks * LINE * 8 // 4096) * 4096
        self._count = 0
        self._open = True
        size = self._head + 2 * ranks * self.capacity
        if rank == 0:
            create(self.path, size)
        with self.path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), size)
        self._counters = np.frombuffer(self._map, np.int64, ranks * LINE)
        self._bytes = np.frombuffer(self._map, np.uint8, offset=self._head)

    def joined(self) -> None:
        """Forget the name; the memory lives as long as a rank has it mapped."""
        self.path.unlink(missing_ok=True)

    def slot(self, rank: int) -> Array:
        begin = ((self._count % 2) * self.ranks + rank) * self.capacity
        return self._bytes[begin : begin + self.capacity]

    def gather(self, parts: Sequence[Array]) -> list[Array]:
        self._count += 1
        mine, end = self.slot(self.rank), 0
        for part in parts:
            mine[end : end + part.nbytes] = part.reshape(-1).view(np.uint8)
            end += part.nbytes
        _arrive(self._counters, self.rank * LINE)
        limit = time.monotonic() + self.timeout_s
        while True:
            missing = _wait(self._counters, self.ranks, self._count, LOOKS)
            if missing < 0:
                return [self.slot(rank) for rank in range(self.ranks)]
            if not self._open:
                raise RunLost(f"rank {self.rank}: the run was given up while it waited for rank {missing}.")
            if time.monotonic() > limit:
                raise RunLost(
                    f"rank {self.rank}: rank {missing} did not come to collective {self._count} in "
                    f"{self.timeout_s:g} s. Its worker may be dead or stopped; resume from the last snapshot."
                )

    def close(self) -> None:
        self._open = False
        self.path.unlink(missing_ok=True)


def create(path: Path, size: int) -> None:
    """A file of ``size`` bytes that really has its memory."""
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
    except FileExistsError:
        raise SettingError(f"{path} is there already: two runs have the same name.") from None
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        path.unlink(missing_ok=True)
        raise SettingError(
            f"{size:,} bytes of shared memory for collectives are not to be had in {path.parent} "
            f"({os.strerror(error.errno or 0)}). Enlarge it, or use transport='comm'."
        ) from error
    finally:
        os.close(descriptor)
