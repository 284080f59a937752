"""Filter gradient of depthwise convolution: every channel has a filter of its own.

    dw[t, c] = sum over n, o of x[n, o*stride + t*dilation - low, c] * dy[n, o, c]

A tile holds the taps of a row by channels and grows by one pixel at a time, vectors of x times a vector of dy. A task
has a part of the rows of pixels, each of which is read once and stays in the nearest cache for all of its taps; sums of
the parts are added in order. Taps that leave x are left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import numpy as np

from rapydli_flow.spec import Spec
from rapydli_flow.template import Device, Epilogue, Loop, template

from .buffer import local
from .conv_geometry import Geometry, forward, sizes
from .depthwise import one_each
from .tile import columns, holds, load, store, zeros

MOST_TAPS = 12  # of a row
LOCAL_BYTES = 1 << 18  # most sums of a part
SPACE: dict[str, tuple[Any, ...]] = {"vectors": (2, 1, 3, 4), "lanes": (16, 8, 4, 2), "split": (8, 2, 4, 16, 32)}


def _geometry(op: Any, ins: Sequence[Spec], outs: Sequence[Spec]) -> Geometry:
    x, dy, dw = ins[0].shape, ins[1].shape, outs[0].shape
    d, h, w = (forward(s) for s in sizes(op, x[1:-1], dy[1:-1], dw[:-2]))
    return Geometry(x[0], (d, h, w), 1, 1, x[-1])


def _allowed(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device) -> bool:
    return one_each(op, ins, ins[1:], device) and outs[0].size > 0 and op.window[-1] <= MOST_TAPS


def _filled(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device, *, vectors: int, lanes: int) -> bool:
    return (vectors - 1) * lanes < outs[0].shape[-1]


def _registers(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device, *, vectors: int, lanes: int) -> bool:
    return holds(op.window[-1], vectors, lanes, np.dtype(outs[0].dtype).itemsize, device.vector_bytes)


def _sums_size(op: Any, outs: Sequence[Spec], width: int) -> int:
    return prod(op.window) * -(-outs[0].shape[-1] // width) * width


def _small(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device, *, vectors: int, lanes: int) -> bool:
    """The sums of a part fit on the stack of its task."""
    return _sums_size(op, outs, vectors * lanes) * np.dtype(outs[0].dtype).itemsize <= LOCAL_BYTES


def _rows(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device, *, split: int) -> bool:
    """A row of pixels for each part."""
    return split == 2 or split <= prod(ins[1].shape[:-2])


RULES = {
    "a filter for each channel": _allowed,
    "no empty vector": _filled,
    "tile in registers": _registers,
    "sums on the stack": _small,
    "a row for each part": _rows,
}


def _workspace(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], **config: Any) -> tuple[Spec, ...]:
    return (Spec((config["split"] * outs[0].size,), outs[0].dtype),)


def _cost(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device, config: Mapping[str, Any]) -> float:
    return 2.0 * op.flops(*ins) / config["lanes"]


def _prefer(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device) -> dict[str, Any]:
    lanes = device.vector_bytes // np.dtype(outs[0].dtype).itemsize
    vectors = 2 if outs[0].shape[-1] > lanes and 2 * op.window[-1] + 3 <= device.vector_registers else 1
    lines = prod(ins[1].shape[:-2])
    return {"vectors": vectors, "lanes": lanes, "split": max(s for s in SPACE["split"] if s == 2 or s <= min(lines, 8))}


@template("conv_filter_grad", "cpu", space=SPACE, fits=RULES, workspace=_workspace, prefer=_prefer, cost=_cost)
def depthwise(
    op: Any, ins: Sequence[Spec], outs: Sequence[Spec], epilogue: Epilogue, *, vectors: int, lanes: int, split: int
) -> Loop:
    """Taps by channels, pixel after pixel."""
    g = _geometry(op, ins, outs)
    d, h, w = g.axes
    channels, width, taps_size = g.groups, vectors * lanes, outs[0].size
    valid = min(channels, width)
    tail, last, panels = valid % lanes, channels - valid, -(-channels // width)
    window_d, window_h, window_w = d.taps[0], h.taps[0], w.taps[0]
    size_d, size_h, size_w, out_d, out_h, out_w = d.size, h.size, w.size, d.out, h.out, w.out
    step_d, step_h, step_w, spread_d, spread_h, spread_w = d.step, h.step, w.step, d.spread, h.spread, w.spread
    from_d, from_h, from_w = (axis.first[0] - axis.low for axis in g.axes)
    lines, sums_size = g.n * out_d * out_h, _sums_size(op, outs, width)
    spread_c, step_c = spread_w * channels, step_w * channels
    # the pixels of a row whose taps all lie inside
    begin = min(out_w, max(0, -(from_w // step_w)))
    end = max(begin, min(out_w, (size_w - 1 - (window_w - 1) * spread_w - from_w) // step_w + 1))

    def add_inside(x, at_x, dy, at_dy, sums, slot):  # type: ignore[no-untyped-def]
        acc = load(zeros(1, window_w, vectors, lanes, sums), sums, slot, width, 0)
        for o in range(begin, end):
            acc = columns(acc, x, at_x + o * step_c, spread_c, dy, at_dy + o * channels, tail)
        store(acc, sums, slot, width, 0)

    def add_ends(x, at_x, dy, at_dy, sums, slot, first, until):  # type: ignore[no-untyped-def]
        for o in range(first, until):
            for s in range(window_w):
                position = from_w + o * step_w + s * spread_w
                if 0 <= position < size_w:
                    a, b, into = at_x + position * channels, at_dy + o * channels, slot + s * width
                    for j in range(valid):
                        sums[into + j] += x[a + j] * dy[b + j]

    def before(task, x, dy, dw, parts, extras, at):  # type: ignore[no-untyped-def]
        sums = local(sums_size, x)
        for i in range(sums_size):
            sums[i] = 0
        for line in range(lines * task // split, lines * (task + 1) // split):
            n, z, o_h = line // (out_d * out_h), line // out_h % out_d, line % out_h
            for q in range(window_d):
                for r in range(window_h):
                    at_d, at_h = from_d + z * step_d + q * spread_d, from_h + o_h * step_h + r * spread_h
                    if 0 <= at_d < size_d and 0 <= at_h < size_h:
                        row = ((n * size_d + at_d) * size_h + at_h) * size_w * channels
                        for panel in range(panels):
                            column = min(panel * width, last)
                            slot = ((q * window_h + r) * panels + panel) * window_w * width
                            at_x, at_dy = row + column, line * out_w * channels + column
                            add_ends(x, at_x, dy, at_dy, sums, slot, 0, begin)
                            add_inside(x, at_x + from_w * channels, dy, at_dy, sums, slot)
                            add_ends(x, at_x, dy, at_dy, sums, slot, end, out_w)
        for taps in range(window_d * window_h):
            for panel in range(panels):
                for s in range(window_w):
                    into = task * taps_size + (taps * window_w + s) * channels + min(panel * width, last)
                    slot = ((taps * panels + panel) * window_w + s) * width
                    for j in range(valid):
                        parts[into + j] = sums[slot + j]

    def body(task, x, dy, dw, parts, extras, at):  # type: ignore[no-untyped-def]
        o = task * channels
        for c in range(channels):
            total = parts[o + c]
            for part in range(1, split):
                total += parts[o + part * taps_size + c]
            dw[o + c] = epilogue(total, extras, o + c, c, at)

    return Loop(body, window_d * window_h * window_w, before=before, before_tasks=split)
