"""Matrix products on Hopper's tensor cores (sm_90a): what dense layers, convolutions and their gradients share.

::

        warpgroup 0                shared memory                 warpgroups 1, 2
       +-----------+   copies  +----+ +----+ +----+   reads   +-------------------+
       | one thread| --------> | a b| | a b| | a b| --------> | wgmma, 64-row     |
       | asks (TMA)|   full:   +----+ +----+ +----+           | parts of bm x bn; |
       +-----------+ <------------------------------ empty:   | then the tail     |
                                                              +-------------------+

A block is persistent: it computes tile after tile of bm x bn outputs, and the copies of the next tile begin while the
last one is stored. A stage holds 64 of the inner sum. `Operand` says where an operand's chunks come from; halves may
have either axis contiguous, so that nothing is transposed. Sums are float32, in registers; the order of each is fixed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

from rapydli_flow.spec import HALVES, Spec
from rapydli_flow.template import Config, Device, Epilogue, broken

from . import cost as costs
from .grid import INDEX_LIMIT, WARPGROUP, Grid, TensorMap, blocks_of
from .hopper import (
    ALIGNMENT,
    CHUNK_BYTES,
    DEPTH,
    LINE_BYTES,
    LINES,
    acquire,
    add,
    arrive,
    columns,
    copy,
    elected,
    expect,
    multiply,
    place_of,
    registers,
    settle,
    start_barriers,
    wait,
    warpgroup,
)
from .ptx import append, clear, cuda, float32, load, select, store, take, unroll
from .tail import tail

# These templates are built and tested without a card; until they have run on one, nothing chooses them by itself.
TRIED = False

SPACE: Mapping[str, tuple[Any, ...]] = {
    "bm": (128, 256, 64),
    "bn": (256, 128, 64, 192),
    "stages": (4, 3, 5, 6, 8),
    "group": (
        16,
        8,
        1,
    ),  # tiles of rows that follow each other before the next column: they share b in the second cache
    "ahead": (1, 0),  # products of stages that may be under way while the next are issued
    "blocks": (132, 0, 114),  # of the grid, at most; 0: one for each tile
}
SPLIT_SPACE: Mapping[str, tuple[Any, ...]] = {**SPACE, "splits": (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64)}
SHARED_BYTES = 227 * 1024 - 256  # of a block on sm_90, but for the barriers
SUMS = 128  # of a thread
FEWER, MORE = 40, 232  # registers of a thread that asks for copies, and of one that multiplies, when there are three


@dataclass(frozen=True)
class Operand:
    """Where the chunks of an operand come from.

    ``fetch(maps, barriers, i, tiles, line, first, step)`` begins all copies of one stage: rows (or columns) from
    ``first`` on, and the 64 of the inner sum with number ``step``.
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
    """``m x n`` sums over ``steps`` times 64, and how they are cut; ``splits`` blocks may share a sum."""

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
    def lines(self) -> int:
        """Of a stage."""
        return self.bm + self.bn

    @property
    def shared_bytes(self) -> int:
        return self.stages * self.lines * LINE_BYTES + ALIGNMENT


def box_operand(array: int, dtype: str, size: tuple[int, int], rows: int, index: int, *, mn_major: bool) -> Operand:
    """An operand that is a matrix of ``size`` (innermost first); ``index``: of its map among those of the grid."""
    begin = copy(2)
    if mn_major:

        def fetch(maps: Any, bars: Any, i: Any, tiles: Any, line: Any, first: Any, step: Any) -> None:
            for part in unroll(rows // LINES):
                begin(maps[index], bars, i, tiles, line + part * LINES, first + part * LINES, step * DEPTH)

    else:

        def fetch(maps: Any, bars: Any, i: Any, tiles: Any, line: Any, first: Any, step: Any) -> None:
            begin(maps[index], bars, i, tiles, line, step * DEPTH, first)

    box = (LINES, DEPTH) if mn_major else (DEPTH, rows)
    return Operand((TensorMap(array, dtype, size, (size[0],), box),), mn_major, fetch)


def products(t: Tile, a: Operand, b: Operand, epilogue: Epilogue | None, rows: Rows | None = None) -> Grid:
    """The kernel: outs[0][row, column] = epilogue(sum over k of a[row, k] * b[column, k]).

    Without an epilogue the sums of split s go to work[0][s, row, column].
    """
    full, empty = 0, t.stages
    size_bytes = t.lines * LINE_BYTES
    ready, free = start_barriers(full, t.stages, 1), start_barriers(empty, t.stages, 4 * t.consumers)
    announce, own, held = expect(size_bytes), acquire(), t.parts * t.bn // 2
    fma = multiply(t.dtype, t.parts, t.bn, mn_major=(a.mn_major, b.mn_major), left=t.ahead)
    sums, done = clear(held), settle(held)
    fewer, more = registers(FEWER, more=False), registers(MORE, more=True)
    chunks, line_places = place_of(ALIGNMENT), place_of(8)
    maps_used = len(a.maps) + len(b.maps)
    turns = blocks_of(t.tiles, t.grid)
    in_group, last_group = t.group * t.blocks_n, t.blocks_m // t.group
    rest = t.blocks_m % t.group
    end = tail(epilogue, 8) if epilogue else None
    trade, steps, write = t.consumers == 2, t.own_steps, store("float32", 4)
    computed, kept = (rows.computed, rows.kept) if rows else (t.m, t.m)
    size = t.m // computed * kept * t.n  # of the outputs

    def ask(maps: Any, bars: Any, tiles: Any, block: Any) -> None:
        for i in unroll(maps_used):
            own(maps[i])
        for turn in range(turns):
            tile = turn * t.grid + block
            if tile < t.tiles:
                group = tile % t.plane // in_group
                height = select(group < last_group, t.group, rest)
                row_0 = (group * t.group + tile % t.plane % in_group % height) * t.bm
                column_0 = tile % t.plane % in_group // height * t.bn
                first = tile // t.plane * steps
                for step in range(steps):
                    count = turn * steps + step
                    stage = count % t.stages
                    wait(bars, empty + stage, (count // t.stages + 1) % 2)
                    announce(bars, stage)
                    a.fetch(maps, bars, stage, tiles, stage * t.lines, row_0, first + step)
                    b.fetch(maps, bars, stage, tiles, stage * t.lines + t.bm, column_0, first + step)

    def finish(acc: Any, outs: Any, work: Any, extras: Any, at: Any, row_0: Any, column_0: Any, split: Any) -> None:
        thread = cuda.threadIdx.x % WARPGROUP
        first_row = row_0 + thread // 32 * 16 + thread % 32 // 4
        first_column = column_0 + thread % 4 * 8
        for part in unroll(t.parts):
            for across in unroll(t.bn // 32):
                for half in unroll(2):
                    row = first_row + (part * LINES + half * 8)
                    column = first_column + across * 32
                    values = columns(acc, part * (t.bn // 2) + across * 16 + half * 2)
                    active = (row < t.m) & (column < t.n) & (row % computed < kept)
                    element = (row // computed * kept + row % computed) * t.n + column
                    if end:
                        end.finish(active, outs[0], values, element, column, extras, at)
                    else:
                        for piece in unroll(2):
                            four = ()
                            for j in unroll(4):
                                four = append(four, values[piece * 4 + j])
                            write(active, work[0], split * size + element + piece * 4, four)

    def consume(outs: Any, work: Any, extras: Any, at: Any, bars: Any, tiles: Any, block: Any, number: Any) -> None:
        acc = cuda.local.array(held, float32)
        for turn in range(turns):
            tile = turn * t.grid + block
            if tile < t.tiles:
                group = tile % t.plane // in_group
                height = select(group < last_group, t.group, rest)
                row_0 = (group * t.group + tile % t.plane % in_group % height) * t.bm
                column_0 = tile % t.plane % in_group // height * t.bn
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
                finish(acc, outs, work, extras, at, row_0 + number * (t.parts * LINES), column_0, tile // t.plane)

    def kernel(ins: Any, outs: Any, work: Any, extras: Any, at: Any, maps: Any) -> None:
        tiles = chunks(cuda.shared.array(0, np.uint16, alignment=16))
        bars = line_places(cuda.shared.array(2 * t.stages, np.int64, alignment=8))
        block = cuda.blockIdx.x
        group = warpgroup()
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


def split_sums(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], **config: Any) -> tuple[Spec, ...]:
    """The workspace: outputs of each split in float32."""
    return (Spec((config["splits"], *outs[0].shape), "float32"),) if config["splits"] > 1 else ()


def add_up(t: Tile, epilogue: Epilogue) -> Grid:
    """The second kernel: the sums of all splits, in their order."""
    size, channels, threads = epilogue.out.size, epilogue.out.shape[-1], 256
    read, plus, zero, gather, end = load("float32", 4), add(4), clear(8), take(8), tail(epilogue, 8)

    def kernel(ins: Any, outs: Any, work: Any, extras: Any, at: Any) -> None:
        total = cuda.local.array(8, float32)
        element = (cuda.blockIdx.x * threads + cuda.threadIdx.x) * 8
        active = element < size
        zero(total)
        for split in range(t.splits):
            for piece in unroll(2):
                plus(total, piece * 4, read(active, work[0], split * size + element + piece * 4))
        end.finish(active, outs[0], gather(total, 0), element, element % channels, extras, at)

    return Grid(kernel, blocks_of(size, threads * 8), threads)


# ---- rules and defaults

Size = Callable[[Any, Sequence[Spec], Sequence[Spec]], tuple[int, int, int]]
Rules = Mapping[str, str | Callable[..., bool]]


def cut(dtype: str, size: tuple[int, int, int], config: Config) -> Tile:
    return Tile(dtype, *size, **config)


def card(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device) -> bool:
    """Is this a Hopper, and may it be used?"""
    return TRIED and device.target == "sm_90a"


def halves(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device) -> bool:
    """Are these non-empty halves that 32 bits can index?"""
    return all(spec.dtype in HALVES and 0 < spec.size < INDEX_LIMIT for spec in (*ins, *outs))


def rules(size: Size) -> dict[str, str | Callable[..., bool]]:
    """The hard constraints of every such kernel. They come after rules on the op alone, so that there is a size."""

    def indices(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device, **config: Any) -> bool:
        t = cut(ins[0].dtype, size(op, ins, outs), config)
        return t.splits * (t.m + t.bm) * (t.n + t.bn) < INDEX_LIMIT

    return {
        "sums in registers": f"bm // 64 // min(2, bm // 64) * bn // 2 <= {SUMS}",
        "stages in shared memory": f"stages * (bm + bn) * {LINE_BYTES} + {ALIGNMENT} <= {SHARED_BYTES}",
        "results in 32-bit indices": indices,
    }


def preferring(rules: Rules, size: Size, splits: tuple[int, ...] = ()) -> Callable[..., Config]:
    """The config that is foretold to be fastest, of those that keep the rules; or one that does not."""

    def prefer(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device) -> Config:
        none = {name: values[0] for name, values in (SPLIT_SPACE if splits else SPACE).items()}
        alone = {name: rule for name, rule in rules.items() if name not in _OF_TILES}
        if broken(alone, op, ins, outs, device, none) is not None:
            return none
        whole, tried = size(op, ins, outs), list(_tried(device, splits))
        tried.sort(key=lambda config: seconds(whole, device, config))
        return next((c for c in tried if broken(rules, op, ins, outs, device, c) is None), none)

    return prefer


_OF_TILES = tuple(rules(lambda *_: (1, 1, 1)))


def costing(size: Size) -> Callable[..., float]:
    """For `template`: seconds by a guess."""
    return lambda op, ins, outs, device, config: seconds(size(op, ins, outs), device, config)


def _tried(device: Device, splits: tuple[int, ...]) -> Iterator[dict[str, Any]]:
    """For each shape of a tile as many stages as there is room for."""
    blocks = device.cores if device.cores in SPACE["blocks"] else 0
    for bm, bn in product(SPACE["bm"], SPACE["bn"]):
        room = (SHARED_BYTES - ALIGNMENT) // ((bm + bn) * LINE_BYTES)
        stages = max((s for s in SPACE["stages"] if s <= room), default=0)
        if stages and bm // LINES // min(2, bm // LINES) * bn // 2 <= SUMS:
            config = {"bm": bm, "bn": bn, "stages": stages, "group": 16, "ahead": 1, "blocks": blocks}
            yield from ({**config, "splits": s} for s in splits) if splits else (config,)


def seconds(size: tuple[int, int, int], device: Device, config: Config) -> float:
    """Time of all tiles: small ones read more for each output, and begin and end as often as large ones."""
    t = cut("bfloat16", size, config)
    depth = (t.own_steps + 6) * DEPTH * (1 + 24 / t.bm + 24 / t.bn) * (1.2 if t.consumers == 1 else 1)
    work = {"unit": "wgmma half", "blocks": t.tiles}
    flops, sums = 2.0 * t.tiles * t.bm * t.bn * depth, 4.0 * t.splits * t.m * t.n
    if t.splits == 1:
        return costs.seconds(device, flops=flops, size_bytes=sums / 2, **work)
    return costs.seconds(device, flops=flops, size_bytes=sums, **work) + costs.seconds(
        device, flops=0, size_bytes=sums, **work
    )


assert CHUNK_BYTES == LINES * LINE_BYTES
