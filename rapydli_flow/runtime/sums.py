"""Sums over ranks, made of swaps: the ways that `rapydli_flow.scheduler.topology` chooses from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..scheduler.collective import halves, wire_bytes
from ..scheduler.topology import BY_HOSTS, DOUBLING, EVERYONE
from ..spec import Array, even_bounds
from .wire import coded, decoded

if TYPE_CHECKING:
    from .transport import Transport


class Joined:
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

    def add(self, begin: int, end: int, parts: Sequence[Sequence[Array]]) -> None:
        """Set elements to sums of parts, by halves; each part is one array, or views that are cut as these are."""
        first = 0
        for view in self.between(begin, end):
            cut = [_cut(part, first, first + view.size) for part in parts]
            if len(cut) == 1:
                view[...] = cut[0]
            else:
                middle = (len(cut) + 1) // 2
                np.add(halves(cut[:middle]), halves(cut[middle:]), out=view)
            first += view.size


def _cut(part: Sequence[Array], begin: int, end: int) -> Array:
    if len(part) == 1:
        return part[0][begin:end]
    first = 0
    for view in part:
        if first == begin:
            return view
        first += view.size
    raise AssertionError(f"no view begins at {begin}")


class AllReducing:
    """One sum, as a rank takes part in it: ``transport`` is its way to the others."""

    def __init__(self, transport: Transport, name: str, dtype: np.dtype[Any], wire: str) -> None:
        self.transport, self.name, self.dtype, self.wire = transport, name, dtype, wire
        self.rank = transport.rank
        self.item = wire_bytes(dtype.name, wire)

    def run(self, ranks: tuple[int, ...], mine: Joined, out: Joined) -> None:
        """Set ``out`` to the sum over ranks; it may be the same memory as ``mine``."""
        if len(ranks) == 1:
            out.add(0, mine.size, [mine.between(0, mine.size)])
            return
        way = self.transport.topology.choose(ranks, mine.size * self.item)
        if way == EVERYONE:
            self.everyone(ranks, mine, out)
            return
        for begin, end in self.chunks(mine.size):
            if way == DOUBLING:
                self.doubling(ranks, mine, out, begin, end)
            elif way == BY_HOSTS:
                self.by_hosts(ranks, mine, out, begin, end)
            else:
                bounds = self.scatter(ranks, mine, out, begin, end)
                self.gather(ranks, out, bounds)

    def chunks(self, size: int) -> Iterator[tuple[int, int]]:
        """Elements that go at once."""
        step = self.transport.chunk_bytes // self.item
        return ((begin, min(size, begin + step)) for begin in range(0, size, step))

    def everyone(self, ranks: Sequence[int], mine: Joined, out: Joined) -> None:
        """The next chunk is on its way while one is added."""
        others = [r for r in ranks if r != self.rank]
        chunks = list(self.chunks(mine.size))
        for i in range(len(chunks) + 1):
            if i < len(chunks):
                self.transport.post(self.name, dict.fromkeys(others, coded(mine.between(*chunks[i]), self.wire)))
            if i > 0:
                begin, end = chunks[i - 1]
                got = self.transport.take(self.name, dict.fromkeys(others, (end - begin) * self.item))
                out.add(begin, end, self.parts(ranks, mine, begin, end, got))
                self.transport.release()

    def doubling(self, ranks: Sequence[int], mine: Joined, out: Joined, begin: int, end: int) -> None:
        """After each round twice as many ranks have the same sum."""
        me, so_far = ranks.index(self.rank), mine
        for i in range(len(ranks).bit_length() - 1):
            other = ranks[me ^ (1 << i)]
            sends = {other: coded(so_far.between(begin, end), self.wire)}
            got = self.transport.swap(self.name, sends, {other: (end - begin) * self.item})
            out.add(begin, end, self.parts(sorted((self.rank, other), key=ranks.index), so_far, begin, end, got))
            self.transport.release()
            so_far = out

    def by_hosts(self, ranks: Sequence[int], mine: Joined, out: Joined, begin: int, end: int) -> None:
        """Pieces within this host, each summed with those of the other hosts."""
        near = [r for r in self.transport.topology.beside(self.rank) if r in ranks]
        me = near.index(self.rank)
        bounds = self.scatter(near, mine, out, begin, end)
        if bounds[me] < bounds[me + 1]:
            piece = Joined(out.between(bounds[me], bounds[me + 1]))
            self.run(tuple(ranks[me :: len(near)]), piece, piece)
        self.gather(near, out, bounds)

    def scatter(self, ranks: Sequence[int], mine: Joined, out: Joined, begin: int, end: int) -> list[int]:
        """Each rank adds one piece; where the pieces begin."""
        me = ranks.index(self.rank)
        bounds = [begin + b for b in even_bounds(end - begin, len(ranks))]
        lo, hi = bounds[me], bounds[me + 1]
        sends = {
            r: coded(mine.between(bounds[i], bounds[i + 1]), self.wire) for i, r in enumerate(ranks) if r != self.rank
        }
        got = self.transport.swap(self.name, sends, dict.fromkeys(sends, (hi - lo) * self.item))
        out.add(lo, hi, self.parts(ranks, mine, lo, hi, got))
        self.transport.release()
        return bounds

    def gather(self, ranks: Sequence[int], out: Joined, bounds: Sequence[int]) -> None:
        """Each rank hands its piece to the others."""
        me = ranks.index(self.rank)
        piece = coded(out.between(bounds[me], bounds[me + 1]), self.wire)
        if self.wire:
            out.write(bounds[me], decoded(piece[0], self.dtype, self.wire))  # the same bits as the others get
        others = {r: i for i, r in enumerate(ranks) if r != self.rank}
        sizes = {r: (bounds[i + 1] - bounds[i]) * self.item for r, i in others.items()}
        got = self.transport.swap(self.name, dict.fromkeys(others, piece), sizes)
        for r, i in others.items():
            out.write(bounds[i], decoded(got[r], self.dtype, self.wire))
        self.transport.release()

    def parts(
        self, ranks: Sequence[int], mine: Joined, begin: int, end: int, got: Mapping[int, Array]
    ) -> list[Sequence[Array]]:
        """What ranks have of elements [begin, end), in their order: this one's own as the others would get it."""
        own: Sequence[Array] = mine.between(begin, end)
        if self.wire:
            own = [decoded(coded(own, self.wire)[0], self.dtype, self.wire)]
        return [own if r == self.rank else [decoded(got[r], self.dtype, self.wire)] for r in ranks]
