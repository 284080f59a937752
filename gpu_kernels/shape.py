"""Ops that keep all elements: reshape, which only a fused tail can change, transposes and concatenation.

A transpose that keeps the last axis moves vectors (see `copies`). Any other turns tiles in shared memory: rows along
the last axis of y go out. A concatenation gives each operand blocks of its own, for some rows of y at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from typing import Any

import numpy as np

from rapydli_flow.spec import Spec
from rapydli_flow.template import Config, Device, Epilogue, Rule, Scalar, broken, template

from . import elements
from .access import affine, pick, put_each
from .copies import SPACE, countable, merged, narrow, preferred, steps_of, strided, walks
from .grid import STATIC_SHARED_BYTES, Grid, blocks_of, widest
from .pair import held
from .ptx import append, cuda, inside, load, select, unroll
from .tail import tail

COPY = Scalar(("x0",), (), ("x0",))


# ---- reshape


def _flat(specs: Sequence[Spec], outs: Sequence[Spec]) -> list[Spec]:
    return [Spec(outs[0].shape, spec.dtype) for spec in specs]


def _copies(
    op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device, *, threads: int, vector: int, items: int
) -> bool:
    return elements.fits(op, _flat(ins, outs), outs, device, threads=threads, vector=vector, items=items)


def _prefer_copy(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device) -> Config:
    return elements.prefer_of(_flat(ins, outs), outs, device, indexed=False)


@template("reshape", "cuda", space=elements.SPACE, fits=_copies, prefer=_prefer_copy)
def copy(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], epilogue: Epilogue, **config: Any) -> Grid:
    """Each element once."""
    return elements.elements(COPY, _flat(ins, outs), outs, epilogue, **config)


# ---- concatenation


def _widths(op: Any, ins: Sequence[Spec]) -> tuple[int, ...]:
    """Elements of a row of each operand; rows of y are one of each, side by side."""
    return tuple(prod(spec.shape[op.axis :]) for spec in ins)


def _divides(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device, *, vector: int) -> bool:
    return not any(width % vector for width in _widths(op, ins))


JOIN_RULES: dict[str, Rule] = {"32-bit indices": countable, "16 bytes at once": narrow, "vectors in rows": _divides}


def _prefer_joined(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device) -> Config:
    return preferred(JOIN_RULES, op, ins, outs, device)


@template("concatenate", "cuda", space=SPACE, fits=JOIN_RULES, prefer=_prefer_joined)
def joined(
    op: Any,
    ins: Sequence[Spec],
    outs: Sequence[Spec],
    epilogue: Epilogue,
    *,
    threads: int,
    vector: int,
    items: int,
) -> Grid:
    """Some rows at a time, for them blocks of each operand in turn: what is written together lies together."""
    out, widths = outs[0], _widths(op, ins)
    if not epilogue.identity and out.shape[-1] % vector:  # a tail's vectors lie in one row of the last axis
        vector, items = 1, items * vector
    of_threads, channels, row, total = threads * vector, out.shape[-1], sum(widths), ins[0].size // widths[0]
    rows = _rows_at_once(widths, total, of_threads * items)
    lefts = (0, *accumulate(widths))
    blocks = tuple(blocks_of(rows * width, of_threads * items) for width in widths)
    firsts = (0, *accumulate(blocks))
    groups, together, count = blocks_of(total, rows), sum(blocks), len(ins)
    read, end = load(out.dtype, vector, constant=True), tail(epilogue, vector)

    def kernel(ins: Any, outs: Any, work: Any, extras: Any, at: Any) -> None:
        row_0 = cuda.blockIdx.x // together * rows
        turn = cuda.blockIdx.x % together
        left = select(row_0 + rows < total, rows, total - row_0)
        for k in unroll(count):
            if inside(turn - firsts[k], blocks[k]):
                first = (turn - firsts[k]) * (of_threads * items) + cuda.threadIdx.x * vector
                loaded = ()
                for item in unroll(items):
                    place = first + item * of_threads
                    loaded = append(loaded, read(place < left * widths[k], ins[k], row_0 * widths[k] + place))
                for item in unroll(items):
                    place = first + item * of_threads
                    element = (row_0 + place // widths[k]) * row + place % widths[k] + lefts[k]
                    active = place < left * widths[k]
                    end.finish(active, outs[0], loaded[item], element, element % channels, extras, at)

    return Grid(kernel, groups * together, threads)


def _rows_at_once(widths: Sequence[int], total: int, of_block: int) -> int:
    """As few rows as fill blocks of every operand, and nearly as well as any number of rows would."""
    least = min(total, max(1, of_block // min(widths)))

    def idle(rows: int) -> float:
        """Elements that blocks have places for, for each that there is."""
        places = sum(blocks_of(rows * width, of_block) for width in widths) * of_block
        return places * blocks_of(total, rows) / (total * sum(widths))

    tried = range(least, min(total, 8 * least) + 1)
    best = min(map(idle, tried))
    return next(rows for rows in tried if idle(rows) <= 1.02 * best)


# ---- transposes


def _moves(op: Any, x: Spec) -> tuple[int, ...]:
    """Steps in x along the axes of y."""
    own = steps_of(x.shape)
    return tuple(own[axis] for axis in op.order)


def _reads(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device, *, vector: int) -> bool:
    return walks(outs[0], _moves(op, ins[0]), 0, vector)


@dataclass(frozen=True)
class Turn:
    """A transpose as many transposes of matrices: a[i, j] at ``i * step_x + j`` of x is at ``j * step_y + i`` of y."""

    rows: int
    columns: int
    step_x: int
    step_y: int
    sizes: tuple[int, ...]  # of the other axes, and their steps in both
    steps_x: tuple[int, ...]
    steps_y: tuple[int, ...]

    @classmethod
    def of(cls, op: Any, x: Spec, y: Spec) -> Turn:
        sizes, moves = merged(y.shape, _moves(op, x))
        own = steps_of(sizes)
        *others, last = range(len(sizes))
        turned = moves.index(1)
        others.remove(turned)

        def of_others(values: Sequence[int], none: int) -> tuple[int, ...]:
            return tuple(values[axis] for axis in others) or (none,)

        return cls(
            sizes[last],
            sizes[turned],
            moves[last],
            own[turned],
            of_others(sizes, 1),
            of_others(moves, 0),
            of_others(own, 0),
        )


def _turns(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device) -> bool:
    """Does the last axis move, are matrices large enough for tiles, and elements such as those hold?"""
    if not outs[0].floating or 0 in outs[0].shape or merged(outs[0].shape, _moves(op, ins[0]))[1][-1] == 1:
        return False
    t = Turn.of(op, ins[0], outs[0])
    return t.rows * t.columns >= SMALLEST


def _keeps(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device) -> bool:
    return not _turns(op, ins, outs, device)


STRIDED_RULES: dict[str, Rule] = {
    "32-bit indices": countable,
    "not by tiles": _keeps,
    "16 bytes at once": narrow,
    "vectors side by side": _reads,
}


def _prefer_strided(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device) -> Config:
    return preferred(STRIDED_RULES, op, ins, outs, device)


@template("transpose", "cuda", space=SPACE, fits=STRIDED_RULES, prefer=_prefer_strided)
def reordered(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], epilogue: Epilogue, **config: int) -> Grid:
    """Each element of y once, read where it lies in x."""
    return strided(outs[0], epilogue, steps=_moves(op, ins[0]), base=0, **config)


TILES = (64, 32, 16, 8, 4, 2, 1, 128, 256, 512, 1024)
TURN_SPACE = {"tile_rows": TILES, "tile_columns": TILES, "vector_rows": (4, 2, 1, 8), "vector_columns": (4, 2, 1, 8)}
THREADS = 256
SMALLEST = 512  # elements of a matrix: smaller ones are read in steps
MOST_HELD = 32  # elements of a thread that come in at once


def _in_vectors(
    op: Any,
    ins: Sequence[Spec],
    outs: Sequence[Spec],
    device: Device,
    *,
    tile_rows: int,
    tile_columns: int,
    vector_rows: int,
    vector_columns: int,
) -> bool:
    t, itemsize = Turn.of(op, ins[0], outs[0]), np.dtype(outs[0].dtype).itemsize
    if tile_rows % vector_rows or tile_columns % vector_columns:
        return False
    if max(vector_rows, vector_columns) * itemsize > 16:
        return False
    across = any(v % vector_columns for v in (t.columns, t.step_x, *t.steps_x))
    along = any(v % vector_rows for v in (t.rows, t.step_y, *t.steps_y))
    return not across and not along


def _shares(
    op: Any,
    ins: Sequence[Spec],
    outs: Sequence[Spec],
    device: Device,
    *,
    tile_rows: int,
    tile_columns: int,
) -> bool:
    """A tile fits into shared memory, a thread's part of it into registers."""
    size = tile_rows * (tile_columns + 1) * np.dtype(held(outs[0].dtype)).itemsize
    return size <= STATIC_SHARED_BYTES and tile_rows * tile_columns <= MOST_HELD * THREADS


TURN_RULES: dict[str, Rule] = {
    "32-bit indices": countable,
    "by tiles": _turns,
    "vectors in rows": _in_vectors,
    "tiles in shared memory": _shares,
}


def _prefer_turned(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device) -> Config:
    """Square tiles of 4096 elements, longer ones where a side is short."""
    if broken({"turns": _turns}, op, ins, outs, device, {}):
        return {name: values[0] for name, values in TURN_SPACE.items()}
    t, itemsize = Turn.of(op, ins[0], outs[0]), np.dtype(outs[0].dtype).itemsize

    def side(extent: int, most: int) -> int:
        return min(most, 1 << max(0, extent - 1).bit_length())

    rows, columns = side(t.rows, 64), side(t.columns, 64)
    rows, columns = side(t.rows, min(1024, 4096 // columns)), side(t.columns, min(1024, 4096 // rows))
    while rows * columns > 4096:
        rows, columns = (rows // 2, columns) if rows > columns else (rows, columns // 2)
    return {
        "tile_rows": rows,
        "tile_columns": columns,
        "vector_rows": widest(t.rows, t.step_y, *t.steps_y, rows, itemsize=max(itemsize, 2)),
        "vector_columns": widest(t.columns, t.step_x, *t.steps_x, columns, itemsize=max(itemsize, 2)),
    }


@template("transpose", "cuda", space=TURN_SPACE, fits=TURN_RULES, prefer=_prefer_turned)
def turned(
    op: Any,
    ins: Sequence[Spec],
    outs: Sequence[Spec],
    epilogue: Epilogue,
    *,
    tile_rows: int,
    tile_columns: int,
    vector_rows: int,
    vector_columns: int,
) -> Grid:
    """A tile a block. A pitch of one more than a row lets columns be read without bank conflicts."""
    t, out = Turn.of(op, ins[0], outs[0]), outs[0]
    channels, kind, pitch = out.shape[-1], np.dtype(held(out.dtype)).type, tile_columns + 1
    if not epilogue.identity and channels % vector_rows:  # a tail's vectors lie in one row of the last axis
        vector_rows = 1
    rows, columns, held_tile = t.rows, t.columns, tile_rows * pitch
    read, end = load(out.dtype, vector_columns, constant=True), tail(epilogue, vector_rows)
    put, get = put_each(vector_columns, 1), pick(vector_rows, pitch)
    across, along = tile_columns // vector_columns, tile_rows // vector_rows
    threads = min(THREADS, tile_rows * across, tile_columns * along)  # all of them powers of two
    loads, stores = tile_rows * across // threads, tile_columns * along // threads
    tiles_r, tiles_c = blocks_of(rows, tile_rows), blocks_of(columns, tile_columns)
    base_x, base_y = affine(t.sizes, t.steps_x), affine(t.sizes, t.steps_y)
    step_x, step_y = t.step_x, t.step_y

    def kernel(ins: Any, outs: Any, work: Any, extras: Any, at: Any) -> None:
        shared = cuda.shared.array(held_tile, kind)
        thread = cuda.threadIdx.x
        row_0 = cuda.blockIdx.x % tiles_r * tile_rows
        column_0 = cuda.blockIdx.x // tiles_r % tiles_c * tile_columns
        matrix = cuda.blockIdx.x // (tiles_r * tiles_c)
        loaded = ()
        for k in unroll(loads):
            part = thread + k * threads
            row = row_0 + part // across
            column = column_0 + part % across * vector_columns
            active = (row < rows) & (column < columns)
            loaded = append(loaded, read(active, ins[0], base_x(matrix) + row * step_x + column))
        for k in unroll(loads):
            part = thread + k * threads
            put(shared, part // across * pitch + part % across * vector_columns, loaded[k])
        cuda.syncthreads()
        for k in unroll(stores):
            part = thread + k * threads
            row = part % along * vector_rows
            column = part // along
            active = (row_0 + row < rows) & (column_0 + column < columns)
            element = base_y(matrix) + (column_0 + column) * step_y + row_0 + row
            values = get(shared, row * pitch + column)
            end.finish(active, outs[0], values, element, element % channels, extras, at)

    return Grid(kernel, tiles_r * tiles_c * prod(t.sizes), threads)
