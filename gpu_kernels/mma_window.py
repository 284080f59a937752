"""Pixels and their windows as operands of tensor-core products that are never laid out (implicit GEMM).

A `Slide` says which pixels of an image a result reads: result ``u`` of an axis and tap ``r`` read pixel
``u * step + start + r * far``. A convolution has ``step`` its stride, ``start`` its padding, negated, ``far`` its
dilation; the gradient of its input walks backwards (``far < 0``).

Which taps lie inside is found once for each pixel, as bits: of the taps of each axis that can lie outside, and one
that says that the pixel itself is there. In the loop over the inner sum a copy asks by one comparison.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Any

from rapydli_flow.spec import Spec

from .arithmetic import indexing
from .async_tiles import Layout, copy_async, place_of
from .conv import geometry
from .mma_loaders import Loader, moves
from .pair import Pair
from .ptx import select, unroll
from .tiles import Share


@dataclass(frozen=True)
class Slide:
    """Three spatial axes: sizes of the image that is read, results, taps, and how taps are found."""

    size: tuple[int, ...]
    out: tuple[int, ...]
    window: tuple[int, ...]
    step: tuple[int, ...]
    start: tuple[int, ...]
    far: tuple[int, ...]

    def reach(self, axis: int) -> tuple[int, int]:
        """The first and the last pixel that are read, inside or not."""
        ends = [0, (self.out[axis] - 1) * self.step[axis]], [0, (self.window[axis] - 1) * self.far[axis]]
        return self.start[axis] + sum(map(min, ends)), self.start[axis] + sum(map(max, ends))

    @property
    def asked(self) -> tuple[int, ...]:
        """Axes with taps that may lie outside."""
        return tuple(a for a in range(3) if self.reach(a)[0] < 0 or self.reach(a)[1] >= self.size[a])

    @property
    def bits(self) -> int:
        """How many a thread keeps for a pixel."""
        return 1 + sum(self.window[axis] for axis in self.asked)

    def first_bit(self, axis: int) -> int:
        return 1 + sum(self.window[a] for a in self.asked if a < axis)


def slide(op: Any, x: Spec, w: Spec, y: Spec) -> Slide:
    """How a convolution reads x."""
    g = geometry(op, x, w, y)
    return Slide(g.size, g.out, g.window, g.stride, tuple(-low for low in g.low), g.dilation)


def reach(s: Slide, images: int, channels: int) -> int:
    """The farthest element that an index names, inside or not, counted from the image."""
    ends = [max(abs(end) for end in s.reach(axis)) + s.size[axis] + 64 * abs(s.far[axis]) for axis in range(3)]
    return (images * prod(s.size) + 2 * prod(ends)) * channels


@cache
def taps_inside(s: Slide) -> Pair:
    """``(at_d, at_h, at_w) -> bits``: which taps of a pixel lie inside, for each axis, and one that is always set.

    ``at``: where the first taps lie.
    """

    def bits(at_d: Any, at_h: Any, at_w: Any) -> Any:
        found: Any = 1
        for axis, first in zip(s.asked, map(s.first_bit, s.asked), strict=True):
            for tap in range(s.window[axis]):
                at = (at_d, at_h, at_w)[axis] + tap * s.far[axis]
                is_outside = (at | s.size[axis] - 1 - at) >> 31 & 1  # one of them is negative
                found = (1 - is_outside << first + tap) | found
        return found if s.asked else at_d * 0 + 1

    return indexing("taps_inside", bits)


@cache
def bits_of_tap(s: Slide) -> Pair:
    """``(r_d, r_h, r_w) -> bits`` that a pixel must have for this tap."""

    def bits(*tap: Any) -> Any:
        found = tap[0] * 0 + 1
        for axis, first in zip(s.asked, map(s.first_bit, s.asked), strict=True):
            found = (1 << (tap[axis] + first & 31)) | found  # behind the last tap, 31 keeps the shift defined
        return found

    return indexing("bits_of_tap", lambda r_d, r_h, r_w: bits(r_d, r_h, r_w))


def _has_rule(bits: Any, wanted: Any) -> Any:
    from numba.cuda import types

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.icmp_unsigned("==", builder.and_(*args), args[1])

    return types.boolean, (types.int32, types.int32), emit


has = Pair("has", lambda bits, wanted: (bits & wanted) == wanted, _has_rule)


def pixels_loader(
    dtype: str, layout: Layout, s: Share, slide: Slide, *, pixels: int, channels: int, inner: int
) -> Loader:
    """Rows of results, the inner sum over (tap, channel): channels run along memory.

    ``inner``: the channels of a tap that are summed; ``channels``: those of a pixel in memory.
    """
    begin, place, move = copy_async(dtype, s.vector), place_of(layout), moves(layout, s)
    bits, wanted = taps_inside(slide), bits_of_tap(slide)
    (depth, height, width), (out_d, high, wide), (_, taps_h, taps_w) = slide.size, slide.out, slide.window
    (step_d, step_h, step_w), (start_d, start_h, start_w) = slide.step, slide.start
    (far_d, far_h, far_w), terms = slide.far, prod(slide.window) * inner
    one_tap = inner % layout.pitch == 0  # all copies of a step are of one tap

    def prepare(state: Any, first: Any, thread: Any) -> None:
        for part in unroll(s.each):
            pixel = first + thread // s.across + part * s.step
            at_d = pixel // (wide * high) % out_d * step_d + start_d
            at_h = pixel // wide % high * step_h + start_h
            at_w = pixel % wide * step_w + start_w
            image = pixel // (wide * high * out_d)
            state[2 * part] = (((image * depth + at_d) * height + at_h) * width + at_w) * channels
            state[2 * part + 1] = select(pixel < pixels, bits(at_d, at_h, at_w), 0)

    def copy(pointer: Any, shared: Any, to: Any, state: Any, base: Any, first: Any, k: Any, thread: Any) -> None:
        column = thread % s.across * s.vector
        if one_tap:
            tap = k // inner
            channel = k % inner + column
        else:
            tap = (k + column) // inner
            channel = (k + column) % inner
        tap_d = tap // (taps_w * taps_h)
        tap_h = tap // taps_w % taps_h
        tap_w = tap % taps_w
        need = select(k + column < terms, wanted(tap_d, tap_h, tap_w), -1)  # no pixel has all bits
        offset = ((tap_d * (far_d * height) + tap_h * far_h) * width + tap_w * far_w) * channels + (base + channel)
        own = place(thread // s.across, column)
        for part in unroll(s.each):
            active = has(state[2 * part + 1], need)
            begin(active, pointer, state[2 * part] + offset, shared, (own ^ move[part][0]) + (to + move[part][1]))

    return Loader(prepare, copy, 2 * s.each)
