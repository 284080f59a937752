"""Rows that are reduced along memory, and what follows from the results: softmax, losses, layer norm, short sums.

A group of threads has a row; a `Program` says what it does with it:

    prepare   numbers of the row: its label, a value of another operand, the element at the label, the first one
    phases    absorb all elements into a state, merge the states of the group, derive numbers of the row from it
    out       a formula for each element of the row, or one for the row

::

    group <= 32   [ warp 0: row 0 | row 1 | .. ][ warp 1: .. ]     butterflies within warps
    else          [ warp 0 | warp 1 | ..         row 0       ]     and one exchange through shared memory

Rows that fit are held in registers: memory is passed once. Longer ones are streamed once a phase, and once more if each
element has a result; what was read a moment ago comes from the L2 cache then. A row may lie in `Runs` instead of in one
piece.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np

from rapydli_flow.spec import HALVES, Spec
from rapydli_flow.template import Config, Device, Epilogue, broken, template

from .access import affine
from .cost import COPY_BYTES_S, LAUNCH_S
from .formulas import Formula, lanewise
from .grid import INDEX_LIMIT, Grid, blocks_of
from .ptx import append, cuda, float32, hold, load, take, unroll
from .tail import tail
from .warp import EXPONENTIALS, MAXIMUM, WARP, Merge, across_block, across_warp, either, fold, start, sums

SPACE = {
    "threads": (128, 256, 512, 1024),
    "group": (32, 128, 256, 512, 1024, 16, 8, 4, 2, 1),
    "vector": (4, 8, 2, 1),
    "items": (4, 8, 2, 1),  # vectors under way, of rows that are streamed
    "held": (True, False),
}
HELD = 64  # the most elements of a row that a thread keeps
FLOATS = ("float32", *HALVES)
SLACK = 2**20  # indices of what is switched off
SECTOR_BYTES = 32  # what memory moves at least
REREAD = 0.4  # of the time of a read from memory


@dataclass(frozen=True)
class Phase:
    """One reduction of a row. ``change`` replaces operands first; only rows that are held can be changed."""

    merge: Merge
    absorb: Formula  # a0, .. are the state so far
    found: Formula  # numbers of the row, from the state
    names: tuple[str, ...]  # of these
    change: Formula | None = None


@dataclass(frozen=True)
class Program:
    """What is done with a row. Operands are numbers of inputs."""

    operands: tuple[int, ...]  # read along the row: x0, x1, ..
    phases: tuple[Phase, ...]
    out: Formula
    whole: bool  # a result for each element, or one for the row
    label: int | None = None  # whole numbers, one for each row: `label`, -1 where it is no class
    each: tuple[int, ...] = ()  # floats, one for each row: e0, ..
    picked: int | None = None  # of this operand the element at the label: `picked`, 0 where that is no class
    first: int | None = None  # of this operand the first element of the row: `first`
    prepare: Formula | None = None
    names: tuple[str, ...] = ()  # of what is prepared

    def row(self) -> tuple[str, ...]:
        """Names of the numbers of a row before its phases."""
        names = ("label",) if self.label is not None else ()
        names += tuple(f"e{k}" for k in range(len(self.each)))
        names += ("picked",) if self.picked is not None else ()
        return names + (("first",) if self.first is not None else ())


@dataclass(frozen=True)
class Runs:
    """How rows lie that are not in one piece: runs of ``run`` elements, each ``step`` behind the one before.

    ``beside`` rows lie beside each other, and fill the steps::

        [ row 0 | row 1 | .. ][ row 0 | row 1 | .. ] ..
    """

    run: int
    step: int
    beside: int


Programs = Callable[[Any, Sequence[Spec], Sequence[Spec], bool], Program]
"""``(op, ins, outs, held) -> Program``"""
Procedure = Callable[..., Any]  # of a kernel
RunsOf = Callable[[Any, Sequence[Spec], Sequence[Spec]], Runs | None]


def extent(p: Program, ins: Sequence[Spec], out: Spec, columns: int) -> tuple[int, int]:
    """Rows, and elements of a row."""
    if p.operands:
        return ins[p.operands[0]].size // columns, columns
    return (out.size // columns if p.whole else out.size), columns


def rules(program: Programs, columns: Callable[..., int], channels: Callable[..., int] | None = None) -> Any:
    """The hard constraints of a template of rows; ``columns`` of a row, which vectors divide, or else ``channels``."""

    def floats(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device) -> bool:
        p = program(op, ins, outs, True)
        read = {*p.operands, *p.each}
        if not all(0 < spec.size < INDEX_LIMIT - SLACK for spec in (*ins, *outs)):
            return False
        return all(ins[k].dtype in FLOATS for k in read) and outs[0].dtype in (*FLOATS, "int64")

    def vectors(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device, *, vector: int) -> bool:
        p = program(op, ins, outs, True)
        sizes = [np.dtype(ins[k].dtype).itemsize for k in p.operands]
        sizes += [np.dtype(outs[0].dtype).itemsize] if p.whole else []
        if not sizes:
            return vector == 1
        return (channels or columns)(op, ins, outs) % vector == 0 and vector * max(sizes) <= 16

    def registers(
        op: Any,
        ins: Sequence[Spec],
        outs: Sequence[Spec],
        device: Device,
        *,
        threads: int,
        group: int,
        vector: int,
        items: int,
        held: bool,
    ) -> bool:
        p, size = program(op, ins, outs, held), columns(op, ins, outs)
        count = max(1, len(p.operands)) * vector
        if held:
            kept = blocks_of(size, group * vector) * count
            return items == SPACE["items"][0] and kept <= (HELD if threads <= 512 else 32)
        return group > WARP and items * count <= 32 and size >= group * vector and bool(p.operands)

    return {
        "a group is part of a warp, or the block": "group <= 32 or group == threads",
        "threads of a block": "threads <= 1024",
        "float operands in 32-bit indices": floats,
        "vectors divide rows": vectors,
        "registers of a thread": registers,
    }


def prefer(program: Programs, columns: Callable[..., int], fits: Callable[..., bool]) -> Callable[..., Config]:
    """The default: few threads a row where there are many rows, else as many as have work."""

    def tried(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device) -> Iterator[dict[str, Any]]:
        size, p = columns(op, ins, outs), program(op, ins, outs, True)
        rows, cores = extent(p, ins, outs[0], size)[0], max(device.cores, 64)
        for kept in (32, HELD):
            for vector in (8, 4, 2, 1):
                for group in (1, 2, 4, 8, 16, 32, 128, 256, 512, 1024):
                    each = blocks_of(size, group * vector)
                    if each * vector * max(1, len(p.operands)) > kept:
                        continue
                    wanted = rows * group >= cores * 512 or each <= 2
                    if not wanted and group < 1024 and group * vector < size:
                        continue
                    threads = max(group, 128)
                    yield {"threads": threads, "group": group, "vector": vector, "items": 4, "held": True}
        for vector in (8, 4, 2, 1):
            items = 4 if vector > 1 else 8
            for count in (items, items // 2, 1):
                for threads in (512, 128):
                    yield {"threads": threads, "group": threads, "vector": vector, "items": count, "held": False}

    def choose(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device) -> Config:
        configs = (c for c in tried(op, ins, outs, device) if fits(op, ins, outs, device, c))
        return next(configs, {name: values[0] for name, values in SPACE.items()})

    return choose


def reached(blocks: int, cores: int) -> float:
    """The part of the memory's rate that so many blocks reach, which read, wait for each other, and go on."""
    return min(1.0, 1.5 * blocks / cores, 0.5 + 0.25 * blocks / cores)


def moved(p: Program, ins: Sequence[Spec], outs: Sequence[Spec], run: int, held: bool) -> float:
    """Bytes that memory moves, in runs of so many elements; what is read again comes from the L2 cache, mostly."""
    partly = max(1.0, SECTOR_BYTES / (run * np.dtype(outs[0].dtype).itemsize)) if p.whole else 1.0
    reads = 1.0 if held else 1.0 + (len(p.phases) + p.whole - 1) * REREAD
    return partly * (reads * sum(spec.size_bytes for spec in ins) + sum(spec.size_bytes for spec in outs))


def cost(program: Programs, columns: Callable[..., int], runs: RunsOf | None = None) -> Callable[..., float]:
    """Seconds: a group of threads is busy with its row, the others wait for memory."""

    def guess(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device, config: Config) -> float:
        p, size, held = program(op, ins, outs, config["held"]), columns(op, ins, outs), bool(config["held"])
        lie = runs(op, ins, outs) if runs else None
        run = lie.run if lie and lie.run < size else SECTOR_BYTES
        rows = max(spec.size for spec in ins) // size
        cores = device.cores if device.cores > 1 else 132
        busy = min(1.0, rows * config["group"] / (cores * 256))  # of the threads that keep memory busy
        if lie is not None:
            busy = min(busy, reached(rows * config["group"] // config["threads"], cores))
        return LAUNCH_S + moved(p, ins, outs, run, held) / (COPY_BYTES_S * cores * busy)

    return guess


def _label(dtype: str, classes: int) -> Formula:
    """The label, or -1 where it is no class."""
    low = "(x0 >= 0) & " if dtype != "uint8" else ""
    return Formula((f"(x0 if {low}(x0 < {classes}) else -1)",), dtypes=("int32",))


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
    read_label = load(ins[label].dtype, 1) if has_label else None
    to_label = lanewise(_label(ins[label].dtype, size), 0, 1, 1) if has_label else None
    read_each = tuple(load(ins[k].dtype, 1) for k in p.each)
    each, count_each = p.each, len(p.each)
    read_picked, read_first = load(ins[picked].dtype, 1), load(ins[first].dtype, 1)
    prepare = lanewise(_with(p.prepare, p.row()), 0, 0, 1) if p.prepare is not None else None
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
    change = lanewise(_with(phase.change, names), 0, operands, lanes) if phase.change else None
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


def _with(formula: Formula, names: tuple[str, ...]) -> Formula:
    """The formula, told what the numbers of a row are called."""
    return replace(formula, row=names)


def last_axis(op: Any, ins: Sequence[Spec], outs: Sequence[Spec]) -> int:
    """Columns of rows that lie along the last axis of the largest operand, or of the output."""
    return max((*ins, *outs), key=lambda spec: prod(spec.shape)).shape[-1]


def trailing(axes: Callable[..., Sequence[int]], x: int = 0) -> Callable[..., int]:
    """Columns of rows that are the reduced axes at the end of an input."""

    def columns(op: Any, ins: Sequence[Spec], outs: Sequence[Spec]) -> int:
        return prod(ins[x].shape[axis] for axis in axes(op, ins[x]))

    return columns


def contiguous(axes: Callable[..., Sequence[int]], x: int = 0) -> Callable[..., bool]:
    """The rule that all reduced axes come after all that are kept."""

    def rows(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device) -> bool:
        kept = [axis for axis, size in enumerate(ins[x].shape) if axis not in axes(op, ins[x]) and size > 1]
        reduced = [axis for axis in axes(op, ins[x]) if ins[x].shape[axis] > 1]
        return not kept or not reduced or max(kept) < min(reduced)

    return rows


def exponentials(held: bool, *, change: bool = True) -> tuple[tuple[Phase, ...], str]:
    """Phases that find `top`, the largest x0, `total`, the sum of exp(x0 - top), its reciprocal `share` and its
    logarithm `log_total`; and what exp(x0 - top) is called then.

    A row that is held is passed twice, and its exponentials are kept with ``change``; one that is streamed is
    passed once: the sum so far shrinks whenever a larger element comes.
    """
    found = ("{0}", "T(1.0) / {0}", "math.log({0})")
    names = ("total", "share", "log_total")
    if held:
        top = Phase(MAXIMUM, Formula(("larger(a0, x0)",)), Formula(("a0",)), ("top",))
        each = "x0" if change else "exp(x0 - top)"
        kept = Formula(("exp(x0 - top)",)) if change else None
        total = Phase(sums(1), Formula((f"a0 + {each}",)), Formula(tuple(f.format("a0") for f in found)), names, kept)
        return (top, total), each
    lines = ("d = x0 - a0", "e = exp(-abs(d))", "rises = d > T(0.0)")
    online = Formula(("larger(a0, x0)", "((a1 * e + T(1.0)) if rises else (a1 + e))"), lines=lines)
    # an infinite top makes the sum NaN
    results = ("a0", *(f.format("sum_") for f in found))
    ended = Formula(results, lines=("sum_ = a1 + (a0 - a0)",))
    return (Phase(EXPONENTIALS, online, ended, ("top", *names)),), "exp(x0 - top)"


def serve(
    family: str,
    program: Programs,
    columns: Callable[..., int] = last_axis,
    along: Callable[..., bool] | None = None,
    channels: Callable[..., int] | None = None,
    runs: RunsOf | None = None,
) -> None:
    """Register the template of a family; ``along``: a rule that says where rows lie along memory; ``runs``: how they
    lie if not in one piece."""
    hard = {**({"rows along memory": along} if along else {}), **rules(program, columns, channels)}

    def fits(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device, config: Config) -> bool:
        return broken(hard, op, ins, outs, device, config) is None

    def of_rows(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], epilogue: Epilogue, **config: Any) -> Grid:
        p, lie = program(op, ins, outs, config["held"]), runs(op, ins, outs) if runs else None
        return build(p, columns(op, ins, outs), ins, outs, epilogue, config, lie)

    of_rows.__module__ = program.__module__  # whose text is part of the kernels' keys
    chosen = prefer(program, columns, fits)
    template(family, "cuda", space=SPACE, fits=hard, prefer=chosen, cost=cost(program, columns, runs))(of_rows)
