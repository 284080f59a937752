"""The kernels of group and instance norm of few channels a group.

A block has a sample's band: some whole groups. Its threads are across and down, each with a vector of channels, which
it reads at every down-th position::

                   across
             +-------------------+
             | g0 g0 g1 | g1 g2 g2 |        step 0
        down | g0 g0 g1 | g1 g2 g2 |
             +-------------------+
             | g0 g0 g1 | g1 g2 g2 |        step 1 ..

States are merged through shared memory, first down, halving, then over the
channels of a group, in order; a vector may have channels of several groups, so that each lane has numbers of its own.
Bands that fit are held in registers; others are streamed once a phase, of the operands that it needs, and once more.
Few large samples are cut into parts of their positions besides: each phase is a grid of its own then, whose blocks
leave their states in the workspace, and the blocks of the next ones begin with merging them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rapydli_flow.spec import Spec
from rapydli_flow.template import Epilogue

from .formulas import Formula, lanewise
from .grid import Grid, blocks_of
from .group_bands import Band, Walk
from .ptx import append, cuda, float32, hold, load, select, store, take, unroll
from .row_program import Phase, Program
from .tail import tail
from .warp import either, fold, get, give, halving, merged, piece, start

BATCH = 8  # states of parts that are read at once
Procedure = Callable[..., Any]  # of a kernel


def _apart(formula: Formula, names: tuple[str, ...]) -> Formula:
    return replace(formula, row=names, apart=True)


def needed(formula: Formula, operands: int) -> tuple[bool, ...]:
    """Which operands a formula names."""
    text = " ".join((*formula.results, *formula.lines))
    return tuple(f"x{k}" in text for k in range(operands))


@dataclass(frozen=True)
class Operands:
    """What a thread has in registers: slots of vectors, for each operand."""

    p: Program
    dtypes: tuple[str, ...]
    w: Walk

    def fetching(self, needed: Sequence[bool]) -> Procedure:
        """``(active, ins, values, slot, at)``: fills a slot with what lies there of the operands that are needed."""
        count, operand, lanes, pitch = len(self.p.operands), self.p.operands, self.w.b.lanes, self.w.pitch
        reads, keep, need = tuple(load(dtype, lanes) for dtype in self.dtypes), hold(lanes), tuple(needed)

        def fetch(active: Any, ins: Any, values: Any, slot: Any, at: Any) -> None:
            for q in unroll(count):
                if need[q]:
                    keep(values, (q * pitch + slot) * lanes, reads[q](active, ins[operand[q]], at))

        return fetch

    @property
    def taken(self) -> Procedure:
        """``(values, slot)``: the vectors of a slot."""
        count, lanes, pitch, gather = len(self.p.operands), self.w.b.lanes, self.w.pitch, take(self.w.b.lanes)

        def taken(values: Any, slot: Any) -> Any:
            xs = ()
            for q in unroll(count):
                xs = append(xs, gather(values, (q * pitch + slot) * lanes))
            return xs

        return taken


def build(
    p: Program, b: Band, ins: Sequence[Spec], outs: Sequence[Spec], epilogue: Epilogue, items: int, held: bool
) -> Grid | tuple[Grid, ...]:
    """The kernel, or those of the phases and of the results."""
    if b.parts == 1:
        return _stage(p, b, ins, outs, epilogue, items, held, None)
    return tuple(_stage(p, b, ins, outs, epilogue, items, held, k) for k in range(len(p.phases) + 1))


def _stage(
    p: Program,
    b: Band,
    ins: Sequence[Spec],
    outs: Sequence[Spec],
    epilogue: Epilogue,
    items: int,
    held: bool,
    stage: int | None,
) -> Grid:
    """The kernel of everything, or of one phase or, last, of the results, after those that the workspace knows."""
    lanes, across, width, channels = b.lanes, b.across, b.width, b.channels
    down, space, bands, slices, each = b.down, b.space, b.bands, b.parts, b.each
    split, phases = stage is not None, len(p.phases)
    after = phases if stage is None else stage  # phases that are known when results are computed
    remembered, writes = stage or 0, after == phases  # phases that are in the workspace
    here_too = after + (not writes)  # and the one whose states are left
    w = Walk(b, items, held, split)
    of = Operands(p, tuple(ins[k].dtype for k in p.operands), w)

    numbers = tuple(len(phase.merge.kinds) for phase in p.phases)
    plane = across * b.passed * max(1, down // 2)
    join, absorbed, halve, leave, found = [], [], [], [], []
    names = p.row()
    for k, phase in enumerate(p.phases):
        place = sum(numbers[:k])  # of the first number in the workspace
        join.append(_joining(phase, b, place, plane))
        absorbed.append(_absorbing(phase, names, of))
        halve.append(halving(phase.merge, b.passed, across, down, plane))
        leave.append(_handing_on(phase, b, plane) if k < after else _leaving(phase, b, place))
        found.append(_finding(phase, names, b, plane))
        names += phase.names
    firsts, results = _firsts(p, b, ins), _results(p, names, of, epilogue)
    fetch = of.fetching([True] * len(p.operands))
    stored, scratch = len(p.operands) * w.pitch * lanes, max((*numbers, 1)) * plane
    steps, stride, rest, free = w.steps, w.stride, w.rest, w.free

    def kernel(ins: Any, outs: Any, work: Any, extras: Any, at: Any) -> None:
        values = cuda.local.array(stored, float32)
        shared = cuda.shared.array(scratch, float32, alignment=16)
        thread = cuda.threadIdx.x
        column = thread % across
        r = thread // across
        band = cuda.blockIdx.x // slices
        slice_ = cuda.blockIdx.x % slices
        band_at = band // bands * (space * channels) + band % bands * width
        channel = band % bands * width + column * lanes
        base = band_at + column * lanes
        top = slice_ * each + r
        if split:
            stop = select((slice_ + 1) * each < space, (slice_ + 1) * each, space)
            passes = (stop - slice_ * each) // stride
        else:
            stop = space
            passes = steps
        row = firsts(ins, r, column, band_at)
        if held:
            for i in unroll(rest):
                n = top + i * down
                fetch(r < down if free[i] else n < stop, ins, values, i, base + n * channels)
        for k in unroll(here_too):
            if k < remembered:
                join[k](work, shared, thread, band)
            else:
                part = absorbed[k](ins, values, r, base, top, stop, passes, row)
                whole = halve[k](shared, r, column, part)
                leave[k](work, shared, r, column, whole)
            if k < after:
                cuda.syncthreads()
                row = found[k](shared, r, column, row)
        if writes:
            results(ins, outs, values, r, base, top, stop, passes, channel, row, extras, at)

    return Grid(kernel, b.blocks, b.block, resident=2 if split and b.block <= 256 else 1)


def _firsts(p: Program, b: Band, ins: Sequence[Spec]) -> Procedure:
    """``(ins, r, column, band_at)``: numbers of the row before its phases, tuples of lanes."""
    first, has_first, lanes, size, down = p.first or 0, p.first is not None, b.lanes, b.size, b.down
    read, alike = load(ins[first].dtype, 1), b.alike

    def firsts(ins: Any, r: Any, column: Any, band_at: Any) -> Any:
        row = ()
        if has_first:
            known = ()
            for i in unroll(lanes):
                if alike[i]:
                    known = append(known, known[0])
                else:
                    own = band_at + (column * lanes + i) // size * size
                    known = append(known, read(r < down, ins[first], own)[0])
            row = append(row, known)
        return row

    return firsts


def _joining(phase: Phase, b: Band, place: int, plane: int) -> Procedure:
    """``(work, shared, thread, band)``: merges the states of all parts, which are in the workspace, in order."""
    slices, left, states, batch = b.parts, b.left, len(phase.merge.kinds), min(BATCH, b.parts)
    batches, read = blocks_of(slices, BATCH), load("float32", 1)
    begin, mask, join = start(phase.merge, 1), either(phase.merge, 1), merged(phase.merge, 1)
    hand = give(phase.merge, 1, plane)

    def joined(work: Any, shared: Any, thread: Any, band: Any) -> None:
        total = begin()
        for step in range(batches):
            others = ()
            for u in unroll(batch):
                there = (step * batch + u < slices) & (thread < left)
                number = (band * slices + step * batch + u) * left + thread
                other = ()
                for v in unroll(states):
                    other = append(other, read(there, work[place + v], number))
                others = append(others, other)
            for u in unroll(batch):
                total = mask(step * batch + u < slices, join(total, others[u]), total)
        hand(thread < left, shared, thread, total)

    return joined


def _absorbing(phase: Phase, names: tuple[str, ...], of: Operands) -> Procedure:
    """``(ins, values, r, base, top, stop, passes, row)``: the state of a thread, as it is passed on."""
    w, b, operands = of.w, of.w.b, len(of.p.operands)
    items, held, stride, rest, free = w.items, w.held, w.stride, w.rest, w.free
    lanes, down, channels, folded = b.lanes, b.down, b.channels, b.folded
    fetch, taken = of.fetching(needed(phase.absorb, operands)), of.taken
    begin, mask, together = start(phase.merge, lanes), either(phase.merge, lanes), fold(phase.merge, lanes)
    absorb = lanewise(_apart(phase.absorb, names), len(phase.merge.kinds), operands, lanes)

    def absorbed(ins: Any, values: Any, r: Any, base: Any, top: Any, stop: Any, passes: Any, row: Any) -> Any:
        state = begin()
        for step in range(passes):
            for u in unroll(items):
                n = top + step * stride + u * down
                fetch(r < down, ins, values, u, base + n * channels)
            for u in unroll(items):
                xs = taken(values, u)
                state = absorb(state, xs, row, 0)
        if not held:
            for i in unroll(rest):
                n = top + passes * stride + i * down
                fetch(n < stop, ins, values, i, base + n * channels)
        for i in unroll(rest):
            xs = taken(values, i)
            fresh = absorb(state, xs, row, 0)
            state = fresh if free[i] else mask(top + passes * stride + i * down < stop, fresh, state)
        part = together(state) if folded else state
        return part

    return absorbed


def _handing_on(phase: Phase, b: Band, plane: int) -> Procedure:
    """``(work, shared, r, column, state)``: the states of a band go to shared memory."""
    across, parts, hand = b.across, b.passed, give(phase.merge, b.passed, plane)

    def hand_on(work: Any, shared: Any, r: Any, column: Any, state: Any) -> None:
        hand(r == 0, shared, (r * across + column) * parts, state)

    return hand_on


def _leaving(phase: Phase, b: Band, place: int) -> Procedure:
    """``(work, shared, r, column, state)``: the states of a band go to the workspace."""
    across, parts, left, states, write = b.across, b.passed, b.left, len(phase.merge.kinds), store("float32", 1)
    one = tuple(piece(i, 1) for i in range(parts))

    def leave(work: Any, shared: Any, r: Any, column: Any, state: Any) -> None:
        here = (r * across + column) * parts
        for v in unroll(states):
            for i in unroll(parts):
                write(r == 0, work[place + v], cuda.blockIdx.x * left + here + i, one[i](state[v]))

    return leave


def _finding(phase: Phase, names: tuple[str, ...], b: Band, plane: int) -> Procedure:
    """``(shared, r, column, row)``: numbers of the row, and what the states in shared memory tell."""
    lanes, size, units, down, alike = b.lanes, b.size, b.units, b.down, b.alike
    states, count = len(phase.merge.kinds), len(phase.names)
    begin, join, fetch = start(phase.merge, 1), merged(phase.merge, 1), get(phase.merge, 1, plane)
    find = lanewise(_apart(phase.found, names), states, 0, lanes)

    def found(shared: Any, r: Any, column: Any, row: Any) -> Any:
        totals = ()
        for i in unroll(lanes):
            if alike[i]:
                totals = append(totals, totals[0])
            else:
                own = (column * lanes + i) // size * units
                total = begin()
                for u in unroll(units):
                    total = join(total, fetch(r < down, shared, own + u))
                totals = append(totals, total)
        cuda.syncthreads()
        whole = ()
        for v in unroll(states):
            of_lanes = ()
            for i in unroll(lanes):
                of_lanes = append(of_lanes, totals[i][v][0])
            whole = append(whole, of_lanes)
        told = find(whole, (), row, 0)
        known = row
        for v in unroll(count):
            known = append(known, told[v])
        return known

    return found


def _results(p: Program, names: tuple[str, ...], of: Operands, epilogue: Epilogue) -> Procedure:
    """``(ins, outs, values, r, base, top, stop, passes, channel, row, extras, at)``: a result for each element."""
    w, b, operands = of.w, of.w.b, len(p.operands)
    items, held, stride, rest, down, channels = w.items, w.held, w.stride, w.rest, b.down, b.channels
    fetch, taken, end = of.fetching([True] * operands), of.taken, tail(epilogue, b.lanes)
    result = lanewise(_apart(p.out, names), 0, operands, b.lanes)

    def give(
        active: Any, outs: Any, values: Any, slot: Any, element: Any, channel: Any, row: Any, extras: Any, at: Any
    ) -> None:
        xs = taken(values, slot)
        found = result((), xs, row, 0)
        end.finish(active, outs[0], found[0], element, channel, extras, at)

    def results(
        ins: Any,
        outs: Any,
        values: Any,
        r: Any,
        base: Any,
        top: Any,
        stop: Any,
        passes: Any,
        channel: Any,
        row: Any,
        extras: Any,
        at: Any,
    ) -> None:
        for step in range(passes):
            for u in unroll(items):
                n = top + step * stride + u * down
                fetch(r < down, ins, values, u, base + n * channels)
            for u in unroll(items):
                n = top + step * stride + u * down
                give(r < down, outs, values, u, base + n * channels, channel, row, extras, at)
        if not held:
            for i in unroll(rest):
                n = top + passes * stride + i * down
                fetch(n < stop, ins, values, i, base + n * channels)
        for i in unroll(rest):
            n = top + passes * stride + i * down
            give(n < stop, outs, values, i, base + n * channels, channel, row, extras, at)

    return results
