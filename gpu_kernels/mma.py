"""Matrix products on tensor cores, from sm_80 on: what dense layers, convolutions and their gradients share.

::

               stages of bk           A block computes bm x bn outputs. Asynchronous copies bring bk values of the inner
          +----+ +----+ +----+        sum at a time to one of several stages of shared memory, while warps multiply
       bm | a  | | a  | | a  |        wm x wn tiles of another: one barrier for each bk.
          +----+ +----+ +----+
       bn | b  | | b  | | b  |        ``splits`` blocks may share the inner sum of one tile. Their sums go to a
          +----+ +----+ +----+        workspace, and a second kernel adds them in a fixed order.

An operand lies in memory with the inner sum along its rows, or across them (`Layout`); a loader says where that is:
``prepare`` once, ``copy`` for each step. What is outside is copied as zeros.

float32 is multiplied in three TF32 products (see `tensor_core`), or in one if the op allows it (``tf32``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Any

import numpy as np

from rapydli_flow.template import Config, Epilogue

from .arithmetic import indexing
from .async_tiles import commit, in_shared, layout_of, wait
from .grid import Grid, blocks_of, widest
from .mma_loaders import Loader, lines_loader, rows_loader
from .pair import Pair
from .parts import add_in_order
from .ptx import clear, cuda, float32, inside, int32, select, store, take, unroll
from .tail import itemsize_of, tail
from .tensor_core import SPLIT, Operand, exchange, own_place, product
from .tiles import Share, share


@dataclass(frozen=True)
class Problem:
    """``batch`` products of ``m x n`` sums over ``k``, and how operands and results lie in memory.

    ``rows_a``, ``rows_b``: k runs along the operand's memory. ``base``: how far the operands, and the results, of one
    product of the batch are from those of the one before. ``pitch``: how far rows of the results are apart.
    ``channels``: of an output's last axis, for epilogues; the products of a batch may have a part of it each.
    """

    dtype: str
    kind: str
    m: int
    n: int
    k: int
    rows_a: bool
    rows_b: bool
    vector_a: int
    vector_b: int
    batch: int = 1
    base: tuple[int, int, int] = (0, 0, 0)
    pitch: int = 0
    state: int = 0  # registers of a thread for each of its copies of a
    part: int = 0  # which part of the op this is: some have several, one after the other

    @property
    def row_pitch(self) -> int:
        return self.pitch or self.n

    @property
    def flops(self) -> int:
        return 2 * self.batch * self.m * self.n * self.k


@dataclass(frozen=True)
class Tile:
    """A problem, and how it is cut."""

    p: Problem
    bm: int
    bn: int
    bk: int
    wm: int
    wn: int
    stages: int
    group: int
    splits: int
    resident: int
    exchange: bool

    @property
    def itemsize(self) -> int:
        return int(np.dtype(self.p.dtype).itemsize)

    @property
    def warps_n(self) -> int:
        return self.bn // self.wn

    @property
    def threads(self) -> int:
        return 32 * (self.bm // self.wm) * self.warps_n

    @property
    def blocks_m(self) -> int:
        return blocks_of(self.p.m, self.bm)

    @property
    def blocks_n(self) -> int:
        return blocks_of(self.p.n, self.bn)

    @property
    def blocks(self) -> int:
        return self.blocks_m * self.blocks_n * self.splits * self.p.batch

    @property
    def steps(self) -> int:
        """Of one split."""
        return blocks_of(blocks_of(self.p.k, self.bk), self.splits)

    @property
    def a(self) -> Operand:
        size = {"lines": self.bm if self.p.rows_a else self.bk, "pitch": self.bk if self.p.rows_a else self.bm}
        layout = layout_of(self.p.dtype, **size, rows=self.p.rows_a, left=True)
        return Operand(self.p.dtype, self.wm, self.p.rows_a, True, layout)

    @property
    def b(self) -> Operand:
        size = {"lines": self.bn if self.p.rows_b else self.bk, "pitch": self.bk if self.p.rows_b else self.bn}
        layout = layout_of(self.p.dtype, **size, rows=self.p.rows_b, left=False)
        return Operand(self.p.dtype, self.wn, self.p.rows_b, False, layout)

    @property
    def stage(self) -> int:
        """Elements of a stage."""
        return self.a.layout.size + self.b.layout.size

    @property
    def shared_bytes(self) -> int:
        return self.stages * self.stage * self.itemsize

    def shares(self) -> tuple[Share | None, Share | None]:
        """What a thread copies of either operand."""
        of_a, of_b = self.a.layout, self.b.layout
        return (
            share(of_a.lines, of_a.pitch, self.p.vector_a, self.threads),
            share(of_b.lines, of_b.pitch, self.p.vector_b, self.threads),
        )

    @property
    def registers(self) -> int:
        """A guess of what a thread needs."""
        held = self.wm * self.wn // 32 + self.a.registers + self.b.registers
        of_a = self.shares()[0]
        copies = 0 if of_a is None else of_a.each * self.p.state
        return held * (2 if self.p.kind == SPLIT else 1) + copies + 24


def cut(p: Problem, config: Config) -> Tile:
    """The tile of a config."""
    return Tile(p, **config)


def vector_of(dtype: str, *extents: int) -> int:
    """The widest copy that divides all of these."""
    return widest(*extents, itemsize=int(np.dtype(dtype).itemsize))


def loader(t: Tile, left: bool) -> Loader:
    """Of a plain matrix."""
    p, s = t.p, t.shares()[0 if left else 1]
    assert s is not None, "copies are not shared out evenly"
    layout = t.a.layout if left else t.b.layout
    make = rows_loader if (p.rows_a if left else p.rows_b) else lines_loader
    return make(p.dtype, layout, s, p.m if left else p.n, p.k)


# ---- kernels


@dataclass(frozen=True)
class Scatter:
    """Where pixels of a part of the output lie in it: ``out`` of a part, ``whole`` of the output, ``step`` and
    ``first`` for each of three axes."""

    out: tuple[int, ...]
    whole: tuple[int, ...]
    step: tuple[int, ...]
    first: tuple[int, ...]


@cache
def row_of(s: Scatter | None) -> Pair:
    """``(row) -> row of the output``: where a pixel of the part lies, or the same."""

    def row(pixel: Any) -> Any:
        if s is None:
            return pixel
        (_, high, wide), out = s.out, pixel // prod(s.out)
        for axis, inner in enumerate((high * wide, wide, 1)):
            out = out * s.whole[axis] + (pixel // inner % s.out[axis] * s.step[axis] + s.first[axis])
        return out

    return indexing("row_of", row)


TOGETHER = 4  # parts of one kernel: each is code of its own


@dataclass(frozen=True)
class Part:
    """One product of a kernel: how it is cut, what brings its operands, and where its pixels lie in the output."""

    tile: Tile
    a: Loader
    b: Loader
    scatter: Scatter | None = None


def lanes_of(p: Problem, epilogue: Epilogue) -> int:
    """How many neighbours are stored at once: 16 bytes of what is widest, if rows are multiples of that."""
    return widest(p.n, p.row_pitch, itemsize=itemsize_of(epilogue))


def multiply(parts: Sequence[Part], epilogue: Epilogue) -> tuple[Grid, ...]:
    """The kernels: outs[0][row, column] = epilogue(sum over k of a[row, k] * b[k, column]).

    Each part writes other elements; all are cut alike.
    """
    grids = [_products(parts[i : i + TOGETHER], epilogue) for i in range(0, len(parts), TOGETHER)]
    t = parts[0].tile
    if t.splits == 1:
        return tuple(grids)
    return (*grids, add_in_order(epilogue, t.splits, min(lanes_of(t.p, epilogue), 4)))


def _products(parts: Sequence[Part], epilogue: Epilogue) -> Grid:
    """The kernel of some parts, each of which has some of the blocks."""
    t, count = parts[0].tile, len(parts)
    ends = [sum(part.tile.blocks for part in parts[: i + 1]) for i in range(count)]
    firsts = [end - part.tile.blocks for end, part in zip(ends, parts, strict=True)]
    bodies = [_body(part, epilogue) for part in parts]
    element_type = in_shared(t.p.dtype)

    def kernel(ins: Any, outs: Any, work: Any, extras: Any, at: Any) -> None:
        shared = cuda.shared.array(0, element_type, alignment=1024)
        block = cuda.blockIdx.x
        for i in unroll(count):
            if count == 1:
                bodies[i](ins, outs, work, extras, at, shared, block)
            elif inside(block - firsts[i], ends[i] - firsts[i]):
                bodies[i](ins, outs, work, extras, at, shared, block - firsts[i])

    return Grid(kernel, ends[-1], t.threads, t.shared_bytes, t.resident)


def _body(part: Part, epilogue: Epilogue) -> Callable[..., None]:
    """What a block of a part does."""
    t, a, b = part.tile, part.a, part.b
    p, of_a, of_b, whole = t.p, t.a, t.b, t.splits == 1
    widest_store = lanes_of(p, epilogue) if whole else widest(p.n, p.row_pitch)
    swaps = t.exchange and not of_b.spread and widest_store > 2
    have = 8 if of_b.spread or swaps else 2  # neighbouring columns of a thread
    lanes = min(have, widest_store)
    end, swap = tail(epilogue, lanes if whole else 1), exchange()
    partial, size = store("float32", min(lanes, 4)), epilogue.out.size
    sums, gather = clear(t.wm * t.wn // 32), take(lanes)
    fma = product(p.kind, t.bk, of_a, of_b)
    place_a, place_b = own_place(of_a), own_place(of_b)
    size_a, stage_size, arrived, ahead = of_a.layout.size, t.stage, wait(t.stages - 2), t.stages - 1
    tiles, across = t.blocks_m * t.blocks_n, t.group * t.blocks_n
    (base_a, base_b, base_out), rows, columns = p.base, t.wm // 8, t.wn // 4
    channels, moved = base_out % p.row_pitch, row_of(part.scatter)

    # copies hide behind the last products of a step, but for two stages that is too late
    soon, not_soon = t.stages == 2, t.stages > 2

    def bring(
        ins: Any,
        shared: Any,
        state_a: Any,
        state_b: Any,
        batch: Any,
        row_0: Any,
        column_0: Any,
        k_0: Any,
        step: Any,
        thread: Any,
    ) -> None:
        to = step % t.stages * stage_size
        k = select(step < t.steps, k_0 + step * t.bk, p.k)  # after the last step, copy nothing: no branch
        a.copy(ins[0], shared, to, state_a, batch * base_a, row_0, k, thread)
        b.copy(ins[1], shared, to + size_a, state_b, batch * base_b, column_0, k, thread)

    def body(
        ins: Any,
        outs: Any,
        work: Any,
        extras: Any,
        at: Any,
        shared: Any,
        number: Any,
    ) -> None:
        acc = cuda.local.array(t.wm * t.wn // 32, float32)
        state_a = cuda.local.array(a.state, int32)
        state_b = cuda.local.array(b.state, int32)
        thread = cuda.threadIdx.x
        block = number % tiles
        batch = number // tiles % p.batch
        split = number // (tiles * p.batch)
        above = block // across * t.group
        tall = select(t.blocks_m - above < t.group, t.blocks_m - above, t.group)
        row_0 = (above + block % across % tall) * t.bm
        column_0 = block % across // tall * t.bn
        k_0 = split * (t.steps * t.bk)
        lane = thread % 32
        warp_row = thread // 32 // t.warps_n * t.wm
        warp_column = thread // 32 % t.warps_n * t.wn
        read_a = place_a(lane, warp_row)
        read_b = place_b(lane, warp_column)
        sums(acc)
        a.prepare(state_a, row_0, thread)
        b.prepare(state_b, column_0, thread)
        for step in unroll(ahead):
            bring(ins, shared, state_a, state_b, batch, row_0, column_0, k_0, step, thread)
            commit()
        for step in range(t.steps):
            arrived()
            cuda.syncthreads()
            if soon:
                bring(ins, shared, state_a, state_b, batch, row_0, column_0, k_0, step + ahead, thread)
                commit()
            here = step % t.stages * stage_size
            fma(acc, shared, here + read_a, here + size_a + read_b)
            if not_soon:
                bring(ins, shared, state_a, state_b, batch, row_0, column_0, k_0, step + ahead, thread)
                commit()
        for i in unroll(rows):
            if of_a.spread:
                row = row_0 + warp_row + lane // 4 * 4 + (i // 4 * 32 + i % 4)
            else:
                row = row_0 + warp_row + lane // 4 + i * 8
            row_out = moved(row)
            if swaps:
                for j in unroll(columns // 8):
                    swap(acc, i * columns + j * 8)
            for j in unroll(columns // lanes):
                first = j * lanes // have * (4 * have) + j * lanes % have
                column = column_0 + warp_column + lane % 4 * have + first
                active = (row < p.m) & (column < p.n)
                values = gather(acc, i * columns + j * lanes)
                element = batch * base_out + row_out * p.row_pitch + column
                if whole:
                    end.finish(active, outs[0], values, element, batch * channels + column, extras, at)
                else:
                    partial(active, work[0], split * size + element, values)

    return body
