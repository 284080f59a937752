"""How an exchange is cut into messages: rounds, in each of which a rank sends every other one a message at most.

No message is longer than a chunk, and what is received can be written where it belongs at once: in a round there is all
that a region of a wanted block is made of, be it copied or added up.

Between cards messages are put together, and taken apart, in memory of the card that is `staged` for it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from math import prod
from typing import NamedTuple

import numpy as np

from .arena import aligned
from .collective import Exchange, Piece

CARD_BYTES = 1 << 25  # of a chunk from card to card: at the speed of their links it takes longer than a launch
Slices = tuple[slice, ...]


class Move(NamedTuple):
    """Elements of a rank's shard that become those of a wanted block; both by number, and where in them.

    ``added``: to what is there already. ``begin``: where it begins in its message, in bytes; -1 if the rank has it.
    """

    source: int
    target: int
    out_of: Slices
    into: Slices
    shape: tuple[int, ...]
    added: bool
    begin: int


@dataclass
class Round:
    """What one rank does in a round: what it sends to whom, how many bytes it gets from whom, what it writes."""

    sends: dict[int, list[Move]] = field(default_factory=dict)
    gets: dict[int, int] = field(default_factory=dict)
    writes: list[tuple[int, Move]] = field(default_factory=list)  # with who it is from


class Staged(NamedTuple):
    """Where messages of a round begin in the memory that is staged, and where there is room for what is added up."""

    sends: dict[int, int]
    gets: dict[int, int]
    sums: int
    size_bytes: int


def staged(now: Round, item: int) -> Staged:
    """Room for a round: each message, and each piece that is added twice, begins where kernels want it."""
    size, room = 0, Staged({}, {}, 0, 0)
    outgoing = {reader: sum(prod(move.shape) for move in moves) * item for reader, moves in now.sends.items()}
    for places, messages in ((room.sends, outgoing), (room.gets, now.gets)):
        for rank, size_bytes in messages.items():
            places[rank] = size
            size += aligned(size_bytes)
    added = sum(2 * aligned(prod(move.shape) * item) for _, move in now.writes if move.added)
    return room._replace(sums=size, size_bytes=size + added)


def staged_bytes(op: Exchange) -> int:
    """Memory of a card that an exchange from card to card takes."""
    item = np.dtype(op.dtype).itemsize
    return max((staged(now, item).size_bytes for now in rounds(op, CARD_BYTES)), default=0)


def rounds(op: Exchange, chunk_bytes: int) -> list[Round]:
    """What the rank of an exchange does, round by round; those in which it does nothing are left out."""
    item = np.dtype(op.dtype).itemsize
    pieces: dict[int, list[Piece]] = {}
    for piece in op.pieces:
        pieces.setdefault(piece.target, []).append(piece)
    found: list[Round] = []
    last: dict[int, tuple[int, int]] = {}  # for each reader, the round it is at, and bytes of it that are taken
    for target, mine in pieces.items():
        reader, block = op.want[target]
        often = max(Counter(op.have[piece.source].rank for piece in mine).values())
        for region in block.cut(max(1, chunk_bytes // (item * often))):
            number, taken = last.get(reader, (0, 0))
            size = region.size * item * often
            if taken and taken + size > chunk_bytes:
                number, taken = number + 1, 0
            last[reader] = number, taken + size
            found += [Round() for _ in range(number + 1 - len(found))]
            for piece in mine:
                both = piece.region.meet(region)
                if both is not None:
                    _add(found[number], op, piece._replace(region=both), item)
    return [each for each in found if each.sends or each.writes]


def _add(now: Round, op: Exchange, piece: Piece, item: int) -> None:
    """Have a piece moved in a round, if the rank has to do with it."""
    shard, (reader, block) = op.have[piece.source], op.want[piece.target]
    if op.rank not in (shard.rank, reader):
        return
    begin = -1 if shard.rank == reader else now.gets.get(shard.rank, 0)
    region = piece.region
    slices = region.inside(shard.block), region.inside(block)
    move = Move(piece.source, piece.target, *slices, region.shape, shard.part > 0, begin)
    if shard.rank != reader == op.rank:
        now.gets[shard.rank] = begin + region.size * item
    if reader == op.rank:
        now.writes.append((shard.rank, move))
    else:
        now.sends.setdefault(reader, []).append(move)
