"""Pooling over 1 to 3 spatial axes, and its gradients; each task takes some rows of the result.

    max_pool       y[o] = max over taps of x[o * stride - padding + tap], argmax[o] = the first tap that has it
    sum_pool       y[o] = sum over taps of x[...]
    ..._grad       an element of dx at a time: the dy of all windows over it
                   (max_pool: of those that chose it)

Fewer axes are taken as 3 by putting axes of size 1 in front. A tile (see `tile`) holds some channels of one
place while the taps pass by.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rapydli_flow.spec import Spec
from rapydli_flow.template import Device, Epilogue, Loop, template

from .buffer import local
from .tile import chosen, fill, larger, plus, store, zeros
from .tile_rules import vector_rules

SPACE: dict[str, tuple[Any, ...]] = {"vectors": (4, 2, 1), "lanes": (8, 16, 4, 2), "tasks": (16, 8, 32, 4)}


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


def _channels(op: Any, ins: Sequence[Spec], outs: Sequence[Spec]) -> int:
    return outs[0].shape[-1]


RULES = vector_rules(_channels, lambda op, ins, outs: 2)  # largest values and their taps


def _prefer(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device) -> dict[str, Any]:
    """As many vectors as there are channels for."""
    lanes = device.vector_bytes // np.dtype(outs[0].dtype).itemsize
    vectors = max((v for v in SPACE["vectors"] if (v - 1) * lanes < _channels(op, ins, outs)), default=1)
    return {"vectors": vectors, "lanes": lanes, "tasks": SPACE["tasks"][0]}


def _tile_writer(epilogue: Epilogue, channels: int, width: int, tail: int) -> Callable[..., None]:
    """Writes a tile of one place, whose channels begin at that of a panel or, for the last panel, earlier."""
    valid = min(channels, width)
    even, plain = -(-channels // width) * valid == channels, epilogue.identity

    def write(acc, y, place, panel, column, sums, extras, at):  # type: ignore[no-untyped-def]
        if plain:  # channels that two panels share get the same value twice
            store(acc, y, place + column, 0, tail)
            return
        store(acc, sums, 0, 0, 0)
        o, k = place + column, column
        for j in range(0 if even else panel * width - column, valid):
            y[o + j] = epilogue(sums[j], extras, o + j, k + j, at)

    return write


def _slide(g: Geometry, epilogue: Epilogue, dtype: str, *, most: bool, vectors: int, lanes: int, tasks: int) -> Loop:
    """Windows clipped to what lies inside: with ``most`` the largest element and its tap, else the sum."""
    (D, H, W), (OD, OH, OW), C = g.size, g.out, g.c
    (KD, KH, KW), (SD, SH, SW), (PD, PH, PW) = g.window, g.stride, g.low
    lines, width = g.n * OD * OH, vectors * lanes
    count = max(1, min(tasks, lines))
    panels, last, tail = -(-C // width), C - min(C, width), min(C, width) % lanes
    write = _tile_writer(epilogue, C, width, tail)
    T = np.dtype(dtype).type
    start = T(-np.inf if most else 0)

    def row(line, x, y, argmax, total, extras, at):  # type: ignore[no-untyped-def]
        n, d, h = line // (OD * OH), line // OH % OD * SD - PD, line % OH * SH - PH
        q0, q1 = max(0, -d), min(KD, D - d)
        r0, r1 = max(0, -h), min(KH, H - h)
        blank = zeros(1, 1, vectors, lanes, y)
        for o in range(OW):
            w = o * SW - PW
            s0, s1 = max(0, -w), min(KW, W - w)
            for panel in range(panels):
                column, place = min(panel * width, last), (line * OW + o) * C
                base = (((n * D + d) * H + h) * W + w) * C + column
                acc, which = fill(blank, start), blank
                for q in range(q0, q1):
                    for r in range(r0, r1):
                        for s in range(s0, s1):
                            there = base + ((q * H + r) * W + s) * C
                            if most:
                                acc, which = larger(acc, which, x, there, T((q * KH + r) * KW + s), tail)
                            else:
                                acc = plus(acc, x, there, 0, tail)
                write(acc, y, place, panel, column, total, extras, at)
                if most:
                    store(which, argmax, place + column, 0, tail)

    def max_body(task, x, y, argmax, extras, at):  # type: ignore[no-untyped-def]
        total = local(width, y)
        for line in range(task * lines // count, (task + 1) * lines // count):
            row(line, x, y, argmax, total, extras, at)

    def sum_body(task, x, y, extras, at):  # type: ignore[no-untyped-def]
        total = local(width, y)
        for line in range(task * lines // count, (task + 1) * lines // count):
            row(line, x, y, y, total, extras, at)

    return Loop(max_body if most else sum_body, count)


@template("max_pool", "cpu", space=SPACE, fits=RULES, prefer=_prefer)
def largest(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], epilogue: Epilogue, **config: Any) -> Loop:
    """Rows of the result for each task."""
    return _slide(Geometry.of(op, ins[0], outs[0], op.window), epilogue, outs[0].dtype, most=True, **config)


@template("sum_pool", "cpu", space=SPACE, fits=RULES, prefer=_prefer)
def sums(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], epilogue: Epilogue, **config: Any) -> Loop:
    """Rows of the result for each task."""
    return _slide(Geometry.of(op, ins[0], outs[0], op.window), epilogue, outs[0].dtype, most=False, **config)


def _gather(g: Geometry, epilogue: Epilogue, argmax_type: Any, *, vectors: int, lanes: int, tasks: int) -> Loop:
    """The gradient by elements of dx; with an ``argmax_type`` from windows that chose the element, else from all."""
    (D, H, W), (OD, OH, OW), C = g.size, g.out, g.c
    (KD, KH, KW), (SD, SH, SW), (PD, PH, PW) = g.window, g.stride, g.low
    lines, width = g.n * D * H, vectors * lanes
    count = max(1, min(tasks, lines))
    panels, last, tail = -(-C // width), C - min(C, width), min(C, width) % lanes
    write = _tile_writer(epilogue, C, width, tail)
    chooses, index = argmax_type is not None, argmax_type or np.int64

    def row(line, dy, argmax, dx, total, extras, at):  # type: ignore[no-untyped-def]
        n, d, h = line // (D * H), line // H % D + PD, line % H + PH
        p0, p1 = first(d, KD, SD), min(OD, d // SD + 1)
        q0, q1 = first(h, KH, SH), min(OH, h // SH + 1)
        for i in range(W):
            w = i + PW
            r0, r1 = first(w, KW, SW), min(OW, w // SW + 1)
            for panel in range(panels):
                column = min(panel * width, last)
                acc = zeros(1, 1, vectors, lanes, dx)
                for p in range(p0, p1):
                    for q in range(q0, q1):
                        top = ((n * OD + p) * OH + q) * OW * C + column
                        tap = ((d - p * SD) * KH + h - q * SH) * KW + w
                        for r in range(r0, r1):
                            if chooses:
                                acc = chosen(acc, dy, argmax, top + r * C, index(tap - r * SW), tail)
                            else:
                                acc = plus(acc, dy, top + r * C, 0, tail)
                write(acc, dx, (line * W + i) * C, panel, column, total, extras, at)

    def max_body(task, dy, argmax, dx, extras, at):  # type: ignore[no-untyped-def]
        total = local(width, dx)
        for line in range(task * lines // count, (task + 1) * lines // count):
            row(line, dy, argmax, dx, total, extras, at)

    def sum_body(task, dy, dx, extras, at):  # type: ignore[no-untyped-def]
        total = local(width, dx)
        for line in range(task * lines // count, (task + 1) * lines // count):
            row(line, dy, dy, dx, total, extras, at)

    return Loop(max_body if chooses else sum_body, count)


@template("max_pool_grad", "cpu", space=SPACE, fits=RULES, prefer=_prefer)
def chosen_windows(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], epilogue: Epilogue, **config: Any) -> Loop:
    """Rows of dx for each task; each element gets the dy of the windows that chose it."""
    return _gather(Geometry.of(op, outs[0], ins[0], op.window), epilogue, np.dtype(ins[1].dtype).type, **config)


@template("sum_pool_grad", "cpu", space=SPACE, fits=RULES, prefer=_prefer)
def all_windows(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], epilogue: Epilogue, **config: Any) -> Loop:
    """Rows of dx for each task; each element gets the dy of all windows over it."""
    return _gather(Geometry.of(op, outs[0], ins[0], op.window), epilogue, None, **config)
