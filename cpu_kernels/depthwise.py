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

from .buffer import local
from .conv_geometry import Axis, Geometry, backward, forward, geometry
from .tile import balanced, columns, store, zeros
from .tile_rules import tile_rules

FAR_BYTES = 1 << 24  # operands and result that come from memory
SPACE: dict[str, tuple[Any, ...]] = {
    "rows": (4, 6, 8, 3, 12, 2, 1),
    "vectors": (2, 1, 3, 4),
    "lanes": (16, 8, 4, 2),
    "tasks": (32, 16, 128),
}


def one_each(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device) -> bool:
    """A filter for each channel, and something to compute."""
    channels = outs[0].shape[-1]
    return op.groups == channels == ins[0].shape[-1] and all(spec.size for spec in (*ins, *outs))


def _geometry(op: Any, ins: Sequence[Spec], outs: Sequence[Spec]) -> Geometry:
    return geometry(op, ins, outs, slide=backward if op.family == "conv_input_grad" else forward)


def _inside(axis: Axis, phase: int) -> tuple[int, int]:
    """The outputs of a phase whose taps all lie in the source: from, to."""
    start, taps = axis.first[phase] - axis.low, axis.taps[phase]
    low = max(0, -(start // axis.step))
    high = (axis.size - 1 - start - (taps - 1) * axis.spread) // axis.step + 1
    return min(low, axis.count[phase]), max(min(low, axis.count[phase]), min(high, axis.count[phase]))


def _shape(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], rows: int) -> tuple[int, ...]:
    """Tiles are cut so that the outputs whose taps lie inside are shared out evenly."""
    axis = _geometry(op, ins, outs).axes[2]
    fewest = min((high - low for low, high in (_inside(axis, p) for p in range(axis.phases)) if high > low), default=1)
    return (balanced(fewest, rows),)


def channels_of(op: Any, ins: Sequence[Spec], outs: Sequence[Spec]) -> int:
    """What vectors share out."""
    return outs[0].shape[-1]


RULES = {"a filter for each channel": one_each, **tile_rules(_shape, channels_of, SPACE["rows"])}


def prefer(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device) -> dict[str, Any]:
    """As many pixels as hide the latency of a multiply-add, or whole lines of memory one after the other."""
    lanes = device.vector_bytes // np.dtype(outs[0].dtype).itemsize
    vectors = 2 if outs[0].shape[-1] > lanes else 1
    first = {"vectors": vectors, "lanes": lanes, "tasks": SPACE["tasks"][0]}
    if not one_each(op, ins, outs, device):
        return {**first, "rows": SPACE["rows"][0]}
    if outs[0].shape[-1] >= 4 * lanes and sum(spec.size_bytes for spec in (*ins, *outs)) > FAR_BYTES:
        return {**first, "vectors": 4, "rows": 1}
    shapes = [(_shape(op, ins, outs, rows), rows) for rows in (3, 4, 6, 8) if rows * vectors <= 8]
    return {**first, "rows": min(rows for shape, rows in shapes if shape == shapes[-1][0])}


def cost(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device, config: Mapping[str, Any]) -> float:
    """Half-cycles of all cores, about: two loads for each multiply-add."""
    return 2.0 * op.flops(*ins) / config["lanes"]


@template("conv", "cpu", space=SPACE, fits=RULES, prefer=prefer, cost=cost, joins=True)
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
    even = panels * valid == channels
    plain = epilogue.identity and panels * width == channels
    size_d, size_h, size_w = d.size, h.size, w.size
    step_d, step_h, step_w, spread_d, spread_h, spread_w = d.step, h.step, w.step, d.spread, h.spread, w.spread
    count_d, count_h, count_w, taps_d, taps_h, taps_w = d.count, h.count, w.count, d.taps, h.taps, w.taps
    # by phase: the position in the source that output 0 reads with tap 0, and which outputs have all taps inside
    from_d, from_h, from_w = (tuple(first - axis.low for first in axis.first) for axis in g.axes)
    lows, highs = zip(*(_inside(w, p) for p in range(w.phases)), strict=True)
    into_d, into_h, into_w, stride_d, stride_h, stride_w = d.into, h.into, w.into, d.into_step, h.into_step, w.into_step
    hole_d, hole_h, hole_w = d.hole, h.hole, w.hole
    phases, phases_h, phases_w = g.phases, h.phases, w.phases
    single, all_w = phases == 1, w.taps[0]
    out_d, out_h, out_w = d.out, h.out, w.out
    window_h, window_w = (1, 1, *ins[1].shape[:-2])[-2:]
    most_d, most_h = max(count_d), max(count_h)
    lines = g.n * most_d * most_h * phases
    count = max(1, min(tasks, lines))
    step_c, spread_c, line_size = step_w * channels, spread_w * channels, size_w * channels
    first_column, row_size = epilogue.rows

    def tap_of(t, taps, stride, phase, hole):  # type: ignore[no-untyped-def]
        if not reverse:
            return t
        dense = phase + stride * (taps - 1 - t)
        if single:
            return dense
        return dense // hole if dense % hole == 0 else -1

    def write(acc, first, pixels, into, column, skip, y, sums, extras, at):  # type: ignore[no-untyped-def]
        if plain:  # rows before the first one get what they have already
            store(acc, y, into * row_size + first_column + column, stride_w * row_size, 0)
            return
        store(acc, sums, 0, width, 0)
        for i in range(first, pixels):
            pixel, s, k = into + i * stride_w, i * width, column
            o, at_y = pixel * channels + column, pixel * row_size + first_column + column
            for j in range(skip, valid):
                y[at_y + j] = epilogue(sums[s + j], extras, o + j, k + j, at)

    def tile(line, o, first, pixels, acc_of, low_s, high_s, x, weights, y, sums, extras, at):  # type: ignore[no-untyped-def]
        # outputs o, o + 1, ... of a line, as many as acc_of has rows; those from `first` are written
        phase, rest = line % phases, line // phases
        n, z, r_h = rest // (most_d * most_h), rest // most_h % most_d, rest % most_h
        p_d, p_h, p_w = phase // (phases_h * phases_w), phase // phases_w % phases_h, phase % phases_w
        n_d, n_h, n_w = taps_d[p_d], taps_h[p_h], taps_w[p_w]
        top_d, top_h, start = from_d[p_d] + z * step_d, from_h[p_h] + r_h * step_h, from_w[p_w] + o * step_w
        into = ((n * out_d + into_d[p_d] + z * stride_d) * out_h + into_h[p_h] + r_h * stride_h) * out_w
        into += into_w[p_w] + o * stride_w
        # rows of taps that lie inside
        low_r = 0 if top_h >= 0 else (-top_h + spread_h - 1) // spread_h
        high_r = min(n_h, (size_h - 1 - top_h) // spread_h + 1)
        for panel in range(panels):
            column = min(panel * width, last)
            skip = 0 if even else panel * width - column
            acc = acc_of
            for q in range(n_d):
                at_d, tap_d = top_d + q * spread_d, tap_of(q, n_d, stride_d, p_d, hole_d)
                if at_d < 0 or at_d >= size_d or tap_d < 0:
                    continue
                for r in range(low_r, high_r):
                    tap_h = tap_of(r, n_h, stride_h, p_h, hole_h)
                    if tap_h < 0:
                        continue
                    row = ((n * size_d + at_d) * size_h + top_h + r * spread_h) * line_size + start * channels + column
                    taps = (tap_d * window_h + tap_h) * window_w * channels + column
                    for s in range(low_s, high_s):
                        tap = tap_of(s, n_w, stride_w, p_w, hole_w)
                        if tap >= 0:
                            acc = columns(acc, x, row + s * spread_c, step_c, weights, taps + tap * channels, tail)
            write(acc, first, pixels, into, column, skip, y, sums, extras, at)

    def line_of(line, x, weights, y, sums, extras, at):  # type: ignore[no-untyped-def]
        phase, rest = line % phases, line // phases
        p_d, p_h, p_w = phase // (phases_h * phases_w), phase // phases_w % phases_h, phase % phases_w
        if rest // most_h % most_d >= count_d[p_d] or rest % most_h >= count_h[p_h]:
            return
        low, high, n_w = lows[p_w], highs[p_w], taps_w[p_w]
        many, one = zeros(1, rows, vectors, lanes, sums), zeros(1, 1, vectors, lanes, sums)
        if high - low < rows:
            high = low
        for begin in range(low, high, rows):
            o = min(begin, high - rows)
            n_s = all_w if single else n_w
            tile(line, o, begin - o, rows, many, 0, n_s, x, weights, y, sums, extras, at)
        for i in range(low + count_w[p_w] - high):
            o = i if i < low else high + i - low
            start = from_w[p_w] + o * step_w
            low_s = 0 if start >= 0 else (-start + spread_w - 1) // spread_w
            high_s = min(n_w, (size_w - 1 - start) // spread_w + 1)
            tile(line, o, 0, 1, one, low_s, high_s, x, weights, y, sums, extras, at)

    def body(task, x, weights, y, extras, at):  # type: ignore[no-untyped-def]
        sums = local(tile_size, y)
        for line in range(task * lines // count, (task + 1) * lines // count):
            line_of(line, x, weights, y, sums, extras, at)

    return Loop(body, count)
