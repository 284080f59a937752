"""Locally connected convolution and its gradients on register tiles; a task takes some positions.

Every position p has filters of its own, so that each is a few small matrix products:

    local_conv              y[:, p, :]     = sum over taps t of   x[:, p+t, :]   @ w[p, t]      samples by filters
    local_conv_input_grad   dx[:, i, :]    = sum over p+t = i of  dy[:, p, :]    @ w[p, t].T    samples by channels
    local_conv_filter_grad  dw[p, t]       =                      x[:, p+t, :].T @ dy[:, p, :]  channels by filters

Filters are most of what is read, and are used once a sample: positions are the outer loop and samples the
inner one, so that filters come from memory once. Fewer axes are taken as 3 by putting axes of size 1 in front.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

from rapydli_flow.spec import Spec
from rapydli_flow.template import Device, Epilogue, Loop, broken, template

from .buffer import local
from .pool import Geometry, first
from .tile import balanced, load, outer, step_cost, store, zeros
from .tile_rules import tile_rules

TASKS = 64  # enough to share out evenly among the cores of a rank
DEPTH = 256  # filters of a packed panel: 256 x 32 floats are 32 KiB
SAMPLES = 256  # most samples whose sums lie on a stack
SPACE: dict[str, tuple[Any, ...]] = {"rows": (8, 12, 4), "vectors": (2, 1, 3), "lanes": (16, 8, 4, 2)}


@dataclass(frozen=True)
class Tiling:
    """A matrix of m x k sums in tiles; those at the end are moved back to end where the matrix ends."""

    rows: int
    width: int
    columns: int  # of a tile that exist
    tiles: int
    panels: int
    last: int  # first column of the last panel

    @classmethod
    def of(cls, m: int, k: int, *, rows: int, vectors: int, lanes: int) -> Tiling:
        rows, width = balanced(m, rows), vectors * lanes
        columns = min(k, width)
        return cls(rows, width, columns, -(-m // rows), -(-k // width), k - columns)


Extents = Callable[[Spec], tuple[int, int]]


def _of_samples(out: Spec) -> tuple[int, int]:
    """Samples and filters; or, for the input gradient, samples and channels."""
    return out.shape[0], out.shape[-1]


def _of_filters(out: Spec) -> tuple[int, int]:
    """Channels and filters."""
    return out.shape[-2], out.shape[-1]


def _choices(extents: Extents) -> dict[str, Any]:
    """Rules and preference of a template whose tiles have these rows and columns."""

    def elements(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device) -> bool:
        return min(extents(outs[0])) > 0

    def shape(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], rows: int) -> tuple[int, ...]:
        return (balanced(extents(outs[0])[0], rows),)

    def columns(op: Any, ins: Sequence[Spec], outs: Sequence[Spec]) -> int:
        return extents(outs[0])[1]

    rules = {"something to compute": elements, **tile_rules(shape, columns, SPACE["rows"])}

    def prefer(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device) -> dict[str, Any]:
        lanes = device.vector_bytes // np.dtype(outs[0].dtype).itemsize

        def cost(config: dict[str, Any]) -> float:
            tiling = Tiling.of(*extents(outs[0]), **config)
            return tiling.tiles * tiling.panels * step_cost(tiling.rows, config["vectors"])

        configs = [{"rows": r, "vectors": v, "lanes": lanes} for r, v in product(SPACE["rows"], SPACE["vectors"])]
        fitting = (config for config in configs if broken(rules, op, ins, outs, device, config) is None)
        return min(fitting, key=cost, default={"rows": 4, "vectors": 1, "lanes": lanes})

    return {"fits": rules, "prefer": prefer}


def _writer(tiling: Tiling, epilogue: Epilogue) -> Callable[..., None]:
    """Stores a tile of sums: its rows lie ``step`` apart in y; ``above`` rows and ``left`` columns were stored."""
    rows, width, columns = tiling.rows, tiling.width, tiling.columns

    def write(y, o, step, sums, slot, above, left, column, extras, at):  # type: ignore[no-untyped-def]
        for r in range(above, rows):
            i, s = o + r * step, slot + r * width
            for j in range(left, columns):
                y[i + j] = epilogue(sums[s + j], extras, i + j, column + j, at)

    return write


@template("local_conv", "cpu", space=SPACE, **_choices(_of_samples))
def positions(
    op: Any,
    ins: Sequence[Spec],
    outs: Sequence[Spec],
    epilogue: Epilogue,
    *,
    rows: int,
    vectors: int,
    lanes: int,
) -> Loop:
    """Tiles of samples by filters; the sums of a tile stay in registers over all taps and channels."""
    g = Geometry.of(op, ins[0], outs[0], op.window_of(ins[1]))
    (D, H, W), (OD, OH, OW), C, K = g.size, g.out, g.c, outs[0].shape[-1]
    (KD, KH, KW), (SD, SH, SW), (PD, PH, PW) = g.window, g.stride, g.low
    tiling = Tiling.of(g.n, K, rows=rows, vectors=vectors, lanes=lanes)
    rows, width, tiles, panels, last = tiling.rows, tiling.width, tiling.tiles, tiling.panels, tiling.last
    tail, last_row, tile_size = tiling.columns % lanes, g.n - tiling.rows, tiling.rows * tiling.width
    sample, places = D * H * W * C, OD * OH * OW
    units = places * panels
    count = max(1, min(TASKS, units))
    write = _writer(tiling, epilogue)

    def body(task, x, w, y, extras, at):  # type: ignore[no-untyped-def]
        sums = local(tile_size, y)
        for unit in range(task * units // count, (task + 1) * units // count):
            place, panel = unit // panels, unit % panels
            column = min(panel * width, last)
            d, h, v = place // (OH * OW) * SD - PD, place // OW % OH * SH - PH, place % OW * SW - PW
            s0 = max(0, -v)
            length = (min(KW, W - v) - s0) * C  # the (s, c) of a row of taps follow each other
            for tile in range(tiles):
                row = min(tile * rows, last_row)
                acc = zeros(1, rows, vectors, lanes, y)
                for q in range(max(0, -d), min(KD, D - d)):
                    for r in range(max(0, -h), min(KH, H - h)):
                        i = (((row * D + d + q) * H + h + r) * W + v + s0) * C
                        j = (((place * KD + q) * KH + r) * KW + s0) * C * K + column
                        for e in range(length):
                            acc = outer(acc, x, i + e, sample, 0, w, j + e * K, tail)
                store(acc, sums, 0, width, 0)
                o = (row * places + place) * K + column
                write(y, o, places * K, sums, 0, tile * rows - row, panel * width - column, column, extras, at)

    return Loop(body, count)


@template("local_conv_input_grad", "cpu", space=SPACE, **_choices(_of_samples))
def elements_back(
    op: Any,
    ins: Sequence[Spec],
    outs: Sequence[Spec],
    epilogue: Epilogue,
    *,
    rows: int,
    vectors: int,
    lanes: int,
) -> Loop:
    """Tiles of samples by channels; a panel of filters is transposed on the stack, then serves all samples."""
    g = Geometry.of(op, outs[0], ins[0], op.window_of(ins[1]))
    (D, H, W), (OD, OH, OW), C, K = g.size, g.out, g.c, ins[0].shape[-1]
    (KD, KH, KW), (SD, SH, SW), (PD, PH, PW) = g.window, g.stride, g.low
    tiling = Tiling.of(g.n, C, rows=rows, vectors=vectors, lanes=lanes)
    rows, width, tiles, panels, last = tiling.rows, tiling.width, tiling.tiles, tiling.panels, tiling.last
    columns, tail, last_row, tile_size = tiling.columns, tiling.columns % lanes, g.n - tiling.rows, rows * width
    places, elements = OD * OH * OW, D * H * W
    block, depth = min(tiles, max(1, SAMPLES // rows)), max(1, min(K, DEPTH))
    packed_size, sums_size, sample = depth * width, block * tile_size, places * K
    units = elements * panels
    count = max(1, min(TASKS, units))
    write = _writer(tiling, epilogue)

    def pack(packed, w, source, length):  # type: ignore[no-untyped-def]
        for j in range(columns):
            for k in range(length):
                packed[k * width + j] = w[source + j * K + k]

    def add(sums, packed, dy, i, length, start, many):  # type: ignore[no-untyped-def]
        for tile in range(many):
            row = min((start + tile) * rows, last_row)
            acc = zeros(1, rows, vectors, lanes, sums)
            acc = load(acc, sums, tile * tile_size, width, 0)
            for k in range(length):
                acc = outer(acc, dy, row * sample + i + k, sample, 0, packed, k * width, tail)
            store(acc, sums, tile * tile_size, width, 0)

    def body(task, dy, w, dx, extras, at):  # type: ignore[no-untyped-def]
        packed, sums = local(packed_size, dx), local(sums_size, dx)
        for unit in range(task * units // count, (task + 1) * units // count):
            element, panel = unit // panels, unit % panels
            column = min(panel * width, last)
            d, h, v = element // (H * W) + PD, element // W % H + PH, element % W + PW
            for start in range(0, tiles, block):
                many = min(block, tiles - start)
                for e in range(many * tile_size):
                    sums[e] = 0
                for p in range(first(d, KD, SD), min(OD, d // SD + 1)):
                    for q in range(first(h, KH, SH), min(OH, h // SH + 1)):
                        for r in range(first(v, KW, SW), min(OW, v // SW + 1)):
                            place = (p * OH + q) * OW + r
                            tap = ((place * KD + d - p * SD) * KH + h - q * SH) * KW + v - r * SW
                            for k in range(0, K, depth):
                                length = min(depth, K - k)
                                pack(packed, w, (tap * C + column) * K + k, length)
                                add(sums, packed, dy, place * K + k, length, start, many)
                for tile in range(many):
                    row = min((start + tile) * rows, last_row)
                    o, above = (row * elements + element) * C + column, (start + tile) * rows - row
                    left = panel * width - column
                    write(dx, o, elements * C, sums, tile * tile_size, above, left, column, extras, at)

    return Loop(body, count)


@template("local_conv_filter_grad", "cpu", space=SPACE, **_choices(_of_filters))
def filters_back(
    op: Any,
    ins: Sequence[Spec],
    outs: Sequence[Spec],
    epilogue: Epilogue,
    *,
    rows: int,
    vectors: int,
    lanes: int,
) -> Loop:
    """Tiles of channels by filters, summed over samples in registers; filters of taps in the padding get zeros."""
    g = Geometry.of(op, ins[0], ins[1], op.window)
    (D, H, W), (OD, OH, OW), C, K = g.size, g.out, g.c, ins[1].shape[-1]
    (KD, KH, KW), (SD, SH, SW), (PD, PH, PW) = g.window, g.stride, g.low
    tiling = Tiling.of(C, K, rows=rows, vectors=vectors, lanes=lanes)
    rows, width, tiles, panels, last = tiling.rows, tiling.width, tiling.tiles, tiling.panels, tiling.last
    tail, last_row, tile_size = tiling.columns % lanes, C - tiling.rows, tiling.rows * tiling.width
    samples, sample, places = g.n, D * H * W * C, OD * OH * OW
    taps = KD * KH * KW
    count = max(1, min(TASKS, places))
    write = _writer(tiling, epilogue)

    def body(task, x, dy, dw, extras, at):  # type: ignore[no-untyped-def]
        sums = local(tile_size, dw)
        for unit in range(task * places // count * taps, (task + 1) * places // count * taps):
            place, q, r, s = unit // taps, unit // (KH * KW) % KD, unit // KW % KH, unit % KW
            d, h, v = place // (OH * OW) * SD - PD + q, place // OW % OH * SH - PH + r, place % OW * SW - PW + s
            inside = min(d, h, v) >= 0 and d < D and h < H and v < W
            many = samples if inside else 0
            for tile in range(tiles):
                row = min(tile * rows, last_row)
                i = ((d * H + h) * W + v) * C + row
                for panel in range(panels):
                    column = min(panel * width, last)
                    acc = zeros(1, rows, vectors, lanes, dw)
                    for n in range(many):
                        acc = outer(acc, x, n * sample + i, 1, 0, dy, (n * places + place) * K + column, tail)
                    store(acc, sums, 0, width, 0)
                    o = (unit * C + row) * K + column
                    write(dw, o, K, sums, 0, tile * rows - row, panel * width - column, column, extras, at)

    return Loop(body, count)
