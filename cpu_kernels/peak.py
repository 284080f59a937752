"""The most that a processor can do: multiply-adds on a register tile whose operands lie in the first-level cache.

Not an op's kernel: what others are measured against (`runtime.peak`). The tile is the one that convolutions prefer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from rapydli_flow.spec import Spec
from rapydli_flow.template import Epilogue, Loop, Template

from .buffer import local
from .tile import outer, store, zeros

DEPTH = 256  # steps over the operands, which then are 14 KiB and 32 KiB
REPEATS = 64


def tile_flops(rows: int, vectors: int, lanes: int, tasks: int) -> int:
    """Multiplications and additions of one call."""
    return 2 * rows * vectors * lanes * DEPTH * REPEATS * tasks


def multiply_add(
    op: Any,
    ins: Sequence[Spec],
    outs: Sequence[Spec],
    epilogue: Epilogue,
    *,
    rows: int,
    vectors: int,
    lanes: int,
    tasks: int,
) -> Loop:
    """Each task adds `REPEATS` times the product of a panel of x with one of w, and stores the sums."""
    width = vectors * lanes
    size, depth, repeats = rows * width, DEPTH, REPEATS

    def body(task, x, w, y, extras, at):  # type: ignore[no-untyped-def]
        sums = local(size, y)
        acc = zeros(1, rows, vectors, lanes, sums)
        for _ in range(repeats):
            for k in range(depth):
                acc = outer(acc, x, k * rows, 1, 0, w, k * width, 0)
        store(acc, sums, 0, width, 0)
        for i in range(size):
            y[task * size + i] = sums[i]

    return Loop(body, tasks)


PEAK = Template("peak", "cpu", multiply_add, {"rows": (14,), "vectors": (2,), "lanes": (16, 8, 4), "tasks": (16,)})


def operands(rows: int, vectors: int, lanes: int, tasks: int) -> tuple[list[Spec], list[Spec]]:
    """Specs of what goes in and out."""
    width = vectors * lanes
    return [Spec((DEPTH * rows,)), Spec((DEPTH * width,))], [Spec((tasks * rows * width,))]


def values(spec: Spec) -> Any:
    """Numbers that neither grow nor vanish."""
    return np.full(spec.shape, 1e-3, spec.dtype)
