"""Elements chosen by whole numbers, and their gradients.

    gather, embedding      each task takes some rows of the output; a number outside of the axis gives NaN
    gather_grad            each task takes some fibres: their indices are followed in order, into float64 sums
    embedding_grad         before   places sorted by id, stably, in one pass over the ids (a counting sort)
                           body     each row of the table is the sum of its places, in order, in float64

The order of addition depends on the operands alone, so results have the same bits for any number of threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np

from rapydli_flow.spec import Spec
from rapydli_flow.template import Epilogue, Loop, template

GRAIN = {"grain": (16384, 4096, 65536)}


@template("gather", "cpu", space=GRAIN)
def chosen(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], epilogue: Epilogue, *, grain: int) -> Loop:
    """``grain``: elements of a task."""
    shape = ins[0].shape
    size, inner, count = shape[op.axis], prod(shape[op.axis + 1 :]), outs[0].shape[op.axis]
    total, channels = outs[0].size, shape[-1]
    T = np.dtype(outs[0].dtype).type

    def body(task, x, indices, y, extras, at):  # type: ignore[no-untyped-def]
        for o in range(task * grain, min(total, (task + 1) * grain)):
            k = np.int64(indices[o])
            base = o // (count * inner) * size * inner + o % inner
            v = x[base + k * inner] if 0 <= k < size else T(np.nan)
            y[o] = epilogue(v, extras, o, o % channels, at)

    return Loop(body, -(-total // grain))


def _sums(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], *, tasks: int) -> tuple[Spec, ...]:
    return (Spec(outs[0].shape, "float64"),)


@template("gather_grad", "cpu", space={"tasks": (16, 8, 32)}, workspace=_sums)
def returned(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], epilogue: Epilogue, *, tasks: int) -> Loop:
    """``tasks``: how many, if there are as many fibres."""
    shape = outs[0].shape
    size, inner, length = shape[op.axis], prod(shape[op.axis + 1 :]), ins[0].shape[op.axis]
    fibres = prod(shape[: op.axis]) * inner
    count, channels = max(1, min(tasks, fibres)), shape[-1]
    T = np.dtype(outs[0].dtype).type

    def body(task, dy, indices, dx, work, extras, at):  # type: ignore[no-untyped-def]
        for fibre in range(task * fibres // count, (task + 1) * fibres // count):
            outer, column = fibre // inner, fibre % inner
            base, source = outer * size * inner + column, outer * length * inner + column
            for k in range(size):
                work[base + k * inner] = 0
            for j in range(length):
                k = np.int64(indices[source + j * inner])
                if 0 <= k < size:
                    work[base + k * inner] += dy[source + j * inner]
            for k in range(size):
                o = base + k * inner
                dx[o] = epilogue(T(work[o]), extras, o, o % channels, at)

    return Loop(body, count)


@template("embedding", "cpu", space=GRAIN)
def rows(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], epilogue: Epilogue, *, grain: int) -> Loop:
    """``grain``: elements of a task, in whole rows."""
    (V, D), places = ins[0].shape, ins[1].size
    group = max(1, grain // max(1, D))
    T = np.dtype(outs[0].dtype).type

    def body(task, table, ids, y, extras, at):  # type: ignore[no-untyped-def]
        for n in range(task * group, min(places, (task + 1) * group)):
            i, o = np.int64(ids[n]), n * D
            if 0 <= i < V:
                row = i * D
                for d in range(D):
                    y[o + d] = epilogue(table[row + d], extras, o + d, d, at)
            else:
                for d in range(D):
                    y[o + d] = epilogue(T(np.nan), extras, o + d, d, at)

    return Loop(body, -(-places // group))


def _order(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], *, tasks: int) -> tuple[Spec, ...]:
    """Where the places of each id end, the places by id, and the sums of a row for each task."""
    V, D = outs[0].shape
    count = max(1, min(tasks, V))
    return Spec((V,), "int64"), Spec((max(1, ins[1].size),), "int64"), Spec((count, D), "float64")


@template("embedding_grad", "cpu", space={"tasks": (32, 8, 16, 64)}, workspace=_order)
def row_sums(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], epilogue: Epilogue, *, tasks: int) -> Loop:
    """``tasks``: into how many the rows of the table are divided."""
    (V, D), places = outs[0].shape, ins[1].size
    count = max(1, min(tasks, V))
    T = np.dtype(outs[0].dtype).type

    def sort(task, dy, ids, dtable, ends, order, sums, extras, at):  # type: ignore[no-untyped-def]
        for v in range(V):
            ends[v] = 0
        for n in range(places):
            i = np.int64(ids[n])
            if 0 <= i < V:
                ends[i] += 1
        total = 0
        for v in range(V):
            total, ends[v] = total + ends[v], total
        for n in range(places):
            i = np.int64(ids[n])
            if 0 <= i < V:
                order[ends[i]] = n
                ends[i] += 1

    def body(task, dy, ids, dtable, ends, order, sums, extras, at):  # type: ignore[no-untyped-def]
        own = task * D
        for v in range(task * V // count, (task + 1) * V // count):
            for d in range(D):
                sums[own + d] = 0
            for p in range(ends[v - 1] if v else 0, ends[v]):
                source = order[p] * D
                for d in range(D):
                    sums[own + d] += dy[source + d]
            o = v * D
            for d in range(D):
                dtable[o + d] = epilogue(T(sums[own + d]), extras, o + d, d, at)

    return Loop(body, count, before=sort, before_tasks=1)
