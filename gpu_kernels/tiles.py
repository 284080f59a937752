"""Register-tiled matrix product in fp32: what dense layers and convolutions share.

::

                      bn columns                   A block computes bm x bn outputs; bk values of the inner
            bk     +-------------+                 sum at a time pass through shared memory, a[k, row] and
        +------+   |   tn        |                 b[k, column]. A thread holds tm x tn sums in registers,
     bm |      |   |   +-+  +-+  |  tm rows in     in groups of four rows and columns that lie a whole
        |      |   |   +-+  +-+  |  groups of 4    block of threads apart, so that neighbouring threads
        +------+   +-------------+                 read neighbouring 16 bytes.

The next tile is loaded into registers while this one is multiplied. With two stages there is one barrier
a step instead of two. Where rows or columns end, loads give zeros and stores are switched off.

A loader brings one operand: `prepare` once, `fetch` from global memory to registers, `put` from there to
shared memory. ``rows`` loads neighbours along the inner sum (and transposes), ``columns`` along the outer axis.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from rapydli_flow.spec import Spec
from rapydli_flow.template import Config, Device, Epilogue, broken

from .grid import INDEX_LIMIT, REGISTERS, STATIC_SHARED_BYTES, Grid, blocks_of, widest
from .ptx import (
    clear,
    cuda,
    float32,
    hold,
    int32,
    load,
    multiply_tile,
    put,
    take,
    unroll,
)
from .tail import tail

SPACE: Mapping[str, tuple[Any, ...]] = {
    "bm": (128, 64, 32, 256),
    "bn": (128, 64, 32, 256),
    "bk": (16, 8, 32),
    "tm": (8, 4),
    "tn": (8, 4),
    "stages": (2, 1),
    "vector_a": (4, 2, 1),
    "vector_b": (4, 2, 1),
    "pad": (4, 0),  # of the rows of a transposed operand in shared memory
    "order": ("columns", "rows"),  # which neighbour block comes next: the one that shares rows, or columns
    "resident": (1, 2, 4),
}
# bm, bn, bk, tm, tn of the defaults; 128 x 128 x 16 needs more than the 128 registers that two blocks leave
SHAPES = ((128, 128, 8, 8, 8), (128, 64, 16, 8, 8), (64, 128, 16, 8, 8), (64, 64, 16, 8, 4))
SHAPES += ((64, 32, 16, 4, 4), (32, 64, 16, 4, 4), (32, 32, 16, 4, 4))
STAGED_VALUES = 32  # the most elements that a thread may have under way


@dataclass(frozen=True)
class Tile:
    """A product of ``m x n`` outputs over ``k``, and how it is cut."""

    m: int
    n: int
    k: int
    bm: int
    bn: int
    bk: int
    tm: int
    tn: int
    stages: int
    order: str
    resident: int

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


@dataclass(frozen=True)
class Loader:
    """How one operand gets into shared memory; ``pitch`` is the length of a row there."""

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


@dataclass(frozen=True)
class Product:
    """What is multiplied: ``m x n`` sums over ``k``. ``rows_a``, ``rows_b``: k runs along the operand's memory, so that
    it is transposed on its way to shared memory, where its rows are padded. ``state``: registers of a thread for each
    of its loads of a."""

    m: int
    n: int
    k: int
    rows_a: bool
    rows_b: bool
    state: int = 0

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
        names = ("bm", "bn", "bk", "tm", "tn", "stages", "order", "resident")
        t = Tile(self.m, self.n, self.k, **{name: config[name] for name in names})
        vectors = config["vector_a"], config["vector_b"]
        a, b = self.shares(*vectors, threads=t.threads, bm=t.bm, bn=t.bn, bk=t.bk)
        assert a is not None, "loads of a are not shared out evenly"
        assert b is not None, "loads of b are not shared out evenly"
        return t, a, b


def nothing(state: Any, first: Any, thread: Any) -> None:
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


def rows_loader(extent: int, inner: int, s: Share, pitch: int) -> Loader:
    """An operand stored as ``[extent, inner]``: k runs along memory."""
    read, keep = load("float32", s.vector, constant=True), hold(s.vector)

    def fetch(pointer: Any, held: Any, state: Any, first: Any, k: Any, thread: Any) -> None:
        at_k = k + thread % s.across * s.vector
        row = first + thread // s.across
        for part in unroll(s.each):
            active = (row + part * s.step < extent) & (at_k < inner)
            keep(held, part * s.vector, read(active, pointer, (row + part * s.step) * inner + at_k))

    return Loader(nothing, fetch, put_transposed(s, pitch), s.each * s.vector, pitch)


def columns_loader(extent: int, inner: int, s: Share, pitch: int) -> Loader:
    """An operand stored as ``[inner, extent]``: rows or columns run along memory."""
    read, keep, write = load("float32", s.vector, constant=True), hold(s.vector), put(s.vector)

    def fetch(pointer: Any, held: Any, state: Any, first: Any, k: Any, thread: Any) -> None:
        at = first + thread % s.across * s.vector
        at_k = k + thread // s.across
        for part in unroll(s.each):
            active = (at_k + part * s.step < inner) & (at < extent)
            keep(held, part * s.vector, read(active, pointer, (at_k + part * s.step) * extent + at))

    def place(shared: Any, held: Any, at: Any, thread: Any) -> None:
        here = at + thread // s.across * pitch + thread % s.across * s.vector
        for part in unroll(s.each):
            write(shared, here + part * s.step * pitch, held, part * s.vector)

    return Loader(nothing, fetch, place, s.each * s.vector, pitch)


def multiply(t: Tile, a: Loader, b: Loader, epilogue: Epilogue) -> Grid:
    """The kernel: outs[0][row, column] = epilogue(sum over k of a[k, row] * b[k, column])."""
    lanes = widest(t.n)
    end = tail(epilogue, lanes)
    sums, gather = clear(t.tm * t.tn), take(lanes)
    four_down, four_across = 4 * t.down, 4 * t.across
    fma = multiply_tile(t.bk, (t.tm, a.pitch, four_down), (t.tn, b.pitch, four_across))
    size_a, size_b = t.bk * a.pitch, t.bk * b.pitch

    def kernel(ins: Any, outs: Any, work: Any, extras: Any, at: Any) -> None:
        shared_a = cuda.shared.array(t.stages * size_a, float32, alignment=16)
        shared_b = cuda.shared.array(t.stages * size_b, float32, alignment=16)
        held_a = cuda.local.array(a.held, float32)
        held_b = cuda.local.array(b.held, float32)
        state_a = cuda.local.array(a.state, int32)
        state_b = cuda.local.array(b.state, int32)
        acc = cuda.local.array(t.tm * t.tn, float32)
        thread = cuda.threadIdx.x
        block = cuda.blockIdx.x
        if t.order == "columns":
            row_0 = block // t.blocks_n * t.bm
            column_0 = block % t.blocks_n * t.bn
        else:
            row_0 = block % t.blocks_m * t.bm
            column_0 = block // t.blocks_m * t.bn
        own_row = thread // t.across * 4
        own_column = thread % t.across * 4
        sums(acc)
        a.prepare(state_a, row_0, thread)
        b.prepare(state_b, column_0, thread)
        a.fetch(ins[0], held_a, state_a, row_0, 0, thread)
        b.fetch(ins[1], held_b, state_b, column_0, 0, thread)
        for step in range(t.steps):
            stage = step % t.stages
            a.put(shared_a, held_a, stage * size_a, thread)
            b.put(shared_b, held_b, stage * size_b, thread)
            cuda.syncthreads()
            a.fetch(ins[0], held_a, state_a, row_0, step * t.bk + t.bk, thread)
            b.fetch(ins[1], held_b, state_b, column_0, step * t.bk + t.bk, thread)
            fma(acc, shared_a, shared_b, stage * size_a + own_row, stage * size_b + own_column)
            if t.stages == 1:
                cuda.syncthreads()
        for i in unroll(t.tm):
            row = row_0 + own_row + (i // 4 * four_down + i % 4)
            for part in unroll(t.tn // lanes):
                column = column_0 + own_column + (part * lanes // 4 * four_across + part * lanes % 4)
                active = (row < t.m) & (column < t.n)
                values = gather(acc, i * t.tn + part * lanes)
                end.finish(active, outs[0], values, row * t.n + column, column, extras, at)

    return Grid(kernel, t.blocks_m * t.blocks_n, t.threads, resident=t.resident)


def rules(product: Callable[[Any, Sequence[Spec], Sequence[Spec]], Product]) -> dict[str, str | Callable[..., bool]]:
    """The hard constraints of every such kernel. They come after rules on the op alone, so that there is a product."""

    def loads(
        op: Any,
        ins: Sequence[Spec],
        outs: Sequence[Spec],
        device: Device,
        *,
        bm: int,
        bn: int,
        bk: int,
        tm: int,
        tn: int,
        vector_a: int,
        vector_b: int,
    ) -> bool:
        return _held(product(op, ins, outs), bm, bn, bk, tm, tn, vector_a, vector_b) is not None

    def registers(
        op: Any,
        ins: Sequence[Spec],
        outs: Sequence[Spec],
        device: Device,
        *,
        bm: int,
        bn: int,
        bk: int,
        tm: int,
        tn: int,
        vector_a: int,
        vector_b: int,
        resident: int,
    ) -> bool:
        held = _held(product(op, ins, outs), bm, bn, bk, tm, tn, vector_a, vector_b)
        threads = bm // tm * (bn // tn)
        used = tm * tn + tm + tn + 24 + (held or 0)
        return used <= min(255, (device.registers or REGISTERS) // (threads * resident))

    def shared(
        op: Any,
        ins: Sequence[Spec],
        outs: Sequence[Spec],
        device: Device,
        *,
        bm: int,
        bn: int,
        bk: int,
        stages: int,
        pad: int,
    ) -> bool:
        rows = bm + bn + sum(product(op, ins, outs).pads(pad))
        return 4 * stages * bk * rows <= min(STATIC_SHARED_BYTES, device.shared_bytes or STATIC_SHARED_BYTES)

    def indices(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device, *, bm: int, bn: int) -> bool:
        p = product(op, ins, outs)
        return (p.m + bm) * (p.n + bn) < INDEX_LIMIT

    return {
        "whole warps, few enough threads": (
            "bm % tm == 0 and bn % tn == 0 and bm // tm * (bn // tn) % 32 == 0 and bm // tm * (bn // tn) <= threads"
        ),
        "loads shared out evenly": loads,
        "sums and loads in registers": registers,
        "tiles in shared memory": shared,
        "results in 32-bit indices": indices,
    }


def _held(p: Product, bm: int, bn: int, bk: int, tm: int, tn: int, vector_a: int, vector_b: int) -> int | None:
    """Registers of a thread for its loads and their state; None where they are not shared out evenly, or too many."""
    shares = p.shares(vector_a, vector_b, threads=bm // tm * (bn // tn), bm=bm, bn=bn, bk=bk)
    values = sum(s.each * s.vector for s in shares if s is not None)
    if None in shares or values > STAGED_VALUES:
        return None
    return values + p.state * (shares[0].each if shares[0] is not None else 0)


def prefer(m: int, n: int, device: Device, *, largest: int = 128 * 128) -> Iterator[dict[str, Any]]:
    """Configs in the order in which to try them: the tile with the least work in the longest multiprocessor first.

    ``largest`` bounds bm * bn, for kernels that have other uses for the registers of a thread.
    """
    cores = device.cores if device.cores > 1 else 108

    def work(shape: tuple[int, ...]) -> float:
        bm, bn = shape[:2]
        waves = blocks_of(blocks_of(m, bm) * blocks_of(n, bn), cores)
        return waves * bm * bn * (1 + 16 / bm + 16 / bn)  # smaller tiles load more for each output

    for bm, bn, best, tm, tn in sorted((shape for shape in SHAPES if shape[0] * shape[1] <= largest), key=work):
        threads = bm * bn // (tm * tn)
        for bk, va, vb in product(dict.fromkeys((best, 16, 8, 32)), (4, 2, 1), (4, 2, 1)):
            for resident in (r for r in (4, 2, 1) if r * threads <= 512 and r * bm * bn * bk <= 2**18):
                yield {
                    **{"bm": bm, "bn": bn, "bk": bk, "tm": tm, "tn": tn, "stages": 2},
                    **{"vector_a": va, "vector_b": vb, "pad": 4, "order": "columns", "resident": resident},
                }


def first(
    rules: Mapping[str, str | Callable[..., bool]],
    op: Any,
    ins: Sequence[Spec],
    outs: Sequence[Spec],
    device: Device,
    tried: Iterator[dict[str, Any]],
) -> Config:
    """The first of these that keeps the rules, or one that does not."""
    fitting = (config for config in tried if broken(rules, op, ins, outs, device, config) is None)
    return next(fitting, {name: values[0] for name, values in SPACE.items()})


def fp32(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device) -> bool:
    """Are these non-empty float32 arrays that 32 bits can index?"""
    return all(spec.dtype == "float32" and 0 < spec.size < INDEX_LIMIT for spec in (*ins, *outs))
