"""Depthwise convolution and its input gradient: every channel has a filter of its own.

    y[n, o, c] = sum over t of x[n, o*stride + t*dilation - low, c] * w[t, c]

The input gradient slides over dy in the same way, for each phase of the stride (see `conv_geometry`). A tile holds
pixels by channels and grows by one tap at a time, vectors of x times vectors of w. Little is computed for each element
that is read, so nothing is copied into zeros first: taps that leave the source are left out, row by row, and pixel by
pixel at the ends of a row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rapydli_flow.spec import Spec
from rapydli_flow.template import Device, Epilogue, Loop, template

from .conv_geometry import Geometry, backward, forward, geometry
from .tile import balanced, columns, local, natural, store, zeros
from .tile_rules import tile_rules

SPACE: dict[str, tuple[Any, ...]] = {
    "rows": (6, 4, 8, 3, 12),
    "vectors": (1, 2, 3),
    "lanes": (16, 8, 4, 2),
    "tasks": (32, 16, 128),
}


def one_each(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device) -> bool:
    """A filter for each channel, and something to compute."""
    channels = outs[0].shape[-1]
    return op.groups == channels == ins[0].shape[-1] and all(spec.size for spec in (*ins, *outs))


def _geometry(op: Any, ins: Sequence[Spec], outs: Sequence[Spec]) -> Geometry:
    return geometry(op, ins, outs, slide=backward if op.family == "conv_input_grad" else forward)


def _shape(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], rows: int) -> tuple[int, ...]:
    return (balanced(_geometry(op, ins, outs).axes[2].fewest, rows),)


def channels_of(op: Any, ins: Sequence[Spec], outs: Sequence[Spec]) -> int:
    """What vectors share out."""
    return outs[0].shape[-1]


RULES = {"a filter for each channel": one_each, **tile_rules(_shape, channels_of, SPACE["rows"])}


def prefer(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device) -> dict[str, Any]:
    """As many pixels as hide the latency of a multiply-add."""
    lanes = device.vector_bytes // np.dtype(outs[0].dtype).itemsize
    first = {"vectors": 1, "lanes": lanes, "tasks": SPACE["tasks"][0]}
    if not one_each(op, ins, outs, device):
        return {**first, "rows": SPACE["rows"][0]}
    shapes = [(_shape(op, ins, outs, rows), rows) for rows in sorted(SPACE["rows"]) if rows <= 8]
    return {**first, "rows": min(rows for shape, rows in shapes if shape == shapes[-1][0])}


def cost(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device, config: Mapping[str, Any]) -> float:
    """Half-cycles of all cores, about: two loads for each multiply-add."""
    return 2.0 * op.flops(*ins) / config["lanes"]


@template("conv", "cpu", space=SPACE, fits=RULES, prefer=prefer, cost=cost)
@template("conv_input_grad", "cpu", space=SPACE, fits=RULES, prefer=prefer, cost=cost)
def depthwise(
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
    """Pixels by channels, tap after tap."""
    g = _geometry(op, ins, outs)
    d, h, w = g.axes
    reverse = op.family == "conv_input_grad"
    channels, width = g.groups, vectors * lanes
    valid = min(channels, width)
    tail, last, panels = valid % lanes, channels - valid, -(-channels // width)
    (rows,) = _shape(op, ins, outs, rows)
    tile_size = rows * width
    size_d, size_h, size_w = d.size, h.size, w.size
    step_d, step_h, step_w, spread_d, spread_h, spread_w = d.step, h.step, w.step, d.spread, h.spread, w.spread
    count_d, count_h, count_w, taps_d, taps_h, taps_w = d.count, h.count, w.count, d.taps, h.taps, w.taps
    # by phase: the position in the source that output 0 reads with tap 0
    from_d, from_h, from_w = (tuple(first - axis.low for first in axis.first) for axis in g.axes)
    into_d, into_h, into_w, stride_d, stride_h, stride_w = d.into, h.into, w.into, d.into_step, h.into_step, w.into_step
    hole_d, hole_h, hole_w = d.hole, h.hole, w.hole
    phases, phases_h, phases_w = g.phases, h.phases, w.phases
    out_d, out_h, out_w = d.out, h.out, w.out
    window_h, window_w = (1, 1, *ins[1].shape[:-2])[-2:]
    most_d, most_h = max(count_d), max(count_h)
    lines = g.n * most_d * most_h * g.phases
    count = max(1, min(tasks, lines))
    step_c, stride_c = step_w * channels, stride_w * channels

    def tap_of(t, taps, stride, phase, hole):  # type: ignore[no-untyped-def]
        if not reverse:
            return t
        dense = phase + stride * (taps - 1 - t)
        return dense // hole if dense % hole == 0 else -1

    def write(acc, pixels, into, column, skip, y, sums, extras, at):  # type: ignore[no-untyped-def]
        store(acc, sums, 0, width, 0)
        for i in range(pixels):
            o, s, k = natural(into + i * stride_c + column), natural(i * width), natural(column)
            for j in range(skip, valid):
                y[o + j] = epilogue(sums[s + j], extras, o + j, k + j, at)

    def line_of(line, x, weights, y, sums, extras, at):  # type: ignore[no-untyped-def]
        phase, rest = line % phases, line // phases
        n, z, r_h = rest // (most_d * most_h), rest // most_h % most_d, rest % most_h
        p_d, p_h, p_w = phase // (phases_h * phases_w), phase // phases_w % phases_h, phase % phases_w
        if z >= count_d[p_d] or r_h >= count_h[p_h]:
            return
        n_d, n_h, n_w, across = taps_d[p_d], taps_h[p_h], taps_w[p_w], count_w[p_w]
        top_d, top_h, left = from_d[p_d] + z * step_d, from_h[p_h] + r_h * step_h, from_w[p_w]
        into_line = ((n * out_d + into_d[p_d] + z * stride_d) * out_h + into_h[p_h] + r_h * stride_h) * out_w
        o = 0
        while o < across:
            start = left + o * step_w
            # a whole tile where all of its taps lie inside, else a pixel
            inside = start >= 0 and o + rows <= across
            inside = inside and start + (rows - 1) * step_w + (n_w - 1) * spread_w < size_w
            pixels = rows if inside else 1
            lowest = 0 if start >= 0 else (-start + spread_w - 1) // spread_w
            highest = n_w if inside else min(n_w, (size_w - 1 - start) // spread_w + 1)
            into = (into_line + into_w[p_w] + o * stride_w) * channels
            for panel in range(panels):
                column = min(panel * width, last)
                skip = natural(panel * width - column)
                acc, single = zeros(1, rows, vectors, lanes, sums), zeros(1, 1, vectors, lanes, sums)
                for q in range(n_d):
                    at_d, tap_d = top_d + q * spread_d, tap_of(q, n_d, stride_d, p_d, hole_d)
                    if at_d < 0 or at_d >= size_d or tap_d < 0:
                        continue
                    for r in range(n_h):
                        at_h, tap_h = top_h + r * spread_h, tap_of(r, n_h, stride_h, p_h, hole_h)
                        if at_h < 0 or at_h >= size_h or tap_h < 0:
                            continue
                        source = (((n * size_d + at_d) * size_h + at_h) * size_w + start) * channels + column
                        taps = (tap_d * window_h + tap_h) * window_w * channels + column
                        for s in range(lowest, highest):
                            tap = tap_of(s, n_w, stride_w, p_w, hole_w)
                            if tap < 0:
                                continue
                            at_x, at_w = source + s * spread_w * channels, taps + tap * channels
                            if inside:
                                acc = columns(acc, x, at_x, step_c, weights, at_w, tail)
                            else:
                                single = columns(single, x, at_x, step_c, weights, at_w, tail)
                if inside:
                    write(acc, rows, into, column, skip, y, sums, extras, at)
                else:
                    write(single, 1, into, column, skip, y, sums, extras, at)
            o += pixels

    def body(task, x, weights, y, extras, at):  # type: ignore[no-untyped-def]
        sums = local(tile_size, y)
        for line in range(task * lines // count, (task + 1) * lines // count):
            line_of(line, x, weights, y, sums, extras, at)

    return Loop(body, count)
