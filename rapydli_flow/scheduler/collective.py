"""Collectives as ops of rank graphs: what ranks tell each other between kernels.

Every rank meets the same collectives in the same order. Each has two transports in `runtime`, and a
pure twin here that the tests use.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..ops import Op
from ..spec import Array, Block, Spec


class AllReduce(Op):
    """Each output is the sum, in rank order, of that input on all ranks."""

    parts: int = 1
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


class Exchange(Op):
    """``have[r]`` of the whole array is on rank r; after it, ``want[r]`` is: halo, all-gather, all-to-all, slice."""

    rank: int
    have: tuple[Block, ...]
    want: tuple[Block, ...]
    collective = True

    @property
    def title(self) -> str:
        return "exchange"

    def infer(self, x: Spec) -> Spec:
        return Spec(self.want[self.rank].shape, x.dtype)

    def index(self, x: Spec) -> str:
        return f"{' '.join('.' * len(x.shape)) or '()'} -> {' '.join('.' * len(x.shape)) or '()'}"

    def reference(self, x: Array) -> Array:
        return assemble(self, [x if r == self.rank else None for r in range(len(self.have))])

    def flops(self, *inputs: Spec) -> int:
        return 0

    def overlap(self, source: int) -> tuple[tuple[slice, ...], tuple[slice, ...]] | None:
        """What this rank takes from ``source``: slices of its block there, and of the wanted block here."""
        have, want = self.have[source], self.want[self.rank]
        lo = tuple(map(max, have.lo, want.lo))
        hi = tuple(map(min, have.hi, want.hi))
        if any(a >= b for a, b in zip(lo, hi, strict=True)):
            return None

        def inside(block: Block) -> tuple[slice, ...]:
            return tuple(slice(a - o, b - o) for a, b, o in zip(lo, hi, block.lo, strict=True))

        return inside(have), inside(want)


def assemble(op: Exchange, parts: Sequence[Array | None]) -> Array:
    """The wanted block of an exchange from the blocks of all ranks."""
    first = next(x for x in parts if x is not None)
    out = np.zeros(op.want[op.rank].shape, first.dtype)
    for source, x in enumerate(parts):
        both = op.overlap(source)
        if both and x is not None:
            out[both[1]] = x[both[0]]
    return out


def add_in_order(parts: Sequence[Array]) -> Array:
    """The sum of all ranks' arrays, added in rank order so that every rank gets the same bits."""
    total = parts[0].copy()
    for x in parts[1:]:
        total += x
    return total


def meet(asks: Sequence[tuple[Any, Sequence[Array]]]) -> list[tuple[Array, ...]]:
    """All ranks at one collective: their answers. The slow twin of the transports."""
    op = asks[0][0]
    if isinstance(op, AllReduce):
        sums = tuple(add_in_order([x[i] for _, x in asks]) for i in range(op.parts))
        return [sums] * len(asks)
    return [(assemble(mine, [x[0] for _, x in asks]),) for mine, _ in asks]
