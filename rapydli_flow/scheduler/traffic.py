"""Who sends how much to whom: the bytes of a step, from each rank to each other one."""

from __future__ import annotations

from collections.abc import Sequence

from .collective import AllReduce, Exchange
from .program import Collective, Program
from .stale import sends


def traffic(programs: Sequence[Program], *, average_every: int = 0) -> tuple[tuple[int, ...], ...]:
    """Bytes that rank ``a`` sends to rank ``b`` in a step: ``traffic(programs)[a][b]``; 0 to itself.

    Of a sum each rank sends every other one its part of that one's piece, and its own piece of the sum. Ranks of an
    asynchronous plan send gradients to those that own parameters, and those to all. ``average_every``: ranks also
    average parameters and state every so many steps (local SGD); a step has its share.
    """
    ranks = len(programs)
    table = [[0] * ranks for _ in programs]
    everyone = AllReduce(ranks=tuple(range(ranks)))
    handed, owned = ([_bytes(p, *kinds) for p in programs] for kinds in (("batch",), ("param", "state")))
    for rank, program in enumerate(programs):
        for step in program.steps:
            if isinstance(step, Collective) and isinstance(step.op, AllReduce | Exchange):
                for other, size_bytes in step.op.sends(rank, *(buffer.spec for buffer in step.ins)).items():
                    table[rank][other] += size_bytes
        if program.gradients is not None:
            for other, size_bytes in sends(handed, owned, rank).items():
                table[rank][other] += size_bytes
        if average_every:
            held = [program.leaves[name].spec for name in program.kind("param", "state")]
            for other, size_bytes in everyone.sends(rank, *(spec for spec in held if spec.floating)).items():
                table[rank][other] += size_bytes // average_every
    return tuple(map(tuple, table))


def _bytes(program: Program, *kinds: str) -> int:
    return sum(program.leaves[name].spec.size_bytes for name in program.kind(*kinds))
