"""Reductions over any axes but along short rows: sums of pixels for each channel, or of everything.

Neighbouring axes of the same fate are merged; what is kept last is the *inner* run, of size 1 where the last axis is
reduced. Rows of it lie one after the other; a few are taken as one, so that vectors divide it:

::

         across threads, a vector each        A block has a slab: some rows of a tile of columns. Each thread
      +-------------------------------+       absorbs every down-th row of its columns; the threads of a
    d |  c0 c1 c2 | c0 c1 c2 | ..     |       column are merged through shared memory, halving. Slabs of the
    o |  c0 c1 c2 | c0 c1 c2 | ..     |       same columns leave states in the workspace, which a second
    w |  ..                           |       grid merges, with the copies of a channel in a wide row.
    n +-------------------------------+

Every order is fixed by op and config.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import gcd, prod
from typing import Any

import numpy as np

from rapydli_flow.spec import HALVES, Spec
from rapydli_flow.template import Config, Device, Epilogue, broken, template

from .access import affine
from .cost import COPY_BYTES_S, LAUNCH_S
from .formulas import Formula, lanewise
from .grid import INDEX_LIMIT, Grid, blocks_of
from .ptx import append, cuda, float32, load, select, store, unroll
from .tail import tail
from .warp import Merge, either, get, give, merged, piece, start

SPACE = {
    "vector": (4, 8, 2, 1),
    "across": (32, 64, 16, 128),  # the most vectors of a slab's row
    "threads": (256, 128, 512),  # about so many, a multiple of those across
    "items": (4, 2, 8),  # loads under way
    "slabs": (4, 1, 2, 8),  # for each multiprocessor, at least
    "parts": (0, 1),  # 1: all rows in one block, no second grid
}
FLOATS = ("float32", *HALVES)
SLACK = 2**24
MERGERS = 256  # threads of a block of the second grid


@dataclass(frozen=True)
class Program:
    """What is reduced, and what comes of it. Operands are numbers of inputs."""

    operands: tuple[int, ...]  # x0, ..
    merge: Merge
    absorb: Formula  # a0, .. are the state so far, j the row
    out: Formula  # of a0, ..: a result for each output
    channels: tuple[int, ...] = ()  # of size inner: x of the absorbing formula, after the operands
    ends: tuple[int, ...] = ()  # of size inner: x0, .. of ``out``


@dataclass(frozen=True)
class Layout:
    """Kept and reduced runs before the inner one: their sizes and steps. ``rows`` of ``inner`` elements come next."""

    kept: tuple[tuple[int, int], ...]
    reduced: tuple[tuple[int, int], ...]
    rows: int
    inner: int

    @classmethod
    def of(cls, shape: Sequence[int], axes: Sequence[int]) -> Layout:
        runs: list[list[int]] = []  # [size, is kept]
        for axis, size in enumerate(shape):
            kept = int(axis not in axes)
            if size == 1:
                continue
            if runs and runs[-1][1] == kept:
                runs[-1][0] *= size
            else:
                runs.append([size, kept])
        inner = runs.pop()[0] if runs and runs[-1][1] else 1
        rows = runs.pop()[0] if runs else 1
        step, groups = inner * rows, ([], [])  # type: tuple[int, tuple[list[tuple[int, int]], list[tuple[int, int]]]]
        for size, kept in reversed(runs):
            groups[kept].insert(0, (size, step))
            step *= size
        return cls(tuple(groups[1]), tuple(groups[0]), rows, inner)

    @property
    def outer(self) -> int:
        return prod(size for size, _ in self.kept)

    @property
    def repeats(self) -> int:
        return prod(size for size, _ in self.reduced)


@dataclass(frozen=True)
class Cut:
    """How a layout is divided."""

    lanes: int
    copies: int  # of the inner run in a wide row
    width: int  # of a wide row
    rows: int  # wide ones, of all reduced runs
    across: int
    down: int
    tiles: int  # of columns
    items: int
    each: int  # rows of a slab
    parts: int

    @classmethod
    def of(cls, layout: Layout, config: Config, cores: int) -> Cut:
        lanes = config["vector"]
        copies = lanes // gcd(lanes, layout.inner)
        width = copies * layout.inner
        vectors = blocks_of(width, lanes)
        tiles = blocks_of(vectors, config["across"])
        across = blocks_of(vectors, tiles)
        rows = layout.rows // copies * layout.repeats
        down = max(1, min(config["threads"] // across, 1 << max(0, rows - 1).bit_length()))
        step = down * config["items"]
        wanted = 1 if config["parts"] == 1 else max(1, config["slabs"] * cores // (tiles * layout.outer))
        each = blocks_of(blocks_of(rows, wanted), step) * step
        return cls(
            lanes, copies, width, rows, across, down, tiles, config["items"], each, max(1, blocks_of(rows, each))
        )

    @property
    def block(self) -> int:
        return self.across * self.down

    @property
    def direct(self) -> bool:
        """Has each output element one block?"""
        return self.parts == 1 and (self.copies == 1 or self.tiles == 1)


Programs = Callable[[Any, Sequence[Spec], Sequence[Spec]], Program]
Axes = Callable[[Any, Spec], Sequence[int]]
CORES = 132  # the order of a sum must not depend on the card


def build(
    p: Program,
    layout: Layout,
    ins: Sequence[Spec],
    outs: Sequence[Spec],
    epilogue: Epilogue,
    config: Config,
) -> Grid | tuple[Grid, ...]:
    """The kernels."""
    c = Cut.of(layout, config, CORES)
    lanes, copies, width, across, down = c.lanes, c.copies, c.width, c.across, c.down
    rows, each, items, tiles, parts, inner = c.rows, c.each, c.items, c.tiles, c.parts, layout.inner
    outer, block, direct = layout.outer, c.block, c.direct
    row_size = layout.rows // copies  # wide rows that follow one another
    numbers = len(p.merge.kinds)
    operands, operand, channels, channel = len(p.operands), p.operands, len(p.channels), p.channels
    reads = tuple(load(ins[k].dtype, lanes, constant=True) for k in p.operands)
    own_channels = tuple(load(ins[k].dtype, lanes if copies == 1 else 1) for k in p.channels)
    begin, choose, combine = start(p.merge, lanes), either(p.merge, lanes), merged(p.merge, lanes)
    absorb = lanewise(p.absorb, numbers, operands + channels, lanes)
    levels = [1 << k for k in reversed(range(max(0, down - 1).bit_length()))]
    halves, level = tuple(levels), len(levels)
    half = levels[0] if levels else 1
    plane = max(half, copies) * across * lanes
    hand, fetch = give(p.merge, lanes, plane), get(p.merge, lanes, plane)
    one_run = not layout.reduced
    row_sizes = (*(size for size, _ in layout.reduced), row_size)
    row_steps = (*(step for _, step in layout.reduced), width)
    locate = affine(row_sizes, row_steps)
    kept_sizes, kept_steps = zip(*(layout.kept or ((1, 0),)), strict=True)
    base_of = affine(tuple(kept_sizes), tuple(kept_steps))
    step_rows = down * items
    short = rows % each  # rows of the last slab
    ragged = bool(short % step_rows)
    stored = min(lanes, 4)  # of 4 bytes each
    keeps, pieces = tuple(store(kind, stored) for kind in p.merge.kinds), lanes // stored
    cuts = tuple(piece(i * stored, stored) for i in range(pieces))
    vectors = width // lanes

    # results: of lanes where a wide row is the inner run, else of one element at a time
    width_out = lanes if copies == 1 else 1
    finishing = _Finish(p, ins, outs, epilogue, width_out, inner)
    single = get(p.merge, 1, plane)
    join = merged(p.merge, 1)
    singles = blocks_of(inner, block)
    begin_one = start(p.merge, 1)
    finish = finishing.finish

    def kernel(ins: Any, outs: Any, work: Any, extras: Any, at: Any) -> None:
        shared = cuda.shared.array(numbers * plane, float32, alignment=16)
        thread = cuda.threadIdx.x
        slab = cuda.blockIdx.x // tiles
        vector = cuda.blockIdx.x % tiles * across + thread % across
        row = thread // across
        column = vector * lanes
        inside = vector < vectors
        first = slab % parts * each
        group = slab // parts
        base = base_of(group) + column
        own = ()
        for k in unroll(channels):
            if copies == 1:
                own = append(own, own_channels[k](inside, ins[channel[k]], column))
            else:
                values = ()
                for i in unroll(lanes):
                    values = append(values, own_channels[k](inside, ins[channel[k]], (column + i) % inner)[0])
                own = append(own, values)
        state = begin()
        count = select(first + each < rows, each, rows - first)
        for step in range(count // step_rows):
            loaded = ()
            for u in unroll(items):
                r = first + step * step_rows + u * down + row
                for k in unroll(operands):
                    if one_run:
                        loaded = append(loaded, reads[k](inside, ins[operand[k]], base + r * width))
                    else:
                        loaded = append(loaded, reads[k](inside, ins[operand[k]], base + locate(r)))
            for u in unroll(items):
                xs = ()
                for k in unroll(operands):
                    xs = append(xs, loaded[u * operands + k])
                for k in unroll(channels):
                    xs = append(xs, own[k])
                state = absorb(state, xs, (), first + step * step_rows + u * down + row)
        if ragged:
            last = first + count // step_rows * step_rows + row
            for u in unroll(items):
                active = inside & (last + u * down < first + count)
                xs = ()
                for k in unroll(operands):
                    if one_run:
                        xs = append(xs, reads[k](active, ins[operand[k]], base + (last + u * down) * width))
                    else:
                        xs = append(xs, reads[k](active, ins[operand[k]], base + locate(last + u * down)))
                for k in unroll(channels):
                    xs = append(xs, own[k])
                state = choose(active, absorb(state, xs, (), last + u * down), state)
        for h in unroll(level):
            here = (row * across + thread % across) * lanes
            hand((row >= halves[h]) & (row < halves[h] * 2), shared, here - halves[h] * across * lanes, state)
            cuda.syncthreads()
            state = combine(state, fetch((row < halves[h]) & (row + halves[h] < down), shared, here))
            cuda.syncthreads()
        if direct:
            if copies == 1:
                finish(inside & (row == 0), ins, outs, state, column, group * inner + column, extras, at)
            else:
                hand(inside & (row == 0), shared, column, state)
                cuda.syncthreads()
                for e in unroll(singles):
                    c = e * block + thread
                    total = begin_one()
                    for q in unroll(copies):
                        total = join(total, single(c < inner, shared, q * inner + c))
                    finish(c < inner, ins, outs, total, c, group * inner + c, extras, at)
        else:
            for k in unroll(numbers):
                for i in unroll(pieces):
                    part = cuts[i](state[k])
                    keeps[k](inside & (row == 0), work[k], slab * width + column + i * stored, part)

    grid = Grid(kernel, tiles * parts * outer, block)
    return grid if direct else (grid, _together(p, layout, c, finishing.of(1)))


@dataclass(frozen=True)
class _Finish:
    """Stores the results of states of ``lanes`` channels."""

    p: Program
    ins: Sequence[Spec]
    outs: Sequence[Spec]
    epilogue: Epilogue
    lanes: int
    inner: int

    def of(self, lanes: int) -> _Finish:
        return _Finish(self.p, self.ins, self.outs, self.epilogue, lanes, self.inner)

    @property
    def finish(self) -> Callable[..., None]:
        p, lanes, out, inner = self.p, self.lanes, self.outs[0], self.inner
        reads = tuple(load(self.ins[k].dtype, lanes) for k in p.ends)
        ends, end, results = len(p.ends), p.ends, len(self.outs)
        apply = lanewise(p.out, len(p.merge.kinds), ends, lanes)
        last = tail(self.epilogue, lanes)
        stores = tuple(store(spec.dtype, lanes) for spec in self.outs)
        channels = out.shape[-1] if out.shape else 1
        plain = channels == inner

        def finish(active: Any, ins: Any, outs: Any, state: Any, c: Any, element: Any, extras: Any, at: Any) -> None:
            xs = ()
            for k in unroll(ends):
                xs = append(xs, reads[k](active, ins[end[k]], c))
            found = apply(state, xs, (), 0)
            if plain:
                last.finish(active, outs[0], found[0], element, c, extras, at)
            else:
                last.finish(active, outs[0], found[0], element, element % channels, extras, at)
            for k in unroll(results - 1):
                stores[k + 1](active, outs[k + 1], element, found[k + 1])

        return finish


def _together(p: Program, layout: Layout, c: Cut, finishing: _Finish) -> Grid:
    """Merges the states of all slabs, in order: threads across channels, and down parts and copies."""
    inner, outer, width, parts = layout.inner, layout.outer, c.width, c.parts
    across = min(8, 1 << (inner - 1).bit_length())
    count = parts * c.copies
    down = max(1, min(MERGERS // across, 1 << (count - 1).bit_length()))
    tiles, numbers, copies = blocks_of(inner, across), len(p.merge.kinds), c.copies
    reads = tuple(load(kind, 1) for kind in p.merge.kinds)
    begin, choose, combine = start(p.merge, 1), either(p.merge, 1), merged(p.merge, 1)
    halves = tuple(1 << k for k in reversed(range((down - 1).bit_length())))
    level, plane = len(halves), max(1, down // 2) * across
    hand, fetch = give(p.merge, 1, plane), get(p.merge, 1, plane)
    steps, finish = blocks_of(count, down), finishing.finish

    def kernel(ins: Any, outs: Any, work: Any, extras: Any, at: Any) -> None:
        shared = cuda.shared.array(numbers * plane, float32)
        thread = cuda.threadIdx.x
        group = cuda.blockIdx.x // tiles
        column = cuda.blockIdx.x % tiles * across + thread % across
        row = thread // across
        state = begin()
        for step in range(steps):
            n = step * down + row
            active = (n < count) & (column < inner)
            where = (group * parts + n // copies) * width + n % copies * inner + column
            other = ()
            for k in unroll(numbers):
                other = append(other, reads[k](active, work[k], where))
            state = choose(active, combine(state, other), state)
        for h in unroll(level):
            here = row * across + thread % across
            hand((row >= halves[h]) & (row < halves[h] * 2), shared, here - halves[h] * across, state)
            cuda.syncthreads()
            state = combine(state, fetch(row < halves[h], shared, here))
            cuda.syncthreads()
        finish((row == 0) & (column < inner), ins, outs, state, column, group * inner + column, extras, at)

    return Grid(kernel, tiles * outer, across * down)


def serve(family: str, program: Programs, axes: Axes, x: int = 0) -> None:
    """Register the template of a family; ``x`` is the input that is reduced over ``axes``."""

    def layout_of(op: Any, ins: Sequence[Spec]) -> Layout:
        return Layout.of(ins[x].shape, axes(op, ins[x]))

    def floats(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device) -> bool:
        known = all(0 < spec.size < INDEX_LIMIT - SLACK for spec in (*ins, *outs))
        return known and all(spec.dtype in FLOATS for spec in ins) and outs[0].dtype in (*FLOATS, "int64")

    def vectors(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device, *, vector: int) -> bool:
        layout, p = layout_of(op, ins), program(op, ins, outs)
        specs = (*(ins[k] for k in p.operands), *outs)
        if max(np.dtype(spec.dtype).itemsize for spec in specs) * vector > 16:
            return False
        counted = p.absorb.together  # rows: those that a wide one is made of are not told apart
        return layout.rows * layout.inner % vector == 0 and (layout.inner % vector == 0 or not counted)

    def threads(
        op: Any,
        ins: Sequence[Spec],
        outs: Sequence[Spec],
        device: Device,
        *,
        vector: int,
        across: int,
        threads: int,
        items: int,
        slabs: int,
        parts: int,
    ) -> bool:
        config = {"vector": vector, "across": across, "threads": threads, "items": items}
        layout, p = layout_of(op, ins), program(op, ins, outs)
        c = Cut.of(layout, {**config, "slabs": slabs, "parts": parts}, CORES)
        numbers = len(p.merge.kinds)
        shared = 4 * numbers * max(c.down, c.copies) * c.across * c.lanes
        live = vector * (len(p.operands) * items + 2 * numbers + len(p.channels))
        return shared <= 40 << 10 and live <= 96 and (parts == 0 or c.direct)

    hard = {"float operands in 32-bit indices": floats, "vectors divide rows": vectors, "threads and memory": threads}

    def workspace(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], **config: Any) -> tuple[Spec, ...]:
        layout = layout_of(op, ins)
        c = Cut.of(layout, config, CORES)
        count = 1 if c.direct else layout.outer * c.parts * c.width
        return tuple(Spec((count,), kind) for kind in program(op, ins, outs).merge.kinds)

    def prefer(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device) -> Config:
        size = ins[x].size
        for parts in (1, 0) if size <= 2**14 else (0,):
            for vector in (8, 4, 2, 1):
                for items in (4, 2):
                    config = {"vector": vector, "across": 32, "threads": 256, "items": items}
                    config |= {"slabs": 4, "parts": parts}
                    if broken(hard, op, ins, outs, device, config) is None:
                        return config
        return {name: values[0] for name, values in SPACE.items()}

    def cost(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device, config: Config) -> float:
        layout = layout_of(op, ins)
        c = Cut.of(layout, config, CORES)
        cores = device.cores if device.cores > 1 else CORES
        moved = sum(spec.size_bytes for spec in (*ins, *outs))
        blocks = c.tiles * c.parts * layout.outer
        # a block lives some microseconds, however little it has to do
        waves = blocks_of(blocks, cores * max(1, 2048 // c.block)) * 1.5e-6
        return (1 if c.direct else 2) * LAUNCH_S + max(moved / (COPY_BYTES_S * cores * min(1.0, blocks / cores)), waves)

    def of_slabs(
        op: Any, ins: Sequence[Spec], outs: Sequence[Spec], epilogue: Epilogue, **config: Any
    ) -> Grid | tuple[Grid, ...]:
        return build(program(op, ins, outs), layout_of(op, ins), ins, outs, epilogue, config)

    of_slabs.__module__ = program.__module__  # whose text is part of the kernels' keys
    template(family, "cuda", space=SPACE, fits=hard, workspace=workspace, prefer=prefer, cost=cost)(of_slabs)
