"""The gradient of a convolution's filters by fused multiply-adds, channels last.

    dw[tap, c, k] = sum over pixels of x[pixel * stride + tap * dilation - padding, c] * dy[pixel, k]

Rows are (tap, channel), columns the filters, and the inner sum runs over the pixels of all images: few outputs for a
long sum, which is split over blocks. Both operands have rows or columns as neighbours in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

from rapydli_flow.spec import Spec
from rapydli_flow.template import Device, Epilogue, Rule, template

from .conv import Geometry, farthest, geometry, vectors
from .grid import INDEX_LIMIT, Grid
from .ptx import hold, inside, load, unroll
from .tile_space import declared
from .tiles import MEMBER, Loader, Product, Share, columns_loader, multiply, put_straight


def taps_loader(g: Geometry, dtype: str, pixels: int, inner: int, s: Share, *, pitch: int) -> Loader:
    """Rows of taps and channels: a thread keeps where its tap lies from a pixel, and finds each pixel.

    ``inner``: channels of a group.
    """
    read, keep = load(dtype, s.vector, constant=True), hold(s.vector)
    (depth, height, width), (out_d, high, wide), (_, taps_h, taps_w) = g.size, g.out, g.window
    rows = prod(g.window) * inner
    ask_d, ask_h, ask_w = g.outside
    (step_d, step_h, step_w), (low_d, low_h, low_w), (far_d, far_h, far_w) = g.stride, g.low, g.dilation
    dense = g.size == g.out and g.stride == (1, 1, 1) and prod(g.window) == 1 and g.low == (0, 0, 0)

    def prepare(state: Any, first: Any, thread: Any, now: Any) -> None:
        row = first + thread % s.across * s.vector
        tap = row // inner
        state[0] = tap // (taps_w * taps_h) * far_d - low_d
        state[1] = tap // taps_w % taps_h * far_h - low_h
        state[2] = tap % taps_w * far_w - low_w
        state[3] = row % inner + now[MEMBER] * inner

    def fetch(pointer: Any, held: Any, state: Any, first: Any, k: Any, thread: Any, now: Any) -> None:
        row = first + thread % s.across * s.vector
        at_k = k + thread // s.across
        for part in unroll(s.each):
            pixel = at_k + part * s.step
            active = (row < rows) & (pixel < pixels)
            if dense:
                keep(held, part * s.vector, read(active, pointer, pixel * g.channels + state[3]))
            else:
                at_d = pixel // (wide * high) % out_d * step_d + state[0]
                at_h = pixel // wide % high * step_h + state[1]
                at_w = pixel % wide * step_w + state[2]
                if ask_w:
                    active = active & inside(at_w, width)
                if ask_h:
                    active = active & inside(at_h, height)
                if ask_d:
                    active = active & inside(at_d, depth)
                line = (pixel // (wide * high * out_d) * depth + at_d) * height + at_h
                keep(held, part * s.vector, read(active, pointer, (line * width + at_w) * g.channels + state[3]))

    return Loader(prepare, fetch, put_straight(s, pitch), s.each * s.vector, pitch, 4)


def product(op: Any, ins: Sequence[Spec], outs: Sequence[Spec]) -> Product:
    """Taps and channels by filters of a group, over pixels."""
    dy, dw = ins[1], outs[0]
    filters = dw.shape[-1]
    own = filters // op.groups
    base = (dw.shape[-2], own, own) if op.groups > 1 else (0, 0, 0)
    group: dict[str, Any] = {"batch": op.groups, "base": base, "pitch": filters, "channels": base[2]}
    lie: dict[str, Any] = {"rows_a": False, "rows_b": False, "state": 2, "dtype": dy.dtype}
    return Product(prod(dw.shape[:-1]), own, dy.size // filters, **lie, **group)


def _reach(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device) -> bool:
    """Offsets of taps that lie outside are computed too."""
    return farthest(geometry(op, ins[0], outs[0], ins[1]), ins[0].shape[0], 64) < INDEX_LIMIT


FITS: dict[str, Rule] = {"loads divide channels": vectors, "taps in 32-bit indices": _reach}


@template("conv_filter_grad", "cuda", **declared(FITS, product, largest=128 * 64))
def implicit_gemm(
    op: Any, ins: Sequence[Spec], outs: Sequence[Spec], epilogue: Epilogue, **config: Any
) -> tuple[Grid, ...]:
    """Register tiles over taps, channels and filters; the sum over pixels in parts."""
    x, dy = ins
    p = product(op, ins, outs)
    t, a, b = p.cut(config)
    taps = taps_loader(geometry(op, x, outs[0], dy), p.dtype, t.k, outs[0].shape[-2], a, pitch=t.bm)
    return multiply(t, taps, columns_loader(p.dtype, t.n, t.k, b, pitch=t.bn, line=p.pitch, base=p.base[1]), epilogue)
