"""Ranks of one host meet in shared memory.

One file in /dev/shm, mapped by all ranks and unlinked as soon as they all have it, so that nothing is
left behind whatever happens to them:

    [ for each pair: messages handed over | messages read | where the last two lie ]
    [ slot 0 of rank 0 | slot 1 of rank 0 | slot 0 of rank 1 | ... ]

What a rank hands over for the i-th time it writes into its slot ``i % 2``, once those who took something from it two
times before have read that, and raises its counters of those it hands something to. They wait for the counter, read,
and raise theirs.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numba import njit

from cpu_kernels.driver import add, look, sched_yield

from ..errors import RunLost, SettingError
from ..spec import Array
from .transport import ALIGN, TIMEOUT_S, Transport, lay_down

LINE = 8  # int64 values in a cache line
SPINS = 200  # looks before this core is offered to others
LOOKS = 20_000  # looks before Python is asked whether to go on: some 10 ms


@njit(nogil=True, cache=True)
def _raise(counters, at):  # type: ignore[no-untyped-def]
    """Raise a counter: all that this rank wrote before is seen before it."""
    add(counters, at, 1)


@njit(nogil=True, cache=True)
def _wait(counters, at, goal, looks):  # type: ignore[no-untyped-def]
    """Look, then yield, until a counter reaches ``goal``; False if it has not after ``looks``."""
    spins = 0
    while look(counters, at) < goal:
        spins += 1
        if spins > SPINS:
            sched_yield()
        if spins > looks:
            return False
    return True


def folder() -> Path:
    """Where memory that processes share is kept."""
    return Path("/dev/shm") if Path("/dev/shm").is_dir() else Path(tempfile.gettempdir())


class SharedMemory(Transport):
    """Rank ``rank`` of ``ranks`` on this host. Rank 0 creates ``name``; `joined` is called when all have it.

    ``capacity_bytes``: the most that a rank hands over in one swap. ``aside``: with a line of its own for what goes on
    behind kernels, in memory of its own.
    """

    aside: SharedMemory | None = None

    def __init__(
        self,
        name: str,
        rank: int,
        ranks: int,
        capacity_bytes: int,
        *,
        timeout_s: float = TIMEOUT_S,
        aside: bool = False,
    ) -> None:
        self.rank, self.ranks, self.timeout_s = rank, ranks, timeout_s
        self.path = folder() / f"rapydli-{name}"
        self.capacity = -(-max(capacity_bytes, 64) // 4096) * 4096
        pairs = ranks * ranks
        self._head = -(-3 * pairs * LINE * 8 // 4096) * 4096
        self._count = 0
        self._open = True
        size = self._head + 2 * ranks * self.capacity
        if rank == 0:
            create(self.path, size)
        with self.path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), size)
        self._counters = np.frombuffer(self._map, np.int64, 3 * pairs * LINE)
        self._where = self._counters.reshape(3, ranks, ranks, LINE)[2]
        self._bytes = np.frombuffer(self._map, np.uint8, offset=self._head)
        self._sent, self._taken = [0] * ranks, [0] * ranks
        self._lent: list[dict[int, int]] = [{}, {}]  # for each slot, who reads it, and the number of that message
        self._reading: list[int] = []
        if aside:
            try:
                self.aside = SharedMemory(f"{name}-aside", rank, ranks, capacity_bytes, timeout_s=timeout_s)
            except SettingError:  # there is not enough for both
                self.close()
                raise

    def joined(self) -> None:
        """Forget the name; the memory lives as long as a rank has it mapped."""
        self.path.unlink(missing_ok=True)
        if self.aside is not None:
            self.aside.joined()

    def _handed(self, source: int, target: int) -> int:
        """The counter of messages from one rank to another."""
        return (source * self.ranks + target) * LINE

    def _read(self, source: int, target: int) -> int:
        """The counter of those that have been read."""
        return (self.ranks * self.ranks + source * self.ranks + target) * LINE

    def take(self, name: str, sizes: Mapping[int, int]) -> dict[int, Array]:
        limit = time.monotonic() + self.timeout_s
        got = {}
        for source, size in sizes.items():
            self._taken[source] += 1
            count = self._taken[source]
            self._until(name, source, self._handed(source, self.rank), count, limit)
            begin = int(self._where[source, self.rank, count % 2])
            got[source] = self._bytes[begin : begin + size]
            self._reading.append(source)
        return got

    def post(self, name: str, sends: Mapping[int, Sequence[Array]]) -> None:
        if not sends:
            return
        limit = time.monotonic() + self.timeout_s
        self._count += 1
        slot = self._count % 2
        for target, count in self._lent[slot].items():
            self._until(name, target, self._read(self.rank, target), count, limit)
        self._lent[slot] = {}
        first = (2 * self.rank + slot) * self.capacity
        mine = self._bytes[first : first + self.capacity]
        places: dict[int, int] = {}  # the same arrays for several ranks lie there once
        end = 0
        for target, parts in sends.items():
            if id(parts) not in places:
                places[id(parts)] = end
                end += lay_down(parts, mine[end:])
                end = -(-end // ALIGN) * ALIGN
            self._sent[target] += 1
            self._where[self.rank, target, self._sent[target] % 2] = first + places[id(parts)]
            self._lent[slot][target] = self._sent[target]
        for target in sends:
            _raise(self._counters, self._handed(self.rank, target))

    def _until(self, name: str, other: int, at: int, goal: int, limit: float) -> None:
        begin = time.monotonic()
        while not _wait(self._counters, at, goal, LOOKS):
            if not self._open:
                raise RunLost(f"rank {self.rank}: the run was given up while it waited for rank {other}.")
            if time.monotonic() > limit:
                raise RunLost(
                    f"rank {self.rank}: rank {other} did not come to {name} in {self.timeout_s:g} s. Its worker may "
                    "be dead or stopped; resume from the last snapshot."
                )
        self.waited_s += time.monotonic() - begin

    def release(self) -> None:
        for source in self._reading:
            _raise(self._counters, self._read(source, self.rank))
        self._reading = []

    @property
    def given_up(self) -> bool:
        return not self._open

    def close(self) -> None:
        self._open = False
        self.path.unlink(missing_ok=True)
        if self.aside is not None:
            self.aside.close()


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
