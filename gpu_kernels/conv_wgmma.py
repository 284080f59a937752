"""Convolutions and their gradients on Hopper's tensor cores, channels last.

The copy engine knows convolutions: a box of pixels steps through the images as outputs do, and a tap is an offset. So
each is a matrix product whose operands come as they lie:

    y[pixel, k]     += x[pixel at tap, 64 c] w[tap, 64 c, k]           pixels, mn-major
    dx[pixel, c]    += dy[pixel at tap, 64 k] w[turned tap, c, 64 k]   pixels, k-major; stride 1
    dw[tap, c, k]   += x[64 pixels at tap, c] dy[64 pixels, k]         mn-major, mn-major; pixels split over blocks

What lies in the padding, after the last channel or the last pixel, is zero.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from rapydli_flow.spec import Spec
from rapydli_flow.template import Device, Epilogue, template

from . import wgmma as machinery
from . import wgmma_passes as passes
from .grid import Grid, TensorMap, blocks_of
from .hopper import LINES, copy, depth_of
from .ptx import unroll
from .tensor_core import kind_of
from .wgmma import SPACE, SPLIT_SPACE, SPLITS, Operand, Rows, Tile, box_operand, cut, products

CORNERS = {1: 2**15, 2: 2**7, 3: 2**4}  # of a box of pixels, by the number of spatial axes
TAPS = {1: 2**16, 2: 2**8, 3: 2**5}
STEPS = 8


@dataclass(frozen=True)
class Walk:
    """Pixels of images of ``size``, as a window visits them ``out`` times in ``steps``; its first tap starts at
    ``lower``."""

    images: int
    size: tuple[int, ...]
    channels: int
    out: tuple[int, ...]
    window: tuple[int, ...]
    lower: tuple[int, ...]
    steps: tuple[int, ...]
    dilation: tuple[int, ...]
    dtype: str

    @property
    def pixels(self) -> int:
        return self.images * prod(self.out)

    @property
    def blocks_c(self) -> int:
        """Lines of channels."""
        return blocks_of(self.channels, depth_of(self.dtype))

    @property
    def upper(self) -> tuple[int, ...]:
        """Where the last visit is, as the copy engine wants it: counted from the end of the image, exclusive."""
        every = zip(self.lower, self.out, self.steps, self.size, strict=True)
        return tuple(low + (out - 1) * step + 1 - size for low, out, step, size in every)

    @property
    def supported(self) -> bool:
        n = len(self.size)
        corners = all(-CORNERS[n] <= corner < CORNERS[n] for corner in (*self.lower, *self.upper))
        taps = all((w + 3) * d < TAPS[n] for w, d in zip(self.window, self.dilation, strict=True))
        return corners and taps and max(self.steps) <= STEPS

    def map(self, array: int, pixels: int) -> TensorMap:
        dims = (self.channels, *self.size[::-1], self.images)
        pitches = tuple(prod(dims[: i + 1]) for i in range(len(dims) - 1))
        corners = {"lower": self.lower[::-1], "upper": self.upper[::-1], "steps": self.steps[::-1]}
        return TensorMap(array, self.dtype, dims, pitches, (depth_of(self.dtype), pixels), **corners)


def pixel_copy(w: Walk, index: int) -> Callable[..., None]:
    """``(maps, barriers, i, tiles, line, pixel, channel, tap)``: begin to copy pixels from one on."""
    begin = copy(len(w.size) + 2, pixels=True)
    (out_d, out_h, out_w), (_, taps_h, taps_w), (far_d, far_h, far_w) = map(_three, (w.out, w.window, w.dilation))
    low_d, low_h, low_w = _three(w.lower)
    step_d, step_h, step_w = _three(w.steps)

    def one(maps: Any, bars: Any, i: Any, tiles: Any, line: Any, pixel: Any, channel: Any, tap: Any) -> None:
        at = pixel % out_w * step_w + low_w
        begin(maps[index], bars, i, tiles, line, channel, at, pixel // out_w, tap * far_w)

    def two(maps: Any, bars: Any, i: Any, tiles: Any, line: Any, pixel: Any, channel: Any, tap: Any) -> None:
        at_w = pixel % out_w * step_w + low_w
        at_h = pixel // out_w % out_h * step_h + low_h
        image = pixel // (out_w * out_h)
        begin(
            maps[index], bars, i, tiles, line, channel, at_w, at_h, image, tap % taps_w * far_w, tap // taps_w * far_h
        )

    def three(maps: Any, bars: Any, i: Any, tiles: Any, line: Any, pixel: Any, channel: Any, tap: Any) -> None:
        at_w = pixel % out_w * step_w + low_w
        at_h = pixel // out_w % out_h * step_h + low_h
        at_d = pixel // (out_w * out_h) % out_d * step_d + low_d
        image = pixel // (out_w * out_h * out_d)
        tap_w = tap % taps_w * far_w
        tap_h = tap // taps_w % taps_h * far_h
        tap_d = tap // (taps_w * taps_h) * far_d
        begin(maps[index], bars, i, tiles, line, channel, at_w, at_h, at_d, image, tap_w, tap_h, tap_d)

    return {1: one, 2: two, 3: three}[len(w.size)]


def _three(values: Sequence[int]) -> tuple[int, ...]:
    return (*[1] * (3 - len(values)), *values)


def window_operand(w: Walk, rows: int) -> Operand:
    """Rows are pixels; the inner sum runs over taps, and lines of channels."""
    begin, blocks_c, depth = pixel_copy(w, 0), w.blocks_c, depth_of(w.dtype)

    def fetch(maps: Any, bars: Any, i: Any, tiles: Any, line: Any, first: Any, step: Any) -> None:
        begin(maps, bars, i, tiles, line, first, step % blocks_c * depth, step // blocks_c)

    return Operand((w.map(0, rows),), False, fetch)


def filter_operand(w: Spec, rows: int, *, gradient: bool) -> Operand:
    """Halves: columns are filters, the inner sum runs over taps and 64s of channels; for a gradient the other way
    round, and the taps from the last to the first."""
    taps, (c, k) = prod(w.shape[:-2]), w.shape[-2:]
    blocks_c, blocks_k, begin = blocks_of(c, LINES), blocks_of(k, LINES), copy(3)
    box = (LINES, rows, 1) if gradient else (LINES, LINES, 1)
    maps = (TensorMap(1, w.dtype, (k, c, taps), (k, c * k), box),)

    def forward(maps: Any, bars: Any, i: Any, tiles: Any, line: Any, first: Any, step: Any) -> None:
        for part in unroll(rows // LINES):
            column, at = first + part * LINES, step % blocks_c * LINES
            begin(maps[1], bars, i, tiles, line + part * LINES, column, at, step // blocks_c)

    def backward(maps: Any, bars: Any, i: Any, tiles: Any, line: Any, first: Any, step: Any) -> None:
        begin(maps[1], bars, i, tiles, line, step % blocks_k * LINES, first, (taps - 1) - step // blocks_k)

    return Operand(maps, not gradient, backward if gradient else forward)


# ---- forward, and gradient of the input


def forward_walk(op: Any, ins: Sequence[Spec], outs: Sequence[Spec]) -> Walk:
    x, w, y = ins[0].shape, ins[1].shape, outs[0].shape
    lower = tuple(-low for low, _ in op.padding)
    return Walk(x[0], x[1:-1], x[-1], y[1:-1], w[:-2], lower, op.stride, op.dilation, ins[0].dtype)


def backward_walk(op: Any, ins: Sequence[Spec], outs: Sequence[Spec]) -> Walk:
    """Of dy, by dx: the window is turned round, so that its first tap is the last."""
    dy, w, dx = ins[0].shape, ins[1].shape, outs[0].shape
    reach = zip(w, op.dilation, op.padding, strict=False)
    lower = tuple(low - (taps - 1) * far for taps, far, (low, _) in reach)
    return Walk(dy[0], dy[1:-1], dy[-1], dx[1:-1], w[:-2], lower, (1,) * len(op.stride), op.dilation, ins[0].dtype)


def _size(walk: Callable[..., Walk]) -> machinery.Size:
    def size(op: Any, ins: Sequence[Spec], outs: Sequence[Spec]) -> tuple[int, int, int]:
        w = walk(op, ins, outs)
        return w.pixels, outs[0].shape[-1], prod(w.window) * w.blocks_c

    return size


def _supported(walk: Callable[..., Walk]) -> Callable[..., bool]:
    """No groups, and 16 bytes everywhere; corners, taps and steps that the copy engine can count to."""

    def supported(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device) -> bool:
        return op.groups == 1 and machinery.wide(*ins, *outs) and walk(op, ins, outs).supported

    return supported


def _unit_stride(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device) -> bool:
    return all(step == 1 for step in op.stride)


def _rules(
    walk: Callable[..., Walk], size: machinery.Size, *, across: bool = False, more: machinery.Rules | None = None
) -> dict[str, Any]:
    alone = {"a Hopper": machinery.card, "floats": machinery.floats, **(more or {})}
    return {**alone, "a walk of the copy engine": _supported(walk), **machinery.rules(size, lambda op: across)}


def _filters(w: Spec, *, gradient: bool) -> tuple[int, int, int]:
    """Taps, the length of the inner sum for each, and columns."""
    length, columns = w.shape[:-3:-1] if gradient else w.shape[-2:]
    return prod(w.shape[:-2]), length, columns


def _filters_laid_out(*, gradient: bool) -> Callable[..., tuple[Spec, ...]]:
    def workspace(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], **config: Any) -> tuple[Spec, ...]:
        kind = kind_of(op, ins[0].dtype)
        return passes.laid_out(kind, ins[1], *_filters(ins[1], gradient=gradient))

    return workspace


def _with_filters(t: Tile, a: Operand, w: Spec, epilogue: Epilogue, *, gradient: bool) -> tuple[Grid, ...]:
    if t.kind == "half":
        return (products(t, a, filter_operand(w, t.bn, gradient=gradient), epilogue),)
    taps, inner, columns = _filters(w, gradient=gradient)
    first = passes.lay_out(t.kind, w, taps, inner, columns, along=gradient)
    return (first, products(t, a, machinery.lines_operand(t, taps, inner, turned=gradient), epilogue))


forward_size, backward_size = _size(forward_walk), _size(backward_walk)
FORWARD = _rules(forward_walk, forward_size)
BACKWARD = _rules(backward_walk, backward_size, more={"stride 1": _unit_stride})


@template(
    "conv",
    "cuda",
    space=SPACE,
    fits=FORWARD,
    prefer=machinery.preferring(FORWARD, forward_size),
    cost=machinery.costing(forward_size),
    workspace=_filters_laid_out(gradient=False),
)
def wgmma(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], epilogue: Epilogue, **config: Any) -> tuple[Grid, ...]:
    """Warpgroup products of pixels and filters."""
    t = cut(op, ins[0].dtype, forward_size(op, ins, outs), config)
    return _with_filters(t, window_operand(forward_walk(op, ins, outs), t.bm), ins[1], epilogue, gradient=False)


@template(
    "conv_input_grad",
    "cuda",
    space=SPACE,
    fits=BACKWARD,
    prefer=machinery.preferring(BACKWARD, backward_size),
    cost=machinery.costing(backward_size),
    workspace=_filters_laid_out(gradient=True),
)
def wgmma_turned(
    op: Any, ins: Sequence[Spec], outs: Sequence[Spec], epilogue: Epilogue, **config: Any
) -> tuple[Grid, ...]:
    """The convolution of dy with the filters turned round, for stride 1."""
    t = cut(op, ins[0].dtype, backward_size(op, ins, outs), config)
    return _with_filters(t, window_operand(backward_walk(op, ins, outs), t.bm), ins[1], epilogue, gradient=True)


# ---- gradient of the filters


def filter_walk(op: Any, ins: Sequence[Spec], outs: Sequence[Spec]) -> Walk:
    x, dy, lower = ins[0].shape, ins[1].shape, tuple(-low for low, _ in op.padding)
    return Walk(x[0], x[1:-1], x[-1], dy[1:-1], op.window, lower, op.stride, op.dilation, ins[0].dtype)


def filter_size(op: Any, ins: Sequence[Spec], outs: Sequence[Spec]) -> tuple[int, int, int]:
    """Rows are taps of 64s of channels; what is beyond the last channel is computed, but not stored."""
    w = filter_walk(op, ins, outs)
    depth = depth_of(w.dtype)
    return prod(w.window) * w.blocks_c * depth, outs[0].shape[-1], blocks_of(w.pixels, depth)


def filter_workspace(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], **config: Any) -> tuple[Spec, ...]:
    """float32: dy, with pixels along lines; then the sums of splits."""
    kind, pixels = kind_of(op, ins[0].dtype), filter_walk(op, ins, outs).pixels
    laid_out = passes.laid_out(kind, ins[1], 1, pixels, outs[0].shape[-1])
    return laid_out + passes.split_sums(op, ins, outs, **config)


FILTERS = _rules(filter_walk, filter_size, across=True)


@template(
    "conv_filter_grad",
    "cuda",
    space=SPLIT_SPACE,
    fits=FILTERS,
    prefer=machinery.preferring(FILTERS, filter_size, splits=SPLITS),
    cost=machinery.costing(filter_size),
    workspace=filter_workspace,
)
def wgmma_pixels(
    op: Any, ins: Sequence[Spec], outs: Sequence[Spec], epilogue: Epilogue, **config: Any
) -> tuple[Grid, ...]:
    """Sums over pixels, split over blocks; a second kernel adds these up."""
    t = cut(op, ins[0].dtype, filter_size(op, ins, outs), config)
    w, filters = filter_walk(op, ins, outs), ins[1].shape[-1]
    begin, blocks_c, depth = pixel_copy(w, 0), w.blocks_c, depth_of(w.dtype)

    def fetch(maps: Any, bars: Any, i: Any, tiles: Any, line: Any, first: Any, step: Any) -> None:
        for part in unroll(t.bm // depth):
            chunk = first // depth + part
            channel = chunk % blocks_c * depth
            begin(maps, bars, i, tiles, line + part * depth, step * depth, channel, chunk // blocks_c)

    a = Operand((w.map(0, depth),), True, fetch)
    before: tuple[Grid, ...] = ()
    if t.kind == "half":
        b = box_operand(1, t.dtype, (filters, w.pixels), t.bn, 1, mn_major=True)
    else:
        before = (passes.lay_out(t.kind, ins[1], 1, w.pixels, filters, along=False, by_threads=True),)
        b = machinery.lines_operand(t, 1, w.pixels)
    rows = Rows(blocks_c * depth, w.channels)
    if t.splits == 1:
        return (*before, products(t, a, b, epilogue, rows))
    return (*before, products(t, a, b, None, rows), passes.add_up(t.kind, t.splits, epilogue))
