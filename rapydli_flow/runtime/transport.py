"""What ranks tell each other, over any transport: all-reduce and exchange, made of swaps.

In a swap a rank hands bytes to some ranks and takes bytes from some; transports differ in how. Sums are taken in the
order of the ranks of a group, so all get the same bits, and a run gives the same bits whatever the transport.
"""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import RunLost
from ..scheduler import AllReduce, Collective, Exchange, Program
from ..spec import Array, Block, even_bounds

TIMEOUT_S = 120.0
SMALL_BYTES = 1 << 16  # sums up to this size: every rank hands all it has to every other
CHUNK_BYTES = 1 << 20  # larger ones go in such pieces, each summed in parts by all ranks


class Transport(ABC):
    """The way between ``ranks`` participants, seen by one of them."""

    rank: int
    ranks: int
    chunk_bytes = CHUNK_BYTES

    @abstractmethod
    def swap(self, name: str, sends: Mapping[int, Sequence[Array]], sizes: Mapping[int, int]) -> dict[int, Array]:
        """Hand arrays to ranks, and take ``sizes[r]`` bytes from each rank r of ``sizes``, as flat uint8 arrays.

        What is returned stays as it is until `release`. Raises RunLost when a rank does not come in time, or the run
        was given up; ``name`` is what the message calls it.
        """

    @abstractmethod
    def release(self) -> None:
        """What the last swap gave has been read."""

    @abstractmethod
    def close(self) -> None:
        """Leave; a swap that waits raises RunLost."""

    # collectives ------------------------------------------------------------------------------------

    def meet(self, name: str, op: Any, ins: Sequence[Array], outs: Sequence[Array]) -> None:
        """Carry out a collective of a program on this rank's buffers."""
        if isinstance(op, AllReduce):
            self._all_reduce(name, op.ranks, _Joined(ins), _Joined(outs))
        elif isinstance(op, Exchange):
            self._exchange(name, op, ins, outs)
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

    def _all_reduce(self, name: str, ranks: Sequence[int], mine: _Joined, out: _Joined) -> None:
        size, item = mine.size, mine.dtype.itemsize
        if size * item <= SMALL_BYTES or len(ranks) == 1:
            self._add_all(name, ranks, mine, out)
            return
        step = self.chunk_bytes // item
        for begin in range(0, size, step):
            self._add_pieces(name, ranks, mine, out, begin, min(size, begin + step))

    def _add_all(self, name: str, ranks: Sequence[int], mine: _Joined, out: _Joined) -> None:
        """Everyone gets everything, and adds."""
        others = [r for r in ranks if r != self.rank]
        parts = mine.between(0, mine.size)
        got = self.swap(name, dict.fromkeys(others, parts), dict.fromkeys(others, mine.size * mine.dtype.itemsize))
        _add(out, 0, mine.size, [parts if r == self.rank else [got[r].view(mine.dtype)] for r in ranks])
        self.release()

    def _add_pieces(self, name: str, ranks: Sequence[int], mine: _Joined, out: _Joined, begin: int, end: int) -> None:
        """Each adds one piece of a chunk, and hands the sum to the others: reduce-scatter and all-gather."""
        item, me = mine.dtype.itemsize, ranks.index(self.rank)
        bounds = [begin + b for b in even_bounds(end - begin, len(ranks))]
        others = [(i, r) for i, r in enumerate(ranks) if r != self.rank]
        lo, hi = bounds[me], bounds[me + 1]
        sends = {r: mine.between(bounds[i], bounds[i + 1]) for i, r in others}
        got = self.swap(name, sends, {r: (hi - lo) * item for _, r in others})
        own = mine.between(lo, hi)
        _add(out, lo, hi, [own if r == self.rank else [got[r].view(mine.dtype)] for r in ranks])
        self.release()
        summed = out.between(lo, hi)
        sizes = {r: (bounds[i + 1] - bounds[i]) * item for i, r in others}
        got = self.swap(name, dict.fromkeys([r for _, r in others], summed), sizes)
        for i, r in others:
            out.write(bounds[i], got[r].view(mine.dtype))
        self.release()

    def _exchange(self, name: str, op: Exchange, ins: Sequence[Array], outs: Sequence[Array]) -> None:
        held = dict(zip(op.held, ins, strict=True))
        wanted = dict(zip(op.wanted, outs, strict=False))
        sends: dict[int, list[Array]] = {}
        sizes: dict[int, int] = {}
        for source, target, region in op.pieces:
            owner, reader = op.have[source].rank, op.want[target][0]
            if owner == self.rank != reader:
                sends.setdefault(reader, []).append(_part(held[source], region, op.have[source].block))
            elif reader == self.rank != owner:
                sizes[owner] = sizes.get(owner, 0) + region.size * np.dtype(op.dtype).itemsize
        got = self.swap_large(name, sends, sizes)
        at = dict.fromkeys(got, 0)
        for source, target, region in op.pieces:
            if target not in wanted:
                continue
            owner, shard = op.have[source].rank, op.have[source]
            if owner == self.rank:
                piece = _part(held[source], region, shard.block)
            else:
                begin = at[owner]
                at[owner] = begin + region.size * np.dtype(op.dtype).itemsize
                piece = got[owner][begin : at[owner]].view(op.dtype).reshape(region.shape)
            place = _part(wanted[target], region, op.want[target][1])
            if np.may_share_memory(place, piece):
                continue  # it was made there
            if shard.part == 0:
                place[...] = piece
            else:
                place += piece


def _part(array: Array, region: Block, outer: Block) -> Array:
    """A view of the region of an array that holds ``outer``."""
    return array[(..., *region.inside(outer))]  # without the dots, of a scalar, no view


class _Joined:
    """Several arrays of one dtype as if they were one flat one."""

    def __init__(self, arrays: Sequence[Array]) -> None:
        self.flats = [x.reshape(-1) for x in arrays]
        self.dtype = self.flats[0].dtype
        self.size = sum(flat.size for flat in self.flats)

    def between(self, begin: int, end: int) -> list[Array]:
        """Views of elements [begin, end)."""
        out, first = [], 0
        for flat in self.flats:
            lo, hi = max(begin, first), min(end, first + flat.size)
            if lo < hi:
                out.append(flat[lo - first : hi - first])
            first += flat.size
        return out

    def write(self, begin: int, values: Array) -> None:
        """Set elements from ``begin`` on."""
        first = 0
        for view in self.between(begin, begin + values.size):
            view[...] = values[first : first + view.size]
            first += view.size


def _add(out: _Joined, begin: int, end: int, parts: Sequence[Sequence[Array]]) -> None:
    """Set elements of ``out`` to sums of parts, in order; each part is a list of views, or one array."""
    first = 0
    for view in out.between(begin, end):
        cut = [_cut(part, first, first + view.size) for part in parts]
        total = view if not any(np.may_share_memory(view, x) for x in cut[2:]) else np.empty_like(view)
        if len(cut) == 1:
            total[...] = cut[0]
        else:
            np.add(cut[0], cut[1], out=total)
        for x in cut[2:]:
            total += x
        if total is not view:
            view[...] = total
        first += view.size


def _cut(part: Sequence[Array], begin: int, end: int) -> Array:
    """Elements of a list of views that was cut where the others are, or of one array."""
    if len(part) == 1:
        return part[0][begin:end]
    first = 0
    for view in part:
        if first == begin:
            return view
        first += view.size
    raise AssertionError(f"no view begins at {begin}")


def swap_bytes(program: Program) -> int:
    """No less than what a rank hands over in one swap of its program."""
    sizes = [0]
    for step in (step for step in program.steps if isinstance(step, Collective)):
        if isinstance(step.op, Exchange):  # a chunk for each of the others
            sizes.append(min(step.op.sent_bytes(), (len(step.op.ranks) - 1) * CHUNK_BYTES))
        else:
            sizes.append(min(sum(b.spec.size_bytes for b in step.ins), CHUNK_BYTES))
    return max(sizes)


class Alone(Transport):
    """The transport of a plan with one rank."""

    rank, ranks = 0, 1

    def swap(self, name: str, sends: Mapping[int, Sequence[Array]], sizes: Mapping[int, int]) -> dict[int, Array]:
        return {}

    def release(self) -> None:
        """Nothing was lent."""

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

    def __init__(self, rank: int, ranks: int, board: _Board, timeout_s: float) -> None:
        self.rank, self.ranks, self.timeout_s = rank, ranks, timeout_s
        self._board = board

    @classmethod
    def of(cls, ranks: int, *, timeout_s: float = TIMEOUT_S) -> tuple[Threads, ...]:
        """One transport a rank."""
        board = _Board()
        return tuple(cls(rank, ranks, board, timeout_s) for rank in range(ranks))

    def swap(self, name: str, sends: Mapping[int, Sequence[Array]], sizes: Mapping[int, int]) -> dict[int, Array]:
        board, limit = self._board, time.monotonic() + self.timeout_s
        flat = {id(parts): flattened(parts) for parts in sends.values()}
        with board.changed:
            for rank, parts in sends.items():
                board.messages.setdefault((self.rank, rank), deque()).append(flat[id(parts)])
            board.changed.notify_all()
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
        return got

    def release(self) -> None:
        """What a swap gave is the receiver's own."""

    def close(self) -> None:
        with self._board.changed:
            self._board.closed = True
            self._board.changed.notify_all()


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
