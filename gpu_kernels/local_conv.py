"""Locally connected convolution and its gradients by fused multiply-adds: a product of its own at each position.

    y[n, h, k]     = sum over r, c of x[n, h * stride + r - padding, c] * w[h, r, c, k]
    dx[n, i, c]    = sum over h, r with h * stride + r - padding = i, and over k, of dy[n, h, k] * w[h, r, c, k]
    dw[h, r, c, k] = sum over n of x[n, h * stride + r - padding, c] * dy[n, h, k]

Positions are the products of a batch: samples by filters over (tap, channel), samples by channels over (tap, filter),
and (tap, channel) by filters over samples. Taps that do not reach a position are loads that are switched off.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

from rapydli_flow.spec import Spec
from rapydli_flow.template import Device, Epilogue, template

from .conv import Geometry
from .grid import Grid
from .ptx import hold, inside, load, unroll
from .tile_space import declared
from .tiles import (
    MEMBER,
    Loader,
    Product,
    Share,
    columns_loader,
    multiply,
    nothing,
    put_straight,
    put_transposed,
)


def geometry(op: Any, x: Spec, window: Sequence[int], y: Spec) -> Geometry:
    """Three spatial axes, with axes of size 1 in front."""
    missing = 3 - len(op.stride)

    def three(values: Sequence[int], of: int) -> tuple[int, ...]:
        return (*[of] * missing, *values)

    low = three([low for low, _ in op.padding], 0)
    sizes = three(x.shape[1:-1], 1), three(y.shape[1:-1], 1), three(window, 1)
    return Geometry(*sizes, three(op.stride, 1), low, (1, 1, 1), x.shape[-1])


def samples_loader(g: Geometry, dtype: str, samples: int, s: Share, *, pitch: int, along_rows: bool) -> Loader:
    """Taps and channels of x at a position by samples. ``along_rows``: samples are rows, else the inner sum."""
    read, keep = load(dtype, s.vector, constant=True), hold(s.vector)
    (depth, height, width), (_, high, wide), (_, taps_h, taps_w) = g.size, g.out, g.window
    (step_d, step_h, step_w), (low_d, low_h, low_w) = g.stride, g.low
    terms = prod(g.window) * g.channels

    def fetch(pointer: Any, held: Any, state: Any, first: Any, k: Any, thread: Any, now: Any) -> None:
        term = thread % s.across * s.vector
        sample = thread // s.across
        if along_rows:
            term = term + k
            sample = sample + first
        else:
            term = term + first
            sample = sample + k
        tap = term // g.channels
        at_d = now[MEMBER] // (wide * high) * step_d + tap // (taps_w * taps_h) - low_d
        at_h = now[MEMBER] // wide % high * step_h + tap // taps_w % taps_h - low_h
        at_w = now[MEMBER] % wide * step_w + tap % taps_w - low_w
        there = (term < terms) & inside(at_d, depth) & inside(at_h, height) & inside(at_w, width)
        place = ((at_d * height + at_h) * width + at_w) * g.channels + term % g.channels
        for part in unroll(s.each):
            active = there & (sample + part * s.step < samples)
            start = (sample + part * s.step) * (depth * height * width * g.channels)
            keep(held, part * s.vector, read(active, pointer, start + place))

    place = put_transposed(s, pitch) if along_rows else put_straight(s, pitch)
    return Loader(nothing, fetch, place, s.each * s.vector, pitch)


def reaching_loader(g: Geometry, dtype: str, rows: int, filters: int, s: Share, *, pitch: int, weights: bool) -> Loader:
    """Taps and filters that reach a position of x: of dy by samples, or (``weights``) of w by channels."""
    read, keep = load(dtype, s.vector, constant=True), hold(s.vector)
    (_, height, width), (deep, high, wide), (_, taps_h, taps_w) = g.size, g.out, g.window
    (step_d, step_h, step_w), (low_d, low_h, low_w) = g.stride, g.low
    above = max(g.window) + max(map(abs, g.low)) + 1  # so many strides make places positive
    taps, positions = prod(g.window), prod(g.out)

    def fetch(pointer: Any, held: Any, state: Any, first: Any, k: Any, thread: Any, now: Any) -> None:
        term = k + thread % s.across * s.vector
        row = first + thread // s.across
        tap = term // filters
        from_d = now[MEMBER] // (width * height) + (low_d + above * step_d) - tap // (taps_w * taps_h)
        from_h = now[MEMBER] // width % height + (low_h + above * step_h) - tap // taps_w % taps_h
        from_w = now[MEMBER] % width + (low_w + above * step_w) - tap % taps_w
        there = (term < taps * filters) & inside(from_d // step_d - above, deep)
        there = there & inside(from_h // step_h - above, high) & inside(from_w // step_w - above, wide)
        if step_d > 1:
            there = there & (from_d % step_d < 1)
        if step_h > 1:
            there = there & (from_h % step_h < 1)
        if step_w > 1:
            there = there & (from_w % step_w < 1)
        position = ((from_d // step_d - above) * high + from_h // step_h - above) * wide + from_w // step_w - above
        for part in unroll(s.each):
            active = there & (row + part * s.step < rows)
            if weights:
                line = (position * taps + tap) * g.channels + row + part * s.step
            else:
                line = (row + part * s.step) * positions + position
            keep(held, part * s.vector, read(active, pointer, line * filters + term % filters))

    return Loader(nothing, fetch, put_transposed(s, pitch), s.each * s.vector, pitch)


def _forward(op: Any, ins: Sequence[Spec], outs: Sequence[Spec]) -> Product:
    """Samples by filters over taps and channels, for each position."""
    x, w = ins
    n, filters = len(op.stride), w.shape[-1]
    positions, terms = prod(w.shape[:n]), prod(w.shape[n:-1])
    base = (0, terms * filters, filters)
    lie: dict[str, Any] = {"rows_a": True, "rows_b": False, "state": 3, "dtype": x.dtype}
    return Product(x.shape[0], filters, terms, **lie, batch=positions, base=base, pitch=positions * filters)


def _backward(op: Any, ins: Sequence[Spec], outs: Sequence[Spec]) -> Product:
    """Samples by channels over taps and filters, for each position of x."""
    dy, w = ins
    n, channels = len(op.stride), w.shape[-2]
    positions, terms = prod(outs[0].shape[1:-1]), prod(w.shape[n:-2]) * w.shape[-1]
    lie: dict[str, Any] = {"rows_a": True, "rows_b": True, "state": 3, "dtype": dy.dtype}
    return Product(
        dy.shape[0], channels, terms, **lie, batch=positions, base=(0, 0, channels), pitch=positions * channels
    )


def _filters(op: Any, ins: Sequence[Spec], outs: Sequence[Spec]) -> Product:
    """Taps and channels by filters over samples, for each position."""
    x, dy = ins
    n, filters = len(op.stride), dy.shape[-1]
    positions, terms = prod(dy.shape[1:-1]), prod(outs[0].shape[n:-1])
    base = (0, filters, terms * filters)
    lie: dict[str, Any] = {"rows_a": False, "rows_b": False, "state": 3, "dtype": dy.dtype}
    return Product(terms, filters, x.shape[0], **lie, batch=positions, base=base)


def _vectors(
    op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device, *, vector_a: int, vector_b: int
) -> bool:
    return ins[0].shape[-1] % vector_a == 0 and ins[1].shape[-1] % vector_b == 0


FITS = {"loads divide channels": _vectors}


@template("local_conv", "cuda", **declared(FITS, _forward, largest=128 * 64))
def untied(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], epilogue: Epilogue, **config: Any) -> tuple[Grid, ...]:
    """Register tiles over samples and filters at each position."""
    x, w = ins
    p = _forward(op, ins, outs)
    t, a, b = p.cut(config)
    g = geometry(op, x, op.window_of(w), outs[0])
    of_x = samples_loader(g, p.dtype, p.m, a, pitch=t.bm + config["pad"], along_rows=True)
    return multiply(t, of_x, columns_loader(p.dtype, t.n, t.k, b, pitch=t.bn, base=p.base[1]), epilogue)


@template("local_conv_input_grad", "cuda", **declared(FITS, _backward, largest=128 * 64))
def untied_input_grad(
    op: Any, ins: Sequence[Spec], outs: Sequence[Spec], epilogue: Epilogue, **config: Any
) -> tuple[Grid, ...]:
    """Register tiles over samples and channels at each position of x."""
    dy, w = ins
    p = _backward(op, ins, outs)
    t, a, b = p.cut(config)
    g = geometry(op, outs[0], op.window_of(w), dy)
    of_dy = reaching_loader(g, p.dtype, p.m, w.shape[-1], a, pitch=t.bm + config["pad"], weights=False)
    of_w = reaching_loader(g, p.dtype, p.n, w.shape[-1], b, pitch=t.bn + config["pad"], weights=True)
    return multiply(t, of_dy, of_w, epilogue)


@template("local_conv_filter_grad", "cuda", **declared(FITS, _filters, largest=128 * 64))
def untied_filter_grad(
    op: Any, ins: Sequence[Spec], outs: Sequence[Spec], epilogue: Epilogue, **config: Any
) -> tuple[Grid, ...]:
    """Register tiles over taps, channels and filters at each position."""
    x, dy = ins
    p = _filters(op, ins, outs)
    t, a, b = p.cut(config)
    g = geometry(op, x, op.window, dy)
    of_x = samples_loader(g, p.dtype, p.k, a, pitch=t.bm, along_rows=False)
    line = p.batch * p.n
    return multiply(t, of_x, columns_loader(p.dtype, t.n, t.k, b, pitch=t.bn, line=line, base=p.base[1]), epilogue)
