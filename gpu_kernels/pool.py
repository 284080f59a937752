"""Pooling over 1 to 3 spatial axes, and its gradient: a thread computes some neighbours, for a few channels.

    max_pool       y[o] = max over taps of x[o * stride - padding + tap], argmax[o] = the first tap that has it
    sum_pool       y[o] = sum over taps of x[...]
    ..._grad       an element of dx at a time: the dy of all windows over it (max_pool: of those that chose it)

Fewer axes are taken as 3 by putting axes of size 1 in front. What a thread loads is used for all windows of its tile
that hold it:

    forward        down x across windows      x[i, j] is tap (i - a * stride, j - b * stride) of window (a, b)
    gradient       (down * stride) x (across * stride) elements of dx, so that taps are constants; for a tile of 0
                   strides, one element, whose taps are computed

Taps come in memory order, so that of equal values the first wins, and sums have one order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from math import prod
from typing import Any

import numpy as np

from rapydli_flow.spec import Spec
from rapydli_flow.template import Config, Device, Epilogue, Rule, broken, template

from .access import (
    halves_of,
    larger,
    larger_words,
    least_words,
    load_words,
    parts_of,
    plus,
    plus_chosen,
    spread,
    whole,
)
from .compile import capability_of
from .grid import INDEX_LIMIT, Grid, blocks_of
from .pair import held
from .ptx import cuda, inside, int32, load, store, take, unroll
from .tail import tail

SPACE = {"threads": (256, 128, 512), "vector": (4, 2, 1, 8), "down": (1, 2, 4), "across": (1, 2, 4)}
SPACE_MOST = {**SPACE, "pairs": (0, 1)}
SPACE_BACK = {"threads": (256, 128, 512), "vector": (4, 2, 1, 8), "down": (1, 0, 2, 4), "across": (1, 0, 2, 4)}
MOST_TAPS = 64  # that are written out: larger windows are loops
MOST_SUMS = 64  # registers for results of one thread
Three = tuple[int, int, int]


def three(values: Sequence[int], missing: int) -> Three:
    """A value for each of three spatial axes."""
    a, b, c = (missing,) * (3 - len(values)) + tuple(values)
    return a, b, c


@dataclass(frozen=True)
class Geometry:
    """Sizes of windows that slide, with three spatial axes; ``big`` is what they slide over."""

    n: int
    size: Three
    out: Three
    c: int
    window: Three
    stride: Three
    low: Three

    @classmethod
    def of(cls, op: Any, big: Spec, small: Spec) -> Geometry:
        return cls(
            big.shape[0],
            three(big.shape[1:-1], 1),
            three(small.shape[1:-1], 1),
            big.shape[-1],
            three(op.window, 1),
            three(op.stride, 1),
            three([low for low, _ in op.padding], 0),
        )

    @property
    def margin(self) -> int:
        """Elements beyond the array whose place is computed, though nothing is read there."""
        reach = [s + 2 * (k + 4 * step) for s, k, step in zip(self.size, self.window, self.stride, strict=True)]
        return 2 * prod(reach) * self.c


def _geometry(op: Any, ins: Sequence[Spec], outs: Sequence[Spec]) -> Geometry:
    back = hasattr(op, "size")
    return Geometry.of(op, outs[0] if back else ins[0], ins[0] if back else outs[0])


def channels_fit(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device, *, vector: int) -> bool:
    """Vectors divide channels, and no access is wider than 16 bytes."""
    sizes = [np.dtype(spec.dtype).itemsize * vector for spec in (*ins, *outs)]
    return outs[0].shape[-1] % vector == 0 and max(sizes) <= 16


def countable(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device) -> bool:
    """Are these arrays of elements that 32 bits can count?"""
    return all(0 < spec.size < INDEX_LIMIT - 2**20 for spec in (*ins, *outs))


def _indices(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device) -> bool:
    if not countable(op, ins, outs, device):
        return False
    return ins[0].size + outs[0].size + _geometry(op, ins, outs).margin < INDEX_LIMIT


def _tiles(
    op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device, *, vector: int, down: int, across: int
) -> bool:
    """Results stay in registers; what is written out is not too long."""
    g, most = _geometry(op, ins, outs), len(outs) == 2
    if down * across > 1 and prod(g.window) > MOST_TAPS:
        return False
    return down * across * vector * (2 if most else 1) <= MOST_SUMS and down <= g.out[1] and across <= g.out[2]


def _pairs(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device, *, vector: int, pairs: int) -> bool:
    """Halves can be compared in pairs: bfloat16 from sm_90 on."""
    dtype = outs[0].dtype
    if not pairs:
        return True
    known = dtype == "float16" or (dtype == "bfloat16" and capability_of(device.target or "sm_80")[0] >= 9)
    return known and vector % 2 == 0 and prod(op.window) < 2**15


def _tiles_back(
    op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device, *, vector: int, down: int, across: int
) -> bool:
    g = _geometry(op, ins, outs)
    if (down == 0) != (across == 0):
        return False
    if down == 0:
        return True
    elements = down * g.stride[1] * across * g.stride[2]
    taps = elements * prod(g.window) // prod(g.stride)
    fills = (down - 1) * g.stride[1] < g.size[1] and (across - 1) * g.stride[2] < g.size[2]
    return fills and elements * vector <= MOST_SUMS and taps <= MOST_TAPS


_ALL: dict[str, Rule] = {"channels in vectors": channels_fit, "32-bit indices": _indices}
RULES = {**_ALL, "tiles in registers": _tiles}
RULES_MOST = {**RULES, "halves in pairs": _pairs}
RULES_BACK = {**_ALL, "tiles in registers": _tiles_back}


def first_of(
    rules: Mapping[str, Rule],
    op: Any,
    ins: Sequence[Spec],
    outs: Sequence[Spec],
    device: Device,
    tried: Sequence[Config],
) -> Config:
    """The first that keeps the rules."""
    return next((c for c in tried if broken(rules, op, ins, outs, device, c) is None), tried[-1])


def enough(device: Device) -> int:
    """Threads that keep a card's memory busy."""
    return 512 * (device.cores if device.cores > 1 else 132)


def _tried(outs: Sequence[Spec], device: Device, tiles: Sequence[tuple[int, int, int]]) -> list[Config]:
    """Wide vectors and large tiles first, as long as there are threads enough. A tile: down, across, its elements."""
    vectors = (8, 4, 2, 1)
    many = [
        {"threads": 256, "vector": v, "down": down, "across": across}
        for v, (down, across, elements) in product(vectors, tiles)
        if outs[0].size // (v * elements) >= enough(device)
    ]
    down, across, _ = tiles[-1]
    few = [{"threads": 128, "vector": v, "down": down, "across": across} for v in (1, 2, 4, 8)]
    return [*many, *few]


def _prefer(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device) -> Config:
    overlap = any(k > s for k, s in zip(op.window, op.stride, strict=True))
    tiles = ((2, 1, 2), (1, 1, 1)) if overlap else ((1, 1, 1),)
    return first_of(RULES, op, ins, outs, device, _tried(outs, device, tiles))


def _prefer_most(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device) -> Config:
    config = _prefer(op, ins, outs, device)
    tried = [{**config, "pairs": pairs} for pairs in (1, 0)]
    return first_of(RULES_MOST, op, ins, outs, device, tried)


def _prefer_back(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device) -> Config:
    g = _geometry(op, ins, outs)
    tiles = ((1, 1, g.stride[1] * g.stride[2]), (0, 0, 1))
    return first_of(RULES_BACK, op, ins, outs, device, _tried(outs, device, tiles))


@dataclass(frozen=True)
class Kept:
    """What a thread keeps of each window, in registers: sums, or the largest elements and their taps.

    ``visit(best, which, k, values, active, tap)`` has window k meet what was loaded.
    """

    read: Any
    registers: int  # of a window
    kind: Any
    start: float
    taps: int  # registers of a window for them
    visit: Callable[..., None]
    result: Any  # float32 of registers
    number: Any  # taps of registers, as int32


def _sums(dtype: str, lanes: int) -> Kept:
    add = plus(lanes)

    def visit(best: Any, which: Any, k: Any, values: Any, active: Any, tap: Any) -> None:
        add(best, k * lanes, values)

    kind = np.dtype(held(dtype)).type
    return Kept(load(dtype, lanes, constant=True), lanes, kind, 0.0, 0, visit, take(lanes), None)


def _largest(dtype: str, lanes: int) -> Kept:
    more = larger(lanes)

    def visit(best: Any, which: Any, k: Any, values: Any, active: Any, tap: Any) -> None:
        more(best, which, k * lanes, values, active, tap)

    kind = np.dtype(held(dtype)).type
    return Kept(load(dtype, lanes, constant=True), lanes, kind, -np.inf, lanes, visit, take(lanes), take(lanes))


def _largest_pairs(dtype: str, lanes: int) -> Kept:
    """Halves stay two to a word and are compared so: half of the instructions, and no conversions but of results."""
    words = lanes // 2
    more = larger_words(dtype, words)

    def visit(best: Any, which: Any, k: Any, values: Any, active: Any, tap: Any) -> None:
        more(best, which, k * words, values, tap)

    result, number = halves_of(dtype, lanes), parts_of(lanes)
    return Kept(load_words(dtype, lanes), words, int32, least_words(dtype), words, visit, result, number)


def _slide(
    g: Geometry,
    kept: Kept,
    outs: Sequence[Spec],
    epilogue: Epilogue,
    *,
    threads: int,
    vector: int,
    down: int,
    across: int,
) -> Grid:
    """The kernel for whatever is kept of windows."""
    (D, H, W), (OD, OH, OW), C, lanes = g.size, g.out, g.c, vector
    (KD, KH, KW), (SD, SH, SW), (PD, PH, PW) = g.window, g.stride, g.low
    panels, across_tiles, down_tiles = C // lanes, blocks_of(OW, across), blocks_of(OH, down)
    total = g.n * OD * down_tiles * across_tiles * panels
    rows, columns = (down - 1) * SH + KH, (across - 1) * SW + KW
    # which tap of which window of the tile an element is, -1 for none
    taps_h = tuple(tuple(_tap(i - a * SH, KH) for a in range(down)) for i in range(rows))
    taps_w = tuple(tuple(_tap(j - b * SW, KW) for b in range(across)) for j in range(columns))
    registers, taps, most = down * across * kept.registers, max(1, down * across * kept.taps), kept.taps > 0
    start, nowhere, end = spread(registers, kept.start), spread(taps, 0), tail(epilogue, lanes)
    mark, as_marks = (store(outs[1].dtype, lanes), whole(outs[1].dtype, lanes)) if most else (None, None)
    written_out = KD * rows * columns <= MOST_TAPS * 2
    inner = unroll if KW <= 16 else range

    def kernel(ins: Any, outs: Any, work: Any, extras: Any, at: Any) -> None:
        thread = cuda.blockIdx.x * threads + cuda.threadIdx.x
        on = thread < total
        channel = thread % panels * lanes
        tile = thread // panels
        wide = tile % across_tiles * across
        high = tile // across_tiles % down_tiles * down
        plane = tile // (across_tiles * down_tiles)
        d = plane % OD * SD - PD
        h = high * SH - PH
        w = wide * SW - PW
        base = (((plane // OD * D + d) * H + h) * W + w) * C + channel
        best = cuda.local.array(registers, kept.kind)
        which = cuda.local.array(taps, int32)
        start(best)
        nowhere(which)
        if written_out:
            for q in unroll(KD):
                for i in unroll(rows):
                    in_row = on & inside(d + q, D) & inside(h + i, H)
                    for j in unroll(columns):
                        active = in_row & inside(w + j, W)
                        values = kept.read(active, ins[0], base + ((q * H + i) * W + j) * C)
                        for a in unroll(down):
                            if taps_h[i][a] >= 0:
                                for b in unroll(across):
                                    if taps_w[j][b] >= 0:
                                        tap = (q * KH + taps_h[i][a]) * KW + taps_w[j][b]
                                        kept.visit(best, which, a * across + b, values, active, tap)
        else:
            for q in range(KD):
                for i in range(KH):
                    in_row = on & inside(d + q, D) & inside(h + i, H)
                    for j in inner(KW):
                        active = in_row & inside(w + j, W)
                        values = kept.read(active, ins[0], base + ((q * H + i) * W + j) * C)
                        kept.visit(best, which, 0, values, active, (q * KH + i) * KW + j)
        for a in unroll(down):
            for b in unroll(across):
                active = on & (high + a < OH) & (wide + b < OW)
                element = ((plane * OH + high + a) * OW + wide + b) * C + channel
                values = kept.result(best, (a * across + b) * kept.registers)
                end.finish(active, outs[0], values, element, channel, extras, at)
                if most:
                    mark(active, outs[1], element, as_marks(kept.number(which, (a * across + b) * kept.taps)))

    return Grid(kernel, blocks_of(total, threads), threads)


def _tap(at: int, window: int) -> int:
    return at if 0 <= at < window else -1


@template("max_pool", "cuda", space=SPACE_MOST, fits=RULES_MOST, prefer=_prefer_most)
def largest(
    op: Any, ins: Sequence[Spec], outs: Sequence[Spec], epilogue: Epilogue, *, pairs: int, **config: int
) -> Grid:
    """One pass over x, which neighbours read again from caches."""
    kept = (_largest_pairs if pairs else _largest)(outs[0].dtype, config["vector"])
    return _slide(_geometry(op, ins, outs), kept, outs, epilogue, **config)


@template("sum_pool", "cuda", space=SPACE, fits=RULES, prefer=_prefer)
def sums(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], epilogue: Epilogue, **config: int) -> Grid:
    """One pass over x, which neighbours read again from caches."""
    kept = _sums(outs[0].dtype, config["vector"])
    return _slide(_geometry(op, ins, outs), kept, outs, epilogue, **config)


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
            tuple(_tap(j + self.low - offset * self.stride, self.window) for j in range(self.tile))
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
    marked = load(ins[1].dtype, lanes, constant=True) if chooses else None
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
    marked = load(ins[1].dtype, lanes, constant=True) if chooses else None
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
    g = _geometry(op, ins, outs)
    return (_gather_tiles if config["down"] else _gather_each)(g, ins, epilogue, **config)


@template("max_pool_grad", "cuda", space=SPACE_BACK, fits=RULES_BACK, prefer=_prefer_back)
def chosen_windows(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], epilogue: Epilogue, **config: int) -> Grid:
    """Each element of dx gets the dy of the windows that chose it."""
    return _gather(op, ins, outs, epilogue, config)


@template("sum_pool_grad", "cuda", space=SPACE_BACK, fits=RULES_BACK, prefer=_prefer_back)
def all_windows(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], epilogue: Epilogue, **config: int) -> Grid:
    """Each element of dx gets the dy of all windows over it."""
    return _gather(op, ins, outs, epilogue, config)
