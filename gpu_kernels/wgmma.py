"""Matrix products on Hopper's tensor cores (sm_90a): what dense layers, convolutions and their gradients share.

::

        warpgroup 0                shared memory                 warpgroups 1, 2
       +-----------+   copies  +----+ +----+ +----+   reads   +-------------------+
       | one thread| --------> | a b| | a b| | a b| --------> | wgmma, 64-row     |
       | asks (TMA)|   full:   +----+ +----+ +----+           | parts of bm x bn; |
       +-----------+ <------------------------------ empty:   | then the tail     |
                                                              +-------------------+

A block is persistent, unless ``blocks`` is 0: it computes tile after tile of bm x bn outputs, and the copies of the
next tile begin while the last one is stored. A stage holds 128 bytes of the inner sum. `Operand` says where an
operand's chunks come from; halves may have either axis contiguous, so that nothing is transposed. Sums are float32, in
registers; the order is fixed.

float32 has two ways (`kind_of`): TF32, or three products of it that are as good as fp32's. The inner sum must then run
along lines, so b is laid out first (`lay_out`), rounded or split; a comes as it lies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

from rapydli_flow.spec import HALVES, Spec
from rapydli_flow.template import Config, Device, Epilogue, Values, broken, values_on

from . import cost as costs
from .grid import INDEX_LIMIT, WARPGROUP, Grid, TensorMap, blocks_of
from .hopper import (
    ALIGNMENT,
    LINE_BYTES,
    LINES,
    acquire,
    arrive,
    copy,
    depth_of,
    elected,
    expect,
    own_warpgroup,
    place_of,
    registers,
    start_barriers,
    wait,
)
from .ptx import append, clear, cuda, float32, select, store, unroll
from .tail import tail
from .tensor_core import SPLIT, kind_of
from .warpgroup import columns, multiply, multiply_split, settle
from .wgmma_passes import lanes_of

SPACE: Mapping[str, Values] = {
    "bm": (128, 256, 64),
    "bn": (256, 128, 64, 192),
    "stages": (4, 3, 5, 6, 8),
    # tiles of rows that follow each other before the next column: they share b in the second cache
    "group": (16, 8, 1),
    "ahead": (1, 0),  # products of stages that may be under way while the next are issued
    # of the grid, at most: one for each multiprocessor (132 of an H200), or, 0, one for each tile
    "blocks": lambda device: (device.cores, 0),
}
SPLITS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64)
SPLIT_SPACE: Mapping[str, Values] = {**SPACE, "splits": SPLITS}
SHARED_BYTES = 227 * 1024 - 256  # of a block on sm_90, but for the barriers
SUMS = 128  # of a thread
FEWER, MORE = 40, 232  # registers of a thread that asks for copies, and of one that multiplies, when there are three


@dataclass(frozen=True)
class Operand:
    """Where the chunks of an operand come from.

    ``fetch(maps, barriers, i, tiles, line, first, step)`` begins all copies of one stage: rows (or columns) from
    ``first`` on, and the line of the inner sum with number ``step``: 64 of halves, 32 of float32.
    """

    maps: tuple[TensorMap, ...]
    mn_major: bool
    fetch: Callable[..., None]


@dataclass(frozen=True)
class Rows:
    """Of every ``computed`` rows the first ``kept`` are outputs."""

    computed: int
    kept: int


@dataclass(frozen=True)
class Tile:
    """``m x n`` sums over ``steps`` lines, and how they are cut; ``splits`` blocks may share a sum."""

    kind: str
    dtype: str
    m: int
    n: int
    steps: int
    bm: int
    bn: int
    stages: int
    group: int
    ahead: int
    blocks: int
    splits: int = 1

    @property
    def consumers(self) -> int:
        """Warpgroups that multiply."""
        return min(2, self.bm // LINES)

    @property
    def parts(self) -> int:
        """64-row parts of each of them."""
        return self.bm // LINES // self.consumers

    @property
    def blocks_m(self) -> int:
        return blocks_of(self.m, self.bm)

    @property
    def blocks_n(self) -> int:
        return blocks_of(self.n, self.bn)

    @property
    def plane(self) -> int:
        return self.blocks_m * self.blocks_n

    @property
    def tiles(self) -> int:
        return self.plane * self.splits

    @property
    def own_steps(self) -> int:
        """Of one split."""
        return blocks_of(self.steps, self.splits)

    @property
    def grid(self) -> int:
        return min(self.tiles, self.blocks or self.tiles)

    @property
    def pieces(self) -> int:
        """Of b: itself, or a part of its bits and the rest."""
        return 2 if self.kind == SPLIT else 1

    @property
    def lines(self) -> int:
        """Of a stage."""
        return self.bm + self.bn * self.pieces

    @property
    def sums(self) -> int:
        """Registers of a thread for them: those of one line are apart where lines are added in float32."""
        return self.parts * self.bn // 2 * self.pieces

    @property
    def shared_bytes(self) -> int:
        return self.stages * self.lines * LINE_BYTES + ALIGNMENT


def box_operand(array: int, dtype: str, size: tuple[int, ...], rows: int, index: int, *, mn_major: bool) -> Operand:
    """An operand that is a matrix of ``size`` (innermost first); ``index``: of its map among those of the grid."""
    begin, depth = copy(2), depth_of(dtype)
    if mn_major:

        def fetch(maps: Any, bars: Any, i: Any, tiles: Any, line: Any, first: Any, step: Any) -> None:
            for part in unroll(rows // depth):
                begin(maps[index], bars, i, tiles, line + part * depth, first + part * depth, step * depth)

    else:

        def fetch(maps: Any, bars: Any, i: Any, tiles: Any, line: Any, first: Any, step: Any) -> None:
            begin(maps[index], bars, i, tiles, line, step * depth, first)

    box = (depth, depth) if mn_major else (depth, rows)
    return Operand((TensorMap(array, dtype, size, (size[0],), box),), mn_major, fetch)


def products(t: Tile, a: Operand, b: Operand, epilogue: Epilogue | None, rows: Rows | None = None) -> Grid:
    """The kernel: outs[0][row, column] = epilogue(sum over k of a[row, k] * b[column, k]).

    Without an epilogue the sums of split s go to the last workspace, [s, row, column].
    """
    full, empty = 0, t.stages
    size_bytes = t.lines * LINE_BYTES
    ready, free = start_barriers(full, t.stages, 1), start_barriers(empty, t.stages, 4 * t.consumers)
    announce, own, held = expect(size_bytes), acquire(), t.parts * t.bn // 2
    by_threads = t.kind == SPLIT or (t.kind == "tf32" and a.mn_major)
    if by_threads:
        fma = multiply_split(t.bn, t.pieces, mn_major=a.mn_major)
    else:
        fma = multiply(t.dtype, t.parts, t.bn, mn_major=(a.mn_major, b.mn_major), left=t.ahead)
    sums, done = clear(held), settle(held)
    fewer, more = registers(FEWER, more=False), registers(MORE, more=True)
    chunks, line_places = place_of(ALIGNMENT), place_of(8)
    maps_used = len(a.maps) + len(b.maps)
    turns = blocks_of(t.tiles, t.grid)
    in_group, last_group = t.group * t.blocks_n, t.blocks_m // t.group
    rest = t.blocks_m % t.group
    fused, eight = epilogue is not None, epilogue is not None and lanes_of(epilogue) == 8
    end: Any = tail(epilogue, lanes_of(epilogue)) if epilogue else None
    trade, steps, write = t.consumers == 2, t.own_steps, store("float32", 4)
    computed, kept = (rows.computed, rows.kept) if rows else (t.m, t.m)
    size = t.m // computed * kept * t.n  # of the outputs
    # which rows of 16 a thread has: neighbours where it has read a itself, across lines
    (apart, next_half), last = (2, 1) if by_threads and a.mn_major else (1, 8), int(t.kind != "half")

    def corner_of(tile: Any) -> Any:
        group = tile % t.plane // in_group
        height = select(group < last_group, t.group, rest)
        row_0 = (group * t.group + tile % t.plane % in_group % height) * t.bm
        return (row_0, tile % t.plane % in_group // height * t.bn)

    def ask(maps: Any, bars: Any, tiles: Any, block: Any) -> None:
        for i in unroll(maps_used):
            own(maps[i])
        for turn in range(turns):
            tile = turn * t.grid + block
            if tile < t.tiles:
                corner = corner_of(tile)
                first = tile // t.plane * steps
                for step in range(steps):
                    count = turn * steps + step
                    stage = count % t.stages
                    wait(bars, empty + stage, (count // t.stages + 1) % 2)
                    announce(bars, stage)
                    a.fetch(maps, bars, stage, tiles, stage * t.lines, corner[0], first + step)
                    b.fetch(maps, bars, stage, tiles, stage * t.lines + t.bm, corner[1], first + step)

    def finish(acc: Any, outs: Any, work: Any, extras: Any, at: Any, row_0: Any, column_0: Any, split: Any) -> None:
        thread = cuda.threadIdx.x % WARPGROUP
        first_row = row_0 + thread // 32 * 16 + thread % 32 // 4 * apart
        first_column = column_0 + thread % 4 * 8
        for part in unroll(t.parts):
            for across in unroll(t.bn // 32):
                for half in unroll(2):
                    row = first_row + (part * LINES + half * next_half)
                    column = first_column + across * 32
                    values = columns(acc, part * (t.bn // 2) + across * 16 + half * 2)
                    active = (row < t.m) & (row % computed < kept)
                    element = (row // computed * kept + row % computed) * t.n + column
                    if eight:
                        end.finish(active & (column < t.n), outs[0], values, element, column, extras, at)
                    else:
                        for piece in unroll(2):
                            four = ()
                            for j in unroll(4):
                                four = append(four, values[piece * 4 + j])
                            on = active & (column + piece * 4 < t.n)
                            place = element + piece * 4
                            if fused:
                                end.finish(on, outs[0], four, place, column + piece * 4, extras, at)
                            else:
                                write(on, work[last], split * size + place, four)

    def consume(outs: Any, work: Any, extras: Any, at: Any, bars: Any, tiles: Any, block: Any, number: Any) -> None:
        acc = cuda.local.array(held, float32)
        for turn in range(turns):
            tile = turn * t.grid + block
            if tile < t.tiles:
                corner = corner_of(tile)
                sums(acc)
                for step in range(steps):
                    count = turn * steps + step
                    stage = count % t.stages
                    wait(bars, stage, count // t.stages % 2)
                    fma(acc, tiles, stage * t.lines + number * (t.parts * LINES), stage * t.lines + t.bm)
                    if t.ahead == 0:
                        arrive(bars, empty + stage)
                    elif step > 0:
                        arrive(bars, empty + (count + (t.stages - 1)) % t.stages)
                done(acc)
                if t.ahead == 1:
                    arrive(bars, empty + (turn * steps + (steps - 1)) % t.stages)
                row_0 = corner[0] + number * (t.parts * LINES)
                finish(acc, outs, work, extras, at, row_0, corner[1], tile // t.plane)

    def kernel(ins: Any, outs: Any, work: Any, extras: Any, at: Any, maps: Any) -> None:
        tiles = chunks(cuda.shared.array(0, np.uint16, alignment=16))
        bars = line_places(cuda.shared.array(2 * t.stages, np.int64, alignment=8))
        block = cuda.blockIdx.x
        group = own_warpgroup()
        if group == 0 and elected():
            ready(bars)
            free(bars)
        cuda.syncthreads()
        if group == 0:
            if trade:
                fewer()
            if elected():
                ask(maps, bars, tiles, block)
        else:
            if trade:
                more()
            consume(outs, work, extras, at, bars, tiles, block, group - 1)

    threads = WARPGROUP * (1 + t.consumers)
    return Grid(kernel, t.grid, threads, shared_bytes=t.shared_bytes, maps=(*a.maps, *b.maps), roles=True)


def lines_operand(t: Tile, taps: int, inner: int, *, turned: bool = False) -> Operand:
    """b as `lay_out` leaves it; ``turned``: the last tap is first."""
    begin, depth = copy(3), depth_of(t.dtype)
    blocks, rows, pieces = blocks_of(inner, depth), t.bn, t.pieces
    pitch = blocks * depth
    maps = (TensorMap(3, t.dtype, (pitch, t.n, pieces * taps), (pitch, pitch * t.n), (depth, rows, 1)),)

    def fetch(maps: Any, bars: Any, i: Any, tiles: Any, line: Any, first: Any, step: Any) -> None:
        tap = (taps - 1) - step // blocks if turned else step // blocks
        for piece in unroll(pieces):
            begin(maps[1], bars, i, tiles, line + piece * rows, step % blocks * depth, first, tap + piece * taps)

    return Operand(maps, False, fetch)


# ---- rules and defaults

Size = Callable[[Any, Sequence[Spec], Sequence[Spec]], tuple[int, int, int]]
Rules = Mapping[str, str | Callable[..., bool]]


def cut(op: Any, dtype: str, size: tuple[int, int, int], config: Config) -> Tile:
    return Tile(kind_of(op, dtype), dtype, *size, **config)


def card(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device) -> bool:
    """Is this a Hopper?"""
    return device.target == "sm_90a"


def floats(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device) -> bool:
    """Halves, or float32 that need not be exact."""
    if op.exact or not all(0 < spec.size < INDEX_LIMIT for spec in (*ins, *outs)):
        return False
    return all(spec.dtype in (*HALVES, "float32") for spec in (*ins, *outs))


def wide(*specs: Spec) -> bool:
    """Are rows of these arrays multiples of 16 bytes? The copy engine and stores want that."""
    return all(spec.shape[-1] * np.dtype(spec.dtype).itemsize % 16 == 0 for spec in specs)


def rules(size: Size, across: Callable[[Any], bool] = lambda op: False) -> dict[str, str | Callable[..., bool]]:
    """The hard constraints of every such kernel. They come after rules on the op alone, so that there is a size.

    ``across``: is a of this op mn-major?
    """

    def indices(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device, **config: Any) -> bool:
        t = cut(op, ins[0].dtype, size(op, ins, outs), config)
        laid = t.pieces * t.steps * depth_of(t.dtype) * t.n if t.kind != "half" else 0
        return t.splits * (t.m + t.bm) * (t.n + t.bn) < INDEX_LIMIT and laid < INDEX_LIMIT

    def sums(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device, **config: Any) -> bool:
        t = cut(op, ins[0].dtype, (1, 1, 1), config)
        by_threads = t.kind == SPLIT or (t.kind == "tf32" and across(op))
        return t.sums <= SUMS and not (by_threads and (t.parts > 1 or t.ahead))

    def stages(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device, **config: Any) -> bool:
        return cut(op, ins[0].dtype, (1, 1, 1), config).shared_bytes <= SHARED_BYTES

    return {"sums in registers": sums, "stages in shared memory": stages, "results in 32-bit indices": indices}


def preferring(rules: Rules, size: Size, splits: tuple[int, ...] = ()) -> Callable[..., Config]:
    """The config that is foretold to be fastest, of those that keep the rules; or one that does not."""

    def prefer(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device) -> Config:
        space = values_on(device, SPLIT_SPACE if splits else SPACE)
        none = {name: values[0] for name, values in space.items()}
        alone = {name: rule for name, rule in rules.items() if name not in _OF_TILES}
        if broken(alone, op, ins, outs, device, none) is not None:
            return none
        kind, whole = kind_of(op, ins[0].dtype), size(op, ins, outs)
        tried = list(_tried(kind, ins[0].dtype, device, splits))
        tried.sort(key=lambda config: seconds(Tile(kind, ins[0].dtype, *whole, **config), device))
        return next((c for c in tried if broken(rules, op, ins, outs, device, c) is None), none)

    return prefer


_OF_TILES = tuple(rules(lambda *_: (1, 1, 1)))


def costing(size: Size) -> Callable[..., float]:
    """For `template`: seconds by a guess."""
    return lambda op, ins, outs, device, config: seconds(cut(op, ins[0].dtype, size(op, ins, outs), config), device)


def _tried(kind: str, dtype: str, device: Device, splits: tuple[int, ...]) -> Iterator[dict[str, Any]]:
    """For each shape of a tile as many stages as there is room for."""
    space = values_on(device, SPACE)
    for bm, bn, ahead in product(space["bm"], space["bn"], (1, 0)):
        config = {"bm": bm, "bn": bn, "stages": 1, "group": 16, "ahead": ahead, "blocks": device.cores}
        t = Tile(kind, dtype, 1, 1, 1, **config)
        room = (SHARED_BYTES - ALIGNMENT) // (t.lines * LINE_BYTES)
        config["stages"] = max((s for s in space["stages"] if s <= room), default=0)
        if config["stages"] and t.sums <= SUMS:
            yield from ({**config, "splits": s} for s in splits) if splits else (config,)


def seconds(t: Tile, device: Device) -> float:
    """Time of all tiles: small ones read more for each output, and begin and end as often as large ones.

    Rates of `cost` were measured with tiles of 128 x 128.
    """
    lost = (1 + 24 / t.bm + 24 / t.bn) / (1 + 24 / 128 + 24 / 128) * (1.2 if t.consumers == 1 else 1)
    depth = (t.own_steps + 6) * depth_of(t.dtype) * lost
    work: dict[str, Any] = {"unit": f"wgmma {t.kind}", "blocks": t.tiles}
    flops, sums = 2.0 * t.tiles * t.bm * t.bn * depth, 4.0 * t.splits * t.m * t.n
    if t.splits == 1:
        return costs.seconds(device, flops=flops, size_bytes=sums / 2, **work)
    return costs.seconds(device, flops=flops, size_bytes=sums, **work) + costs.seconds(
        device, flops=0, size_bytes=sums, **work
    )
