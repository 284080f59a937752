"""Elements chosen by whole numbers, and their gradients: in a fixed order, without atomics.

    gather, embedding   each element of y is read where its number says; NaN for a number outside of the axis
    gather_grad         each element of dx is the sum of the dy of its fibre whose number it is: all are looked at
    embedding_grad      keys      ids as int32, those outside of the table as the largest
                        ranks     the place of each in the sorted order: how many come before it, counted
                        starts    where each row of the table begins in that order, by bisection
                        sums      each row of the table is the sum of its rows of dy, in the order of their places

Ranks take places^2 comparisons, which for the tens of thousands of ids of a batch is little next to the sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np

from rapydli_flow.spec import HALVES, Spec
from rapydli_flow.template import Config, Device, Epilogue, Rule, template

from .access import otherwise, plus_chosen, spread, whole
from .chosen import before, chosen_of, plus_rows
from .copies import SPACE, countable, narrow, preferred
from .grid import INDEX_LIMIT, Grid, blocks_of
from .pair import held
from .ptx import append, cuda, load, select, store, take, unroll
from .tail import tail

NAN = float("nan")


def _single(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device, *, vector: int) -> bool:
    return vector == 1


def _divides(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device, *, vector: int) -> bool:
    return outs[0].shape[-1] % vector == 0


GATHER_RULES: dict[str, Rule] = {"32-bit indices": countable, "elements alone": _single}
ROW_RULES: dict[str, Rule] = {"32-bit indices": countable, "16 bytes at once": narrow, "vectors in rows": _divides}


def _prefer_gather(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device) -> Config:
    return preferred(GATHER_RULES, op, ins, outs, device)


def _prefer_rows(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device) -> Config:
    return preferred(ROW_RULES, op, ins, outs, device)


def _read_by_number(
    x: Spec,
    numbers: Spec,
    out: Spec,
    epilogue: Epilogue,
    *,
    inner: int,
    size: int,
    each: int,
    threads: int,
    vector: int,
    items: int,
) -> Grid:
    """y[o] = x[outer, number, column] where o is (outer, j, column): ``inner`` columns, the axis of x has ``size``.

    ``each``: so many elements of y share a number.
    """
    total, channels, of_block = out.size, out.shape[-1], threads * vector
    read, read_number = load(x.dtype, vector, constant=True), load(numbers.dtype, 1, constant=True)
    number, known, end = chosen_of(numbers.dtype, size, -1), otherwise(x.dtype, vector, NAN), tail(epilogue, vector)
    fibre = inner * (out.size // (x.size // size)) if each == 1 else out.size  # elements of y for one of ``outer``

    def kernel(ins: Any, outs: Any, work: Any, extras: Any, at: Any) -> None:
        first = cuda.blockIdx.x * (of_block * items) + cuda.threadIdx.x * vector
        rows = ()
        for item in unroll(items):
            element = first + item * of_block
            rows = append(rows, number(read_number(element < total, ins[1], element // each)))
        loaded = ()
        for item in unroll(items):
            element = first + item * of_block
            there = (element < total) & (rows[item] >= 0)
            source = element // fibre * (size * inner) + rows[item] * inner + element % inner
            loaded = append(loaded, known(there, read(there, ins[0], source)))
        for item in unroll(items):
            element = first + item * of_block
            end.finish(element < total, outs[0], loaded[item], element, element % channels, extras, at)

    return Grid(kernel, blocks_of(total, of_block * items), threads)


@template("gather", "cuda", space=SPACE, fits=GATHER_RULES, prefer=_prefer_gather)
def chosen(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], epilogue: Epilogue, **config: int) -> Grid:
    """Each element of y once."""
    x, numbers = ins
    inner = prod(x.shape[op.axis + 1 :])
    return _read_by_number(x, numbers, outs[0], epilogue, inner=inner, size=x.shape[op.axis], each=1, **config)


@template("embedding", "cuda", space=SPACE, fits=ROW_RULES, prefer=_prefer_rows)
def rows(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], epilogue: Epilogue, **config: int) -> Grid:
    """Each row of y is one of the table."""
    table, numbers = ins
    size, length = table.shape
    return _read_by_number(table, numbers, outs[0], epilogue, inner=length, size=size, each=length, **config)


@template("gather_grad", "cuda", space={"threads": (256, 128, 512)}, fits={"32-bit indices": countable})
def returned(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], epilogue: Epilogue, *, threads: int) -> Grid:
    """Each element of dx once; its fibre of dy in order."""
    (dy, numbers), out = ins, outs[0]
    size, inner, length = out.shape[op.axis], prod(out.shape[op.axis + 1 :]), dy.shape[op.axis]
    total, channels, kind = out.size, out.shape[-1], np.dtype(held(out.dtype)).type
    read, read_number = load(dy.dtype, 1, constant=True), load(numbers.dtype, 1, constant=True)
    number, as_values = chosen_of(numbers.dtype, size, -1), whole("int32", 1)
    start, add, result, end = spread(1, 0.0), plus_chosen(1), take(1), tail(epilogue, 1)

    def kernel(ins: Any, outs: Any, work: Any, extras: Any, at: Any) -> None:
        element = cuda.blockIdx.x * threads + cuda.threadIdx.x
        on = element < total
        own = element // inner % size
        source = element // (inner * size) * (inner * length) + element % inner
        acc = cuda.local.array(1, kind)
        start(acc)
        for j in range(length):
            row = number(read_number(on, ins[1], source + j * inner))
            values = read(on & (row == own), ins[0], source + j * inner)
            add(acc, 0, values, as_values((row,)), own)
        end.finish(on, outs[0], result(acc, 0), element, element % channels, extras, at)

    return Grid(kernel, blocks_of(total, threads), threads)


# ---- the gradient of a table

AT_ONCE = 16  # keys that are looked at by a step of a rank


def _padded(places: int) -> int:
    return blocks_of(places, AT_ONCE) * AT_ONCE


def _order(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], *, threads: int, vector: int) -> tuple[Spec, ...]:
    """Keys of the places; the places, and the keys, in order of these; where each row of the table begins."""
    places = ins[1].size
    sizes = (_padded(places), places, places, outs[0].shape[0] + 1)
    return tuple(Spec((size,), "int32") for size in sizes)


def _summed(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device) -> bool:
    return countable(op, ins, outs, device) and outs[0].shape[0] + 2 < INDEX_LIMIT


SUM_SPACE = {"threads": (128, 256, 64), "vector": (4, 2, 1, 8)}
SUM_RULES: dict[str, Rule] = {"32-bit indices": _summed, "16 bytes at once": narrow, "vectors in rows": _divides}


def _prefer_sums(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device) -> Config:
    vectors = (8, 4, 2, 1) if outs[0].dtype in HALVES else (4, 2, 1)
    most = 16 // np.dtype(outs[0].dtype).itemsize
    return {"threads": 128, "vector": next(v for v in vectors if v <= most and outs[0].shape[-1] % v == 0)}


@template("embedding_grad", "cuda", space=SUM_SPACE, fits=SUM_RULES, workspace=_order, prefer=_prefer_sums)
def row_sums(
    op: Any, ins: Sequence[Spec], outs: Sequence[Spec], epilogue: Epilogue, *, threads: int, vector: int
) -> tuple[Grid, ...]:
    """Four kernels: keys, ranks, starts, sums."""
    (dy, ids), out = ins, outs[0]
    (size, length), places = out.shape, ids.size
    padded, kind, panels = _padded(places), np.dtype(held(out.dtype)).type, length // vector
    read_id, key_of = load(ids.dtype, 1, constant=True), chosen_of(ids.dtype, size, size)
    read_keys, read_key, write = load("int32", 4, constant=True), load("int32", 1, constant=True), store("int32", 1)
    start, add, result, end = (
        spread(vector, 0.0),
        plus_rows(dy.dtype, vector, length),
        take(vector),
        tail(epilogue, vector),
    )
    bits = places.bit_length()
    probes = tuple(1 << bit for bit in reversed(range(bits)))

    def keys(ins: Any, outs: Any, work: Any, extras: Any, at: Any) -> None:
        place = cuda.blockIdx.x * threads + cuda.threadIdx.x
        key = key_of(read_id(place < places, ins[1], place))
        write(place < padded, work[0], place, (select(place < places, key, size + 2),))

    def ranks(ins: Any, outs: Any, work: Any, extras: Any, at: Any) -> None:
        place = cuda.blockIdx.x * threads + cuda.threadIdx.x
        on = place < places
        key = read_key(on, work[0], place)[0]
        rank = place - place
        for step in range(padded // AT_ONCE):
            four = ()
            for part in unroll(AT_ONCE // 4):
                four = append(four, read_keys(on, work[0], step * AT_ONCE + part * 4))
            for part in unroll(AT_ONCE // 4):
                rank = before(rank, four[part], key, step * AT_ONCE + part * 4, place)
        write(on, work[1], rank, (place,))
        write(on, work[2], rank, (key,))

    def starts(ins: Any, outs: Any, work: Any, extras: Any, at: Any) -> None:
        row = cuda.blockIdx.x * threads + cuda.threadIdx.x
        found = row - row
        for k in unroll(bits):
            probe = found + (probes[k] - 1)
            there = (row <= size) & (probe < places)
            key = read_key(there, work[2], probe)[0]
            found = select(there & (key < row), found + probes[k], found)
        write(row <= size, work[3], row, (found,))

    def sums(ins: Any, outs: Any, work: Any, extras: Any, at: Any) -> None:
        part = cuda.blockIdx.x * threads + cuda.threadIdx.x
        row = part // panels
        on = row < size
        column = part % panels * vector
        acc = cuda.local.array(vector, kind)
        start(acc)
        first = read_key(on, work[3], row)[0]
        last = read_key(on, work[3], row + 1)[0]
        add(acc, ins[0], work[1], first, last, column)
        end.finish(on, outs[0], result(acc, 0), part * vector, column, extras, at)

    return (
        Grid(keys, blocks_of(padded, threads), threads),
        Grid(ranks, blocks_of(places, threads), threads),
        Grid(starts, blocks_of(size + 1, threads), threads),
        Grid(sums, blocks_of(size * panels, threads), threads),
    )
