"""Convolution in fp32 as a matrix product that is never laid out (implicit GEMM), channels last.

    y[pixel, k] = sum over (tap, c) of x[pixel * stride + tap * dilation - padding, c] * w[tap, c, k]

Rows are the pixels of all images, columns the filters; the inner sum runs over (tap, channel), channels
fastest, so that neighbours of the sum are neighbours in memory. One and two spatial axes are three with
axes of size 1 in front. What lies in the padding is a load that is switched off.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from rapydli_flow.spec import Spec
from rapydli_flow.template import Config, Device, Epilogue, template

from . import tiles
from .grid import INDEX_LIMIT, Grid
from .ptx import FAR, hold, inside, load, select, unroll
from .tiles import SPACE, Loader, Product, Share, columns_loader, multiply, put_transposed


@dataclass(frozen=True)
class Geometry:
    """Three spatial axes, whatever the op has."""

    size: tuple[int, ...]
    out: tuple[int, ...]
    window: tuple[int, ...]
    stride: tuple[int, ...]
    low: tuple[int, ...]
    dilation: tuple[int, ...]
    channels: int

    @property
    def outside(self) -> tuple[bool, ...]:
        """For each axis: can a tap lie outside? The last axis is always asked: it also tells missing pixels."""
        last = [
            (o - 1) * s + (w - 1) * d - lo
            for o, s, w, d, lo in zip(self.out, self.stride, self.window, self.dilation, self.low, strict=True)
        ]
        ask = [lo > 0 or end >= size for lo, end, size in zip(self.low, last, self.size, strict=True)]
        return (*ask[:2], True)


def geometry(op: Any, x: Spec, w: Spec, y: Spec) -> Geometry:
    """Put axes of size 1 in front."""
    pad = 3 - len(op.stride)

    def three(values: Sequence[int], missing: int) -> tuple[int, ...]:
        return (*[missing] * pad, *values)

    low = three([low for low, _ in op.padding], 0)
    return Geometry(
        three(x.shape[1:-1], 1),
        three(y.shape[1:-1], 1),
        three(w.shape[:-2], 1),
        three(op.stride, 1),
        low,
        three(op.dilation, 1),
        x.shape[-1],
    )


def window_loader(g: Geometry, pixels: int, s: Share, pitch: int) -> Loader:
    """Rows of pixels: for each a thread keeps where its first tap lies, and adds the tap's offset."""
    read, keep = load("float32", s.vector, constant=True), hold(s.vector)
    (depth, height, width), (_, high, wide), (_, taps_h, taps_w) = g.size, g.out, g.window
    (out_d, _, _), (ask_d, ask_h, _) = g.out, g.outside
    (step_d, step_h, step_w), (low_d, low_h, low_w), (far_d, far_h, far_w) = g.stride, g.low, g.dilation
    inner = prod(g.window) * g.channels

    def prepare(state: Any, first: Any, thread: Any) -> None:
        for part in unroll(s.each):
            pixel = first + thread // s.across + part * s.step
            at_d = pixel // (wide * high) % out_d * step_d - low_d
            at_h = pixel // wide % high * step_h - low_h
            at_w = pixel % wide * step_w - low_w
            image = pixel // (wide * high * out_d)
            state[4 * part] = (((image * depth + at_d) * height + at_h) * width + at_w) * g.channels
            state[4 * part + 1] = at_d
            state[4 * part + 2] = at_h
            state[4 * part + 3] = select(pixel < pixels, at_w, -FAR)

    def fetch(pointer: Any, held: Any, state: Any, first: Any, k: Any, thread: Any) -> None:
        at_k = k + thread % s.across * s.vector
        tap = at_k // g.channels
        tap_d = tap // (taps_w * taps_h) * far_d
        tap_h = tap // taps_w % taps_h * far_h
        tap_w = tap % taps_w * far_w
        offset = ((tap_d * height + tap_h) * width + tap_w) * g.channels + at_k % g.channels
        for part in unroll(s.each):
            active = (at_k < inner) & inside(state[4 * part + 3] + tap_w, width)
            if ask_h:
                active = active & inside(state[4 * part + 2] + tap_h, height)
            if ask_d:
                active = active & inside(state[4 * part + 1] + tap_d, depth)
            keep(held, part * s.vector, read(active, pointer, state[4 * part] + offset))

    return Loader(prepare, fetch, put_transposed(s, pitch), s.each * s.vector, pitch, 4 * s.each)


def product(op: Any, ins: Sequence[Spec], outs: Sequence[Spec]) -> Product:
    """Pixels by filters, over taps and channels; for each pixel a thread keeps where its taps lie."""
    filters = outs[0].shape[-1]
    return Product(outs[0].size // filters, filters, prod(ins[1].shape[:-1]), rows_a=True, rows_b=False, state=3)


def _ungrouped(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device) -> bool:
    return bool(op.groups == 1)


def _vectors(
    op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device, *, vector_a: int, vector_b: int
) -> bool:
    return ins[0].shape[-1] % vector_a == 0 and ins[1].shape[-1] % vector_b == 0


def _reach(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device, *, bm: int) -> bool:
    """Offsets of taps that lie outside are computed too."""
    x, w = ins
    g = geometry(op, x, w, outs[0])
    reach = [abs(low) + (r + 32) * d + s for low, r, d, s in zip(g.low, g.window, g.dilation, g.stride, strict=True)]
    far = prod(size + 2 * more for size, more in zip(g.size, reach, strict=True)) * x.shape[-1]
    return x.size + 2 * far + bm * max(g.stride) * x.shape[-1] < INDEX_LIMIT


RULES = {
    "float32 operands": tiles.fp32,
    "no groups": _ungrouped,
    "loads divide channels": _vectors,
    "taps in 32-bit indices": _reach,
    **tiles.rules(product),
}


def prefer(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device) -> Config:
    filters = outs[0].shape[-1]
    tried = tiles.prefer(outs[0].size // max(1, filters), filters, device, largest=128 * 64)  # 128 x 128 spills
    return tiles.first(RULES, op, ins, outs, device, tried)


@template("conv", "cuda", space=SPACE, fits=RULES, prefer=prefer)
def implicit_gemm(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], epilogue: Epilogue, **config: Any) -> Grid:
    """Register tiles over pixels and filters."""
    t, a, b = product(op, ins, outs).cut(config)
    windows = window_loader(geometry(op, *ins, outs[0]), t.m, a, t.bm + config["pad"])
    return multiply(t, windows, columns_loader(t.n, t.k, b, t.bn), epilogue)
