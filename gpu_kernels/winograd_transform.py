"""The grids of Winograd's algorithm besides its products: what is transformed before and after them.

    patches     pixels of an image, n x n of them for each tile    ->  matrices [n*n][tile][channel]
    filters     taps x taps                                        ->  matrices [n*n][row][column]
    results     sums [n*n][tile][column]                           ->  m x m pixels of each tile, and the epilogue
    gradients   sums [part][n*n][row][column]                      ->  taps x taps, and the epilogue

A thread transforms one square for a few neighbouring channels: all of it is loaded at once, transformed in registers
and stored, so that every load and every store of a warp is of neighbouring bytes. What patches share is read again,
from a cache. Sums and points: `rapydli_flow.winograd`.

Images are taken in slabs, so that the matrices of a slab fit in a bounded workspace, or in the card's second cache. The
grids of all slabs are the same; whose turn it is they find in the workspace (`turn`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np

from rapydli_flow.spec import Array, Spec
from rapydli_flow.template import Epilogue
from rapydli_flow.winograd import filter_lines, input_lines, output_lines

from .access import plus
from .grid import REGISTERS, Grid, blocks_of, widest
from .pair import Pair
from .ptx import _array, _at, append, clear, cuda, float32, hold, inside, int32, load, store, take, unroll
from .tail import itemsize_of, tail

THREADS = 128  # of a block: a warp for each of a multiprocessor's four parts, which have a quarter of the registers


@dataclass(frozen=True)
class Tiles:
    """Images of ``size`` pixels, over which patches of tiles of m x m results slide, from ``-low`` on.

    ``together``: images of a slab.
    """

    images: int
    size: tuple[int, int]
    out: tuple[int, int]
    low: tuple[int, int]
    m: int
    taps: int  # of a window, along each axis
    together: int

    @property
    def n(self) -> int:
        return self.m + self.taps - 1

    @property
    def area(self) -> int:
        """Matrices."""
        return self.n * self.n

    @property
    def grid(self) -> tuple[int, int]:
        """Tiles of an image."""
        return blocks_of(self.out[0], self.m), blocks_of(self.out[1], self.m)

    @property
    def of_image(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def tiles(self) -> int:
        return self.images * self.of_image

    @property
    def rows(self) -> int:
        """Tiles of a slab: rows of a matrix. The last slab may have fewer."""
        return self.together * self.of_image

    @property
    def slabs(self) -> int:
        return blocks_of(self.images, self.together)

    @property
    def counter(self) -> tuple[Spec, ...]:
        """What a workspace has in the end, where there are several slabs."""
        return (Spec((2,), "int32"),) if self.slabs > 1 else ()


# ---- squares in registers

LINES: dict[str, Callable[[int, int, int], Sequence[str]]] = {
    "patch": lambda n, reads, writes: input_lines(n),
    "filter": lambda n, reads, writes: filter_lines(n, reads),
    "result": lambda n, reads, writes: output_lines(n, writes),
}


class Real:
    """A float32 of the compiled kernel."""

    def __init__(self, builder: Any, value: Any) -> None:
        self.builder, self.value = builder, value

    def __add__(self, other: Real) -> Real:
        return Real(self.builder, self.builder.fadd(self.value, other.value))

    def __sub__(self, other: Real) -> Real:
        return Real(self.builder, self.builder.fsub(self.value, other.value))

    def __mul__(self, other: Real) -> Real:
        return Real(self.builder, self.builder.fmul(self.value, other.value))

    def __neg__(self) -> Real:
        from llvmlite import ir

        return Real(self.builder, self.builder.fsub(ir.Constant(ir.FloatType(), -0.0), self.value))


@cache
def square(kind: str, n: int, reads: int, writes: int, lanes: int) -> Pair:
    """``(registers)``: transform the first reads x reads of n x n elements to writes x writes, columns, then rows.

    Element (i, j) of lane l is register ``(i * n + j) * lanes + l``.
    """
    code = compile("\n".join(LINES[kind](n, reads, writes)), f"<{kind} of {n}>", "exec")
    columns = [([i * n + j for i in range(reads)], [i * n + j for i in range(writes)]) for j in range(reads)]
    rows = [([i * n + j for j in range(reads)], [i * n + j for j in range(writes)]) for i in range(writes)]

    def transform(values: Any, number: Callable[[float], Any]) -> None:
        for sources, targets in (*columns, *rows):
            names = {"T": number, **{f"d{i}": values[place] for i, place in enumerate(sources)}}
            exec(code, names)
            for i, place in enumerate(targets):
                values[place] = names[f"r{i}"]

    def twin(registers: Array) -> None:
        values = dict(enumerate(registers.reshape(n * n, lanes, -1).copy()))
        transform(values, np.float32)
        for place in (place for _, targets in rows for place in targets):
            registers[place * lanes : (place + 1) * lanes] = values[place]

    def rule(registers: Any) -> Any:
        from llvmlite import ir
        from numba.cuda import types

        def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            data = _array(context, builder, registers, args[0])
            for lane in range(lanes):
                places = {place for sources, _ in columns for place in sources}
                values = {p: Real(builder, builder.load(_at(builder, data, p * lanes + lane))) for p in sorted(places)}
                transform(values, lambda number: Real(builder, ir.Constant(ir.FloatType(), float(np.float32(number)))))
                for place in (place for _, targets in rows for place in targets):
                    builder.store(values[place].value, _at(builder, data, place * lanes + lane))
            return context.get_dummy_value()

        return types.void, (registers,), emit

    return Pair(f"square_{kind}_{n}_{reads}_{writes}_{lanes}", twin, rule)


# ---- grids


def lanes_of(vector: int, *extents: int) -> int:
    """The widest vector, up to ``vector``, that divides every extent."""
    return min(vector, widest(*extents))


def turn(t: Tiles, counter: int, *, results: bool) -> Callable[..., None]:
    """A procedure ``(number, work, item)``: ``number[0]`` becomes the number of the slab whose turn it is.

    Patches find it in the first place of the last array of the workspace and leave the next one in the second; results
    find that there and leave it in the first. So no kernel writes what it reads.
    """
    several, found, left, step = t.slabs > 1, int(results), int(not results), int(not results)
    read, write, keep, gather = load("int32", 1), store("int32", 1), hold(1), take(1)

    def begin(number: Any, work: Any, item: Any) -> None:
        number[0] = 0
        if several:
            keep(number, 0, read(item >= 0, work[counter], found))
            number[0] = number[0] + step
            write(item < 1, work[counter], left, gather(number, 0))
            number[0] = number[0] - 1

    return begin


def start(t: Tiles, counter: int, *, total: int = 0, size: int = 0) -> tuple[Grid, ...]:
    """Before the first of several slabs: it is the first one's turn, and ``work[total]``, of ``size``, is zero."""
    write, write_word, gather, zero = store("float32", 1), store("int32", 1), take(1), clear(1)

    def kernel(ins: Any, outs: Any, work: Any, extras: Any, at: Any) -> None:
        d = cuda.local.array(1, float32)
        number = cuda.local.array(1, int32)
        item = cuda.blockIdx.x * THREADS + cuda.threadIdx.x
        number[0] = 0
        write_word(item < 1, work[counter], 0, gather(number, 0))
        if size > 0:
            zero(d)
            write(item < size, work[total], item, gather(d, 0))

    return (Grid(kernel, blocks_of(max(1, size), THREADS), THREADS),) if t.slabs > 1 else ()


def patches(
    t: Tiles, channels: int, vector: int, *, source: int, into: int, counter: int, of_results: bool = False
) -> Grid:
    """``work[into]`` = transformed patches of ``ins[source]``, for all tiles of a slab; zeros for those not there.

    ``of_results``: tiles of m x m pixels, transformed as filters are, instead of patches: for gradients of filters.
    They come after patches, and find the slab's number where results do.
    """
    m, n, area, rows, tiles = t.m, t.n, t.area, t.rows, t.tiles
    reads, (high, wide), (low_h, low_w) = (m, t.out, (0, 0)) if of_results else (n, t.size, t.low)
    kind, (grid_h, grid_w) = "filter" if of_results else "patch", t.grid
    lanes = lanes_of(vector, channels)
    across, size = channels // lanes, rows * channels
    read, write = load("float32", lanes, constant=True), store("float32", lanes)
    keep, gather, change = hold(lanes), take(lanes), square(kind, n, reads, n, lanes)
    begin = turn(t, counter, results=of_results)

    def kernel(ins: Any, outs: Any, work: Any, extras: Any, at: Any) -> None:
        d = cuda.local.array(area * lanes, float32)
        number = cuda.local.array(1, int32)
        item = cuda.blockIdx.x * THREADS + cuda.threadIdx.x
        begin(number, work, item)
        channel = item % across * lanes
        row = item // across
        tile = number[0] * rows + row
        there = (row < rows) & (tile < tiles)
        top = tile // grid_w % grid_h * m - low_h
        left = tile % grid_w * m - low_w
        first = ((tile // (grid_w * grid_h) * high + top) * wide + left) * channels + channel
        for i in unroll(reads):
            line = there & inside(top + i, high)
            for j in unroll(reads):
                active = line & inside(left + j, wide)
                keep(d, (i * n + j) * lanes, read(active, ins[source], first + (i * wide + j) * channels))
        change(d)
        for p in unroll(area):
            write(row < rows, work[into], item * lanes + p * size, gather(d, p * lanes))

    return Grid(kernel, blocks_of(rows * across, THREADS), THREADS, resident=resident_of(n, lanes))


def filters(t: Tiles, shape: tuple[int, int], vector: int, *, turned: bool, source: int, into: int) -> Grid:
    """``work[into]`` = transformed ``ins[source]``, taps x taps x shape; ``turned``: taps in reverse order."""
    n, area, taps, (rows, columns) = t.n, t.area, t.taps, shape
    lanes = lanes_of(vector, columns)
    across, size = columns // lanes, rows * columns
    read, write = load("float32", lanes, constant=True), store("float32", lanes)
    keep, gather, change = hold(lanes), take(lanes), square("filter", n, taps, n, lanes)
    order = tuple(reversed(range(taps))) if turned else tuple(range(taps))

    def kernel(ins: Any, outs: Any, work: Any, extras: Any, at: Any) -> None:
        d = cuda.local.array(area * lanes, float32)
        item = cuda.blockIdx.x * THREADS + cuda.threadIdx.x
        there = item < rows * across
        for i in unroll(taps):
            for j in unroll(taps):
                tap = order[i] * taps + order[j]
                keep(d, (i * n + j) * lanes, read(there, ins[source], item * lanes + tap * size))
        change(d)
        for p in unroll(area):
            write(there, work[into], item * lanes + p * size, gather(d, p * lanes))

    return Grid(kernel, blocks_of(rows * across, THREADS), THREADS, resident=resident_of(n, lanes))


def results(t: Tiles, channels: int, vector: int, epilogue: Epilogue, *, source: int, counter: int) -> Grid:
    """``outs[0]`` = epilogue(the pixels of a slab's tiles), from their sums in ``work[source]``."""
    m, n, area, rows, tiles, (out_h, out_w) = t.m, t.n, t.area, t.rows, t.tiles, t.out
    (grid_h, grid_w), lanes = t.grid, tail_lanes(vector, channels, epilogue)
    across, size = channels // lanes, rows * channels
    read, end = load("float32", lanes, constant=True), tail(epilogue, lanes)
    keep, gather, change = hold(lanes), take(lanes), square("result", n, n, m, lanes)
    begin = turn(t, counter, results=True)
    count, of_pixel = len(end.reach), end.reach.count("element")
    own = [how == "element" for how in end.reach]
    slots = tuple(own[:k].count(own[k]) for k in range(count))  # among those that are read like it

    def kernel(ins: Any, outs: Any, work: Any, extras: Any, at: Any) -> None:
        d = cuda.local.array(area * lanes, float32)
        number = cuda.local.array(1, int32)
        item = cuda.blockIdx.x * THREADS + cuda.threadIdx.x
        begin(number, work, item)
        channel = item % across * lanes
        row = item // across
        tile = number[0] * rows + row
        there = (row < rows) & (tile < tiles)
        top = tile // grid_w % grid_h * m
        left = tile % grid_w * m
        first = ((tile // (grid_w * grid_h) * out_h + top) * out_w + left) * channels + channel
        for p in unroll(area):
            keep(d, p * lanes, read(there, work[source], item * lanes + p * size))
        change(d)
        steady = ()  # operands of the epilogue that are the same for all pixels of a thread
        for k in unroll(count):
            if end.reach[k] == "channel":
                steady = append(steady, end.loads[k](there, extras[k], channel))
            elif end.reach[k] == "scalar":
                steady = append(steady, end.loads[k](there, extras[k], 0))
        for i in unroll(m):
            ahead = ()  # those of each pixel; a row's are under way at once, for more there are no registers
            for j in unroll(m):
                active = there & inside(top + i, out_h) & inside(left + j, out_w)
                for k in unroll(count):
                    if end.reach[k] == "element":
                        ahead = append(ahead, end.loads[k](active, extras[k], first + (i * out_w + j) * channels))
            for j in unroll(m):
                active = there & inside(top + i, out_h) & inside(left + j, out_w)
                operands = (gather(d, (i * n + j) * lanes),)
                for k in unroll(count):
                    if end.reach[k] == "element":
                        operands = append(operands, ahead[j * of_pixel + slots[k]])
                    else:
                        operands = append(operands, steady[slots[k]])
                end.finish_given(active, outs[0], operands, first + (i * out_w + j) * channels, at)

    resident = resident_of(n, lanes, m * lanes * of_pixel)
    return Grid(kernel, blocks_of(rows * across, THREADS), THREADS, resident=resident)


def add_slab(size: int, parts: int, *, source: int, total: int) -> Grid:
    """``work[total]`` += the parts in ``work[source]``, first to last."""
    read, write, keep, more, gather = load("float32", 1), store("float32", 1), hold(1), plus(1), take(1)

    def kernel(ins: Any, outs: Any, work: Any, extras: Any, at: Any) -> None:
        d = cuda.local.array(1, float32)
        item = cuda.blockIdx.x * THREADS + cuda.threadIdx.x
        keep(d, 0, read(item < size, work[total], item))
        for part in range(parts):
            more(d, 0, read(item < size, work[source], part * size + item))
        write(item < size, work[total], item, gather(d, 0))

    return Grid(kernel, blocks_of(size, THREADS), THREADS)


def gradients(t: Tiles, shape: tuple[int, int], parts: int, vector: int, epilogue: Epilogue, *, source: int) -> Grid:
    """``outs[0]`` = epilogue(taps x taps x shape), from the sum of the parts in ``work[source]``, first to last."""
    n, area, taps, (rows, columns) = t.n, t.area, t.taps, shape
    lanes = tail_lanes(vector, columns, epilogue)
    across, size = columns // lanes, rows * columns
    read, end, zero = load("float32", lanes, constant=True), tail(epilogue, lanes), clear(area * lanes)
    more, gather, change = plus(lanes), take(lanes), square("result", n, n, taps, lanes)

    def kernel(ins: Any, outs: Any, work: Any, extras: Any, at: Any) -> None:
        d = cuda.local.array(area * lanes, float32)
        item = cuda.blockIdx.x * THREADS + cuda.threadIdx.x
        there = item < rows * across
        zero(d)
        for part in range(parts):
            for p in unroll(area):
                more(d, p * lanes, read(there, work[source], item * lanes + (part * area + p) * size))
        change(d)
        for i in unroll(taps):
            for j in unroll(taps):
                element = item * lanes + (i * taps + j) * size
                values = gather(d, (i * n + j) * lanes)
                end.finish(there, outs[0], values, element, item % across * lanes, extras, at)

    return Grid(kernel, blocks_of(rows * across, THREADS), THREADS, resident=resident_of(n, lanes))


def tail_lanes(vector: int, channels: int, epilogue: Epilogue) -> int:
    """The widest vector of which the epilogue's operands are no more than 16 bytes."""
    return min(vector, widest(channels, itemsize=itemsize_of(epilogue)))


def resident_of(n: int, lanes: int, more: int = 0) -> int:
    """Blocks of a multiprocessor: a thread holds a square, and finds room for it, and for ``more`` registers."""
    return max(1, min(12, REGISTERS // THREADS // (n * n * lanes + more + 24)))


def routed(grid: Grid, a: int, b: int, out: int) -> Grid:
    """A product of two arrays of the workspace into another, instead of inputs and an output."""
    multiply = grid.kernel

    def kernel(ins: Any, outs: Any, work: Any, extras: Any, at: Any) -> None:
        multiply((work[a], work[b]), (work[out],), (work[out],), extras, at)

    return replace(grid, kernel=kernel)
