"""Copies of a run's state in the memory of its workers: what it goes on from when one of them dies.

    rank 0   step 40, step 60      and of rank 2 what nobody else holds
    rank 1   step 40, step 60      and of rank 0
    rank 2   lost                  rank 0 has its part of step 60: everyone goes back there

Every rank keeps the state that its last segment began with, and gives what only it holds, a part of a sharded state or
of its own layers, to the rank behind it. The copies before those are let go as soon as a step of the segment is done,
for then all ranks have their new ones; unless somebody has asked what there is, to go on from it. A rank may not know
yet by then that another one is lost, and goes on for a while.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np

from ..errors import DeviceFault, RunLost
from ..scheduler import Program
from ..spec import Array, Block
from .participant import Participant

NamedBlock = tuple[str, Block]


@dataclass(frozen=True)
class Piece:
    """A block of a parameter or state."""

    name: str
    block: Block
    array: Array


def only_here(programs: Sequence[Program]) -> tuple[tuple[str, ...], ...]:
    """For each rank, the parameters and state of which it holds a block that no other rank holds."""
    everyone: dict[NamedBlock, int] = {}
    for program in programs:
        for name in program.kind("param", "state"):
            everyone[name, program.layout[name]] = everyone.get((name, program.layout[name]), 0) + 1
    return tuple(
        tuple(name for name in program.kind("param", "state") if everyone[name, program.layout[name]] == 1)
        for program in programs
    )


class Copies:
    """What one rank keeps of its run, by step. `offered` and `handed_out` are called by other threads than its own."""

    def __init__(self, rank: Participant, programs: Sequence[Program], number: int) -> None:
        self.rank, self.programs, self.number = rank, programs, number
        self.alone = only_here(programs)
        self._steps: dict[int, _Kept] = {}
        self._lock = threading.Lock()
        self._offered = False

    def keep(self, step: int, state: Future[dict[str, Array]]) -> None:
        """Keep this rank's state at a step, which may still be on its way, and what the rank before it gives; all ranks
        come here together."""
        kept = _Kept(self.rank.program, state, self._given(state))
        with self._lock:
            self._steps[step] = kept

    def _given(self, state: Future[dict[str, Array]]) -> list[Piece]:
        """What only the rank before this one holds; in turn the next one gets what only this one does."""
        ranks = len(self.programs)
        before, behind = (self.number - 1) % ranks, (self.number + 1) % ranks
        mine, theirs = self.alone[self.number], self.alone[before]
        if ranks == 1 or not (mine or theirs):
            return []
        sends = {behind: [state.result()[name] for name in mine]} if mine else {}
        wants = {before: [self.programs[before].leaves[name].spec for name in theirs]} if theirs else {}
        got = self.rank.transport.swap_arrays("the copies of a segment", sends, wants).get(before, [])
        layout = self.programs[before].layout
        return [Piece(name, layout[name], array) for name, array in zip(theirs, got, strict=True)]

    def settle(self, step: int) -> None:
        """All ranks have their copies of a step, or have them set aside: those before it are not needed any more,
        unless they were offered, or this rank's own is still on its way."""
        with self._lock:
            if not self._offered and self._steps[step].here:
                self._steps = {at: kept for at, kept in self._steps.items() if at >= step}

    def offered(self) -> dict[int, list[NamedBlock]]:
        """What is kept, by step; from now on nothing is let go."""
        with self._lock:
            self._offered = True
            return {step: kept.blocks for step, kept in self._steps.items() if not kept.failed}

    def handed_out(self, step: int) -> list[Piece]:
        """The copies of a step that was offered; RunLost if there are none."""
        with self._lock:
            if step not in self._steps:
                has = ", ".join(map(str, self._steps)) or "none"
                raise RunLost(f"rank {self.number} has no copy of step {step}, but of {has}; resume from the last one.")
            kept = self._steps[step]
        try:
            return kept.pieces
        except DeviceFault as error:
            raise RunLost(f"rank {self.number} cannot bring its copy of step {step} from its card: {error}") from error


@dataclass(frozen=True)
class _Kept:
    """A rank's own state at a step, and what was given to it."""

    program: Program
    state: Future[dict[str, Array]]
    given: list[Piece]

    @property
    def here(self) -> bool:
        """Has it come?"""
        return self.state.done() and self.state.exception() is None

    @property
    def failed(self) -> bool:
        """Will it never come?"""
        return self.state.done() and self.state.exception() is not None

    @property
    def blocks(self) -> list[NamedBlock]:
        own = [(name, self.program.layout[name]) for name in self.program.kind("param", "state")]
        return own + [(piece.name, piece.block) for piece in self.given]

    @property
    def pieces(self) -> list[Piece]:
        layout = self.program.layout
        return [Piece(name, layout[name], array) for name, array in self.state.result().items()] + self.given


def common_step(kept: Iterable[Mapping[int, Sequence[NamedBlock]]], programs: Sequence[Program]) -> int | None:
    """The last step of which the copies of several ranks together have everything."""
    found: dict[int, set[NamedBlock]] = {}
    for each in kept:
        for step, held in each.items():
            found.setdefault(step, set()).update(held)
    needed = {(name, p.layout[name]) for p in programs for name in p.kind("param", "state")}
    return max((step for step, held in found.items() if needed <= held), default=None)


def sources(program: Program, offers: Sequence[tuple[str, Sequence[NamedBlock]]], address: str) -> list[int]:
    """Numbers of the offers, each with the worker that makes it, that a rank on a worker takes its state from.

    Its own worker's come first; blocks that nobody has as they are needed are put together of all that have a part.
    """
    needed = {(name, program.layout[name]) for name in program.kind("param", "state")}
    taken: list[int] = []
    for i in sorted(range(len(offers)), key=lambda i: offers[i][0] != address):
        if needed.intersection(offers[i][1]):
            taken.append(i)
            needed -= set(offers[i][1])
    names = {name for name, _ in needed}
    more = (i for i, (_, held) in enumerate(offers) if i not in taken and names.intersection(name for name, _ in held))
    return [*taken, *more]


def put_together(pieces: Iterable[Piece], program: Program) -> dict[str, Array]:
    """A rank's blocks of parameters and state, out of pieces that may be other blocks."""
    by_name: dict[str, list[Piece]] = {}
    for piece in pieces:
        by_name.setdefault(piece.name, []).append(piece)
    out: dict[str, Array] = {}
    for name in program.kind("param", "state"):
        block, there = program.layout[name], by_name[name]
        same = next((piece.array for piece in there if piece.block == block), None)
        if same is None:
            same = np.empty(block.shape, there[0].array.dtype)
            for piece in there:
                both = block.meet(piece.block)
                if both is not None:
                    same[both.inside(block)] = piece.array[both.inside(piece.block)]
        out[name] = same
    return out
