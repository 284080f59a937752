"""Input gradient of a convolution as overlapping rows: every multiplication of it counts.

    row i of dx  =  sum over the (h, r) with h*stride + r*dilation - low = i, and over pixels o of dy[n, h], of

        dy[n, h, o, :] x w[r, :, (s, c)]     added at pixel o*stride - low of the row:

        o=0   [ s=0 | s=1 | s=2 ]                       the (s, c) of a row of taps follow each other
        o=1         [ s=0 | s=1 | s=2 ]                 in memory, both in w and in dx (stride 1 here)
        o=2               [ s=0 | s=1 | s=2 ]

A tile holds pixels o by (s, c); it sums over r and filters in registers before it is added to a row
buffer on the stack, so adding costs little. No zeros are multiplied, whatever padding and stride, and
few channels fill vectors because the taps stand beside them. Only for windows that are dense along the
last axis, and without groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rapydli_flow.spec import Spec
from rapydli_flow.template import Epilogue, Loop

from .buffer import local
from .conv_geometry import Sizes, sizes
from .tile import add, balanced, outer, store, zeros

BUFFER_BYTES = 1 << 16  # longest row that may lie on a stack


@dataclass(frozen=True)
class Overlap:
    """Extents of the input gradient along its three axes, and how they are cut."""

    n: int
    axes: tuple[Sizes, Sizes, Sizes]
    channels: int
    filters: int
    rows: int
    width: int

    @classmethod
    def of(cls, op: Any, ins: Sequence[Spec], outs: Sequence[Spec], *, rows: int, width: int) -> Overlap:
        dy, w, dx = ins[0].shape, ins[1].shape, outs[0].shape
        axes = sizes(op, dx[1:-1], dy[1:-1], w[:-2])
        return cls(dx[0], axes, dx[-1], dy[-1], balanced(axes[2].y, rows), width)

    @property
    def length(self) -> int:
        """(s, c) pairs of a row of taps."""
        return self.axes[2].window * self.channels

    @property
    def panels(self) -> int:
        return -(-self.length // self.width)

    @property
    def packed_size(self) -> int:
        return self.axes[0].window * self.axes[1].window * self.panels * self.filters * self.width

    @property
    def buffer_size(self) -> int:
        """A row with all that is added to it, inside dx or not, and a gap before it where dx begins earlier."""
        w = self.axes[2]
        reach = (w.y - 1) * w.stride + w.window
        return (max(0, -w.low) + max(reach, w.x + max(0, w.low))) * self.channels

    def run(self, tasks: int) -> int:
        """Rows of dx of each of about so many tasks."""
        return max(1, self.n * self.axes[0].x * self.axes[1].x // tasks)

    @property
    def multiplies(self) -> int:
        """Calls of `outer`, about."""
        d, h, w = self.axes
        pairs = d.window * h.window * min(d.y, d.x) * min(h.y, h.x)
        return self.n * pairs * -(-w.y // self.rows) * self.panels * self.filters


def overlaps(op: Any) -> bool:
    """Can this input gradient be computed so?"""
    return op.groups == 1 and op.dilation[-1] == 1


def overlapping(g: Overlap, epilogue: Epilogue, *, vectors: int, lanes: int, tasks: int) -> Loop:
    """The kernel; its workspace is the packed filters, [q][r][panel][filter][column]."""
    d, h, w_axis = g.axes
    panels, width, length, filters, channels = g.panels, g.width, g.length, g.filters, g.channels
    columns = min(width, length)
    last, even, tail = length - columns, panels * columns == length, columns % lanes
    rows, tile_count, last_pixel = g.rows, -(-w_axis.y // g.rows), w_axis.y - g.rows
    panel_size, tile_size, buffer_size = filters * width, g.rows * width, g.buffer_size
    window_d, window_h = d.window, h.window
    low_d, low_h, dilation_d, dilation_h, stride_d, stride_h = d.low, h.low, d.dilation, h.dilation, d.stride, h.stride
    y_d, y_h, y_w, x_d, x_h, x_w = d.y, h.y, w_axis.y, d.x, h.x, w_axis.x
    step, row_size = w_axis.stride * channels, w_axis.x * channels
    # dx[0] within the row buffer, and the first tap's pixel 0
    zero, origin = max(0, w_axis.low) * channels, max(0, -w_axis.low) * channels
    total = g.n * d.x * h.x
    run = g.run(tasks)

    def before(task, dy, w, dx, packed, unused, extras, at):  # type: ignore[no-untyped-def]
        taps, panel = task // panels, task % panels
        source, into = (taps * length + min(panel * width, last)) * filters, task * panel_size
        for j in range(width):
            for k in range(filters):
                packed[into + k * width + j] = w[source + j * filters + k] if j < columns else 0

    def row_of(buffer, n, z, i, dy, packed):  # type: ignore[no-untyped-def]
        sums = local(tile_size, buffer)
        for e in range(buffer_size):
            buffer[e] = 0
        for panel in range(panels):
            column = min(panel * width, last)
            skip = 0 if even else panel * width - column
            for tile in range(tile_count):
                first = min(tile * rows, last_pixel)
                acc = zeros(1, rows, vectors, lanes, sums)
                for q in range(window_d):
                    from_d = z + low_d - q * dilation_d
                    if from_d < 0 or from_d % stride_d != 0 or from_d // stride_d >= y_d:
                        continue
                    for r in range(window_h):
                        from_h = i + low_h - r * dilation_h
                        if from_h < 0 or from_h % stride_h != 0 or from_h // stride_h >= y_h:
                            continue
                        line = (n * y_d + from_d // stride_d) * y_h + from_h // stride_h
                        pixel = (line * y_w + first) * filters
                        weights = ((q * window_h + r) * panels + panel) * panel_size
                        for k in range(filters):
                            acc = outer(acc, dy, pixel + k, filters, 0, packed, weights + k * width, 0)
                if first == tile * rows and skip == 0:
                    add(acc, buffer, origin + first * step + column, step, tail)
                    continue
                store(acc, sums, 0, width, 0)
                for p in range(tile * rows - first, rows):
                    into = origin + (first + p) * step + column
                    for j in range(skip, columns):
                        buffer[into + j] += sums[p * width + j]

    def body(task, dy, w, dx, packed, unused, extras, at):  # type: ignore[no-untyped-def]
        buffer = local(buffer_size, dx)
        for row in range(task * run, min((task + 1) * run, total)):
            row_of(buffer, row // (x_h * x_d), row // x_h % x_d, row % x_h, dy, packed)
            for pixel in range(x_w):
                o = row * row_size + pixel * channels
                for c in range(channels):
                    value = buffer[zero + pixel * channels + c]
                    dx[o + c] = epilogue(value, extras, o + c, c, at)

    return Loop(body, -(-total // run), before=before, before_tasks=window_d * window_h * panels)
