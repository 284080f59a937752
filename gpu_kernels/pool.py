"""Pooling over 1 to 3 spatial axes: a thread computes a tile of neighbours, for a few channels.

    max_pool       y[o] = max over taps of x[o * stride - padding + tap], argmax[o] = the first tap that has it
    sum_pool       y[o] = sum over taps of x[...]

Fewer axes are taken as 3 by putting axes of size 1 in front. What a thread loads is used for all of its down x across
windows that hold it: x[i, j] is tap (i - a * stride, j - b * stride) of window (a, b). Taps come in memory order, so
that of equal values the first wins, and sums have one order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from rapydli_flow.spec import Spec
from rapydli_flow.template import Config, Device, Epilogue, template

from .access import larger, plus, spread, whole
from .compile import capability_of
from .grid import Grid, blocks_of
from .halves import halves_of, larger_words, least_words, load_words, parts_of
from .pair import held
from .pool_geometry import COMMON, MOST_SUMS, MOST_TAPS, Geometry, first_of, geometry, tap_of, tried
from .ptx import cuda, inside, int32, load, store, take, unroll
from .tail import tail

SPACE = {"threads": (256, 128, 512), "vector": (4, 2, 1, 8), "down": (1, 2, 4), "across": (1, 2, 4)}
SPACE_MOST = {**SPACE, "pairs": (0, 1)}


def _tiles(
    op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device, *, vector: int, down: int, across: int
) -> bool:
    """Results stay in registers; what is written out is not too long."""
    g, most = geometry(op, ins, outs), len(outs) == 2
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


RULES = {**COMMON, "tiles in registers": _tiles}
RULES_MOST = {**RULES, "halves in pairs": _pairs}


def _prefer(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device) -> Config:
    overlap = any(k > s for k, s in zip(op.window, op.stride, strict=True))
    tiles = ((2, 1, 2), (1, 1, 1)) if overlap else ((1, 1, 1),)
    return first_of(RULES, op, ins, outs, device, tried(outs, device, tiles))


def _prefer_most(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device) -> Config:
    config = _prefer(op, ins, outs, device)
    tried = [{**config, "pairs": pairs} for pairs in (1, 0)]
    return first_of(RULES_MOST, op, ins, outs, device, tried)


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
    taps_h = tuple(tuple(tap_of(i - a * SH, KH) for a in range(down)) for i in range(rows))
    taps_w = tuple(tuple(tap_of(j - b * SW, KW) for b in range(across)) for j in range(columns))
    registers, taps, most = down * across * kept.registers, max(1, down * across * kept.taps), kept.taps > 0
    start, nowhere, end = spread(registers, kept.start), spread(taps, 0), tail(epilogue, lanes)
    mark: Any = store(outs[1].dtype, lanes) if most else None
    as_marks: Any = whole(outs[1].dtype, lanes) if most else None
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


@template("max_pool", "cuda", space=SPACE_MOST, fits=RULES_MOST, prefer=_prefer_most)
def largest(
    op: Any, ins: Sequence[Spec], outs: Sequence[Spec], epilogue: Epilogue, *, pairs: int, **config: int
) -> Grid:
    """One pass over x, which neighbours read again from caches."""
    kept = (_largest_pairs if pairs else _largest)(outs[0].dtype, config["vector"])
    return _slide(geometry(op, ins, outs), kept, outs, epilogue, **config)


@template("sum_pool", "cuda", space=SPACE, fits=RULES, prefer=_prefer)
def sums(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], epilogue: Epilogue, **config: int) -> Grid:
    """One pass over x, which neighbours read again from caches."""
    kept = _sums(outs[0].dtype, config["vector"])
    return _slide(geometry(op, ins, outs), kept, outs, epilogue, **config)
