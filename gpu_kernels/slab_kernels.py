"""The kernels of reductions over any axes.

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
from typing import Any

from rapydli_flow.spec import Spec
from rapydli_flow.template import Config, Epilogue

from .access import affine
from .formulas import lanewise
from .grid import Grid, blocks_of
from .ptx import append, cuda, float32, load, select, store, unroll
from .slab_program import Cut, Layout, Program
from .tail import tail
from .warp import either, get, give, halving, merged, piece, start

CORES = 132  # the order of a sum must not depend on the card
MERGERS = 256  # threads of a block of the second grid


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
    rows, each, tiles, parts, inner, direct = c.rows, c.each, c.tiles, c.parts, layout.inner, c.direct
    numbers, vectors = len(p.merge.kinds), width // lanes
    plane = max(1, (1 << max(0, down - 1).bit_length()) // 2, copies) * across * lanes
    kept_sizes, kept_steps = zip(*(layout.kept or ((1, 0),)), strict=True)
    base_of = affine(tuple(kept_sizes), tuple(kept_steps))
    channels_of, absorbed = _channels(p, c, ins, inner), _absorbing(p, layout, c, ins)
    merged_down = halving(p.merge, lanes, across, down, plane)
    # results: of lanes where a wide row is the inner run, else of one element at a time
    finishing = _Finish(p, ins, outs, epilogue, lanes if copies == 1 else 1, inner)
    finish, finish_copies, leave = finishing.finish, _finish_copies(p, c, finishing, plane), _leaving(p, lanes)

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
        own = channels_of(ins, inside, column)
        count = select(first + each < rows, each, rows - first)
        state = absorbed(ins, own, inside, base, first, count, row)
        state = merged_down(shared, row, thread % across, state)
        if not direct:
            leave(inside & (row == 0), work, slab * width + column, state)
        elif copies == 1:
            finish(inside & (row == 0), ins, outs, state, column, group * inner + column, extras, at)
        else:
            finish_copies(inside & (row == 0), ins, outs, shared, state, column, group, extras, at)

    grid = Grid(kernel, tiles * parts * layout.outer, c.block)
    return grid if direct else (grid, _together(p, layout, c, finishing.of(1)))


def _channels(p: Program, c: Cut, ins: Sequence[Spec], inner: int) -> Callable[..., Any]:
    """``(ins, inside, column)``: of each operand for channels, those of a thread's lanes."""
    lanes, copies, count, channel = c.lanes, c.copies, len(p.channels), p.channels
    reads = tuple(load(ins[k].dtype, lanes if copies == 1 else 1) for k in p.channels)

    def channels(ins: Any, inside: Any, column: Any) -> Any:
        own = ()
        for k in unroll(count):
            if copies == 1:
                own = append(own, reads[k](inside, ins[channel[k]], column))
            else:
                values = ()
                for i in unroll(lanes):
                    values = append(values, reads[k](inside, ins[channel[k]], (column + i) % inner)[0])
                own = append(own, values)
        return own

    return channels


def _absorbing(p: Program, layout: Layout, c: Cut, ins: Sequence[Spec]) -> Callable[..., Any]:
    """``(ins, own, inside, base, first, count, row)``: a thread's state of the ``count`` rows of a slab."""
    lanes, down, width, items, step_rows = c.lanes, c.down, c.width, c.items, c.down * c.items
    operands, operand, channels = len(p.operands), p.operands, len(p.channels)
    reads = tuple(load(ins[k].dtype, lanes, constant=True) for k in p.operands)
    begin, choose = start(p.merge, lanes), either(p.merge, lanes)
    absorb = lanewise(p.absorb, len(p.merge.kinds), operands + channels, lanes)
    one_run = not layout.reduced
    row_sizes = (*(size for size, _ in layout.reduced), layout.rows // c.copies)  # of wide rows that follow each other
    locate = affine(row_sizes, (*(step for _, step in layout.reduced), width))
    ragged = bool(c.rows % c.each % step_rows)  # the rows of the last slab

    def fetched(ins: Any, before: Any, active: Any, base: Any, r: Any) -> Any:
        values = before
        for k in unroll(operands):
            if one_run:
                values = append(values, reads[k](active, ins[operand[k]], base + r * width))
            else:
                values = append(values, reads[k](active, ins[operand[k]], base + locate(r)))
        return values

    def operands_of(fetched_rows: Any, u: Any, own: Any) -> Any:
        xs = ()
        for k in unroll(operands):
            xs = append(xs, fetched_rows[u * operands + k])
        for k in unroll(channels):
            xs = append(xs, own[k])
        return xs

    def absorbed(ins: Any, own: Any, inside: Any, base: Any, first: Any, count: Any, row: Any) -> Any:
        state = begin()
        for step in range(count // step_rows):
            loaded = ()
            for u in unroll(items):
                r = first + step * step_rows + u * down + row
                loaded = fetched(ins, loaded, inside, base, r)
            for u in unroll(items):
                xs = operands_of(loaded, u, own)
                state = absorb(state, xs, (), first + step * step_rows + u * down + row)
        if ragged:
            last = first + count // step_rows * step_rows + row
            for u in unroll(items):
                r = last + u * down
                active = inside & (r < first + count)
                loaded = fetched(ins, (), active, base, r)
                xs = operands_of(loaded, 0, own)
                state = choose(active, absorb(state, xs, (), r), state)
        return state

    return absorbed


def _finish_copies(p: Program, c: Cut, finishing: _Finish, plane: int) -> Callable[..., None]:
    """``(active, ins, outs, shared, state, column, group, extras, at)``: merges copies of channels in wide rows."""
    copies, block, inner, singles = c.copies, c.block, finishing.inner, blocks_of(finishing.inner, c.block)
    hand, single = give(p.merge, c.lanes, plane), get(p.merge, 1, plane)
    begin, join, finish = start(p.merge, 1), merged(p.merge, 1), finishing.finish

    def finish_copies(
        active: Any, ins: Any, outs: Any, shared: Any, state: Any, column: Any, group: Any, extras: Any, at: Any
    ) -> None:
        hand(active, shared, column, state)
        cuda.syncthreads()
        for e in unroll(singles):
            own = e * block + cuda.threadIdx.x
            total = begin()
            for q in unroll(copies):
                total = join(total, single(own < inner, shared, q * inner + own))
            finish(own < inner, ins, outs, total, own, group * inner + own, extras, at)

    return finish_copies


def _leaving(p: Program, lanes: int) -> Callable[..., None]:
    """``(active, work, place, state)``: a state goes to the workspace, an array for each of its numbers."""
    numbers, stored = len(p.merge.kinds), min(lanes, 4)  # of 4 bytes each
    keeps, pieces = tuple(store(kind, stored) for kind in p.merge.kinds), lanes // stored
    cuts = tuple(piece(i * stored, stored) for i in range(pieces))

    def leave(active: Any, work: Any, place: Any, state: Any) -> None:
        for k in unroll(numbers):
            for i in unroll(pieces):
                keeps[k](active, work[k], place + i * stored, cuts[i](state[k]))

    return leave


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
    plane = max(1, down // 2) * across
    merged_down = halving(p.merge, 1, across, down, plane, even=True)
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
        state = merged_down(shared, row, thread % across, state)
        finish((row == 0) & (column < inner), ins, outs, state, column, group * inner + column, extras, at)

    return Grid(kernel, tiles * outer, across * down)
