"""Linear interpolation over 1 to 3 spatial axes, and its gradient; each task takes some rows of the result.

    resize         y[o] = sum over the two nearest elements along each axis of weight * x[...]
    resize_grad    dx[i] = sum over the o that i is near to of weight * dy[o]

Fewer axes are taken as 3 by putting axes of size 1 in front. Along an axis that keeps its size the weight of the
element itself is 1. Channels are the inner loop.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from rapydli_flow.spec import Spec
from rapydli_flow.template import Device, Epilogue, Loop, template

from .buffer import local

SPACE = {"tasks": (16, 8, 32, 4)}
MOST_CHANNELS = 1 << 16  # that fit on a thread's stack, in float64


def _fits(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device, **config: Any) -> bool:
    return ins[0].shape[-1] <= MOST_CHANNELS


def three(values: Sequence[int]) -> tuple[int, int, int]:
    a, b, c = (1,) * (3 - len(values)) + tuple(values)
    return a, b, c


def position(o, size, new):  # type: ignore[no-untyped-def]
    """Where element o of ``new`` lies between the centres of ``size`` elements."""
    return max((o + 0.5) * size / new - 0.5, 0.0) if size != new else float(o)


def weight(o, i, size, new):  # type: ignore[no-untyped-def]
    """How much element o of the larger or smaller array takes of element i."""
    p = position(o, size, new)
    near = min(int(p), size - 1)
    share = p - near
    total = 0.0
    if near == i:
        total += 1.0 - share
    if min(near + 1, size - 1) == i:
        total += share
    return total


def reach(i, size, new):  # type: ignore[no-untyped-def]
    """The first element that may take of element i, and the one behind the last."""
    low = int((i - 0.5) * new / size - 0.5) - 1 if i else 0
    high = int((i + 1.5) * new / size - 0.5) + 2 if i < size - 1 else new
    return max(low, 0), min(high, new)


@template("resize", "cpu", space=SPACE, fits=_fits)
def interpolated(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], epilogue: Epilogue, *, tasks: int) -> Loop:
    """``tasks``: how many."""
    (D, H, W), (OD, OH, OW) = three(ins[0].shape[1:-1]), three(op.size)
    (QD, QH, QW) = (1 if a == b else 2 for a, b in ((D, OD), (H, OH), (W, OW)))
    N, C = ins[0].shape[0], ins[0].shape[-1]
    lines = N * OD * OH
    count = max(1, min(tasks, lines))
    T = np.dtype(outs[0].dtype).type

    def body(task, x, y, extras, at):  # type: ignore[no-untyped-def]
        total = local(C, y)
        for line in range(task * lines // count, (task + 1) * lines // count):
            n = line // (OD * OH)
            pd, ph = position(line // OH % OD, D, OD), position(line % OH, H, OH)
            d0, h0 = min(int(pd), D - 1), min(int(ph), H - 1)
            for column in range(OW):
                pw = position(column, W, OW)
                w0 = min(int(pw), W - 1)
                for c in range(C):
                    total[c] = 0
                for q in range(QD):
                    for r in range(QH):
                        for s in range(QW):
                            part = pd - d0 if q else 1.0 - (pd - d0)
                            part *= ph - h0 if r else 1.0 - (ph - h0)
                            part *= pw - w0 if s else 1.0 - (pw - w0)
                            d, h, w = min(d0 + q, D - 1), min(h0 + r, H - 1), min(w0 + s, W - 1)
                            i, a = (((n * D + d) * H + h) * W + w) * C, T(part)
                            for c in range(C):
                                total[c] += a * x[i + c]
                o = (line * OW + column) * C
                for c in range(C):
                    y[o + c] = epilogue(total[c], extras, o + c, c, at)

    return Loop(body, count)


@template("resize_grad", "cpu", space=SPACE, fits=_fits)
def returned(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], epilogue: Epilogue, *, tasks: int) -> Loop:
    """``tasks``: how many."""
    (D, H, W), (OD, OH, OW) = three(op.size), three(ins[0].shape[1:-1])
    N, C = ins[0].shape[0], ins[0].shape[-1]
    lines = N * D * H
    count = max(1, min(tasks, lines))
    T = np.dtype(outs[0].dtype).type

    def body(task, dy, dx, extras, at):  # type: ignore[no-untyped-def]
        total = local(C, dx)
        for line in range(task * lines // count, (task + 1) * lines // count):
            n, d, h = line // (D * H), line // H % D, line % H
            (d0, d1), (h0, h1) = reach(d, D, OD), reach(h, H, OH)
            for w in range(W):
                w0, w1 = reach(w, W, OW)
                for c in range(C):
                    total[c] = 0
                for p in range(d0, d1):
                    for q in range(h0, h1):
                        across = weight(p, d, D, OD) * weight(q, h, H, OH)
                        for r in range(w0, w1):
                            a = T(across * weight(r, w, W, OW))
                            i = (((n * OD + p) * OH + q) * OW + r) * C
                            if a != T(0):  # what it does not take from may be infinite
                                for c in range(C):
                                    total[c] += a * dy[i + c]
                o = (line * W + w) * C
                for c in range(C):
                    dx[o + c] = epilogue(total[c], extras, o + c, c, at)

    return Loop(body, count)
