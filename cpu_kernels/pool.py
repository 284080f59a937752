"""Pooling over 1 to 3 spatial axes, and its gradients; each task takes some rows of the result.

    max_pool       y[o] = max over taps of x[o * stride - padding + tap], argmax[o] = the first tap that has it
    sum_pool       y[o] = sum over taps of x[...]
    ..._grad       a row of dx at a time: the windows over that row add their dy to its elements
                   (max_pool: to the one that they chose)

Fewer axes are taken as 3 by putting axes of size 1 in front. Channels are the inner loop, over arrays on
the stack that nothing can alias, so that LLVM vectorises without asking.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rapydli_flow.spec import Spec
from rapydli_flow.template import Device, Epilogue, Loop, template

from .tile import local

TASKS = {"tasks": (16, 8, 32, 4)}
MOST_ROW = 1 << 17  # elements of a row of dx that fit on a thread's stack


@dataclass(frozen=True)
class Geometry:
    """Sizes of windows that slide, with three spatial axes."""

    n: int
    size: tuple[int, int, int]
    out: tuple[int, int, int]
    c: int
    window: tuple[int, int, int]
    stride: tuple[int, int, int]
    low: tuple[int, int, int]

    @classmethod
    def of(cls, op: Any, big: Spec, small: Spec, window: Sequence[int]) -> Geometry:
        """``big`` is what the windows slide over, ``small`` has one element for each."""

        def three(values: Sequence[int], missing: int) -> tuple[int, int, int]:
            a, b, c = (missing,) * (3 - len(values)) + tuple(values)
            return a, b, c

        return cls(
            big.shape[0],
            three(big.shape[1:-1], 1),
            three(small.shape[1:-1], 1),
            big.shape[-1],
            three(window, 1),
            three(op.stride, 1),
            three([low for low, _ in op.padding], 0),
        )


def first(i, window, stride):  # type: ignore[no-untyped-def]
    """The first window that reaches element i."""
    return max(0, -((window - 1 - i) // stride))


@template("max_pool", "cpu", space=TASKS)
def rows(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], epilogue: Epilogue, *, tasks: int) -> Loop:
    """Each output row in turn; windows that lie inside are unrolled, the others are clipped first."""
    g = Geometry.of(op, ins[0], outs[0], op.window)
    (D, H, W), (OD, OH, OW), C = g.size, g.out, g.c
    (KD, KH, KW), (SD, SH, SW), (PD, PH, PW) = g.window, g.stride, g.low
    lines = g.n * OD * OH
    count = max(1, min(tasks, lines))
    T, A = np.dtype(outs[0].dtype).type, np.dtype(outs[1].dtype).type

    def inside(x, base, best, tap):  # type: ignore[no-untyped-def]
        for c in range(C):
            b = x[base + c]
            t = T(0)  # taps in the dtype of x: vectors of one width
            for q in range(KD):
                for r in range(KH):
                    for s in range(KW):
                        v = x[base + ((q * H + r) * W + s) * C + c]
                        take = (not v <= b) & (b == b)  # a NaN wins, and the first one stays
                        b = v if take else b
                        t = T((q * KH + r) * KW + s) if take else t
            best[c] = b
            tap[c] = t

    def better(x, base, best, tap, t):  # type: ignore[no-untyped-def]
        for c in range(C):
            v, b, a = x[base + c], best[c], tap[c]
            take = (not v <= b) & (b == b)
            best[c] = v if take else b
            tap[c] = t if take else a

    def body(task, x, y, argmax, extras, at):  # type: ignore[no-untyped-def]
        best, tap = local(C, y), local(C, y)
        for line in range(task * lines // count, (task + 1) * lines // count):
            n, d, h = line // (OD * OH), line // OH % OD * SD - PD, line % OH * SH - PH
            q0, q1 = max(0, -d), min(KD, D - d)
            r0, r1 = max(0, -h), min(KH, H - h)
            for column in range(OW):
                w = column * SW - PW
                s0, s1 = max(0, -w), min(KW, W - w)
                base = (((n * D + d) * H + h) * W + w) * C
                if (q1 - q0) * (r1 - r0) * (s1 - s0) == KD * KH * KW:
                    inside(x, base, best, tap)
                else:
                    for c in range(C):
                        best[c] = -np.inf
                        tap[c] = 0
                    for q in range(q0, q1):
                        for r in range(r0, r1):
                            for s in range(s0, s1):
                                t = T((q * KH + r) * KW + s)
                                better(x, base + ((q * H + r) * W + s) * C, best, tap, t)
                o = (line * OW + column) * C
                for c in range(C):
                    y[o + c] = best[c]
                for c in range(C):
                    argmax[o + c] = A(tap[c])

    return Loop(body, count)


@template("sum_pool", "cpu", space=TASKS)
def row_sums(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], epilogue: Epilogue, *, tasks: int) -> Loop:
    """Each output row in turn, the taps of a window clipped to what lies inside."""
    g = Geometry.of(op, ins[0], outs[0], op.window)
    (D, H, W), (OD, OH, OW), C = g.size, g.out, g.c
    (KD, KH, KW), (SD, SH, SW), (PD, PH, PW) = g.window, g.stride, g.low
    lines = g.n * OD * OH
    count = max(1, min(tasks, lines))

    def body(task, x, y, extras, at):  # type: ignore[no-untyped-def]
        total = local(C, y)
        for line in range(task * lines // count, (task + 1) * lines // count):
            n, d, h = line // (OD * OH), line // OH % OD * SD - PD, line % OH * SH - PH
            for column in range(OW):
                w = column * SW - PW
                for c in range(C):
                    total[c] = 0
                for q in range(max(0, -d), min(KD, D - d)):
                    for r in range(max(0, -h), min(KH, H - h)):
                        for s in range(max(0, -w), min(KW, W - w)):
                            i = (((n * D + d + q) * H + h + r) * W + w + s) * C
                            for c in range(C):
                                total[c] += x[i + c]
                o = (line * OW + column) * C
                for c in range(C):
                    y[o + c] = epilogue(total[c], extras, o + c, c, at)

    return Loop(body, count)


def _fits(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device, **config: Any) -> bool:
    return max(spec.shape[-2] * spec.shape[-1] for spec in (*ins, *outs)) <= MOST_ROW


def _scatter(g: Geometry, tasks: int, chosen: bool, epilogue: Epilogue) -> Loop:
    """The gradient by rows of dx; ``chosen``: only to the tap that argmax names."""
    (D, H, W), (OD, OH, OW), C = g.size, g.out, g.c
    (KD, KH, KW), (SD, SH, SW), (PD, PH, PW) = g.window, g.stride, g.low
    lines = g.n * D * H
    count = max(1, min(tasks, lines))
    T = np.dtype(epilogue.out.dtype).type
    plain, row_size, window_row = epilogue.identity, W * C, OW * C

    def add(total, i, dy, o):  # type: ignore[no-untyped-def]
        for c in range(C):
            total[i + c] += dy[o + c]

    def add_chosen(total, i, dy, o, winner, j, tap):  # type: ignore[no-untyped-def]
        for c in range(C):
            v = dy[o + c]  # read in any case: a select, not a branch
            total[i + c] += v if winner[j + c] == tap else T(0)

    def row(line, dy, argmax, dx, extras, at):  # type: ignore[no-untyped-def]
        total, winner = local(row_size, dx), local(window_row, dx)
        for i in range(row_size):
            total[i] = 0
        n, d, h = line // (D * H), line // H % D + PD, line % H + PH
        for p in range(first(d, KD, SD), min(OD, d // SD + 1)):
            for q in range(first(h, KH, SH), min(OH, h // SH + 1)):
                tap = ((d - p * SD) * KH + h - q * SH) * KW
                top = ((n * OD + p) * OH + q) * OW * C
                if chosen:
                    for j in range(window_row):  # in the dtype of dy: vectors of one width
                        winner[j] = argmax[top + j]
                for r in range(OW):
                    o, left = top + r * C, r * SW - PW
                    for s in range(max(0, -left), min(KW, W - left)):
                        if chosen:
                            add_chosen(total, (left + s) * C, dy, o, winner, r * C, T(tap + s))
                        else:
                            add(total, (left + s) * C, dy, o)
        o = line * W * C
        if plain:
            for i in range(row_size):
                dx[o + i] = total[i]
        else:
            for column in range(W):
                for c in range(C):
                    i = column * C + c
                    dx[o + i] = epilogue(total[i], extras, o + i, c, at)

    def max_body(task, dy, argmax, dx, extras, at):  # type: ignore[no-untyped-def]
        for line in range(task * lines // count, (task + 1) * lines // count):
            row(line, dy, argmax, dx, extras, at)

    def sum_body(task, dy, dx, extras, at):  # type: ignore[no-untyped-def]
        for line in range(task * lines // count, (task + 1) * lines // count):
            row(line, dy, dy, dx, extras, at)

    return Loop(max_body if chosen else sum_body, count)


@template("max_pool_grad", "cpu", space=TASKS, fits=_fits)
def scatter(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], epilogue: Epilogue, *, tasks: int) -> Loop:
    """``tasks``: how many."""
    return _scatter(Geometry.of(op, outs[0], ins[0], op.window), tasks, True, epilogue)


@template("sum_pool_grad", "cpu", space=TASKS, fits=_fits)
def scatter_sums(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], epilogue: Epilogue, *, tasks: int) -> Loop:
    """``tasks``: how many."""
    return _scatter(Geometry.of(op, outs[0], ins[0], op.window), tasks, False, epilogue)
