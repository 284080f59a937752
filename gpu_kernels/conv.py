"""Convolution by fused multiply-adds, as a matrix product that is never laid out (implicit GEMM), channels last.

    y[pixel, k] = sum over (tap, c) of x[pixel * stride + tap * dilation - padding, c] * w[tap, c, k]

Rows are the pixels of all images, columns the filters; the inner sum runs over (tap, channel), channels
fastest, so that neighbours of the sum are neighbours in memory. One and two spatial axes are three with
axes of size 1 in front. What lies in the padding is a load that is switched off. Groups are products of a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from rapydli_flow.spec import Spec
from rapydli_flow.template import Device, Epilogue, Rule, template

from .grid import INDEX_LIMIT, Grid
from .ptx import FAR, hold, inside, load, select, unroll
from .tile_space import declared
from .tiles import MEMBER, Loader, Product, Share, columns_loader, multiply, put_transposed


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


def window_loader(g: Geometry, dtype: str, pixels: int, inner: int, s: Share, *, pitch: int) -> Loader:
    """Rows of pixels: for each a thread keeps where its first tap lies, and adds the tap's offset.

    ``inner``: channels of a group.
    """
    read, keep = load(dtype, s.vector, constant=True), hold(s.vector)
    (depth, height, width), (_, high, wide), (_, taps_h, taps_w) = g.size, g.out, g.window
    (out_d, _, _), (ask_d, ask_h, _) = g.out, g.outside
    (step_d, step_h, step_w), (low_d, low_h, low_w), (far_d, far_h, far_w) = g.stride, g.low, g.dilation
    terms = prod(g.window) * inner

    def prepare(state: Any, first: Any, thread: Any, now: Any) -> None:
        for part in unroll(s.each):
            pixel = first + thread // s.across + part * s.step
            at_d = pixel // (wide * high) % out_d * step_d - low_d
            at_h = pixel // wide % high * step_h - low_h
            at_w = pixel % wide * step_w - low_w
            image = pixel // (wide * high * out_d)
            start = ((image * depth + at_d) * height + at_h) * width + at_w
            state[4 * part] = start * g.channels + now[MEMBER] * inner
            state[4 * part + 1] = at_d
            state[4 * part + 2] = at_h
            state[4 * part + 3] = select(pixel < pixels, at_w, -FAR)

    def fetch(pointer: Any, held: Any, state: Any, first: Any, k: Any, thread: Any, now: Any) -> None:
        at_k = k + thread % s.across * s.vector
        tap = at_k // inner
        tap_d = tap // (taps_w * taps_h) * far_d
        tap_h = tap // taps_w % taps_h * far_h
        tap_w = tap % taps_w * far_w
        offset = ((tap_d * height + tap_h) * width + tap_w) * g.channels + at_k % inner
        for part in unroll(s.each):
            active = (at_k < terms) & inside(state[4 * part + 3] + tap_w, width)
            if ask_h:
                active = active & inside(state[4 * part + 2] + tap_h, height)
            if ask_d:
                active = active & inside(state[4 * part + 1] + tap_d, depth)
            keep(held, part * s.vector, read(active, pointer, state[4 * part] + offset))

    return Loader(prepare, fetch, put_transposed(s, pitch), s.each * s.vector, pitch, 4 * s.each)


def product(op: Any, ins: Sequence[Spec], outs: Sequence[Spec]) -> Product:
    """Pixels by filters of a group, over taps and channels; for each pixel a thread keeps where its taps lie."""
    w, filters = ins[1], outs[0].shape[-1]
    own = filters // op.groups
    lie: dict[str, Any] = {"rows_a": True, "rows_b": False, "state": 3, "dtype": w.dtype}
    base = (w.shape[-2], own, own) if op.groups > 1 else (0, 0, 0)
    group: dict[str, Any] = {"batch": op.groups, "base": base, "pitch": filters, "channels": base[2]}
    return Product(outs[0].size // filters, own, prod(w.shape[:-1]), **lie, **group)


def vectors(
    op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device, *, vector_a: int, vector_b: int
) -> bool:
    """Loads of neighbours in the last axis lie within a group."""
    of_a, of_b = (spec.shape[-1] for spec in ins)
    return bool(of_a // op.groups % vector_a == 0 and of_b // op.groups % vector_b == 0)


def farthest(g: Geometry, images: int, pixels: int) -> int:
    """A bound of the elements that offsets of taps reach, inside or not."""
    reach = [abs(low) + (r + 32) * d + s for low, r, d, s in zip(g.low, g.window, g.dilation, g.stride, strict=True)]
    far = prod(size + 2 * more for size, more in zip(g.size, reach, strict=True))
    return (images * prod(g.size) + 2 * far + pixels * max(g.stride)) * g.channels


def _reach(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device, *, bm: int) -> bool:
    """Offsets of taps that lie outside are computed too."""
    x, w = ins
    return farthest(geometry(op, x, w, outs[0]), x.shape[0], bm) < INDEX_LIMIT


FITS: dict[str, Rule] = {"loads divide channels": vectors, "taps in 32-bit indices": _reach}


@template("conv", "cuda", **declared(FITS, product, largest=128 * 64))  # 128 x 128 spills
def implicit_gemm(
    op: Any, ins: Sequence[Spec], outs: Sequence[Spec], epilogue: Epilogue, **config: Any
) -> tuple[Grid, ...]:
    """Register tiles over pixels and filters."""
    x, w = ins
    p = product(op, ins, outs)
    t, a, b = p.cut(config)
    windows = window_loader(geometry(op, x, w, outs[0]), p.dtype, t.m, w.shape[-2], a, pitch=t.bm + config["pad"])
    filters = columns_loader(p.dtype, t.n, t.k, b, pitch=t.bn, line=p.pitch, base=p.base[1])
    return multiply(t, windows, filters, epilogue)
