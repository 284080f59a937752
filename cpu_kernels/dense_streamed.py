"""Products of few rows with a large matrix: as fast as it can be read.

    y[m, k] = sum over i of a[m, i] * b[i, k]       a[M,I] or, with `ta`, [I,M]; b[I,K]; M rows in one tile

Each row of b serves M multiplications an element, so all that counts is to read b from one end to the other:

    before: a task takes some rows of b, STEP at a time:        b     k ----->
        for each panel of `vectors * lanes` columns:          i |  =================  a task's rows lie
            acc  = the task's sums of these columns           | |  =================  one behind the other
            acc += a[:, i] x b[i, columns], for STEP i        v |  - - - - - - - - -
            sums = acc                                             =================  the next task's
    then: the sums of all tasks are added, in order, and go through the epilogue

`dense` reads pieces of rows, which lie kilobytes apart, and reaches half of memory's speed with one row of a.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rapydli_flow.spec import Spec
from rapydli_flow.template import Device, Epilogue, Loop, template

from .tile import holds, load, outer, step_cost, store, waiting, zeros
from .tile_rules import vector_rules

STEP = 8  # rows of b at a time: their sums are loaded and stored once
MOST_ROWS = 8  # of a; with more there is enough to compute for `dense`
TURN = (
    5e5  # half-cycles of all cores until a second round of tasks has begun and the first one's sums are added: measured
)
SPACE: dict[str, tuple[Any, ...]] = {
    "vectors": (4, 2, 1),
    "lanes": (8, 16, 4, 2),
    "parts": (16, 8, 32, 64),
}


def _few(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device) -> bool:
    return not op.tb and outs[0].shape[0] <= MOST_ROWS and outs[0].size > 0


def _many(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device, *, parts: int) -> bool:
    return ins[1].shape[0] >= parts * STEP


def _rows(op: Any, ins: Sequence[Spec], outs: Sequence[Spec]) -> int:
    return outs[0].shape[0]


def _columns(op: Any, ins: Sequence[Spec], outs: Sequence[Spec]) -> int:
    return outs[0].shape[-1]


RULES = {"few rows of a": _few, "many rows of b": _many, **vector_rules(_columns, _rows)}


def _prefer(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device) -> dict[str, Any]:
    (m, k), lanes = outs[0].shape, device.vector_bytes // np.dtype(outs[0].dtype).itemsize
    fitting = (v for v in SPACE["vectors"] if (v - 1) * lanes < k and holds(m, v, lanes, *_bytes(outs, device)))
    vectors = next((v for v in fitting if m * v <= 8), 1)
    return {"vectors": vectors, "lanes": lanes, "parts": SPACE["parts"][0]}


def _bytes(outs: Sequence[Spec], device: Device) -> tuple[int, int]:
    return np.dtype(outs[0].dtype).itemsize, device.vector_bytes


def _cost(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device, config: Mapping[str, Any]) -> float:
    """Half-cycles of all cores, about."""
    (m, k), vectors, lanes = outs[0].shape, config["vectors"], config["lanes"]
    panels = -(-k // (vectors * lanes))
    step = step_cost(m, vectors) + 2 * m * vectors / STEP
    return panels * ins[1].shape[0] * step * waiting(config["parts"], device.cores) + TURN


def _workspace(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], **config: Any) -> tuple[Spec, ...]:
    m, k = outs[0].shape
    width = config["vectors"] * config["lanes"]
    return (Spec((config["parts"] * -(-k // width) * m * width,), outs[0].dtype),)


@template("matmul", "cpu", space=SPACE, fits=RULES, workspace=_workspace, prefer=_prefer, cost=_cost)
def streamed(
    op: Any,
    ins: Sequence[Spec],
    outs: Sequence[Spec],
    epilogue: Epilogue,
    *,
    vectors: int,
    lanes: int,
    parts: int,
) -> Loop:
    """Rows of b one after the other, shared out among tasks; ``parts``: how many."""
    (m, k), inner, width = outs[0].shape, ins[1].shape[0], vectors * lanes
    columns = min(k, width)
    tail, last, panels = columns % lanes, k - columns, -(-k // width)
    even = panels * columns == k
    row_step, inner_step = (1, m) if op.ta else (inner, 1)
    size, part_size = m * width, panels * m * width  # of one panel's sums, of a task's

    def before(task, a, b, y, sums, extras, at):  # type: ignore[no-untyped-def]
        begin, end = inner * task // parts, inner * (task + 1) // parts
        for start in range(begin, end, STEP):
            count = min(STEP, end - start)
            for panel in range(panels):
                slot, source = task * part_size + panel * size, start * k + min(panel * width, last)
                acc = zeros(1, m, vectors, lanes, y)
                if start > begin:
                    acc = load(acc, sums, slot, width, 0)
                for i in range(count):
                    acc = outer(acc, a, (start + i) * inner_step, row_step, 0, b, source + i * k, tail)
                store(acc, sums, slot, width, 0)

    def body(panel, a, b, y, sums, extras, at):  # type: ignore[no-untyped-def]
        column = min(panel * width, last)
        skip = 0 if even else panel * width - column
        for r in range(m):
            o, s = r * k + column, panel * size + r * width
            for j in range(skip, columns):
                v = sums[s + j]
                for part in range(1, parts):
                    v += sums[s + part * part_size + j]
                y[o + j] = epilogue(v, extras, o + j, column + j, at)

    return Loop(body, panels, before=before, before_tasks=parts)
