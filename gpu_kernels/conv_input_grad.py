"""The gradient of a convolution's input by fused multiply-adds, channels last: the transposed convolution.

    dx[i, c] = sum over k, taps r and pixels h with h * stride + r * dilation - padding = i of dy[h, k] * w[r, c, k]

Which taps reach i is decided by its remainder modulo the stride: its phase. The pixels of a phase are a dense
problem, a convolution of dy with every stride-th tap, backwards::

    i       0  1  2  3  4  5  6      stride 2, window 3, padding 1:
    phase   0  1  0  1  0  1  0      phase 0 is reached by tap 1 alone, phase 1 by taps 0 and 2

One launch computes all phases, each with the taps that it has, so that no product with zero is computed. Where no tap
reaches a phase its sum is empty. Rows are the pixels of a phase, columns the channels; the inner sum runs over (tap,
filter), filters fastest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd, prod
from typing import Any

from rapydli_flow.spec import Spec
from rapydli_flow.template import Device, Epilogue, Rule, template

from .conv import Geometry, geometry
from .grid import INDEX_LIMIT, Grid, blocks_of
from .ptx import FAR, cuda, hold, inside, int32, load, select, unroll
from .tile_space import declared
from .tiles import INNER, MEMBER, Loader, Product, Share, multiply, put_transposed

FIRST, TAPS, START, PHASE = 2, 5, 8, 11  # in what a block computes now, for three axes: see `Axis`


@dataclass(frozen=True)
class Axis:
    """One axis of a strided gradient. Pixel ``i = q * stride + phase`` is reached by the taps ``first + j * hop``, from
    the pixel ``q + start - j * back`` of dy."""

    size: int
    read: int
    window: int
    stride: int
    low: int
    dilation: int

    @property
    def phases(self) -> int:
        return min(self.stride, self.size)

    @property
    def pixels(self) -> int:
        """Of the longest phase."""
        return blocks_of(self.size, self.stride)

    @property
    def common(self) -> int:
        return gcd(self.stride, self.dilation)

    @property
    def hop(self) -> int:
        return self.stride // self.common

    @property
    def back(self) -> int:
        return self.dilation // self.common

    @property
    def turn(self) -> int:
        """Times a phase modulo `hop`: its first tap."""
        return pow(self.back, -1, self.hop) if self.hop > 1 else 0

    @property
    def most(self) -> int:
        """Taps of the phase that has most."""
        return blocks_of(self.window, self.hop)

    @property
    def even(self) -> bool:
        """Have all phases as many taps?"""
        return self.common == 1 and self.window % self.hop == 0

    @property
    def above(self) -> int:
        """So many strides make `start` positive."""
        return self.window * self.dilation + abs(self.low) + 1

    def taps(self, phase: int) -> int:
        """How many reach a phase."""
        at = (phase + self.low) % self.stride
        return (
            (self.window + self.hop - 1 - at // self.common * self.turn % self.hop)
            // self.hop
            * (at % self.common == 0)
        )


def axes(g: Geometry) -> tuple[Axis, ...]:
    each = zip(g.size, g.out, g.window, g.stride, g.low, g.dilation, strict=True)
    return tuple(Axis(*values) for values in each)


def begin_phase(of: tuple[Axis, ...], filters: int) -> Any:
    """What a block computes now; the last phases, which have most taps where there is little padding, come first."""
    d, h, w = of
    count = d.phases * h.phases * w.phases

    def along(now: Any, axis: Any, phase: Any) -> None:
        at = (phase + of[axis].low % of[axis].stride) % of[axis].stride
        now[PHASE + axis] = phase
        now[FIRST + axis] = at // of[axis].common * of[axis].turn % of[axis].hop
        if of[axis].even:
            now[TAPS + axis] = of[axis].most
        else:
            taps = (of[axis].window + of[axis].hop - 1 - now[FIRST + axis]) // of[axis].hop
            now[TAPS + axis] = select(at % of[axis].common < 1, taps, 0)
        start = phase + (of[axis].low + of[axis].above * of[axis].stride) - now[FIRST + axis] * of[axis].dilation
        now[START + axis] = start // of[axis].stride - of[axis].above

    def begin(now: Any, number: Any) -> None:
        phase = count - 1 - number
        along(now, 0, phase // (h.phases * w.phases))
        along(now, 1, phase // w.phases % h.phases)
        along(now, 2, phase % w.phases)
        now[INNER] = now[TAPS] * now[TAPS + 1] * now[TAPS + 2] * filters

    return begin


def split_tap(of: tuple[Axis, ...]) -> Any:
    """``(place, tap, now)``: which of the phase's taps this is along each axis."""
    _, h, w = of

    def procedure(place: Any, tap: Any, now: Any) -> None:
        if w.even:
            place[2] = tap % w.most
            rest = tap // w.most
        else:
            some_w = select(now[TAPS + 2] < 1, 1, now[TAPS + 2])
            place[2] = tap % some_w
            rest = tap // some_w
        if h.even:
            place[1] = rest % h.most
            place[0] = rest // h.most
        else:
            some_h = select(now[TAPS + 1] < 1, 1, now[TAPS + 1])
            place[1] = rest % some_h
            place[0] = rest // some_h

    return procedure


def pixels_loader(g: Geometry, dtype: str, p: Product, filters: int, s: Share, *, pitch: int) -> Loader:
    """Rows of pixels of dy: for each a thread keeps where the phase's first tap is read, and goes back from there.

    ``filters``: of a group.
    """
    of = axes(g)
    read, keep = load(dtype, s.vector, constant=True), hold(s.vector)
    split = split_tap(of)
    (_, high, wide), (read_d, read_h, read_w) = (one.pixels for one in of), g.out
    deep = of[0].pixels
    line = filters * p.batch

    def prepare(state: Any, first: Any, thread: Any, now: Any) -> None:
        for part in unroll(s.each):
            pixel = first + thread // s.across + part * s.step
            at_d = pixel // (wide * high) % deep + now[START]
            at_h = pixel // wide % high + now[START + 1]
            at_w = pixel % wide + now[START + 2]
            image = pixel // (wide * high * deep)
            place = ((image * read_d + at_d) * read_h + at_h) * read_w + at_w
            state[4 * part] = place * line + now[MEMBER] * filters
            state[4 * part + 1] = at_d
            state[4 * part + 2] = at_h
            state[4 * part + 3] = select(pixel < p.m, at_w, -FAR)

    def fetch(pointer: Any, held: Any, state: Any, first: Any, k: Any, thread: Any, now: Any) -> None:
        back = cuda.local.array(3, int32)
        at_k = k + thread % s.across * s.vector
        split(back, at_k // filters, now)
        back_d = back[0] * of[0].back
        back_h = back[1] * of[1].back
        back_w = back[2] * of[2].back
        offset = ((back_d * read_h + back_h) * read_w + back_w) * line - at_k % filters
        for part in unroll(s.each):
            active = (at_k < now[INNER]) & inside(state[4 * part + 3] - back_w, read_w)
            if read_h > 1 or of[1].window > 1:
                active = active & inside(state[4 * part + 2] - back_h, read_h)
            if read_d > 1 or of[0].window > 1:
                active = active & inside(state[4 * part + 1] - back_d, read_d)
            keep(held, part * s.vector, read(active, pointer, state[4 * part] - offset))

    return Loader(prepare, fetch, put_transposed(s, pitch), s.each * s.vector, pitch, 4 * s.each)


def filters_loader(g: Geometry, dtype: str, p: Product, filters: int, s: Share, *, pitch: int) -> Loader:
    """Columns of channels: the filters of the phase's taps, which run along memory."""
    of = axes(g)
    read, keep = load(dtype, s.vector, constant=True), hold(s.vector)
    split = split_tap(of)
    _, high, wide = g.window
    line = filters * p.batch

    def prepare(state: Any, first: Any, thread: Any, now: Any) -> None:
        state[0] = (first + thread // s.across) * line + now[MEMBER] * filters

    def fetch(pointer: Any, held: Any, state: Any, first: Any, k: Any, thread: Any, now: Any) -> None:
        which = cuda.local.array(3, int32)
        at_k = k + thread % s.across * s.vector
        split(which, at_k // filters, now)
        tap_d = now[FIRST] + which[0] * of[0].hop
        tap_h = now[FIRST + 1] + which[1] * of[1].hop
        tap_w = now[FIRST + 2] + which[2] * of[2].hop
        start = ((tap_d * high + tap_h) * wide + tap_w) * (p.n * line) + at_k % filters + state[0]
        row = first + thread // s.across
        for part in unroll(s.each):
            active = (row + part * s.step < p.n) & (at_k < now[INNER])
            keep(held, part * s.vector, read(active, pointer, start + part * s.step * line))

    return Loader(prepare, fetch, put_transposed(s, pitch), s.each * s.vector, pitch)


def locate_pixels(g: Geometry, p: Product) -> Any:
    """Where a pixel of the phase lies in dx."""
    d, h, w = axes(g)

    def locate(spot: Any, row: Any, now: Any) -> None:
        at_d = row // (w.pixels * h.pixels) % d.pixels * d.stride + now[PHASE]
        at_h = row // w.pixels % h.pixels * h.stride + now[PHASE + 1]
        at_w = row % w.pixels * w.stride + now[PHASE + 2]
        image = row // (w.pixels * h.pixels * d.pixels)
        there = (row < p.m) & (at_w < w.size) & (at_h < h.size) & (at_d < d.size)
        spot[0] = (((image * d.size + at_d) * h.size + at_h) * w.size + at_w) * p.pitch + now[MEMBER] * p.base[2]
        spot[1] = select(there, 1, 0)

    return locate


def product(op: Any, ins: Sequence[Spec], outs: Sequence[Spec]) -> Product:
    """Pixels of a phase by channels of a group, over the phase's taps and filters."""
    dy, w = ins
    g = geometry(op, outs[0], w, dy)
    of = axes(g)
    own, filters = w.shape[-2], w.shape[-1] // op.groups
    base = (filters, filters, own) if op.groups > 1 else (0, 0, 0)
    rows = dy.shape[0] * prod(one.pixels for one in of)
    taps = prod(sum(one.taps(phase) for phase in range(one.phases)) for one in of)
    lie: dict[str, Any] = {"rows_a": True, "rows_b": True, "state": 3, "dtype": dy.dtype}
    group: dict[str, Any] = {"batch": op.groups, "base": base, "pitch": own * op.groups, "channels": base[2]}
    phases, work = prod(one.phases for one in of), float(op.groups * rows * own * filters * taps)
    return Product(rows, own, prod(one.most for one in of) * filters, **lie, **group, phases=phases, work=work)


def _vectors(
    op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device, *, vector_a: int, vector_b: int
) -> bool:
    """Loads of neighbouring filters lie within a group."""
    filters = ins[1].shape[-1] // op.groups
    return bool(filters % vector_a == 0 and filters % vector_b == 0)


def _reach(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device, *, bm: int) -> bool:
    """Offsets of taps that lie outside are computed too."""
    dy, w = ins
    g = geometry(op, outs[0], w, dy)
    far = [one.above + one.pixels + one.most * one.back + 32 * one.back for one in axes(g)]
    return (dy.shape[0] * prod(g.out) + 2 * prod(far) + bm) * dy.shape[-1] < INDEX_LIMIT


FITS: dict[str, Rule] = {"loads divide filters": _vectors, "taps in 32-bit indices": _reach}


@template("conv_input_grad", "cuda", **declared(FITS, product, largest=128 * 64))
def implicit_gemm(
    op: Any, ins: Sequence[Spec], outs: Sequence[Spec], epilogue: Epilogue, **config: Any
) -> tuple[Grid, ...]:
    """Register tiles over pixels of a phase and channels."""
    dy, w = ins
    p = product(op, ins, outs)
    t, a, b = p.cut(config)
    g, filters = geometry(op, outs[0], w, dy), w.shape[-1] // op.groups
    pixels = pixels_loader(g, p.dtype, p, filters, a, pitch=t.bm + config["pad"])
    of_taps = filters_loader(g, p.dtype, p, filters, b, pitch=t.bn + config["pad"])
    begin = begin_phase(axes(g), filters)
    if p.phases == 1:
        return multiply(t, pixels, of_taps, epilogue, begin=begin)
    return multiply(t, pixels, of_taps, epilogue, begin=begin, locate=locate_pixels(g, p))
