"""Exchanges over ranks, made of swaps: a message is on its way while the one before it is written to its place."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from types import EllipsisType
from typing import TYPE_CHECKING

import numpy as np

from ..scheduler import Exchange
from ..scheduler.messages import Round, Slices, rounds
from ..spec import Array

if TYPE_CHECKING:
    from .transport import Transport


def exchange(transport: Transport, name: str, op: Exchange, ins: Sequence[Array], outs: Sequence[Array]) -> None:
    """Give this rank what it wants, and the others what they want of it."""
    held = dict(zip(op.held, ins, strict=True))
    wanted = dict(zip(op.wanted, outs, strict=False))
    todo = _rounds(op, transport.chunk_bytes)
    for i in range(len(todo) + 1):
        if i < len(todo):
            sends = {
                reader: [_part(held[move.source], move.out_of) for move in moves]
                for reader, moves in todo[i].sends.items()
            }
            transport.post(name, sends)
        if i > 0:
            before = todo[i - 1]
            got = transport.take(name, before.gets)
            _write(op, before, transport.rank, held, wanted, got)
            transport.release()


@lru_cache(maxsize=4096)
def _rounds(op: Exchange, chunk_bytes: int) -> list[Round]:
    return rounds(op, chunk_bytes)


def _write(
    op: Exchange, now: Round, rank: int, held: dict[int, Array], wanted: dict[int, Array], got: dict[int, Array]
) -> None:
    """Write what came in a round, and what the rank has itself."""
    item = np.dtype(op.dtype).itemsize
    for owner, move in now.writes:
        place = _part(wanted[move.target], move.into)
        if owner == rank:
            piece = _part(held[move.source], move.out_of)
            if np.may_share_memory(place, piece):
                continue  # it was made there
        else:
            end = move.begin + place.size * item
            piece = got[owner][move.begin : end].view(op.dtype).reshape(move.shape)
        if move.added:
            place += piece
        else:
            place[...] = piece


def _part(array: Array, region: Slices) -> Array:
    """A view of a region."""
    at: tuple[EllipsisType | slice, ...] = (..., *region)  # without the dots, of a scalar, no view
    return array[at]
