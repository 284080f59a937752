"""Copies between an array and parts of it, and transposes; each task takes some rows of the output.

    strided    slice, transpose      y[row, j] = x[where the row begins + j * step]
    spread     slice_grad, pad       y[row, j] = x[...] where the output lies on x, else a constant

Neighbouring axes that a step or a place describes together are merged, so that the inner loop is long.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from math import prod
from operator import mul
from typing import Any

import numpy as np

from rapydli_flow.spec import Spec
from rapydli_flow.template import Epilogue, Loop, template

from .pointwise import Walk
from .reduce import place

GRAIN = {"grain": (16384, 4096, 65536)}


def steps_of(shape: Sequence[int]) -> tuple[int, ...]:
    """Elements from one position to the next along each axis of a contiguous array."""
    return tuple(accumulate(reversed((*shape[1:], 1)), mul))[::-1] if shape else ()


def merged(sizes: Sequence[int], steps: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Sizes and steps of as few axes as walk over the same elements in the same order."""
    runs: list[tuple[int, int]] = []
    for size, step in zip(sizes, steps, strict=True):
        if size == 1:
            continue
        if runs and runs[-1][1] == step * size:
            runs[-1] = runs[-1][0] * size, step
        else:
            runs.append((size, step))
    runs = runs or [(1, 1)]
    return tuple(size for size, _ in runs), tuple(step for _, step in runs)


def strided(out: Spec, epilogue: Epilogue, *, steps: Sequence[int], base: int, grain: int) -> Loop:
    """y = x, read from ``base`` on with a step for each axis of y."""
    sizes, moves = merged(out.shape, steps)
    walk, step = Walk(sizes, grain), moves[-1]
    rows, inner, columns, pieces, group = walk.rows, walk.inner, walk.columns, walk.parts, walk.group
    outer_sizes, outer_steps = (sizes[:-1], moves[:-1]) if len(sizes) > 1 else ((1,), (0,))
    channels, by_source = out.shape[-1] if out.shape else 1, epilogue.by_source

    def body(task, x, y, extras, at):  # type: ignore[no-untyped-def]
        first, low = task // pieces * group, task % pieces * columns
        for row in range(first, min(first + group, rows)):
            i, o = base + place(row, outer_sizes, outer_steps) + low * step, row * inner + low
            for j in range(min(columns, inner - low)):
                p = o + j
                s = i + j * step
                y[p] = epilogue(x[s], extras, s if by_source else p, p % channels, at)

    return Loop(body, walk.tasks)


@template("slice", "cpu", space=GRAIN)
def part(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], epilogue: Epilogue, *, grain: int) -> Loop:
    """``grain``: elements of a task."""
    own = steps_of(ins[0].shape)
    steps = [step * by for step, by in zip(own, op.steps, strict=True)]
    base = sum(step * start for step, start in zip(own, op.starts, strict=True))
    return strided(outs[0], epilogue, steps=steps, base=base, grain=grain)


@template("transpose", "cpu", space=GRAIN)
def reordered(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], epilogue: Epilogue, *, grain: int) -> Loop:
    """``grain``: elements of a task."""
    own = steps_of(ins[0].shape)
    return strided(outs[0], epilogue, steps=[own[axis] for axis in op.order], base=0, grain=grain)


Line = tuple[int, int, int, int]  # of an axis: size of y, size of x, position of x's first element in y, step


def merged_lines(lines: Sequence[Line]) -> list[Line]:
    """As few axes as say the same: those that x fills wholly go into the axis before them, where that has no step."""
    out: list[Line] = []
    for big, small, start, step in reversed(lines):
        if out and step == 1 and out[-1][:2] == (out[-1][1], out[-1][1]):
            run = out[-1][0]
            out[-1] = (big * run, small * run, start * run, 1)
        else:
            out.append((big, small, start, step))
    return out[::-1] or [(1, 1, 0, 1)]


def spread(lines: Sequence[Line], out: Spec, epilogue: Epilogue, *, value: float, grain: int) -> Loop:
    """y[start + step * i] = x[i] along every axis, ``value`` elsewhere."""
    axes = merged_lines(lines)
    walk = Walk(tuple(big for big, *_ in axes), grain)
    rows, inner, columns, pieces, group = walk.rows, walk.inner, walk.columns, walk.parts, walk.group
    sizes, counts, starts, steps = zip(*(axes[:-1] or [(1, 1, 0, 1)]), strict=True)
    jumps = steps_of(counts)
    _, count, start, step = axes[-1]
    end = start + (count - 1) * step + 1 if prod(counts) * count else start
    last, channels = len(sizes) - 1, out.shape[-1] if out.shape else 1
    T = np.dtype(out.dtype).type

    def source(row):  # type: ignore[no-untyped-def]
        """The row of x that lies on a row of y; -1 if none does."""
        total = 0
        for k in range(last, -1, -1):
            i = row % sizes[k] - starts[k]
            row //= sizes[k]
            if i < 0 or i % steps[k] or i // steps[k] >= counts[k]:
                return -1
            total += i // steps[k] * jumps[k]
        return total

    def fill(y, o, low, high, extras, at):  # type: ignore[no-untyped-def]
        for j in range(o + low, o + high):
            p = j
            y[p] = epilogue(T(value), extras, p, p % channels, at)

    def body(task, x, y, extras, at):  # type: ignore[no-untyped-def]
        first, low = task // pieces * group, task % pieces * columns
        high = min(low + columns, inner)
        for row in range(first, min(first + group, rows)):
            r, o = source(row), row * inner
            if r < 0:
                fill(y, o, low, high, extras, at)
                continue
            a, b = min(max(low, start), high), min(max(low, end), high)
            fill(y, o, low, a, extras, at)
            for j in range(a, b):
                i, p = j - start, o + j
                v = x[r * count + i // step] if i % step == 0 else T(value)
                y[p] = epilogue(v, extras, p, p % channels, at)
            fill(y, o, b, high, extras, at)

    return Loop(body, walk.tasks)


@template("slice_grad", "cpu", space=GRAIN)
def with_holes(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], epilogue: Epilogue, *, grain: int) -> Loop:
    """``grain``: elements of a task."""
    lines = list(zip(op.shape, ins[0].shape, op.starts, op.steps, strict=True))
    return spread(lines, outs[0], epilogue, value=0.0, grain=grain)


@template("pad", "cpu", space=GRAIN)
def margins(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], epilogue: Epilogue, *, grain: int) -> Loop:
    """``grain``: elements of a task."""
    lines = list(zip(outs[0].shape, ins[0].shape, op.low, (1,) * len(op.low), strict=True))
    return spread(lines, outs[0], epilogue, value=op.value, grain=grain)
