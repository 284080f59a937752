"""Register-tiled matrix product by fused multiply-adds: what dense layers and convolutions share.

::

                      bn columns                   A block computes bm x bn outputs; bk values of the inner
            bk     +-------------+                 sum at a time pass through shared memory, a[k, row] and
        +------+   |   tn        |                 b[k, column]. A thread holds tm x tn sums in registers,
     bm |      |   |   +-+  +-+  |  tm rows in     in groups of four rows and columns that lie a whole
        |      |   |   +-+  +-+  |  groups of 4    block of threads apart, so that neighbouring threads
        +------+   +-------------+                 read neighbouring 16 bytes.

The next tile is loaded into registers while this one is multiplied. With two stages there is one barrier
a step instead of two. Where rows or columns end, loads give zeros and stores are switched off. Halves are
widened on their way to shared memory.

A loader brings one operand: `prepare` once, `fetch` from global memory to registers, `put` from there to
shared memory. ``rows`` loads neighbours along the inner sum (and transposes), ``columns`` along the outer axis.

One launch computes all products of a batch (groups of channels, leading axes) and all phases of a strided gradient.
The inner sum can be split into parts: each writes its sums to the workspace, and a second kernel adds them in order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from rapydli_flow.template import Config, Epilogue

from .grid import Grid, blocks_of, widest
from .pair import Pair, held
from .parts import add_parts
from .ptx import (
    FAR,
    clear,
    cuda,
    hold,
    int32,
    load,
    multiply_tile,
    put,
    select,
    store,
    take,
    unroll,
)
from .tail import tail

NOW = 16  # numbers that loaders share; the first ones are
MEMBER, INNER = 0, 1  # which product of the batch this block computes a part of, and how long its sum is


@dataclass(frozen=True)
class Product:
    """What is multiplied: ``m x n`` sums over ``k``. ``rows_a``, ``rows_b``: k runs along the operand's memory, so that
    it is transposed on its way to shared memory, where its rows are padded. ``state``: registers of a thread for each
    of its loads of a.

    ``batch`` products of this form lie ``base`` elements apart in a, b and the result, whose rows begin ``pitch``
    elements apart (0: n). ``channels``: how far apart they are in the result's last axis. ``phases``: row sets with
    inner sums of their own, of which ``k`` is the longest.
    """

    m: int
    n: int
    k: int
    rows_a: bool
    rows_b: bool
    state: int = 0
    dtype: str = "float32"
    batch: int = 1
    base: tuple[int, int, int] = (0, 0, 0)
    pitch: int = 0
    channels: int = 0
    phases: int = 1
    work: float = 0  # multiply-adds of all products; 0: batch * m * n * k

    @property
    def row_pitch(self) -> int:
        return self.pitch or self.n

    @property
    def held_bytes(self) -> int:
        """Of an element in registers and shared memory."""
        return np.dtype(held(self.dtype)).itemsize

    def shares(self, vector_a: int, vector_b: int, *, threads: int, bm: int, bn: int, bk: int) -> list[Share | None]:
        """What a thread loads of either operand."""
        of_a = (bm, bk) if self.rows_a else (bk, bm)
        of_b = (bn, bk) if self.rows_b else (bk, bn)
        return [share(*of_a, vector_a, threads), share(*of_b, vector_b, threads)]

    def pads(self, pad: int) -> tuple[int, int]:
        """Values after a row of either operand in shared memory."""
        return pad if self.rows_a else 0, pad if self.rows_b else 0

    def cut(self, config: Config) -> tuple[Tile, Share, Share]:
        """The tile of a config that keeps the rules, and what a thread loads."""
        names = ("bm", "bn", "bk", "tm", "tn", "stages", "order", "splits", "resident")
        t = Tile(self, **{name: config[name] for name in names})
        vectors = config["vector_a"], config["vector_b"]
        a, b = self.shares(*vectors, threads=t.threads, bm=t.bm, bn=t.bn, bk=t.bk)
        assert a is not None, "loads of a are not shared out evenly"
        assert b is not None, "loads of b are not shared out evenly"
        return t, a, b


@dataclass(frozen=True)
class Tile:
    """A product, and how it is cut."""

    p: Product
    bm: int
    bn: int
    bk: int
    tm: int
    tn: int
    stages: int
    order: str
    splits: int
    resident: int

    @property
    def m(self) -> int:
        return self.p.m

    @property
    def n(self) -> int:
        return self.p.n

    @property
    def k(self) -> int:
        return self.p.k

    @property
    def across(self) -> int:
        """Threads along the columns."""
        return self.bn // self.tn

    @property
    def down(self) -> int:
        return self.bm // self.tm

    @property
    def threads(self) -> int:
        return self.across * self.down

    @property
    def blocks_m(self) -> int:
        return blocks_of(self.m, self.bm)

    @property
    def blocks_n(self) -> int:
        return blocks_of(self.n, self.bn)

    @property
    def steps(self) -> int:
        return blocks_of(self.k, self.bk)

    @property
    def blocks(self) -> int:
        return self.blocks_m * self.blocks_n * self.splits * self.p.phases * self.p.batch


@dataclass(frozen=True)
class Loader:
    """How one operand gets into shared memory; ``pitch`` is the length of a row there.

    ``prepare(state, first, thread, now)``, ``fetch(pointer, held, state, first, k, thread, now)`` and
    ``put(shared, held, at, thread)``; ``now`` is what the block computes, see `MEMBER`.
    """

    prepare: Callable[..., None]
    fetch: Callable[..., None]
    put: Callable[..., None]
    held: int
    pitch: int
    state: int = 1


@dataclass(frozen=True)
class Share:
    """What a thread carries: ``each`` vectors, ``step`` rows apart, of which ``across`` lie in a row."""

    vector: int
    across: int
    step: int
    each: int


def share(rows: int, columns: int, vector: int, threads: int) -> Share | None:
    """Divide a tile of rows x columns over the threads; None where that leaves a rest."""
    across = columns // vector
    if columns % vector or threads % across or rows % (threads // across):
        return None
    step = threads // across
    return Share(vector, across, step, rows // step)


def _uniform_twin(value: Any) -> int:
    values = np.unique(value)
    assert values.size == 1, "a number differs between the threads of a block"
    return int(values[0])


def _uniform_rule(value: Any) -> Any:
    from numba.cuda import types

    return types.int32, (types.int32,), lambda context, builder, sig, args: args[0]


uniform = Pair("uniform", _uniform_twin, _uniform_rule)  # a number that all threads of a block have alike


def nothing(state: Any, first: Any, thread: Any, now: Any) -> None:
    """A loader that has nothing to prepare."""


def put_transposed(s: Share, pitch: int) -> Callable[..., None]:
    """Vectors along k to ``shared[k, row]``."""
    one = put(1)

    def procedure(shared: Any, held: Any, at: Any, thread: Any) -> None:
        here = at + thread % s.across * (s.vector * pitch) + thread // s.across
        for part in unroll(s.each):
            for j in unroll(s.vector):
                one(shared, here + (j * pitch + part * s.step), held, part * s.vector + j)

    return procedure


def put_straight(s: Share, pitch: int) -> Callable[..., None]:
    """Vectors along rows or columns to ``shared[k, row]``."""
    write = put(s.vector)

    def procedure(shared: Any, held: Any, at: Any, thread: Any) -> None:
        here = at + thread // s.across * pitch + thread % s.across * s.vector
        for part in unroll(s.each):
            write(shared, here + part * s.step * pitch, held, part * s.vector)

    return procedure


def rows_loader(dtype: str, extent: int, inner: int, s: Share, *, pitch: int, base: int = 0) -> Loader:
    """An operand stored as ``[extent, inner]``: k runs along memory. ``base``: between products of the batch."""
    read, keep = load(dtype, s.vector, constant=True), hold(s.vector)

    def fetch(pointer: Any, held: Any, state: Any, first: Any, k: Any, thread: Any, now: Any) -> None:
        at_k = k + thread % s.across * s.vector
        row = first + thread // s.across
        for part in unroll(s.each):
            active = (row + part * s.step < extent) & (at_k < inner)
            keep(
                held, part * s.vector, read(active, pointer, (row + part * s.step) * inner + at_k + now[MEMBER] * base)
            )

    return Loader(nothing, fetch, put_transposed(s, pitch), s.each * s.vector, pitch)


def columns_loader(
    dtype: str, extent: int, inner: int, s: Share, *, pitch: int, line: int = 0, base: int = 0
) -> Loader:
    """An operand stored as ``[inner, extent]``, of rows ``line`` apart: rows or columns run along memory."""
    read, keep = load(dtype, s.vector, constant=True), hold(s.vector)
    line = line or extent

    def fetch(pointer: Any, held: Any, state: Any, first: Any, k: Any, thread: Any, now: Any) -> None:
        at = first + thread % s.across * s.vector
        at_k = k + thread // s.across
        for part in unroll(s.each):
            active = (at_k + part * s.step < inner) & (at < extent)
            keep(held, part * s.vector, read(active, pointer, (at_k + part * s.step) * line + at + now[MEMBER] * base))

    return Loader(nothing, fetch, put_straight(s, pitch), s.each * s.vector, pitch)


def begin_plain(now: Any, phase: Any) -> None:
    """Nothing to say of a phase where there is one."""


def locate_rows(p: Product) -> Callable[..., None]:
    """Rows of the result lie one after the other."""

    def locate(spot: Any, row: Any, now: Any) -> None:
        spot[0] = row * p.row_pitch + now[MEMBER] * p.base[2]
        spot[1] = select(row < p.m, 1, 0)

    return locate


def multiply(
    t: Tile,
    a: Loader,
    b: Loader,
    epilogue: Epilogue,
    *,
    begin: Callable[..., None] = begin_plain,
    locate: Callable[..., None] | None = None,
) -> tuple[Grid, ...]:
    """The kernels: outs[0][row, column] = epilogue(sum over k of a[k, row] * b[k, column]).

    ``begin(now, phase)`` says what the loaders share; ``locate(spot, row, now)`` where a row of the result begins, and
    whether there is one.
    """
    p, size = t.p, epilogue.out.size
    lanes = widest(t.n, p.row_pitch, p.base[2], p.channels, itemsize=p.held_bytes)
    split = t.splits > 1
    end, write = tail(epilogue, lanes), store(held(p.dtype), lanes)
    sums, gather = clear(t.tm * t.tn), take(lanes)
    where = locate or locate_rows(p)
    four_down, four_across = 4 * t.down, 4 * t.across
    fma = multiply_tile(t.bk, (t.tm, a.pitch, four_down), (t.tn, b.pitch, four_across))
    size_a, size_b = t.bk * a.pitch, t.bk * b.pitch
    tiles = t.blocks_m * t.blocks_n
    number = getattr(np, held(p.dtype))

    def kernel(ins: Any, outs: Any, work: Any, extras: Any, at: Any) -> None:
        shared_a = cuda.shared.array(t.stages * size_a, number, alignment=16)
        shared_b = cuda.shared.array(t.stages * size_b, number, alignment=16)
        held_a = cuda.local.array(a.held, number)
        held_b = cuda.local.array(b.held, number)
        state_a = cuda.local.array(a.state, int32)
        state_b = cuda.local.array(b.state, int32)
        now = cuda.local.array(NOW, int32)
        spot = cuda.local.array(2, int32)
        acc = cuda.local.array(t.tm * t.tn, number)
        thread = cuda.threadIdx.x
        block = cuda.blockIdx.x % tiles
        rest = cuda.blockIdx.x // tiles
        part = rest % t.splits
        now[MEMBER] = rest // (t.splits * p.phases) % p.batch
        if t.order == "columns":
            row_0 = block // t.blocks_n * t.bm
            column_0 = block % t.blocks_n * t.bn
        else:
            row_0 = block % t.blocks_m * t.bm
            column_0 = block // t.blocks_m * t.bn
        own_row = thread // t.across * 4
        own_column = thread % t.across * 4
        begin(now, rest // t.splits % p.phases)
        steps = t.steps
        if p.phases > 1:
            steps = (uniform(now[INNER]) + (t.bk - 1)) // t.bk
        first = part * steps // t.splits
        last = (part + 1) * steps // t.splits
        sums(acc)
        a.prepare(state_a, row_0, thread, now)
        b.prepare(state_b, column_0, thread, now)
        a.fetch(ins[0], held_a, state_a, row_0, first * t.bk, thread, now)
        b.fetch(ins[1], held_b, state_b, column_0, first * t.bk, thread, now)
        for step in range(first, last):
            stage = step % t.stages
            a.put(shared_a, held_a, stage * size_a, thread)
            b.put(shared_b, held_b, stage * size_b, thread)
            cuda.syncthreads()
            after = step * t.bk + t.bk
            if split:
                after = select(step + 1 < last, after, FAR)
            a.fetch(ins[0], held_a, state_a, row_0, after, thread, now)
            b.fetch(ins[1], held_b, state_b, column_0, after, thread, now)
            fma(acc, shared_a, shared_b, stage * size_a + own_row, stage * size_b + own_column)
            if t.stages == 1:
                cuda.syncthreads()
        for i in unroll(t.tm):
            where(spot, row_0 + own_row + (i // 4 * four_down + i % 4), now)
            for j in unroll(t.tn // lanes):
                column = column_0 + own_column + (j * lanes // 4 * four_across + j * lanes % 4)
                active = (spot[1] > 0) & (column < t.n)
                values = gather(acc, i * t.tn + j * lanes)
                if split:
                    write(active, work[0], part * size + spot[0] + column, values)
                else:
                    end.finish(active, outs[0], values, spot[0] + column, column + now[MEMBER] * p.channels, extras, at)

    products = Grid(kernel, t.blocks, t.threads, resident=t.resident)
    return (products, add_parts(epilogue, t.splits, size)) if split else (products,)
