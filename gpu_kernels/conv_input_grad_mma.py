"""The gradient of a convolution's input on tensor cores: convolutions of dy with some taps in reverse order.

    dx[i, c] = sum over (tap, k) of dy[(i + padding - tap * dilation) / stride, k] * w[tap, c, k]

Pixels i of one phase, that is with one remainder by the stride, meet the same taps; each phase is a dense product of
its pixels by channels, over its taps and filters, and nothing is multiplied by zeros that strides put in between.
A stride of 1 has one phase. Each phase has some of a kernel's blocks, those with most taps first; one without taps
writes zeros, or what is fused into the op.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product as every
from math import gcd, prod
from typing import Any

from rapydli_flow.spec import Spec
from rapydli_flow.template import Device, Epilogue, template

from .async_tiles import copy_async, place_of
from .conv import geometry
from .grid import INDEX_LIMIT, Grid, blocks_of
from .mma import Part, Problem, Scatter, Tile, cut, multiply, vector_of
from .mma_loaders import Loader, moves, nothing, rows_loader
from .mma_rules import settings
from .mma_window import Slide, pixels_loader, reach
from .ptx import unroll
from .tensor_core import kind_of


@dataclass(frozen=True)
class Axis:
    """A phase of one axis: its pixels, and its taps ``first + v * step``."""

    phase: int
    out: int
    first: int
    step: int
    taps: int
    start: int
    far: int


def axis(size: int, window: int, stride: int, low: int, dilation: int) -> list[Axis]:
    """The phases of an axis."""
    found = []
    for phase in range(min(stride, size)):
        taps = [r for r in range(window) if (phase + low - r * dilation) % stride == 0]
        first, step = taps[0] if taps else 0, stride // gcd(stride, dilation)
        start = (phase + low - first * dilation) // stride
        out = blocks_of(size - phase, stride)
        found.append(Axis(phase, out, first, step, len(taps), start, -(step * dilation) // stride))
    return found


@dataclass(frozen=True)
class Phase:
    """A dense product: how it reads dy, which taps of the window it has, and which pixels of dx."""

    slide: Slide
    window: tuple[int, ...]
    first: tuple[int, ...]
    step: tuple[int, ...]
    scatter: Scatter | None


def phases(op: Any, dy: Spec, w: Spec, dx: Spec) -> list[Phase]:
    g = geometry(op, dx, w, dy)
    found = []
    for axes in every(*map(axis, g.size, g.window, g.stride, g.low, g.dilation)):
        out, start, far = (tuple(getattr(a, name) for a in axes) for name in ("out", "start", "far"))
        first, step, taps = (tuple(getattr(a, name) for a in axes) for name in ("first", "step", "taps"))
        slide = Slide(g.out, out, taps, (1, 1, 1), start, far)
        scatter = Scatter(out, g.size, g.stride, tuple(a.phase for a in axes))
        found.append(Phase(slide, g.window, first, step, scatter if max(g.stride) > 1 else None))
    return sorted(found, key=lambda phase: -prod(phase.slide.window))


def problems(op: Any, ins: Sequence[Spec], outs: Sequence[Spec]) -> list[Problem]:
    """For each phase its pixels by channels of a group, over taps and filters."""
    dy, w = ins
    c, k, pitch = w.shape[-2], w.shape[-1] // op.groups, outs[0].shape[-1]
    vector = vector_of(dy.dtype, k, w.shape[-1])
    lie = {"rows_a": True, "rows_b": True, "batch": op.groups, "base": (k, k, c), "pitch": pitch, "state": 2}
    return [
        Problem(
            dy.dtype,
            kind_of(op, dy.dtype),
            dy.shape[0] * prod(phase.slide.out),
            c,
            prod(phase.slide.window) * k,
            **lie,
            vector_a=vector,
            vector_b=vector,
        )
        for phase in phases(op, dy, w, outs[0])
    ]


def filters_loader(t: Tile, phase: Phase, channels: int, filters: int) -> Loader:
    """Columns are channels; the inner sum over (tap, filter): filters run along memory."""
    s, layout, inner = t.shares()[1], t.b.layout, t.p.k // prod(phase.slide.window)
    assert s is not None, "copies of filters are not shared out evenly"
    begin, place, move = copy_async(t.p.dtype, s.vector), place_of(layout), moves(layout, s)
    (_, taps_h, taps_w), (_, high, wide) = phase.slide.window, phase.window
    (first_d, first_h, first_w), (step_d, step_h, step_w) = phase.first, phase.step
    one_tap = inner % layout.pitch == 0

    def copy(pointer: Any, shared: Any, to: Any, state: Any, base: Any, first: Any, k: Any, thread: Any) -> None:
        column = thread % s.across * s.vector
        if one_tap:
            tap = k // inner
            filter_0 = k % inner + column
        else:
            tap = (k + column) // inner
            filter_0 = (k + column) % inner
        at_d = tap // (taps_w * taps_h) * step_d + first_d
        at_h = tap // taps_w % taps_h * step_h + first_h
        at_w = tap % taps_w * step_w + first_w
        channel = first + thread // s.across
        element = (((at_d * high + at_h) * wide + at_w) * channels + channel) * filters + (base + filter_0)
        own = place(thread // s.across, column)
        for part in unroll(s.each):
            active = (k + column < t.p.k) & (channel + part * s.step < channels)
            target = (own ^ move[part][0]) + (to + move[part][1])
            begin(active, pointer, element + part * s.step * filters, shared, target)

    return Loader(nothing, copy)


def taps_in_bits(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device) -> bool:
    dy, w = ins
    return all(phase.slide.bits <= 31 for phase in phases(op, dy, w, outs[0]))


def in_reach(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device) -> bool:
    dy, w = ins
    return all(reach(phase.slide, dy.shape[0], dy.shape[-1]) < INDEX_LIMIT for phase in phases(op, dy, w, outs[0]))


RULES = {"taps in 31 bits": taps_in_bits, "taps in 32-bit indices": in_reach}


@template("conv_input_grad", "cuda", **settings(problems, RULES))
def tensor_cores(
    op: Any, ins: Sequence[Spec], outs: Sequence[Spec], epilogue: Epilogue, **config: Any
) -> tuple[Grid, ...]:
    """Tiles of mma.sync over pixels and channels, one dense product for each phase of the stride."""
    dy, w = ins
    parts = []
    for p, phase in zip(problems(op, ins, outs), phases(op, dy, w, outs[0]), strict=True):
        t = cut(p, config)
        a, b = t.shares()
        assert a is not None, "copies of pixels are not shared out evenly"
        assert b is not None, "copies of filters are not shared out evenly"
        if p.k:
            inner = p.k // prod(phase.slide.window)
            of_dy = {"pixels": p.m, "channels": dy.shape[-1], "inner": inner}
            loaders = (
                pixels_loader(p.dtype, t.a.layout, a, phase.slide, **of_dy),
                filters_loader(t, phase, p.n, w.shape[-1]),
            )
        else:  # nothing is copied
            loaders = rows_loader(p.dtype, t.a.layout, a, p.m, 0), rows_loader(p.dtype, t.b.layout, b, p.n, 0)
        parts.append(Part(t, *loaders, phase.scatter))
    return multiply(parts, epilogue)
