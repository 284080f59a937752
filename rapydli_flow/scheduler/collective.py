"""Collectives as ops of rank graphs: what ranks tell each other between kernels.

Ranks that take part in a collective have a node of the same name; each meets its collectives in the order of its
graph, and all these orders agree. `runtime` carries them out; the pure twin here is what tests compare with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import numpy as np

from ..ops import Op, Sample
from ..spec import Array, Block, Spec

EXCHANGE, ASSEMBLE = "exchange", "assemble"  # titles: between ranks, and of what a rank has in pieces itself


class AllReduce(Op):
    """Each output is the sum, by halves of ``ranks``, of that input on all of them.

    ``wire``: what floats are rounded to on their way, 'bfloat16' or '' (not at all). ``behind``: kernels go on
    meanwhile, up to a `Wait`.
    """

    ranks: tuple[int, ...]
    parts: int = 1
    wire: str = ""
    behind: bool = False  # type: ignore[misc]
    collective = True

    @property
    def outputs(self) -> tuple[str, ...]:  # type: ignore[override]
        return tuple(f"y{i}" for i in range(self.parts))

    def infer(self, *inputs: Spec) -> tuple[Spec, ...]:
        return inputs

    def index(self, *inputs: Spec) -> str:
        operands = ", ".join(" ".join("abcdefgh"[: len(x.shape)]) or "()" for x in inputs)
        return f"{operands} -> {operands}"

    def reference(self, *inputs: Array) -> tuple[Array, ...]:
        return inputs

    def flops(self, *inputs: Spec) -> int:
        return sum(x.size for x in inputs)

    def sent_bytes(self, *inputs: Spec) -> int:
        """Bytes that a rank sends to others: its part of the others' pieces, and its piece of the sum."""
        return sum(self.sends(self.ranks[0], *inputs).values())

    def sends(self, rank: int, *inputs: Spec) -> dict[int, int]:
        """Bytes that a rank sends to each of the others."""
        each = 2 * sum(x.size * wire_bytes(x.dtype, self.wire) for x in inputs) // len(self.ranks)
        return {other: each for other in self.ranks if other != rank}


def wire_bytes(dtype: str, wire: str) -> int:
    """Bytes that an element takes on its way."""
    return 2 if wire else np.dtype(dtype).itemsize


class Wait(Op):
    """An output of an all-reduce that runs behind the kernels, once it is done."""

    view = True

    def infer(self, x: Spec) -> Spec:
        return x

    def index(self, x: Spec) -> str:
        letters = " ".join("abcdefgh"[: len(x.shape)]) or "()"
        return f"{letters} -> {letters}"

    def reference(self, x: Array) -> Array:
        return x

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (Sample(cls(), (Spec((2, 3)),)),)


@dataclass(frozen=True)
class Shard:
    """A block that a rank holds: of the array, or of the part number ``part`` of a sum that the array is."""

    rank: int
    block: Block
    part: int = 0


class Piece(NamedTuple):
    """A region of a wanted block, and the shard that it is taken from, both by number."""

    source: int
    target: int
    region: Block


class Exchange(Op):
    """The shards ``have`` are on their ranks; after it, each rank has what it wants: halo, all-gather, all-to-all,
    broadcast, send and receive. Where shards are parts of a sum the receiver adds them: reduce-scatter.

    Inputs are this rank's shards, outputs its wanted blocks, in the order in which they are listed; a rank that only
    sends has an output of no elements. Several arrays may go together: ``ends`` then says where the shards, and the
    wanted blocks, of each end.
    """

    rank: int
    have: tuple[Shard, ...]
    want: tuple[tuple[int, Block], ...]
    dtype: str = "float32"
    ends: tuple[tuple[int, int], ...] = ()
    collective = True

    @classmethod
    def together(cls, ops: Sequence[Exchange]) -> Exchange:
        """One exchange of what several would exchange, as one rank sees them."""
        if len(ops) == 1:
            return ops[0]
        ends = [(len(op.have), len(op.want)) for op in ops]
        return replace(
            ops[0],
            have=tuple(shard for op in ops for shard in op.have),
            want=tuple(want for op in ops for want in op.want),
            ends=tuple(zip(*(accumulate(each) for each in zip(*ends, strict=True)), strict=True)),
        )

    @property
    def outputs(self) -> tuple[str, ...]:  # type: ignore[override]
        return tuple(f"y{i}" for i in range(max(1, len(self.wanted))))

    @property
    def ranks(self) -> tuple[int, ...]:
        """All that take part."""
        return tuple(sorted({shard.rank for shard in self.have} | {rank for rank, _ in self.want}))

    def held_by(self, rank: int) -> list[int]:
        """Numbers of a rank's shards."""
        return [i for i, shard in enumerate(self.have) if shard.rank == rank]

    @property
    def held(self) -> list[int]:
        """Numbers of this rank's shards."""
        return self.held_by(self.rank)

    @property
    def wanted(self) -> list[int]:
        """Numbers of the blocks that this rank wants."""
        return [i for i, (rank, _) in enumerate(self.want) if rank == self.rank]

    @cached_property
    def pieces(self) -> tuple[Piece, ...]:
        """What goes where; of a region that several ranks have, the receiver's own is taken, else that of the next one
        that has it: copies share the work of sending."""
        found: list[Piece] = []
        for (first, begin), (last, end) in pairwise([(0, 0), *(self.ends or [(len(self.have), len(self.want))])]):
            for target in range(begin, end):
                found += self._pieces(range(first, last), target)
        return tuple(found)

    def _pieces(self, shards: range, target: int) -> list[Piece]:
        """What a wanted block is made of, out of these shards."""
        rank, block = self.want[target]
        found: list[Piece] = []
        last = max(self.ranks) + 1
        order = sorted(shards, key=lambda i: ((self.have[i].rank - rank) % last, i))
        for part in sorted({self.have[i].part for i in shards}):
            missing = [block]
            for source in (i for i in order if self.have[i].part == part):
                held = self.have[source].block
                found += [Piece(source, target, both) for m in missing if (both := m.meet(held))]
                missing = [rest for m in missing for rest in m.without(held)]
        return found

    @property
    def sums(self) -> bool:
        """Are shards added?"""
        return any(shard.part for shard in self.have)

    @property
    def title(self) -> str:
        return EXCHANGE if len(self.ranks) > 1 else ASSEMBLE

    def infer(self, *inputs: Spec) -> tuple[Spec, ...]:
        specs = tuple(Spec(self.want[i][1].shape, self.dtype) for i in self.wanted)
        return specs or (Spec((0,), self.dtype),)

    def index(self, *inputs: Spec) -> str:
        sides = (inputs, self.infer(*inputs))
        return " -> ".join(", ".join(" ".join("." * len(x.shape)) or "()" for x in side) for side in sides)

    def reference(self, *inputs: Array) -> tuple[Array, ...]:
        return assemble(self, dict(zip(self.held, inputs, strict=True)))

    def flops(self, *inputs: Spec) -> int:
        return 0

    def sent_bytes(self, *inputs: Spec) -> int:
        """Bytes that this rank sends to others."""
        return sum(self.sends(self.rank).values())

    def sends(self, rank: int, *inputs: Spec) -> dict[int, int]:
        """Bytes that a rank sends to each of the others that want something of it."""
        item, out = np.dtype(self.dtype).itemsize, dict[int, int]()
        for source, target, region in self.pieces:
            other = self.want[target][0]
            if self.have[source].rank == rank != other:
                out[other] = out.get(other, 0) + region.size * item
        return out


TITLES = (AllReduce.name, Wait.name, EXCHANGE, ASSEMBLE)  # of all that is no kernel


def assemble(op: Exchange, shards: Mapping[int, Array]) -> tuple[Array, ...]:
    """What the rank of an exchange wants, from arrays of shards by number."""
    outs = {i: np.zeros(op.want[i][1].shape, op.dtype) for i in op.wanted}
    for source, target, region in op.pieces:
        if target in outs and source in shards:
            at = region.inside(op.want[target][1])
            outs[target][at] += shards[source][region.inside(op.have[source].block)]
    return tuple(outs.values()) or (np.empty(0, op.dtype),)


def halves(parts: Sequence[Array]) -> Array:
    """The sum of all ranks' arrays, ``((0 + 1) + (2 + 3))``: the same bits for every rank, and every way to take it."""
    if len(parts) == 1:
        return parts[0]
    middle = (len(parts) + 1) // 2
    total: Array = np.add(halves(parts[:middle]), halves(parts[middle:]))
    return total


def meet(asks: Mapping[int, tuple[Any, Sequence[Array]]]) -> dict[int, tuple[Array, ...]]:
    """The ranks of one collective, by number, at it: their answers. The slow twin of the transports."""
    op = next(iter(asks.values()))[0]
    if isinstance(op, AllReduce):
        sums = tuple(halves([asks[r][1][i] for r in op.ranks]) for i in range(op.parts))
        return dict.fromkeys(asks, sums)
    shards = {i: x for mine, xs in asks.values() for i, x in zip(mine.held, xs, strict=True)}
    return {rank: assemble(mine, shards) for rank, (mine, _) in asks.items()}
