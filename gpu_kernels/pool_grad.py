"""Gradients of pooling over 1 to 3 spatial axes: a thread gathers the dy of the windows over some neighbours of dx.

A tile is (down * stride) x (across * stride) elements, so that which taps of which windows they are is known when the
kernel is built, and each dy is loaded once for all of a tile. For a tile of 0 strides it is one element, whose taps
are computed: for large strides and windows. Windows come in memory order, so that sums have one order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import numpy as np

from rapydli_flow.spec import Spec
from rapydli_flow.template import Config, Device, Epilogue, template

from .access import plus, plus_chosen, spread
from .grid import Grid, blocks_of
from .pair import held
from .pool_geometry import COMMON, MOST_SUMS, MOST_TAPS, Geometry, first_of, geometry, tap_of, tried
from .ptx import cuda, inside, load, take, unroll
from .tail import tail

SPACE = {"threads": (256, 128, 512), "vector": (4, 2, 1, 8), "down": (1, 0, 2, 4), "across": (1, 0, 2, 4)}


def _tiles(
    op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device, *, vector: int, down: int, across: int
) -> bool:
    g = geometry(op, ins, outs)
    if (down == 0) != (across == 0):
        return False
    if down == 0:
        return True
    elements = down * g.stride[1] * across * g.stride[2]
    taps = elements * prod(g.window) // prod(g.stride)
    fills = (down - 1) * g.stride[1] < g.size[1] and (across - 1) * g.stride[2] < g.size[2]
    return fills and elements * vector <= MOST_SUMS and taps <= MOST_TAPS


RULES = {**COMMON, "tiles in registers": _tiles}


def _prefer(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device) -> Config:
    g = geometry(op, ins, outs)
    tiles = ((1, 1, g.stride[1] * g.stride[2]), (0, 0, 1))
    return first_of(RULES, op, ins, outs, device, tried(outs, device, tiles))


@dataclass(frozen=True)
class Over:
    """The windows over a tile of neighbours along one axis, which begins at a multiple of ``tile``.

    Window ``first * count + offsets[k]`` has element j of tile ``first`` at its tap ``taps[k][j]``, -1 for none.
    """

    size: int
    out: int
    window: int
    stride: int
    low: int
    count: int

    @property
    def tile(self) -> int:
        return self.count * self.stride

    @property
    def windows(self) -> int:
        return len(self.offsets)

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        first, last = -((self.window - 1 - self.low) // self.stride), (self.tile - 1 + self.low) // self.stride
        return tuple(range(first, last + 1))

    @cached_property
    def taps(self) -> tuple[tuple[int, ...], ...]:
        return tuple(
            tuple(tap_of(j + self.low - offset * self.stride, self.window) for j in range(self.tile))
            for offset in self.offsets
        )


def _gather_tiles(
    g: Geometry, ins: Sequence[Spec], epilogue: Epilogue, *, threads: int, vector: int, down: int, across: int
) -> Grid:
    """dx by tiles that are multiples of the stride: each dy is loaded once for all of a tile."""
    each = zip(g.size, g.out, g.window, g.stride, g.low, (1, down, across), strict=True)
    (D, H, W), lanes, C = (Over(*axis) for axis in each), vector, g.c
    chooses, kind = len(ins) == 2, np.dtype(held(ins[0].dtype)).type
    panels, tiles = C // lanes, tuple(blocks_of(axis.size, axis.tile) for axis in (D, H, W))
    total = g.n * prod(tiles) * panels
    sums = D.tile * H.tile * W.tile * lanes
    read, end = load(ins[0].dtype, lanes, constant=True), tail(epilogue, lanes)
    marked: Any = load(ins[1].dtype, lanes, constant=True) if chooses else None
    start, add, add_chosen, result = spread(sums, 0.0), plus(lanes), plus_chosen(lanes), take(lanes)

    def kernel(ins: Any, outs: Any, work: Any, extras: Any, at: Any) -> None:
        thread = cuda.blockIdx.x * threads + cuda.threadIdx.x
        on = thread < total
        channel = thread % panels * lanes
        tile = thread // panels
        wide = tile % tiles[2]
        high = tile // tiles[2] % tiles[1]
        deep = tile // (tiles[2] * tiles[1]) % tiles[0]
        image = tile // (tiles[2] * tiles[1] * tiles[0])
        base = ((image * D.out + deep * D.count) * H.out + high * H.count) * W.out + wide * W.count
        acc = cuda.local.array(sums, kind)
        start(acc)
        for p in unroll(D.windows):
            for q in unroll(H.windows):
                in_row = on & inside(deep * D.count + D.offsets[p], D.out)
                in_row = in_row & inside(high * H.count + H.offsets[q], H.out)
                for r in unroll(W.windows):
                    active = in_row & inside(wide * W.count + W.offsets[r], W.out)
                    place = base + ((D.offsets[p] * H.out + H.offsets[q]) * W.out + W.offsets[r])
                    values = read(active, ins[0], place * C + channel)
                    if chooses:
                        marks = marked(active, ins[1], place * C + channel)
                    for i in unroll(D.tile):
                        if D.taps[p][i] >= 0:
                            for j in unroll(H.tile):
                                if H.taps[q][j] >= 0:
                                    for k in unroll(W.tile):
                                        if W.taps[r][k] >= 0:
                                            first = ((i * H.tile + j) * W.tile + k) * lanes
                                            tap = (D.taps[p][i] * H.window + H.taps[q][j]) * W.window + W.taps[r][k]
                                            if chooses:
                                                add_chosen(acc, first, values, marks, tap)
                                            else:
                                                add(acc, first, values)
        for i in unroll(D.tile):
            for j in unroll(H.tile):
                for k in unroll(W.tile):
                    d = deep * D.tile + i
                    h = high * H.tile + j
                    w = wide * W.tile + k
                    active = on & (d < D.size) & (h < H.size) & (w < W.size)
                    element = (((image * D.size + d) * H.size + h) * W.size + w) * C + channel
                    values = result(acc, ((i * H.tile + j) * W.tile + k) * lanes)
                    end.finish(active, outs[0], values, element, channel, extras, at)

    return Grid(kernel, blocks_of(total, threads), threads)


def _gather_each(
    g: Geometry, ins: Sequence[Spec], epilogue: Epilogue, *, threads: int, vector: int, **tiles: int
) -> Grid:
    """dx by single places, whose taps are computed: for large strides and windows."""
    (D, H, W), (OD, OH, OW), C, lanes = g.size, g.out, g.c, vector
    (KD, KH, KW), (SD, SH, SW) = g.window, g.stride
    chooses, kind = len(ins) == 2, np.dtype(held(ins[0].dtype)).type
    # the last window over position p is (p + low) // stride; multiples of the stride keep what is divided positive
    before = tuple(max(0, blocks_of(-low, s)) for low, s in zip(g.low, g.stride, strict=True))
    more_d, more_h, more_w = (low + b * s for low, b, s in zip(g.low, before, g.stride, strict=True))
    before_d, before_h, before_w = before
    over_d, over_h, over_w = (blocks_of(k, s) for k, s in zip(g.window, g.stride, strict=True))
    panels = C // lanes
    total = g.n * D * H * W * panels
    read, end = load(ins[0].dtype, lanes, constant=True), tail(epilogue, lanes)
    marked: Any = load(ins[1].dtype, lanes, constant=True) if chooses else None
    start, add, add_chosen, result = spread(lanes, 0.0), plus(lanes), plus_chosen(lanes), take(lanes)
    steps = unroll if over_d * over_h * over_w <= MOST_TAPS else range

    def kernel(ins: Any, outs: Any, work: Any, extras: Any, at: Any) -> None:
        thread = cuda.blockIdx.x * threads + cuda.threadIdx.x
        on = thread < total
        channel = thread % panels * lanes
        place = thread // panels
        w = place % W + more_w
        h = place // W % H + more_h
        d = place // (W * H) % D + more_d
        image = place // (W * H * D)
        last_d = d // SD - before_d
        last_h = h // SH - before_h
        last_w = w // SW - before_w
        acc = cuda.local.array(lanes, kind)
        start(acc)
        for p in steps(over_d):
            tap_d = d % SD + (over_d - 1 - p) * SD
            o_d = last_d - (over_d - 1 - p)
            in_plane = on & inside(o_d, OD) & (tap_d < KD)
            for q in steps(over_h):
                tap_h = h % SH + (over_h - 1 - q) * SH
                o_h = last_h - (over_h - 1 - q)
                in_row = in_plane & inside(o_h, OH) & (tap_h < KH)
                for r in steps(over_w):
                    tap_w = w % SW + (over_w - 1 - r) * SW
                    o_w = last_w - (over_w - 1 - r)
                    active = in_row & inside(o_w, OW) & (tap_w < KW)
                    source = (((image * OD + o_d) * OH + o_h) * OW + o_w) * C + channel
                    values = read(active, ins[0], source)
                    if chooses:
                        marks = marked(active, ins[1], source)
                        add_chosen(acc, 0, values, marks, (tap_d * KH + tap_h) * KW + tap_w)
                    else:
                        add(acc, 0, values)
        end.finish(on, outs[0], result(acc, 0), place * C + channel, channel, extras, at)

    return Grid(kernel, blocks_of(total, threads), threads)


def _gather(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], epilogue: Epilogue, config: Config) -> Grid:
    g = geometry(op, ins, outs)
    return (_gather_tiles if config["down"] else _gather_each)(g, ins, epilogue, **config)


@template("max_pool_grad", "cuda", space=SPACE, fits=RULES, prefer=_prefer)
def chosen_windows(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], epilogue: Epilogue, **config: int) -> Grid:
    """Each element of dx gets the dy of the windows that chose it."""
    return _gather(op, ins, outs, epilogue, config)


@template("sum_pool_grad", "cuda", space=SPACE, fits=RULES, prefer=_prefer)
def all_windows(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], epilogue: Epilogue, **config: int) -> Grid:
    """Each element of dx gets the dy of all windows over it."""
    return _gather(op, ins, outs, epilogue, config)
