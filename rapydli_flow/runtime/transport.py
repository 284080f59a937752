"""What ranks tell each other, over any transport: all-reduce and exchange, made of swaps.

In a swap a rank hands bytes to some ranks and takes bytes from some; transports differ in how. Sums are taken by halves
of the ranks of a group, so all get the same bits, and a run gives the same bits whatever the transport.
"""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from ..errors import RunLost
from ..scheduler import AllReduce, Collective, Exchange, Program
from ..scheduler.topology import Topology
from ..spec import Array, Spec
from .exchanges import exchange
from .sums import AllReducing, Joined

TIMEOUT_S = 120.0
CHUNK_BYTES = 1 << 20  # messages go in such pieces
ALIGN = 64  # bytes; where a message begins


class Transport(ABC):
    """The way between ``ranks`` participants, seen by one of them."""

    rank: int
    ranks: int
    chunk_bytes = CHUNK_BYTES
    timeout_s: float = TIMEOUT_S  # how long another rank is waited for
    waited_s: float = 0.0  # seconds in all in which what others send was not there yet, or they had no room
    aside: Transport | None = None  # a line of its own to the same ranks, for what goes on behind kernels

    @cached_property
    def topology(self) -> Topology:
        """Where the ranks are; unless it is set, all are on one host."""
        return Topology((0,) * self.ranks)

    @abstractmethod
    def post(self, name: str, sends: Mapping[int, Sequence[Array]]) -> None:
        """Hand arrays to ranks; they may change afterwards. At most two are on their way before `take`."""

    @abstractmethod
    def take(self, name: str, sizes: Mapping[int, int]) -> dict[int, Array]:
        """``sizes[r]`` bytes from each rank r of ``sizes``, the oldest not taken yet, as flat uint8 arrays.

        What is returned stays as it is until `release`. Raises RunLost when a rank does not come in time, or the run
        was given up; ``name`` is what the message calls it.
        """

    def swap(self, name: str, sends: Mapping[int, Sequence[Array]], sizes: Mapping[int, int]) -> dict[int, Array]:
        """Hand arrays to ranks, and take bytes from some."""
        self.post(name, sends)
        return self.take(name, sizes)

    @abstractmethod
    def release(self) -> None:
        """What was taken last has been read."""

    @abstractmethod
    def joined(self) -> None:
        """All ranks have their ends: what they found each other by may go."""

    @property
    @abstractmethod
    def given_up(self) -> bool:
        """Has this end, or the run, been closed?"""

    @abstractmethod
    def close(self) -> None:
        """Leave; a swap that waits raises RunLost."""

    # collectives ------------------------------------------------------------------------------------

    def meet(self, name: str, op: Any, ins: Sequence[Array], outs: Sequence[Array]) -> None:
        """Carry out a collective of a program on this rank's buffers."""
        if isinstance(op, AllReduce):
            mine = Joined(ins)
            AllReducing(self, name, mine.dtype, op.wire).run(op.ranks, mine, Joined(outs))
        elif isinstance(op, Exchange):
            exchange(self, name, op, ins, outs)
        else:
            raise TypeError(f"not a collective: {op!r}")

    def swap_large(self, name: str, sends: Mapping[int, Sequence[Array]], sizes: Mapping[int, int]) -> dict[int, Array]:
        """A swap of messages of any size, a chunk at a time; what it gives is this rank's own."""
        flat = {rank: flattened(parts) for rank, parts in sends.items()}
        got = {rank: np.empty(size, np.uint8) for rank, size in sizes.items()}
        longest = max((x.size for x in (*flat.values(), *got.values())), default=0)
        for begin in range(0, longest, self.chunk_bytes):
            out = {r: [x[begin : begin + self.chunk_bytes]] for r, x in flat.items() if begin < x.size}
            now = {r: min(self.chunk_bytes, x.size - begin) for r, x in got.items() if begin < x.size}
            for rank, data in self.swap(name, out, now).items():
                got[rank][begin : begin + now[rank]] = data[: now[rank]]
            self.release()
        return got

    def swap_arrays(
        self, name: str, sends: Mapping[int, Sequence[Array]], wants: Mapping[int, Sequence[Spec]]
    ) -> dict[int, list[Array]]:
        """A swap of arrays of any size; ``wants``: what comes from whom."""
        got = self.swap_large(name, sends, {r: sum(spec.size_bytes for spec in specs) for r, specs in wants.items()})
        return {r: taken_up(got[r], specs) for r, specs in wants.items()}

    def share(self, name: str, message: bytes) -> list[bytes]:
        """A message of each rank of the transport, for all of them."""
        lengths = self._shared(name, np.array([len(message)], np.int64), [8] * self.ranks)
        sizes = [int(length.view(np.int64)[0]) for length in lengths]
        texts = self._shared(name, np.frombuffer(message, np.uint8), sizes)
        return [text.tobytes()[:size] for text, size in zip(texts, sizes, strict=True)]

    def _shared(self, name: str, mine: Array, sizes: Sequence[int]) -> list[Array]:
        others = [r for r in range(self.ranks) if r != self.rank]
        parts = [mine]
        got = self.swap(name, dict.fromkeys(others, parts), {r: sizes[r] for r in others})
        out = [mine if r == self.rank else got[r].copy() for r in range(self.ranks)]
        self.release()
        return out


def swap_bytes(program: Program, ranks: int, chunk_bytes: int) -> int:
    """No less than what one rank hands over to others in one swap of its program; so many ranks are within reach."""
    sizes = [(ranks - 1) * chunk_bytes if program.gradients is not None else 0]
    for step in (step for step in program.steps if isinstance(step, Collective)):
        if isinstance(step.op, Exchange):  # a chunk for each of the others
            sizes.append(min(step.op.sent_bytes(), (ranks - 1) * chunk_bytes))
        else:
            sizes.append(min(sum(b.spec.size_bytes for b in step.ins), chunk_bytes))
    return max(sizes) + (ranks - 1) * ALIGN  # each message begins at a cache line


class Alone(Transport):
    """The transport of a plan with one rank."""

    rank, ranks = 0, 1

    def post(self, name: str, sends: Mapping[int, Sequence[Array]]) -> None:
        """There is nobody."""

    def take(self, name: str, sizes: Mapping[int, int]) -> dict[int, Array]:
        return {}

    def release(self) -> None:
        """Nothing was lent."""

    def joined(self) -> None:
        """There is nobody to be found."""

    @property
    def given_up(self) -> bool:
        return False

    def close(self) -> None:
        """Nothing to leave."""


class _Board:
    """What threads have handed over and nobody has taken yet, by (from, to)."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.messages: dict[tuple[int, int], deque[Array]] = {}
        self.closed = False


class Threads(Transport):
    """Ranks that are threads of one process; make all of them with `Threads.of`."""

    def __init__(self, rank: int, ranks: int, board: _Board, timeout_s: float, aside: Threads | None) -> None:
        self.rank, self.ranks, self.timeout_s, self.aside = rank, ranks, timeout_s, aside
        self._board = board

    @classmethod
    def of(cls, ranks: int, *, timeout_s: float = TIMEOUT_S) -> tuple[Threads, ...]:
        """One transport a rank, with its line aside."""
        board, beside = _Board(), _Board()
        lines = (cls(rank, ranks, beside, timeout_s, None) for rank in range(ranks))
        return tuple(cls(aside.rank, ranks, board, timeout_s, aside) for aside in lines)

    def post(self, name: str, sends: Mapping[int, Sequence[Array]]) -> None:
        flat = {id(parts): flattened(parts) for parts in sends.values()}
        with self._board.changed:
            for rank, parts in sends.items():
                self._board.messages.setdefault((self.rank, rank), deque()).append(flat[id(parts)])
            self._board.changed.notify_all()

    def take(self, name: str, sizes: Mapping[int, int]) -> dict[int, Array]:
        board, begin = self._board, time.monotonic()
        limit = begin + self.timeout_s
        with board.changed:
            got = {}
            for rank in sizes:
                while not board.messages.get((rank, self.rank)):
                    if board.closed:
                        raise RunLost(f"rank {self.rank}: another rank of this process stopped.")
                    if not board.changed.wait(max(0.0, limit - time.monotonic())) and time.monotonic() > limit:
                        raise RunLost(f"rank {self.rank}: rank {rank} did not come to {name} in {self.timeout_s:g} s.")
                got[rank] = board.messages[rank, self.rank].popleft()
            if board.closed:
                raise RunLost(f"rank {self.rank}: another rank of this process stopped.")
        self.waited_s += time.monotonic() - begin
        return got

    def release(self) -> None:
        """What was taken is the receiver's own."""

    def joined(self) -> None:
        """They know each other from the start."""

    @property
    def given_up(self) -> bool:
        return self._board.closed

    def close(self) -> None:
        with self._board.changed:
            self._board.closed = True
            self._board.changed.notify_all()
        if self.aside is not None:
            self.aside.close()


def flattened(parts: Sequence[Array]) -> Array:
    """The bytes of arrays, one after the other."""
    out = np.empty(sum(x.nbytes for x in parts), np.uint8)
    lay_down(parts, out)
    return out


def lay_down(parts: Sequence[Array], out: Array) -> int:
    """Write arrays, contiguous or not, into bytes; where the last one ends."""
    end = 0
    for x in parts:
        out[end : end + x.nbytes].view(x.dtype).reshape(x.shape)[...] = x
        end += x.nbytes
    return end


def taken_up(data: Array, specs: Sequence[Spec]) -> list[Array]:
    """Views of the arrays that lie in bytes one after the other."""
    out, begin = [], 0
    for spec in specs:
        out.append(data[begin : begin + spec.size_bytes].view(spec.dtype).reshape(spec.shape))
        begin += spec.size_bytes
    return out
