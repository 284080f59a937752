"""Linear interpolation over 1 to 3 spatial axes, and its gradient: a thread has a few channels of one place.

    resize         y[o] = sum over the two nearest elements along each axis of weight * x[...]
    resize_grad    dx[i] = sum over the o that i is near to of weight * dy[o]

Positions are whole numbers of half steps, without rounding: element o of ``new`` lies at q / (2 new) of ``size``
elements, q = max(0, (2 o + 1) size - new); so its nearest element is q // (2 new), and the share of the next one is
the rest over 2 new. Along an axis that keeps its size the element itself has weight 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rapydli_flow.spec import Spec
from rapydli_flow.template import Device, Epilogue, Rule, template

from .access import plus_times, product_of, ratio, spread
from .adaptive_pool import SPACE, prefer
from .copies import countable
from .grid import INDEX_LIMIT, Grid, blocks_of
from .pair import held
from .pool_geometry import channels_fit, three
from .ptx import cuda, load, select, take, unroll
from .tail import tail

WRITTEN_OUT = 16  # terms of an element that are written out


def _positions(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device) -> bool:
    """Do positions fit into 32 bits?"""
    sizes = zip(ins[0].shape[1:-1], outs[0].shape[1:-1], strict=True)
    return all((2 * max(a, b) + 4) * max(a, b) < INDEX_LIMIT for a, b in sizes)


RULES: dict[str, Rule] = {
    "channels in vectors": channels_fit,
    "32-bit indices": countable,
    "32-bit positions": _positions,
}


@dataclass(frozen=True)
class Axis:
    """From ``size`` elements to ``new``."""

    size: int
    new: int

    @property
    def taps(self) -> int:
        return 1 if self.size == self.new else 2

    def low(self, i: int) -> int:
        """The first element that takes of element i, or one before it."""
        return 0 if i == 0 else ((2 * i - 1) * self.new + self.size) // (2 * self.size)

    @property
    def reach(self) -> int:
        """The most elements that take of one, from `low` on."""
        if self.size == self.new:
            return 1
        nearest = [max(0, (2 * o + 1) * self.size - self.new) // (2 * self.new) for o in range(self.new)]
        last = {i: o for o, near in enumerate(nearest) for i in (near, min(near + 1, self.size - 1))}
        return max(o - self.low(i) + 1 for i, o in last.items())


def _axes(old: Spec, new: Spec) -> tuple[Axis, Axis, Axis]:
    d, h, w = (Axis(*pair) for pair in zip(three(old.shape[1:-1], 1), three(new.shape[1:-1], 1), strict=True))
    return d, h, w


@template("resize", "cuda", space=SPACE, fits=RULES, prefer=prefer)
def interpolated(
    op: Any, ins: Sequence[Spec], outs: Sequence[Spec], epilogue: Epilogue, *, threads: int, vector: int
) -> Grid:
    """Each element of y by one thread."""
    out, lanes = outs[0], vector
    (d, h, w), channels, kind = _axes(ins[0], out), out.shape[-1], np.dtype(held(out.dtype)).type
    panels, total = channels // lanes, out.size // lanes
    read, end = load(out.dtype, lanes, constant=True), tail(epilogue, lanes)
    start, add, result = spread(lanes, 0.0), plus_times(lanes), take(lanes)
    over_d, over_h, over_w = (ratio(out.dtype, 2 * axis.new) for axis in (d, h, w))

    def kernel(ins: Any, outs: Any, work: Any, extras: Any, at: Any) -> None:
        thread = cuda.blockIdx.x * threads + cuda.threadIdx.x
        on = thread < total
        channel = thread % panels * lanes
        place = thread // panels
        o_w = place % w.new
        o_h = place // w.new % h.new
        o_d = place // (w.new * h.new) % d.new
        image = place // (w.new * h.new * d.new)
        far_d = (2 * o_d + 1) * d.size
        far_h = (2 * o_h + 1) * h.size
        far_w = (2 * o_w + 1) * w.size
        q_d = select(far_d > d.new, far_d - d.new, 0)
        q_h = select(far_h > h.new, far_h - h.new, 0)
        q_w = select(far_w > w.new, far_w - w.new, 0)
        acc = cuda.local.array(lanes, kind)
        start(acc)
        for i in unroll(d.taps):
            part_d = q_d % (2 * d.new) * i + (2 * d.new - q_d % (2 * d.new)) * (1 - i)
            near_d = q_d // (2 * d.new) + i
            at_d = select(near_d < d.size, near_d, d.size - 1)
            for j in unroll(h.taps):
                part_h = q_h % (2 * h.new) * j + (2 * h.new - q_h % (2 * h.new)) * (1 - j)
                near_h = q_h // (2 * h.new) + j
                at_h = select(near_h < h.size, near_h, h.size - 1)
                for k in unroll(w.taps):
                    part_w = q_w % (2 * w.new) * k + (2 * w.new - q_w % (2 * w.new)) * (1 - k)
                    near_w = q_w // (2 * w.new) + k
                    at_w = select(near_w < w.size, near_w, w.size - 1)
                    source = (((image * d.size + at_d) * h.size + at_h) * w.size + at_w) * channels + channel
                    weight = product_of(product_of(over_d(part_d), over_h(part_h)), over_w(part_w))
                    add(acc, 0, read(on, ins[0], source), weight)
        end.finish(on, outs[0], result(acc, 0), thread * lanes, channel, extras, at)

    return Grid(kernel, blocks_of(total, threads), threads)


@template("resize_grad", "cuda", space=SPACE, fits=RULES, prefer=prefer)
def returned(
    op: Any, ins: Sequence[Spec], outs: Sequence[Spec], epilogue: Epilogue, *, threads: int, vector: int
) -> Grid:
    """Each element of dx by one thread, which asks all elements that may have taken of it how much."""
    out, lanes = outs[0], vector
    (d, h, w), channels, kind = _axes(out, ins[0]), out.shape[-1], np.dtype(held(out.dtype)).type
    panels, total = channels // lanes, out.size // lanes
    read, end = load(out.dtype, lanes, constant=True), tail(epilogue, lanes)
    start, add, result = spread(lanes, 0.0), plus_times(lanes), take(lanes)
    over_d, over_h, over_w = (ratio(out.dtype, 2 * axis.new) for axis in (d, h, w))
    reach_d, reach_h, reach_w = d.reach, h.reach, w.reach
    inner = unroll if reach_w <= WRITTEN_OUT else range

    def kernel(ins: Any, outs: Any, work: Any, extras: Any, at: Any) -> None:
        thread = cuda.blockIdx.x * threads + cuda.threadIdx.x
        on = thread < total
        channel = thread % panels * lanes
        place = thread // panels
        i_w = place % w.size
        i_h = place // w.size % h.size
        i_d = place // (w.size * h.size) % d.size
        image = place // (w.size * h.size * d.size)
        low_d = select(i_d > 0, (2 * i_d * d.new + (d.size - d.new)) // (2 * d.size), 0)
        low_h = select(i_h > 0, (2 * i_h * h.new + (h.size - h.new)) // (2 * h.size), 0)
        low_w = select(i_w > 0, (2 * i_w * w.new + (w.size - w.new)) // (2 * w.size), 0)
        acc = cuda.local.array(lanes, kind)
        start(acc)
        for a in range(reach_d):
            o_d = select(d.size == d.new, i_d, low_d + a)
            far_d = (2 * o_d + 1) * d.size
            q_d = select(far_d > d.new, far_d - d.new, 0)
            near_d = q_d // (2 * d.new)
            next_d = select(near_d + 1 < d.size, near_d + 1, d.size - 1)
            rest_d = q_d % (2 * d.new)
            part_d = select(near_d == i_d, 2 * d.new - rest_d, 0) + select(next_d == i_d, rest_d, 0)
            for b in range(reach_h):
                o_h = select(h.size == h.new, i_h, low_h + b)
                far_h = (2 * o_h + 1) * h.size
                q_h = select(far_h > h.new, far_h - h.new, 0)
                near_h = q_h // (2 * h.new)
                next_h = select(near_h + 1 < h.size, near_h + 1, h.size - 1)
                rest_h = q_h % (2 * h.new)
                part_h = select(near_h == i_h, 2 * h.new - rest_h, 0) + select(next_h == i_h, rest_h, 0)
                in_row = on & (o_d < d.new) & (o_h < h.new) & (part_d > 0) & (part_h > 0)
                for c in inner(reach_w):
                    o_w = select(w.size == w.new, i_w, low_w + c)
                    far_w = (2 * o_w + 1) * w.size
                    q_w = select(far_w > w.new, far_w - w.new, 0)
                    near_w = q_w // (2 * w.new)
                    next_w = select(near_w + 1 < w.size, near_w + 1, w.size - 1)
                    rest_w = q_w % (2 * w.new)
                    part_w = select(near_w == i_w, 2 * w.new - rest_w, 0) + select(next_w == i_w, rest_w, 0)
                    active = in_row & (o_w < w.new) & (part_w > 0)
                    source = (((image * d.new + o_d) * h.new + o_h) * w.new + o_w) * channels + channel
                    weight = product_of(product_of(over_d(part_d), over_h(part_h)), over_w(part_w))
                    add(acc, 0, read(active, ins[0], source), weight)
        end.finish(on, outs[0], result(acc, 0), thread * lanes, channel, extras, at)

    return Grid(kernel, blocks_of(total, threads), threads)
