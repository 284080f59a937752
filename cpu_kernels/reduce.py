"""Sums over any axes, in two phases, and their transpose.

Neighbouring axes of the same fate are merged; the last run of axes is the inner loop:

    before   kept last, [.. K .. R .. I]:      work[part, g, i] = sum over the part's r of x[g, r, i]   vectors of i
             reduced last, [.. K .. R .. J]:   work[part, g]    = sum over the part's r, j              a reduction
    body     y = the parts of each element, added in order

A block of addends is summed in the dtype of x, blocks in float64. `broadcast` is the pointwise loop of
a formula that says y = x.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from rapydli_flow.spec import Spec
from rapydli_flow.template import Epilogue, Loop, template

from .buffer import local
from .pointwise import elements
from .shape import COPY

WIDTH = 1024  # columns, or addends of a run, that are summed together
BLOCK = 32  # rows that are added before they enter the float64 sums
LEAST = 4096  # addends of a part: fewer do not pay for a second phase in parallel
TOGETHER = 4096  # elements of a task of the second phase


@dataclass(frozen=True)
class Layout:
    """Kept and reduced axes before the inner run: their sizes and steps in x; ``inner`` is that run."""

    kept: tuple[tuple[int, int], ...]
    reduced: tuple[tuple[int, int], ...]
    inner: int
    inner_kept: bool

    @classmethod
    def of(cls, shape: Sequence[int], axes: Sequence[int]) -> Layout:
        runs: list[list[int]] = []  # [size, is kept]
        for axis, size in enumerate(shape):
            kept = axis not in axes
            if size == 1:
                continue
            if runs and runs[-1][1] == kept:
                runs[-1][0] *= size
            else:
                runs.append([size, kept])
        inner, inner_kept = runs.pop() if runs else [1, True]
        step = inner
        groups: dict[int, list[tuple[int, int]]] = {True: [], False: []}
        for size, kept in reversed(runs):
            groups[kept].insert(0, (size, step))
            step *= size
        return cls(tuple(groups[True]), tuple(groups[False]), inner, bool(inner_kept))

    @property
    def columns(self) -> int:
        """Pieces of the inner run."""
        return -(-self.inner // WIDTH)

    @property
    def outer(self) -> int:
        return prod(size for size, _ in self.kept)

    @property
    def addends(self) -> int:
        """Pieces to be added for one output element, or row of them."""
        return prod(size for size, _ in self.reduced) * (1 if self.inner_kept else self.columns)

    def split(self, parts: int) -> tuple[int, int]:
        """(groups of kept elements, parts of each sum): parts only where there are few groups."""
        pieces = self.outer * (self.columns if self.inner_kept else 1)
        groups = max(1, min(parts, self.outer))
        if pieces >= parts:
            return groups, 1
        enough = self.addends * min(self.inner, WIDTH) // LEAST
        return groups, max(1, min(parts // max(1, pieces), self.addends, enough))


def _workspace(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], *, parts: int) -> tuple[Spec, ...]:
    return (Spec((Layout.of(ins[0].shape, op.axes).split(parts)[1], outs[0].size), "float64"),)


def place(index, sizes, steps):  # type: ignore[no-untyped-def]
    """Where the element with a flat index over axes of these sizes lies; the first size is not needed."""
    total = 0
    for i in range(len(sizes) - 1, 0, -1):
        total += index % sizes[i] * steps[i]
        index //= sizes[i]
    return total + index * steps[0]


@template("sum", "cpu", space={"parts": (16, 8, 32)}, workspace=_workspace)
def parts(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], epilogue: Epilogue, *, parts: int) -> Loop:
    """``parts``: how many tasks, if there is enough to add."""
    layout = Layout.of(ins[0].shape, op.axes)
    groups, count = layout.split(parts)
    outer, inner, columns, addends = layout.outer, layout.inner, layout.columns, layout.addends
    kept_sizes, kept_steps = zip(*(layout.kept or ((1, 0),)), strict=True)
    sizes, steps = zip(*(layout.reduced or ((1, 0),)), strict=True)
    width, size = min(inner, WIDTH), outs[0].size
    channels = outs[0].shape[-1] if outs[0].shape else 1
    T = np.dtype(outs[0].dtype).type

    def rows(task, x, y, work, extras, at):  # type: ignore[no-untyped-def]
        part, left, group = task % count, task // count % columns * width, task // (count * columns)
        a = local(width, x)
        n = min(width, inner - left)
        last = (part + 1) * addends // count
        for g in range(group * outer // groups, (group + 1) * outer // groups):
            w, base = part * size + g * inner + left, place(g, kept_sizes, kept_steps) + left
            for i in range(n):
                work[w + i] = 0
            for top in range(part * addends // count, last, BLOCK):
                for i in range(n):
                    a[i] = 0
                for r in range(top, min(top + BLOCK, last)):
                    o = base + place(r, sizes, steps)
                    for i in range(n):
                        a[i] += x[o + i]
                for i in range(n):
                    work[w + i] += a[i]

    def runs(task, x, y, work, extras, at):  # type: ignore[no-untyped-def]
        part, group = task % count, task // count
        for g in range(group * outer // groups, (group + 1) * outer // groups):
            base, total = place(g, kept_sizes, kept_steps), 0.0
            for r in range(part * addends // count, (part + 1) * addends // count):
                o, left = base + place(r // columns, sizes, steps), r % columns * width
                a = T(0)
                for j in range(o + left, o + min(left + width, inner)):
                    a += x[j]
                total += a
            work[part * size + g] = total

    def together(task, x, y, work, extras, at):  # type: ignore[no-untyped-def]
        for o in range(task * TOGETHER, min(size, (task + 1) * TOGETHER)):
            total = 0.0
            for part in range(count):
                total += work[part * size + o]
            y[o] = epilogue(T(total), extras, o, o % channels, at)

    tasks = groups * count * (columns if layout.inner_kept else 1)
    return Loop(together, -(-size // TOGETHER), before=rows if layout.inner_kept else runs, before_tasks=tasks)


@template("broadcast", "cpu", space={"grain": (16384, 4096, 65536)})
def repeat(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], epilogue: Epilogue, *, grain: int) -> Loop:
    """``grain``: elements of a task."""
    shape = [1 if axis in op.axes else size for axis, size in enumerate(op.shape)]
    return elements("broadcast", COPY, [shape], outs, epilogue, grain=grain)
