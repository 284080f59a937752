"""Depthwise convolution and its input gradient: every channel has a filter of its own.

    y[n, h, c]  = sum over r of x[n, h * stride + r * dilation - padding, c] * w[r, c]
    dx[n, i, c] = sum over r, h with h * stride + r * dilation - padding = i of dy[n, h, c] * w[r, c]

Little is computed for each element that is read, so a thread has a tile of pixels and a few channels: it reads each row
of the source once, as vectors, for all pixels of the tile that it reaches. Which they are is known when the kernel is
built, for gradients too, as tiles are whole multiples of the stride::

    source   0 1 2 3 4 5        a tile of 4 pixels, 3 taps: row 2 is tap 2 of pixel 0, tap 1 of 1 and tap 0 of 2
    pixels     0 1 2 3

The filter gradient is in `depthwise_filter_grad`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product as every
from math import prod
from typing import Any

import numpy as np

from rapydli_flow.spec import Spec
from rapydli_flow.template import Config, Device, Epilogue, broken, template

from . import cost as guess
from .conv import geometry
from .grid import INDEX_LIMIT, REGISTERS, Grid, blocks_of
from .pair import Pair, held
from .ptx import clear, cuda, hold, inside, load, take, unroll
from .tail import tail

SPACE: Mapping[str, tuple[Any, ...]] = {
    "threads": (128, 256, 64),
    "vector": (4, 2, 1, 8),
    "rows": (2, 4, 1, 3, 7, 8),  # of a thread's tile; of a strided gradient, times the stride
    "run": (4, 2, 1, 7, 8),
}
MOST_TAPS = 121
Use = tuple[int, int]  # pixel of the tile, and tap


Sums = tuple[tuple[int, int, int], ...]  # places of sums and of both factors


@cache
def multiply_add(lanes: int, sums: Sums) -> Pair:
    """``(acc, x, w)``: acc[at + j] += x[at_x + j] * w[at_w + j] for all ``(at, at_x, at_w)`` of these sums.

    One intrinsic for a whole row of the source, as each call of one takes the compiler's time.
    """

    def twin(acc: Any, x: Any, w: Any) -> None:
        for at, at_x, at_w in sums:
            acc[at : at + lanes] += x[at_x : at_x + lanes] * w[at_w : at_w + lanes]

    def rule(acc: Any, x: Any, w: Any) -> Any:
        from llvmlite import ir
        from numba.cuda import types

        def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            kind = ir.FloatType() if acc.dtype.bitwidth == 32 else ir.DoubleType()
            fma = builder.module.declare_intrinsic("llvm.fma", [kind], ir.FunctionType(kind, [kind] * 3))
            data = [context.make_array(k)(context, builder, v).data for k, v in zip(sig.args, args, strict=True)]
            for places in sums:
                for j in range(lanes):
                    at = [context.get_constant(types.int32, place + j) for place in places]
                    total, *factors = (builder.gep(p, [i], inbounds=True) for p, i in zip(data, at, strict=True))
                    values = [builder.load(place) for place in (*factors, total)]
                    builder.store(builder.call(fma, values), total)
            return context.get_dummy_value()

        return types.void, (acc, x, w), emit

    return Pair(f"multiply_add{lanes}_{len(sums)}", twin, rule)


@dataclass(frozen=True)
class Line:
    """Tiles along one axis: ``pixels`` of a tile of an axis of ``size``, and what they read of a source of ``read``.

    ``uses[i]``: the pixels and taps that read the place ``tile * step + offsets[i]``.
    """

    size: int
    read: int
    pixels: int
    step: int
    offsets: tuple[int, ...]
    uses: tuple[tuple[Use, ...], ...]

    @property
    def tiles(self) -> int:
        return blocks_of(self.size, self.pixels)


@dataclass(frozen=True)
class Row:
    """One row of the source that a tile reads: its place, its taps, and for each of them the pixels that read it from
    where: pairs of a pixel and a place in the row."""

    d: int
    h: int
    taps: tuple[int, ...]
    uses: tuple[tuple[Use, ...], ...]

    def sums(self, vector: int) -> Sums:
        """Pixels of all taps, from this row and the filters of all taps."""
        return tuple(
            (pixel * vector, place * vector, tap * vector)
            for tap, uses in zip(self.taps, self.uses, strict=True)
            for pixel, place in uses
        )

    def sums_of(self, tap: int, vector: int) -> Sums:
        """Pixels of its n-th tap, from this row and one filter."""
        return tuple((pixel * vector, place * vector, 0) for pixel, place in self.uses[tap])


def rows_of(of: Sequence[Line], window: Sequence[int]) -> tuple[Row, ...]:
    """The rows that are read, in the order of memory."""
    d, h, w = of
    out = []
    for i, j in every(range(len(d.offsets)), range(len(h.offsets))):
        found: dict[int, list[Use]] = {}
        for (a, q), (b, r), (k, uses) in every(d.uses[i], h.uses[j], enumerate(w.uses)):
            for c, s in uses:
                tap, pixel = (q * window[1] + r) * window[2] + s, (a * h.pixels + b) * w.pixels + c
                found.setdefault(tap, []).append((pixel, k))
        taps = tuple(sorted(found))
        out.append(Row(d.offsets[i], h.offsets[j], taps, tuple(tuple(found[tap]) for tap in taps)))
    return tuple(out)


def reader(
    of: Sequence[Line], source: Sequence[Row], dtype: str, channels: int, vector: int
) -> tuple[Callable[..., Any], Callable[..., None]]:
    """``(image, tile_d, tile_h, tile_w, channel)``: the element that a tile's places are counted from; and
    ``(line, ins, i, there, tile_d, tile_h, tile_w, first)``: registers of a line become row i of ins[0]."""
    (d, h, w), rows = of, tuple(source)
    read, keep, places = load(dtype, vector, constant=True), hold(vector), len(w.offsets)

    def begin(image: Any, tile_d: Any, tile_h: Any, tile_w: Any, channel: Any) -> Any:
        place = ((image * d.read + tile_d * d.step) * h.read + tile_h * h.step) * w.read + tile_w * w.step
        return place * channels + channel

    def row(line: Any, ins: Any, i: Any, there: Any, tile_d: Any, tile_h: Any, tile_w: Any, first: Any) -> None:
        in_d = there & inside(tile_d * d.step + rows[i].d, d.read)
        active = in_d & inside(tile_h * h.step + rows[i].h, h.read)
        for k in unroll(places):
            on = active & inside(tile_w * w.step + w.offsets[k], w.read)
            offset = ((rows[i].d * h.read + rows[i].h) * w.read + w.offsets[k]) * channels
            keep(line, k * vector, read(on, ins[0], first + offset))

    return begin, row


def pixels_of(of: Sequence[Line], channels: int) -> Callable[..., Any]:
    """``(there, image, tile_d, tile_h, tile_w, a, b, c, channel)``: is pixel (a, b, c) of a tile there, and where?"""
    d, h, w = of

    def pixel(
        there: Any, image: Any, tile_d: Any, tile_h: Any, tile_w: Any, a: Any, b: Any, c: Any, channel: Any
    ) -> Any:
        at_d = tile_d * d.pixels + a
        at_h = tile_h * h.pixels + b
        at_w = tile_w * w.pixels + c
        on = there & (at_d < d.size) & (at_h < h.size) & (at_w < w.size)
        return (on, (((image * d.size + at_d) * h.size + at_h) * w.size + at_w) * channels + channel)

    return pixel


def _line(size: int, read: int, pixels: int, step: int, reads: Mapping[Use, int]) -> Line:
    offsets = tuple(sorted(set(reads.values())))
    uses = tuple(tuple(use for use, at in reads.items() if at == offset) for offset in offsets)
    return Line(size, read, pixels, step, offsets, uses)


def lines(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], rows: int, run: int) -> tuple[Line, ...]:
    """Three axes; of the filter gradient, tiles are those of dy."""
    back = op.family == "conv_input_grad"
    x, w, y = {
        "conv": (*ins, outs[0]),
        "conv_input_grad": (outs[0], ins[1], ins[0]),
        "conv_filter_grad": (ins[0], outs[0], ins[1]),
    }[op.family]
    g = geometry(op, x, w, y)
    out = []
    for n, size, read, window, s, low, d in zip(
        (1, rows, run), g.size, g.out, g.window, g.stride, g.low, g.dilation, strict=True
    ):
        if back:
            reads = {(i, r): (i + low - r * d) // s for i in range(n * s) for r in range(window)}
            reads = {(i, r): at for (i, r), at in reads.items() if at * s == i + low - r * d}
            out.append(_line(size, read, n * s, n, reads))
        else:
            reads = {(i, r): i * s + r * d - low for i in range(n) for r in range(window)}
            out.append(_line(read, size, n, n * s, reads))
    return tuple(out)


def one_each(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device) -> bool:
    """A filter for each channel, of floats that 32 bits can index."""
    every_spec = (*ins, *outs)
    x, w = (ins[0], outs[0]) if op.family == "conv_filter_grad" else ins
    return (
        op.groups == x.shape[-1] == w.shape[-1]
        and all(s.dtype == x.dtype and s.floating and 0 < s.size < INDEX_LIMIT - 2**26 for s in every_spec)
        and prod(w.shape[:-1]) <= MOST_TAPS
    )


def _vectors(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device, *, vector: int) -> bool:
    return op.groups % vector == 0 and vector * np.dtype(ins[0].dtype).itemsize <= 16


def _registers(
    op: Any,
    ins: Sequence[Spec],
    outs: Sequence[Spec],
    device: Device,
    *,
    threads: int,
    vector: int,
    rows: int,
    run: int,
) -> bool:
    d, h, w = lines(op, ins, outs, rows, run)
    wide = vector * np.dtype(held(ins[0].dtype)).itemsize // 4
    pixels, taps = prod(line.pixels for line in (d, h, w)), _taps(op, ins, outs)
    if op.family == "conv_filter_grad":
        used = wide * (pixels + taps + len(w.offsets))
    else:
        used = wide * (pixels + (taps if _kept(taps, vector) else 1) + len(w.offsets))
    loads = len(d.offsets) * len(h.offsets) * len(w.offsets)
    spare = 56 if op.family == "conv_filter_grad" or not _kept(taps, vector) else 46  # addresses, and loads under way
    return (
        used + spare <= min(255, (device.registers or REGISTERS) // (threads * together(threads)))
        and loads <= max(48, 2 * taps)
        and pixels * taps * vector <= 1024
    )


def together(threads: int, *, bound: int = 384) -> int:
    """Blocks that a multiprocessor should hold: many threads hide the time of loads."""
    return max(1, bound // threads)


def _taps(op: Any, ins: Sequence[Spec], outs: Sequence[Spec]) -> int:
    return prod((outs[0] if op.family == "conv_filter_grad" else ins[1]).shape[:-1])


def _kept(taps: int, vector: int) -> bool:
    """Are a thread's filters in registers?"""
    return taps * vector <= 40


def _indices(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device, *, rows: int, run: int) -> bool:
    """Places outside the source are computed too."""
    of = lines(op, ins, outs, rows, run)
    spans = [line.tiles * line.step + max(map(abs, line.offsets), default=0) + line.read for line in of]
    ends = [line.tiles * line.pixels for line in of]
    return bool(max(prod(spans), prod(ends)) * 2 * op.groups + ins[0].size < INDEX_LIMIT)


RULES: Mapping[str, str | Callable[..., bool]] = {
    "a filter for each channel": one_each,
    "vectors of channels": _vectors,
    "tiles in registers": _registers,
    "places in 32-bit indices": _indices,
    "few enough threads": "threads <= 1024",
}


def _score(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device, config: Config) -> float:
    """What tiles cost for each pixel: loads, pixels that are not there, and threads that are too few."""
    of = lines(op, ins, outs, config["rows"], config["run"])
    each = prod(line.pixels for line in of)
    tiles = prod(line.tiles for line in of)
    loads = prod(len(line.offsets) for line in of) / each
    used = tiles * each / prod(line.size for line in of)
    threads: int = ins[0].shape[0] * tiles * (op.groups // config["vector"])
    few = min(1.0, threads / ((device.cores if device.cores > 1 else 132) * 512))
    vector: int = config["vector"]
    return used * (1 + 0.4 * loads) / few * 4 / min(4, vector)


def preferring(
    space: Mapping[str, tuple[Any, ...]], fits: Mapping[str, str | Callable[..., bool]]
) -> Callable[..., Config]:
    """The tile with the least cost whose sums fill a quarter of the registers at most."""

    def best(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device) -> Config:
        none = {name: values[0] for name, values in space.items()}
        if not one_each(op, ins, outs, device):
            return none
        tried: list[tuple[float, int, Config]] = []
        for vector, rows, run in every((4, 2, 1), space["rows"], space["run"]):
            config = {**none, "vector": vector, "rows": rows, "run": run}
            if broken(fits, op, ins, outs, device, config) is None:
                tried.append((_score(op, ins, outs, device, config), len(tried), config))
        if not tried:
            return none
        return min(tried)[2]

    return best


def cost(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device, config: Config) -> float:
    of = lines(op, ins, outs, config["rows"], config["run"])
    loads = (
        prod(line.tiles * len(line.offsets) for line in of)
        * ins[0].shape[0]
        * op.groups
        * np.dtype(ins[0].dtype).itemsize
    )
    size_bytes = sum(spec.size_bytes for spec in (*ins, *outs))
    return guess.seconds(device, flops=0, size_bytes=max(size_bytes * 1.1, loads / 1.5), unit="fp32", blocks=132)


@template("conv_input_grad", "cuda", space=SPACE, fits=RULES, prefer=preferring(SPACE, RULES), cost=cost)
@template("conv", "cuda", space=SPACE, fits=RULES, prefer=preferring(SPACE, RULES), cost=cost)
def depthwise(
    op: Any,
    ins: Sequence[Spec],
    outs: Sequence[Spec],
    epilogue: Epilogue,
    *,
    threads: int,
    vector: int,
    rows: int,
    run: int,
) -> Grid:
    """A tile of pixels and a few channels for each thread; filters in registers where they are few."""
    dtype, channels = ins[0].dtype, op.groups
    d, h, w = of = lines(op, ins, outs, rows, run)
    window = (1, 1, *ins[1].shape[:-2])[-3:]
    taps, source, places = prod(window), rows_of(of, window), len(w.offsets)
    keeps = _kept(taps, vector)
    kept = taps if keeps else 1
    across = channels // vector
    total = ins[0].shape[0] * d.tiles * h.tiles * w.tiles * across
    read, keep, gather = load(dtype, vector, constant=True), hold(vector), take(vector)
    sums, end = clear(d.pixels * h.pixels * w.pixels * vector), tail(epilogue, vector)
    of_rows, counts = len(source), tuple(len(row.taps) for row in source)
    all_taps = tuple(multiply_add(vector, row.sums(vector)) for row in source)
    one_tap = tuple(
        tuple(multiply_add(vector, row.sums_of(j, vector)) for j in range(count))
        for row, count in zip(source, counts, strict=True)
    )
    begin, row = reader(of, source, dtype, channels, vector)
    kind, pixel = getattr(np, held(dtype)), pixels_of(of, channels)

    def kernel(ins: Any, outs: Any, work: Any, extras: Any, at: Any) -> None:
        acc = cuda.local.array(d.pixels * h.pixels * w.pixels * vector, kind)
        line = cuda.local.array(places * vector, kind)
        filters = cuda.local.array(kept * vector, kind)
        item = cuda.blockIdx.x * threads + cuda.threadIdx.x
        there = item < total
        channel = item % across * vector
        tile_w = item // across % w.tiles
        tile_h = item // (across * w.tiles) % h.tiles
        tile_d = item // (across * w.tiles * h.tiles) % d.tiles
        image = item // (across * w.tiles * h.tiles * d.tiles)
        first = begin(image, tile_d, tile_h, tile_w, channel)
        sums(acc)
        if keeps:
            for tap in unroll(taps):
                keep(filters, tap * vector, read(there, ins[1], tap * channels + channel))
        for i in unroll(of_rows):
            row(line, ins, i, there, tile_d, tile_h, tile_w, first)
            if keeps:
                all_taps[i](acc, line, filters)
            else:
                for j in unroll(counts[i]):
                    keep(filters, 0, read(there, ins[1], source[i].taps[j] * channels + channel))
                    one_tap[i][j](acc, line, filters)
        for a in unroll(d.pixels):
            for b in unroll(h.pixels):
                for c in unroll(w.pixels):
                    spot = pixel(there, image, tile_d, tile_h, tile_w, a, b, c, channel)
                    values = gather(acc, ((a * h.pixels + b) * w.pixels + c) * vector)
                    end.finish(spot[0], outs[0], values, spot[1], channel, extras, at)

    return Grid(
        kernel,
        blocks_of(total, threads),
        threads,
        resident=together(threads, bound=384 if keeps and max(op.stride) == 1 else 256),
    )
