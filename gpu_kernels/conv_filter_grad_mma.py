"""The gradient of a convolution's filters on tensor cores, the sum over pixels split over blocks.

    dw[tap, c, k] = sum over pixels of x[pixel * stride + tap * dilation - padding, c] * dy[pixel, k]

Rows are (tap, channel), columns filters. There are few outputs and many pixels, so the blocks of one output tile
share its pixels; what they found is added in a fixed order by a second kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

from rapydli_flow.spec import Spec
from rapydli_flow.template import Device, Epilogue, template

from .async_tiles import copy_async, place_of
from .grid import INDEX_LIMIT, Grid
from .mma import Part, Problem, Tile, cut, multiply, vector_of
from .mma_loaders import Loader, lines_loader, moves
from .mma_rules import SPACE, settings
from .mma_window import Slide, reach, slide
from .ptx import inside, unroll
from .tensor_core import kind_of


def slide_of(op: Any, ins: Sequence[Spec], outs: Sequence[Spec]) -> Slide:
    x, dy = ins
    return slide(op, x, outs[0], dy)


def problems(op: Any, ins: Sequence[Spec], outs: Sequence[Spec]) -> tuple[Problem]:
    """Taps and channels by filters of a group, over pixels."""
    x, dy = ins
    c, k = x.shape[-1] // op.groups, dy.shape[-1] // op.groups
    vector_a, vector_b = vector_of(x.dtype, c, x.shape[-1]), vector_of(x.dtype, k, dy.shape[-1])
    lie: dict[str, Any] = {"rows_a": False, "rows_b": False, "vector_a": vector_a, "vector_b": vector_b}
    group: dict[str, Any] = {"batch": op.groups, "base": (c, k, k), "pitch": dy.shape[-1]}
    kind, pixels = kind_of(op, x.dtype), dy.size // dy.shape[-1]
    return (Problem(x.dtype, kind, prod(op.window) * c, k, pixels, **lie, **group),)


def taps_loader(t: Tile, s: Slide, channels: int) -> Loader:
    """Rows are (tap, channel): a thread copies one tap's channels of different pixels."""
    of_a, layout, c = t.shares()[0], t.a.layout, t.p.m // prod(s.window)
    assert of_a is not None, "copies of pixels are not shared out evenly"
    share = of_a
    begin, place, move = copy_async(t.p.dtype, share.vector), place_of(layout), moves(layout, share)
    (depth, height, width), (out_d, high, wide), (_, taps_h, taps_w) = s.size, s.out, s.window
    (step_d, step_h, step_w), (start_d, start_h, start_w), (far_d, far_h, far_w) = s.step, s.start, s.far
    ask_d, ask_h, ask_w = (axis in s.asked for axis in range(3))

    def prepare(state: Any, first: Any, thread: Any) -> None:
        row = first + thread % share.across * share.vector
        tap = row // c
        state[0] = tap // (taps_w * taps_h) * far_d + start_d
        state[1] = tap // taps_w % taps_h * far_h + start_h
        state[2] = tap % taps_w * far_w + start_w
        state[3] = ((state[0] * height + state[1]) * width + state[2]) * channels + row % c

    def copy(pointer: Any, shared: Any, to: Any, state: Any, base: Any, first: Any, k: Any, thread: Any) -> None:
        column = thread % share.across * share.vector
        own = place(thread // share.across, column)
        there = first + column < t.p.m
        for part in unroll(share.each):
            pixel = k + thread // share.across + part * share.step
            at_d = pixel // (wide * high) % out_d * step_d
            at_h = pixel // wide % high * step_h
            at_w = pixel % wide * step_w
            image = pixel // (wide * high * out_d)
            active = there & (pixel < t.p.k)
            if ask_d:
                active = active & inside(at_d + state[0], depth)
            if ask_h:
                active = active & inside(at_h + state[1], height)
            if ask_w:
                active = active & inside(at_w + state[2], width)
            element = (((image * depth + at_d) * height + at_h) * width + at_w) * channels + (base + state[3])
            target = (own ^ move[part][0]) + (to + move[part][1])
            begin(active, pointer, element, shared, target)

    return Loader(prepare, copy, 4)


def loaders(t: Tile, s: Slide, channels: int) -> tuple[Loader, Loader]:
    """Of x and dy; x is a plain matrix where each pixel is read once."""
    p = t.p
    a, b = t.shares()
    assert a is not None, "copies of x are not shared out evenly"
    assert b is not None, "copies of dy are not shared out evenly"
    plain = prod(s.window) == 1 and s.size == s.out and s.step == (1, 1, 1) and s.start == (0, 0, 0)
    of_x = lines_loader(p.dtype, t.a.layout, a, p.m, p.k, channels) if plain else taps_loader(t, s, channels)
    return of_x, lines_loader(p.dtype, t.b.layout, b, p.n, p.k, p.row_pitch)


def in_reach(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device) -> bool:
    x = ins[0]
    return reach(slide_of(op, ins, outs), x.shape[0], x.shape[-1]) < INDEX_LIMIT


SPLITS = {**SPACE, "splits": (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)}


@template("conv_filter_grad", "cuda", **settings(problems, {"taps in 32-bit indices": in_reach}, SPLITS))
def tensor_cores(
    op: Any, ins: Sequence[Spec], outs: Sequence[Spec], epilogue: Epilogue, **config: Any
) -> tuple[Grid, ...]:
    """Tiles of mma.sync over taps, channels and filters, split over pixels."""
    (p,) = problems(op, ins, outs)
    t = cut(p, config)
    return multiply([Part(t, *loaders(t, slide_of(op, ins, outs), ins[0].shape[-1]))], epilogue)
