"""Sums over everything but channels, for batch normalisation, in two phases.

    before   part p of the rows:  work[p, 0, c] = sum of a,  work[p, 1, c] = sum of b     (in parallel)
    body     channel c:           the parts added in order                               (in parallel)

    moments          a = x - shift     b = (x - shift)^2
    normalize_sums   a = dy            b = dy (x - mean), then over sqrt(var + eps)

A few rows at a time are added in the dtype of x, in vectors of channels, and those sums in float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from math import prod
from typing import Any

from rapydli_flow.spec import Spec
from rapydli_flow.template import Device, Epilogue, Loop, template

from .buffer import local

BLOCK = 32  # rows that are added before they enter the float64 sums
CHANNELS = 256  # of a task of the second phase
MOST_CHANNELS = 1 << 15  # sums of so many channels fit on a thread's stack
SPACE = {"parts": (16, 8, 32)}


def _parts(x: Spec, parts: int) -> int:
    return max(1, min(parts, prod(x.shape[:-1])))


def _workspace(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], *, parts: int) -> tuple[Spec, ...]:
    return (Spec((_parts(ins[0], parts), 2, ins[0].shape[-1]), "float64"),)


def _fits(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device, *, parts: int) -> bool:
    return 0 < ins[0].shape[-1] <= MOST_CHANNELS


@template("moments", "cpu", space=SPACE, workspace=_workspace, fits=_fits)
def moments(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], epilogue: Epilogue, *, parts: int) -> Loop:
    """``parts``: how many partial sums."""
    C, rows, count = ins[0].shape[-1], prod(ins[0].shape[:-1]), _parts(ins[0], parts)

    def partial(task, x, shift, total, squares, work, extras, at):  # type: ignore[no-untyped-def]
        a, b, w = local(C, x), local(C, x), task * 2 * C
        for c in range(2 * C):
            work[w + c] = 0
        last = (task + 1) * rows // count
        for top in range(task * rows // count, last, BLOCK):
            for c in range(C):
                a[c] = 0
                b[c] = 0
            for row in range(top, min(top + BLOCK, last)):
                for c in range(C):
                    d = x[row * C + c] - shift[c]
                    a[c] += d
                    b[c] += d * d
            for c in range(C):
                work[w + c] += a[c]
                work[w + C + c] += b[c]

    def together(task, x, shift, total, squares, work, extras, at):  # type: ignore[no-untyped-def]
        for c in range(task * CHANNELS, min(C, (task + 1) * CHANNELS)):
            a = b = 0.0
            for part in range(count):
                a += work[part * 2 * C + c]
                b += work[part * 2 * C + C + c]
            total[c] = a
            squares[c] = b

    return Loop(together, -(-C // CHANNELS), before=partial, before_tasks=count)


@template("normalize_sums", "cpu", space=SPACE, workspace=_workspace, fits=_fits)
def normalize_sums(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], epilogue: Epilogue, *, parts: int) -> Loop:
    """``parts``: how many partial sums."""
    C, rows, count = ins[0].shape[-1], prod(ins[0].shape[:-1]), _parts(ins[0], parts)
    eps = float(op.eps)

    def partial(task, dy, x, mean, var, dbias, dgain, work, extras, at):  # type: ignore[no-untyped-def]
        a, b, w = local(C, x), local(C, x), task * 2 * C
        for c in range(2 * C):
            work[w + c] = 0
        last = (task + 1) * rows // count
        for top in range(task * rows // count, last, BLOCK):
            for c in range(C):
                a[c] = 0
                b[c] = 0
            for row in range(top, min(top + BLOCK, last)):
                for c in range(C):
                    d = dy[row * C + c]
                    a[c] += d
                    b[c] += d * (x[row * C + c] - mean[c])
            for c in range(C):
                work[w + c] += a[c]
                work[w + C + c] += b[c]

    def together(task, dy, x, mean, var, dbias, dgain, work, extras, at):  # type: ignore[no-untyped-def]
        for c in range(task * CHANNELS, min(C, (task + 1) * CHANNELS)):
            a = b = 0.0
            for part in range(count):
                a += work[part * 2 * C + c]
                b += work[part * 2 * C + C + c]
            b /= math.sqrt(var[c] + eps)  # read before dbias and dgain, which may lie on var and mean
            dbias[c] = a
            dgain[c] = b

    return Loop(together, -(-C // CHANNELS), before=partial, before_tasks=count)
