"""The kernel of a row's program: a group of threads has a row.

::

    group <= 32   [ warp 0: row 0 | row 1 | .. ][ warp 1: .. ]     butterflies within warps
    else          [ warp 0 | warp 1 | ..         row 0       ]     and one exchange through shared memory

Rows that fit are held in registers: memory is passed once. Longer ones are streamed once a phase, and once more if each
element has a result; what was read a moment ago comes from the L2 cache then. A row may lie in `Runs` instead of in one
piece.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rapydli_flow.spec import Spec
from rapydli_flow.template import Config, Epilogue

from .access import affine
from .formulas import Formula, lanewise
from .grid import Grid, blocks_of
from .ptx import append, cuda, float32, hold, load, take, unroll
from .row_program import Phase, Program, Runs, extent
from .tail import tail
from .warp import WARP, across_block, across_warp, either, fold, start

Procedure = Callable[..., Any]  # of a kernel


@dataclass(frozen=True)
class Walk:
    """How a group of threads walks over its row: vectors of ``lanes`` elements, ``items`` of a thread under way."""

    size: int
    group: int
    lanes: int
    items: int
    held: bool

    @property
    def vectors(self) -> int:
        """Of a thread."""
        return blocks_of(self.size, self.group * self.lanes)

    @property
    def full(self) -> int:
        """Of all threads."""
        return self.size // (self.group * self.lanes)

    @property
    def steps(self) -> int:
        """Of the loop over a row that is streamed."""
        return 0 if self.held else self.full // self.items

    @property
    def left(self) -> int:
        """Vectors that the loop has passed."""
        return self.steps * self.items

    @property
    def rest(self) -> int:
        return self.vectors - self.left

    @property
    def pitch(self) -> int:
        """Vectors of an operand that a thread has at once."""
        return self.vectors if self.held else max(self.items, self.rest)


@dataclass(frozen=True)
class Operands:
    """What a thread has of its row in registers: slots of vectors, for each operand.

    ``fetch(active, ins, values, slot, row_at, j)`` fills a slot with what lies at element j, and
    ``taken(values, slot)`` has the vectors of a slot.
    """

    fetch: Callable[..., None]
    taken: Callable[..., Any]

    @classmethod
    def of(cls, p: Program, ins: Sequence[Spec], w: Walk, place: Any) -> Operands:
        operands, operand, lanes, pitch = len(p.operands), p.operands, w.lanes, w.pitch
        reads = tuple(load(ins[k].dtype, lanes) for k in p.operands)
        keep, gather = hold(lanes), take(lanes)

        def fetch(active: Any, ins: Any, values: Any, slot: Any, row_at: Any, j: Any) -> None:
            for k in unroll(operands):
                keep(values, (k * pitch + slot) * lanes, reads[k](active, ins[operand[k]], row_at + place(j)))

        def taken(values: Any, slot: Any) -> Any:
            xs = ()
            for k in unroll(operands):
                xs = append(xs, gather(values, (k * pitch + slot) * lanes))
            return xs

        return cls(fetch, taken)


def build(
    p: Program,
    columns: int,
    ins: Sequence[Spec],
    outs: Sequence[Spec],
    epilogue: Epilogue,
    config: Config,
    runs: Runs | None = None,
) -> Grid:
    """The kernel."""
    threads, group, lanes = (config[name] for name in ("threads", "group", "vector"))
    rows, size = extent(p, ins, outs[0], columns)
    together = threads // group
    w = Walk(size, group, lanes, config["items"], bool(config["held"]))
    base_of, place = affine((rows,), (size,)), affine((size,), (1,))
    if runs is not None:
        base_of = affine((rows // runs.beside, runs.beside), (size * runs.beside, runs.run))
        place = affine((size // runs.run, runs.run), (runs.step, 1))
    of = Operands.of(p, ins, w, place)
    numbers, fetch = _numbers(p, ins, size), of.fetch
    phases, scratch, names = _phases(p, w, of, threads)
    count, crosses, whole, held = len(phases), group > WARP and bool(phases), p.whole, w.held
    vectors, full, stored = w.vectors, w.full, max(1, w.pitch * len(p.operands))
    if whole:
        results = _results(p, w, of, names, epilogue, place, pieces=runs is not None)
    else:
        results = _result(p, names, epilogue)

    def kernel(ins: Any, outs: Any, work: Any, extras: Any, at: Any) -> None:
        values = cuda.local.array(stored * lanes, float32)
        thread = cuda.threadIdx.x
        own = thread % group
        n = cuda.blockIdx.x * together + thread // group
        present = n < rows
        row_at = base_of(n)
        shared = ()
        if crosses:
            shared = cuda.shared.array(scratch, float32)
        row = numbers(ins, n, present, row_at)
        if held:
            for i in unroll(vectors):
                j = (i * group + own) * lanes
                if i < full:
                    fetch(present, ins, values, i, row_at, j)
                else:
                    fetch(present & (j < size), ins, values, i, row_at, j)
        for k in unroll(count):
            row = phases[k](ins, values, shared, thread, own, present, row_at, row)
        if whole:
            results(ins, outs, values, own, present, row_at, row, extras, at)
        else:
            results(outs, n, present & (own == 0), row, extras, at)

    return Grid(kernel, blocks_of(rows, together), threads, resident=1)


def _numbers(p: Program, ins: Sequence[Spec], size: int) -> Callable[..., Any]:
    """``(ins, n, present, row_at)``: the numbers of row n before its phases."""
    label, picked, first = p.label or 0, p.picked or 0, p.first or 0
    has_label, has_picked, has_first = p.label is not None, p.picked is not None, p.first is not None
    read_label: Any = load(ins[label].dtype, 1) if has_label else None
    to_label: Any = lanewise(_label(ins[label].dtype, size), 0, 1, 1) if has_label else None
    read_each = tuple(load(ins[k].dtype, 1) for k in p.each)
    each, count_each = p.each, len(p.each)
    read_picked, read_first = load(ins[picked].dtype, 1), load(ins[first].dtype, 1)
    prepare: Any = lanewise(_with(p.prepare, p.row()), 0, 0, 1) if p.prepare is not None else None
    prepares, prepared = p.prepare is not None, len(p.names)

    def numbers(ins: Any, n: Any, present: Any, row_at: Any) -> Any:
        row = ()
        if has_label:
            known = to_label((), (read_label(present, ins[label], n),), (), 0)
            row = append(row, known[0][0])
        for k in unroll(count_each):
            row = append(row, read_each[k](present, ins[each[k]], n)[0])
        if has_picked:
            row = append(row, read_picked(present & (known[0][0] >= 0), ins[picked], row_at + known[0][0])[0])
        if has_first:
            row = append(row, read_first(present, ins[first], row_at)[0])
        if prepares:
            derived = prepare((), (), row, 0)
            for v in unroll(prepared):
                row = append(row, derived[v][0])
        return row

    return numbers


def _phases(p: Program, w: Walk, of: Operands, threads: int) -> tuple[tuple[Procedure, ...], int, tuple[str, ...]]:
    """A procedure for each phase, the shared memory of all, and the names of the numbers that a row has then."""
    out, slot, names = [], 0, p.row() + p.names
    for phase in p.phases:
        out.append(_phase(phase, names, len(p.operands), w, of, threads, slot))
        slot += len(phase.merge.kinds) * (threads // WARP)
        names += phase.names
    return tuple(out), max(1, slot), names


def _phase(
    phase: Phase, names: tuple[str, ...], operands: int, w: Walk, of: Operands, threads: int, slot: int
) -> Callable[..., Any]:
    """``(ins, values, shared, thread, own, present, row_at, row)``: numbers of the row, and what the phase found."""
    group, lanes, items, size, held = w.group, w.lanes, w.items, w.size, w.held
    steps, left, rest, full = w.steps, w.left, w.rest, w.full
    fetch, taken, keep, state_size = of.fetch, of.taken, hold(lanes), len(phase.merge.kinds)
    begin, mask, folded = start(phase.merge, lanes), either(phase.merge, lanes), fold(phase.merge, lanes)
    in_warp, in_block = across_warp(phase.merge, min(group, WARP)), across_block(phase.merge, max(threads, WARP))
    absorb = lanewise(_with(phase.absorb, names), state_size, operands, lanes)
    changing = phase.change is not None
    change: Any = lanewise(_with(phase.change, names), 0, operands, lanes) if phase.change else None
    find, count = lanewise(_with(phase.found, names), state_size, 0, 1), len(phase.names)

    def run(ins: Any, values: Any, shared: Any, thread: Any, own: Any, present: Any, row_at: Any, row: Any) -> Any:
        state = begin()
        for step in range(steps):
            for u in unroll(items):
                fetch(present, ins, values, u, row_at, ((step * items + u) * group + own) * lanes)
            for u in unroll(items):
                xs = taken(values, u)
                state = absorb(state, xs, row, ((step * items + u) * group + own) * lanes)
        if not held:
            for i in unroll(rest):
                j = ((left + i) * group + own) * lanes
                fetch(present & (j < size), ins, values, i, row_at, j)
        for i in unroll(rest):
            j = ((left + i) * group + own) * lanes
            xs = taken(values, i)
            if changing:
                changed = change((), xs, row, j)
                keep(values, i * lanes, changed[0])
                xs = taken(values, i)
            fresh = absorb(state, xs, row, j)
            if left + i < full:  # noqa: SIM108 - decided when the kernel is built
                state = fresh
            else:
                state = mask(j < size, fresh, state)
        total = in_warp(folded(state)) if group <= WARP else in_block(shared, slot, thread, folded(state))
        found = find(total, (), row, 0)
        known = row
        for v in unroll(count):
            known = append(known, found[v][0])
        return known

    return run


def channels_of(out: Spec) -> int:
    """Elements of the last axis."""
    return out.shape[-1] if out.shape else 1


def _results(
    p: Program, w: Walk, of: Operands, names: tuple[str, ...], epilogue: Epilogue, place: Any, *, pieces: bool
) -> Callable[..., None]:
    """``(ins, outs, values, own, present, row_at, row, extras, at)``: a result for each element of the row.

    ``pieces``: rows are not in one piece.
    """
    group, lanes, items, size, held = w.group, w.lanes, w.items, w.size, w.held
    steps, left, rest, fetch, taken = w.steps, w.left, w.rest, of.fetch, of.taken
    result, end = lanewise(_with(p.out, names), 0, len(p.operands), lanes), tail(epilogue, lanes)
    channels = channels_of(epilogue.out)

    def write(active: Any, outs: Any, values: Any, row_at: Any, j: Any, extras: Any, at: Any) -> None:
        element = row_at + place(j)
        if pieces:
            end.finish(active, outs[0], values, element, element % channels, extras, at)
        elif channels == size:
            end.finish(active, outs[0], values, element, j, extras, at)
        else:
            end.finish(active, outs[0], values, element, j % channels, extras, at)

    def run(
        ins: Any, outs: Any, values: Any, own: Any, present: Any, row_at: Any, row: Any, extras: Any, at: Any
    ) -> None:
        for step in range(steps):
            for u in unroll(items):
                fetch(present, ins, values, u, row_at, ((step * items + u) * group + own) * lanes)
            for u in unroll(items):
                j = ((step * items + u) * group + own) * lanes
                xs = taken(values, u)
                found = result((), xs, row, j)
                write(present, outs, found[0], row_at, j, extras, at)
        if not held:
            for i in unroll(rest):
                j = ((left + i) * group + own) * lanes
                fetch(present & (j < size), ins, values, i, row_at, j)
        for i in unroll(rest):
            j = ((left + i) * group + own) * lanes
            xs = taken(values, i)
            found = result((), xs, row, j)
            write(present & (j < size), outs, found[0], row_at, j, extras, at)

    return run


def _result(p: Program, names: tuple[str, ...], epilogue: Epilogue) -> Callable[..., None]:
    """``(outs, n, active, row, extras, at)``: one result for row n."""
    result, end, channels = lanewise(_with(p.out, names), 0, 0, 1), tail(epilogue, 1), channels_of(epilogue.out)

    def run(outs: Any, n: Any, active: Any, row: Any, extras: Any, at: Any) -> None:
        found = result((), (), row, 0)
        end.finish(active, outs[0], found[0], n, n % channels, extras, at)

    return run


def _label(dtype: str, classes: int) -> Formula:
    """The label, or -1 where it is no class."""
    low = "(x0 >= 0) & " if dtype != "uint8" else ""
    return Formula((f"(x0 if {low}(x0 < {classes}) else -1)",), dtypes=("int32",))


def _with(formula: Formula, names: tuple[str, ...]) -> Formula:
    """The formula, told what the numbers of a row are called."""
    return replace(formula, row=names)
