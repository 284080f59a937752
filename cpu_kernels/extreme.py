"""The largest or smallest element over any axes, in two phases as sums are (see `reduce`), and its gradient.

    before   work[part, g] = the extreme of the part's elements       vectors of the inner run where that is kept
    body     y = the extreme of the parts of each element
    extreme_grad    for each element, or row of kept ones: its extreme and how many have it, then a pass that writes

A NaN wins over all.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np

from rapydli_flow.spec import Spec
from rapydli_flow.template import Epilogue, Loop, template

from .buffer import local
from .reduce import TOGETHER, WIDTH, Layout, place


def _workspace(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], *, parts: int) -> tuple[Spec, ...]:
    return (Spec((Layout.of(ins[0].shape, op.axes).split(parts)[1], outs[0].size), ins[0].dtype),)


@template("extreme", "cpu", space={"parts": (16, 8, 32)}, workspace=_workspace)
def parts(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], epilogue: Epilogue, *, parts: int) -> Loop:
    """``parts``: how many tasks, if there is enough to compare."""
    layout, least = Layout.of(ins[0].shape, op.axes), op.least
    groups, count = layout.split(parts)
    outer, inner, columns, pieces = layout.outer, layout.inner, layout.columns, layout.addends
    kept_sizes, kept_steps = zip(*(layout.kept or ((1, 0),)), strict=True)
    sizes, steps = zip(*(layout.reduced or ((1, 0),)), strict=True)
    width, size = min(inner, WIDTH), outs[0].size
    channels = outs[0].shape[-1] if outs[0].shape else 1

    def better(v, best):  # type: ignore[no-untyped-def]
        wins = not (v >= best) if least else not (v <= best)
        return v if wins & (best == best) else best

    def rows(task, x, y, work, extras, at):  # type: ignore[no-untyped-def]
        part, left, group = task % count, task // count % columns * width, task // (count * columns)
        best = local(width, x)
        n, first = min(width, inner - left), part * pieces // count
        for g in range(group * outer // groups, (group + 1) * outer // groups):
            w, base = part * size + g * inner + left, place(g, kept_sizes, kept_steps) + left
            o = base + place(first, sizes, steps)
            for i in range(n):
                best[i] = x[o + i]
            for r in range(first + 1, (part + 1) * pieces // count):
                o = base + place(r, sizes, steps)
                for i in range(n):
                    best[i] = better(x[o + i], best[i])
            for i in range(n):
                work[w + i] = best[i]

    def runs(task, x, y, work, extras, at):  # type: ignore[no-untyped-def]
        part, group = task % count, task // count
        first = part * pieces // count
        for g in range(group * outer // groups, (group + 1) * outer // groups):
            base = place(g, kept_sizes, kept_steps)
            best = x[base + place(first // columns, sizes, steps) + first % columns * width]
            for r in range(first, (part + 1) * pieces // count):
                o, left = base + place(r // columns, sizes, steps), r % columns * width
                for j in range(o + left, o + min(left + width, inner)):
                    best = better(x[j], best)
            work[part * size + g] = best

    def together(task, x, y, work, extras, at):  # type: ignore[no-untyped-def]
        for o in range(task * TOGETHER, min(size, (task + 1) * TOGETHER)):
            best = work[o]
            for part in range(1, count):
                best = better(work[part * size + o], best)
            y[o] = epilogue(best, extras, o, o % channels, at)

    tasks = groups * count * (columns if layout.inner_kept else 1)
    return Loop(together, -(-size // TOGETHER), before=rows if layout.inner_kept else runs, before_tasks=tasks)


@template("extreme_grad", "cpu", space={"tasks": (16, 8, 32)})
def shares(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], epilogue: Epilogue, *, tasks: int) -> Loop:
    """``tasks``: how many, if there are as many groups of kept elements."""
    layout, least = Layout.of(ins[1].shape, op.axes), op.least
    outer, kept_inner = layout.outer, layout.inner_kept
    repeats = prod(size for size, _ in layout.reduced)
    kept_sizes, kept_steps = zip(*(layout.kept or ((1, 0),)), strict=True)
    sizes, steps = zip(*(layout.reduced or ((1, 0),)), strict=True)
    # a row of `width` kept elements at a time, over `across` elements each
    inner = layout.inner if kept_inner else 1
    across = 1 if kept_inner else layout.inner
    width = min(inner, WIDTH)
    columns = -(-inner // width)
    lines = outer * columns
    count, channels = max(1, min(tasks, lines)), outs[0].shape[-1] if outs[0].shape else 1
    T = np.dtype(outs[0].dtype).type

    def body(task, dy, x, dx, extras, at):  # type: ignore[no-untyped-def]
        best, ties = local(width, x), local(width, x)
        for line in range(task * lines // count, (task + 1) * lines // count):
            g, left = line // columns, line % columns * width
            n, base = min(width, inner - left), place(g, kept_sizes, kept_steps) + left
            for i in range(n):
                best[i] = x[base + i]
                ties[i] = 0
            for r in range(repeats):
                o = base + place(r, sizes, steps)
                for j in range(across):
                    for i in range(n):
                        v, b = x[o + j + i], best[i]
                        wins = (not (v >= b) if least else not (v <= b)) & (b == b)
                        best[i] = v if wins else b
                        ties[i] = T(1) if wins else ties[i] + (T(1) if v == b else T(0))
            for i in range(n):
                ties[i] = dy[g * inner + left + i] / max(ties[i], T(1))
            for r in range(repeats):
                o = base + place(r, sizes, steps)
                for j in range(across):
                    for i in range(n):
                        p = o + j + i
                        dx[p] = epilogue(ties[i] if x[p] == best[i] else T(0), extras, p, p % channels, at)

    return Loop(body, count)


@template("arg_extreme", "cpu", space={"tasks": (16, 8, 32)})
def places(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], epilogue: Epilogue, *, tasks: int) -> Loop:
    """``tasks``: how many, if there are as many elements."""
    shape, axis, least = ins[0].shape, op.axes[0], op.least
    size, inner, total = shape[axis], prod(shape[axis + 1 :]), outs[0].size
    count = max(1, min(tasks, total))

    def body(task, x, y, extras, at):  # type: ignore[no-untyped-def]
        for o in range(task * total // count, (task + 1) * total // count):
            base = o // inner * size * inner + o % inner
            best, where = x[base], 0
            for k in range(1, size):
                v = x[base + k * inner]
                wins = not (v >= best) if least else not (v <= best)
                if wins & (best == best):
                    best, where = v, k
            y[o] = epilogue(np.int64(where), extras, o, 0, at)

    return Loop(body, count)
