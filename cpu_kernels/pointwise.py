"""Pointwise operators: one template for all of them, written from the text of the formula.

    out[p] = formula(in_0[p], in_1[p broadcast], ...)

Neighbouring axes that every operand reads alike are merged, which leaves a flat loop, or rows of
channels, in nearly all cases; LLVM vectorises the inner loop. An operand may be the memory of an
output: it is read where the output is written, before that. LLVM then runs its loop without vectors,
which costs little where memory is the limit. Exponentials and the like, and random numbers, take several
times as long without: in place, their results wait on the stack, a block at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from rapydli_flow.spec import Spec
from rapydli_flow.template import Epilogue, Loop, Scalar, template

from .buffer import local, same
from .functions import WRITTEN
from .text import scalar_names, written

BLOCK = 256  # results that wait on the stack


def merged(
    out: Sequence[int], operands: Sequence[Sequence[int]], *, keep_last: bool = False
) -> tuple[tuple[int, ...], tuple[tuple[bool, ...], ...]]:
    """Extents after merging axes, and for each operand whether it varies along each of them.

    (2, 3, 4) with (2, 3, 4) and (4,) gives (6, 4) and (True, True), (False, True). ``keep_last``: the
    last axis stays apart.
    """
    padded = [(1,) * (len(out) - len(shape)) + tuple(shape) for shape in operands]
    sizes: list[int] = []
    masks: list[tuple[bool, ...]] = []
    for axis, size in enumerate(out):
        apart = keep_last and axis == len(out) - 1
        mask = tuple(shape[axis] != 1 for shape in padded)
        if size == 1 and not apart:
            continue
        if masks and masks[-1] == mask and not apart:
            sizes[-1] *= size
        else:
            sizes.append(size)
            masks.append(mask)
    if not sizes:
        sizes, masks = [1], [(False,) * len(operands)]
    return tuple(sizes), tuple(tuple(mask[i] for mask in masks) for i in range(len(operands)))


@dataclass(frozen=True)
class Walk:
    """How an array is cut into tasks: groups of ``group`` rows, or parts of ``columns`` of one row."""

    sizes: tuple[int, ...]
    grain: int

    @property
    def rows(self) -> int:
        return prod(self.sizes[:-1])

    @property
    def inner(self) -> int:
        return self.sizes[-1]

    @property
    def columns(self) -> int:
        return max(1, min(self.inner, self.grain))

    @property
    def parts(self) -> int:
        return -(-self.inner // self.columns)

    @property
    def group(self) -> int:
        return max(1, self.grain // self.columns) if self.parts == 1 else 1

    @property
    def tasks(self) -> int:
        return -(-self.rows // self.group) * self.parts

    def lines(self) -> Iterator[str]:
        """Text that gives a task its rows ``first`` to ``last`` and columns ``low`` to ``high``."""
        if self.parts > 1:
            yield f"first = task // {self.parts}"
            yield "last = first + 1"
            yield f"low = task % {self.parts} * {self.columns}"
            yield f"high = min(low + {self.columns}, {self.inner})"
        else:
            yield f"first = task * {self.group}"
            yield f"last = min(first + {self.group}, {self.rows})"
            yield f"low, high = 0, {self.inner}"

    def offset(self, varies: Sequence[bool]) -> str:
        """Text of where the part of an operand for ``row`` begins."""
        if all(varies):
            return f"row * {self.inner}"
        terms = []
        own, below = self.inner if varies[-1] else 1, 1
        for axis in reversed(range(len(self.sizes) - 1)):
            if varies[axis]:
                term = f"row // {below}" if below > 1 else "row"
                terms.append(f"{term} % {self.sizes[axis]} * {own}" if axis else f"{term} * {own}")
                own *= self.sizes[axis]
            below *= self.sizes[axis]
        return " + ".join(reversed(terms)) or "0"


def row_place(shape: Sequence[int]) -> list[str]:
    """Text of ``place``: the index in the whole array of the first element of ``row`` of a block."""
    lines, n, below = ["place = 0"], len(shape), prod(shape[:-1])
    for axis, size in enumerate(shape[:-1]):
        below //= max(1, size)
        lines.append(f"place = place * at[{n + axis}] + at[{axis}] + row // {below} % {size}")
    return [*lines, f"place = place * at[{2 * n - 1}] + at[{n - 1}]"] if n else lines


def _costly(scalar: Scalar, dtype: str) -> bool:
    """Does an element take much longer without vectors than memory takes to give it?"""
    called = any(f"math.{name}(" in line for line in scalar.lines for name in WRITTEN)
    return bool(scalar.uses) or (called and dtype == "float32")


def _names(ins: Sequence[Spec]) -> tuple[str, ...]:
    return tuple(f"x{i}" for i in range(len(ins)))


@template("pointwise", "cpu", space={"grain": (16384, 4096, 65536)})
def rows(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], epilogue: Epilogue, *, grain: int) -> Loop:
    """``grain``: elements of a task."""
    shapes = [spec.shape for spec in ins]
    return elements(op.name, op.scalar(_names(ins)), shapes, outs, epilogue, grain=grain)


def elements(
    name: str,
    scalar: Scalar,
    ins: Sequence[Sequence[int]],
    outs: Sequence[Spec],
    epilogue: Epilogue,
    *,
    grain: int,
) -> Loop:
    """The loop of a formula over operands x0, x1, ... of shapes ``ins``, which broadcast to the outputs."""
    shape = outs[0].shape
    by_channel = any(epilogue.reach(extra) == "channel" for extra in epilogue.extras)
    sizes, varies = merged(shape, ins, keep_last=scalar.indexed or by_channel)
    walk = Walk(sizes, grain)
    scalars = [i for i in range(len(ins)) if not any(varies[i])]
    by_row = [i for i in range(len(ins)) if any(varies[i]) and not varies[i][-1]]
    by_element = [i for i in range(len(ins)) if varies[i][-1]]
    waiting = bool(by_element) and any(_costly(one, outs[0].dtype) for one in (scalar, epilogue.scalar))
    results = list(scalar.results)
    if not epilogue.identity:
        results[0] = f"epilogue({results[0]}, extras, o + j, {'j' if by_channel else '0'}, at)"

    def values() -> Iterator[str]:
        yield from (f"x{i} = in_{i}[a_{i} + j]" for i in by_element)
        if scalar.indexed:
            yield "index = U(place + j)"
        yield from scalar.lines
        # all results before the first is stored: an output may lie on an input
        yield from (f"y{i} = {result}" for i, result in enumerate(results))

    def blocks() -> Iterator[str]:
        yield f"for block in range((high - low + {BLOCK - 1}) // {BLOCK}):"
        yield f"    begin = low + block * {BLOCK}"
        yield f"    end = min(begin + {BLOCK}, high)"
        yield "    for j in range(begin, end):"
        yield from (f"        {line}" for line in values())
        yield from (f"        wait_{i}[j - begin] = y{i}" for i in range(len(outs)))
        for i in range(len(outs)):
            yield "    for j in range(begin, end):"
            yield f"        out_{i}[o + j] = wait_{i}[j - begin]"

    def lines() -> Iterator[str]:
        if waiting:
            yield from (f"    wait_{i} = local({BLOCK}, out_{i})" for i in range(len(outs)))
        yield from (f"    x{i} = in_{i}[0]" for i in scalars)
        yield from (f"    {line}" for line in walk.lines())
        yield "    for row in range(first, last):"
        yield f"        o = row * {walk.inner}"
        if scalar.indexed:
            yield from (f"        {line}" for line in row_place(shape))
        yield from (f"        x{i} = in_{i}[{walk.offset(varies[i])}]" for i in by_row)
        yield from (f"        a_{i} = {walk.offset(varies[i])}" for i in by_element)
        if waiting:
            found = (f"same(in_{i}, out_{k})" for i in by_element for k in range(len(outs)))
            yield f"        if {' or '.join(found)}:"
            yield from (f"            {line}" for line in blocks())
            yield "            continue"
        yield "        for j in range(low, high):"
        yield from (f"            {line}" for line in values())
        yield from (f"            out_{i}[o + j] = y{i}" for i in range(len(outs)))

    arrays = ", ".join([*(f"in_{i}" for i in range(len(ins))), *(f"out_{i}" for i in range(len(outs)))])
    head = f"def {name}_loop(task, {arrays}, extras, at):"  # _loop: an op may be called like a builtin, min or abs
    text = "\n".join([head, *lines()]) + "\n"
    names = {"epilogue": epilogue, "T": np.dtype(outs[0].dtype).type, "U": np.uint64, "local": local, "same": same}
    return Loop(written(text, **names, **scalar_names(scalar)), walk.tasks)
