"""Group and instance norm of few channels a group: bands of neighbouring groups, so that what is read lies together.

A block has a sample's band: some whole groups. Its threads are across and down, each with a vector of channels, which
it reads at every down-th position::

                   across
             +-------------------+
             | g0 g0 g1 | g1 g2 g2 |        step 0
        down | g0 g0 g1 | g1 g2 g2 |
             +-------------------+
             | g0 g0 g1 | g1 g2 g2 |        step 1 ..

The `Program` is that of `layer_norm`. States are merged through shared memory, first down, halving, then over the
channels of a group, in order; a vector may have channels of several groups, so that each lane has numbers of its own.
Bands that fit are held in registers; others are streamed once a phase, of the operands that it needs, and once more.
Few large samples are cut into parts of their positions besides: each phase is a grid of its own then, whose blocks
leave their states in the workspace, and the blocks of the next ones begin with merging them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import lcm, prod
from typing import Any

import numpy as np

from rapydli_flow.spec import Spec
from rapydli_flow.template import Config, Device, Epilogue, broken, template

from .cost import COPY_BYTES_S, LAUNCH_S
from .formulas import Formula, lanewise
from .grid import INDEX_LIMIT, REGISTERS, Grid, blocks_of
from .layer_norm import standardize, standardize_grad
from .ptx import append, cuda, float32, hold, load, select, store, take, unroll
from .row_program import Program, Programs
from .rows import FLOATS, HELD, REREAD, SECTOR_BYTES, reached
from .tail import tail
from .warp import either, fold, get, give, merged, piece, start

SPACE = {
    "vector": (4, 8, 2, 1),
    "across": (8, 4, 2, 16, 32),  # the most vectors of a band, if a group is not wider
    "threads": (256, 512, 1024, 128),  # at most
    "items": (4, 2, 8),  # positions under way, of bands that are streamed
    "held": (True, False),
    "parts": (1, 2, 4, 8, 16, 32, 64),  # of positions
}
MOST_UNITS = 64  # merged in order
CORES = 132  # where a card does not say
UNDER_WAY_BYTES = 40 << 10  # of loads that a multiprocessor needs for its share of the memory's rate
BATCH = 8  # states of parts that are read at once
OTHERS = 36  # registers of a thread beside those that hold elements
SLACK = 2**24  # indices of what is switched off


@dataclass(frozen=True)
class Band:
    """How samples are cut."""

    samples: int
    space: int  # positions
    channels: int
    size: int  # channels of a group
    lanes: int
    across: int
    down: int
    each: int  # positions of a part

    @classmethod
    def of(cls, op: Any, x: Spec, config: Config) -> Band:
        lead, lanes, channels = len(x.shape) - op.axes, config["vector"], x.shape[-1]
        samples, space, size = prod(x.shape[:lead]), prod(x.shape[lead:-1]), channels // op.groups
        least = lcm(size, lanes)
        most = max(1, config["across"] * lanes // least)
        across = least // lanes * max(n for n in range(1, most + 1) if channels // least % n == 0)
        down = max(1, min(config["threads"] // across, 1 << (space - 1).bit_length()))
        step = down * config["items"]
        each = blocks_of(blocks_of(space, config["parts"]), step) * step if config["parts"] > 1 else space
        return cls(samples, space, channels, size, lanes, across, down, each)

    @property
    def width(self) -> int:
        return self.across * self.lanes

    @property
    def bands(self) -> int:
        """Bands of a sample."""
        return self.channels // self.width

    @property
    def block(self) -> int:
        return self.across * self.down

    @property
    def parts(self) -> int:
        return blocks_of(self.space, self.each)

    @property
    def blocks(self) -> int:
        return self.samples * self.bands * self.parts

    @property
    def steps(self) -> int:
        """Positions of a thread."""
        return blocks_of(self.each, self.down)

    @property
    def folded(self) -> bool:
        """Are all lanes of one group?"""
        return self.size % self.lanes == 0

    @property
    def units(self) -> int:
        """States of a group that are left when those of all positions are one."""
        return self.size // self.lanes if self.folded else self.size

    @property
    def left(self) -> int:
        """States of a band that are left then."""
        return self.across if self.folded else self.width


def _apart(formula: Formula, names: tuple[str, ...]) -> Formula:
    return replace(formula, row=names, apart=True)


def _needed(formula: Formula, operands: int) -> tuple[bool, ...]:
    """Which operands a formula names."""
    text = " ".join((*formula.results, *formula.lines))
    return tuple(f"x{k}" in text for k in range(operands))


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
    lanes, across, down, width, channels = b.lanes, b.across, b.down, b.width, b.channels
    space, size, bands, units, slices, each = b.space, b.size, b.bands, b.units, b.parts, b.each
    split = stage is not None
    after = stage if stage is not None else len(p.phases)  # phases that are known when results are computed
    remembered = stage or 0  # phases that are in the workspace
    folded = b.folded
    one = tuple(piece(i, 1) for i in range(lanes))
    alike = tuple(folded and i > 0 for i in range(lanes))  # lanes that have what lane 0 has
    operand, operands, phases = p.operands, len(p.operands), len(p.phases)
    writes = after == phases
    here_too = after + (not writes)  # and the one whose states are left
    reads = tuple(load(ins[k].dtype, lanes) for k in p.operands)
    first, has_first = p.first or 0, p.first is not None
    read_first = load(ins[first].dtype, 1)

    # phases: numbers of the row are tuples of lanes
    names = p.row()
    parts = 1 if folded else lanes  # lanes of a state that is passed on
    states = tuple(len(phase.merge.kinds) for phase in p.phases)
    plane = across * parts * max(1, down // 2)
    starts = tuple(start(phase.merge, lanes) for phase in p.phases)
    masks = tuple(either(phase.merge, lanes) for phase in p.phases)
    folds = tuple(fold(phase.merge, lanes) for phase in p.phases)
    combine = tuple(merged(phase.merge, parts) for phase in p.phases)
    hand = tuple(give(phase.merge, parts, plane) for phase in p.phases)
    fetch = tuple(get(phase.merge, parts, plane) for phase in p.phases)
    begin_unit = tuple(start(phase.merge, 1) for phase in p.phases)
    fetch_unit = tuple(get(phase.merge, 1, plane) for phase in p.phases)
    mask_unit = tuple(either(phase.merge, 1) for phase in p.phases)
    join_unit = tuple(merged(phase.merge, 1) for phase in p.phases)
    absorbs, finds, needs = [], [], []
    for phase, state in zip(p.phases, states, strict=True):
        absorbs.append(lanewise(_apart(phase.absorb, names), state, operands, lanes))
        finds.append(lanewise(_apart(phase.found, names), state, 0, lanes))
        needs.append(_needed(phase.absorb, operands))
        names += phase.names
    absorb, find, need = tuple(absorbs), tuple(finds), (*needs, (True,) * operands)
    count_found = tuple(len(phase.names) for phase in p.phases)
    left_states, batch, batches = b.left, min(BATCH, slices), blocks_of(slices, BATCH)
    load_state, keep_state = load("float32", 1), store("float32", 1)
    hand_unit = tuple(give(phase.merge, 1, plane) for phase in p.phases)
    place = tuple(sum(states[:k]) for k in range(phases))  # of the first number in the workspace
    halves = tuple(1 << k for k in reversed(range((down - 1).bit_length())))
    level = len(halves)
    shared_size = max((*states, 1)) * plane

    # results
    result = lanewise(_apart(p.out, names), 0, operands, lanes)
    end = tail(epilogue, lanes)
    keep, gather = hold(lanes), take(lanes)
    vectors, full = b.steps, space // down
    steps = 0 if held else full // items
    stride = down * items
    rest = vectors - steps * items
    if split:
        rest = items if space % each else 0
    free = tuple(not split and steps * items + i < full for i in range(rest))  # whether all threads have a position
    pitch = max(1, vectors if held else max(items, rest))
    everything = phases  # the row of `need` that names all operands

    def read(which: Any, active: Any, ins: Any, values: Any, slot: Any, at: Any) -> None:
        for q in unroll(operands):
            if need[which][q]:
                keep(values, (q * pitch + slot) * lanes, reads[q](active, ins[operand[q]], at))

    def kernel(ins: Any, outs: Any, work: Any, extras: Any, at: Any) -> None:
        values = cuda.local.array(operands * pitch * lanes, float32)
        shared = cuda.shared.array(shared_size, float32, alignment=16)
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
        row = ()
        if has_first:
            known = ()
            for i in unroll(lanes):
                if alike[i]:
                    known = append(known, known[0])
                else:
                    own = band_at + (column * lanes + i) // size * size
                    known = append(known, read_first(r < down, ins[first], own)[0])
            row = append(row, known)
        if held:
            for i in unroll(rest):
                n = top + i * down
                if free[i]:
                    read(everything, r < down, ins, values, i, base + n * channels)
                else:
                    read(everything, n < stop, ins, values, i, base + n * channels)
        for k in unroll(here_too):
            if k < remembered:
                total = begin_unit[k]()
                for step in range(batches):
                    others = ()
                    for u in unroll(batch):
                        there = (step * batch + u < slices) & (thread < left_states)
                        number = (band * slices + step * batch + u) * left_states + thread
                        other = ()
                        for v in unroll(states[k]):
                            other = append(other, load_state(there, work[place[k] + v], number))
                        others = append(others, other)
                    for u in unroll(batch):
                        total = mask_unit[k](step * batch + u < slices, join_unit[k](total, others[u]), total)
                hand_unit[k](thread < left_states, shared, thread, total)
            else:
                state = starts[k]()
                for step in range(passes):
                    for u in unroll(items):
                        n = top + step * stride + u * down
                        read(k, r < down, ins, values, u, base + n * channels)
                    for u in unroll(items):
                        xs = ()
                        for q in unroll(operands):
                            xs = append(xs, gather(values, (q * pitch + u) * lanes))
                        state = absorb[k](state, xs, row, 0)
                if not held:
                    for i in unroll(rest):
                        n = top + passes * stride + i * down
                        read(k, n < stop, ins, values, i, base + n * channels)
                for i in unroll(rest):
                    xs = ()
                    for q in unroll(operands):
                        xs = append(xs, gather(values, (q * pitch + i) * lanes))
                    fresh = absorb[k](state, xs, row, 0)
                    state = fresh if free[i] else masks[k](top + passes * stride + i * down < stop, fresh, state)
                part = folds[k](state) if folded else state
                here = (r * across + column) * parts
                for h in unroll(level):
                    passed = (r >= halves[h]) & (r < halves[h] * 2)
                    hand[k](passed, shared, here - halves[h] * across * parts, part)
                    cuda.syncthreads()
                    part = combine[k](part, fetch[k]((r < halves[h]) & (r + halves[h] < down), shared, here))
                    cuda.syncthreads()
                if k < after:
                    hand[k](r == 0, shared, here, part)
                else:
                    for v in unroll(states[k]):
                        for i in unroll(parts):
                            number = cuda.blockIdx.x * left_states + here + i
                            keep_state(r == 0, work[place[k] + v], number, one[i](part[v]))
            if k < after:
                cuda.syncthreads()
                totals = ()
                for i in unroll(lanes):
                    if alike[i]:
                        totals = append(totals, totals[0])
                    else:
                        own = (column * lanes + i) // size * units
                        total = begin_unit[k]()
                        for u in unroll(units):
                            total = join_unit[k](total, fetch_unit[k](r < down, shared, own + u))
                        totals = append(totals, total)
                cuda.syncthreads()
                whole = ()
                for v in unroll(states[k]):
                    of_lanes = ()
                    for i in unroll(lanes):
                        of_lanes = append(of_lanes, totals[i][v][0])
                    whole = append(whole, of_lanes)
                found = find[k](whole, (), row, 0)
                for v in unroll(count_found[k]):
                    row = append(row, found[v])
        if writes:
            for step in range(passes):
                for u in unroll(items):
                    n = top + step * stride + u * down
                    read(everything, r < down, ins, values, u, base + n * channels)
                for u in unroll(items):
                    n = top + step * stride + u * down
                    xs = ()
                    for q in unroll(operands):
                        xs = append(xs, gather(values, (q * pitch + u) * lanes))
                    results = result((), xs, row, 0)
                    end.finish(r < down, outs[0], results[0], base + n * channels, channel, extras, at)
            if not held:
                for i in unroll(rest):
                    n = top + passes * stride + i * down
                    read(everything, n < stop, ins, values, i, base + n * channels)
            for i in unroll(rest):
                n = top + passes * stride + i * down
                xs = ()
                for q in unroll(operands):
                    xs = append(xs, gather(values, (q * pitch + i) * lanes))
                results = result((), xs, row, 0)
                end.finish(n < stop, outs[0], results[0], base + n * channels, channel, extras, at)

    return Grid(kernel, b.blocks, b.block, resident=2 if split and b.block <= 256 else 1)


def serve(family: str, program: Programs) -> None:
    """Register the template of a family."""

    def floats(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device) -> bool:
        return outs[0].dtype in FLOATS and 0 < outs[0].size < INDEX_LIMIT - SLACK

    def vectors(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device, *, vector: int) -> bool:
        x = outs[0]
        return x.shape[-1] % vector == 0 and np.dtype(x.dtype).itemsize * vector <= 16

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
        held: bool,
        parts: int,
    ) -> bool:
        cut = {"vector": vector, "across": across, "threads": threads, "items": items, "parts": parts}
        b = Band.of(op, outs[0], cut)
        if b.across > threads or b.units > MOST_UNITS:
            return False
        if parts > 1 and (held or 2 * b.parts <= parts or b.block < b.left):
            return False
        shared = 12 * b.width * max(1, b.down // 2) // (b.lanes if b.folded else 1)
        kept = len(ins) * vector
        if held:
            return shared <= 40 << 10 and items == 4 and kept * b.steps <= (HELD if threads <= 512 else HELD // 2)
        return shared <= 40 << 10 and kept * items <= (32 if threads <= 512 else 16) and b.steps >= items

    hard = {
        "several groups": lambda op, ins, outs, device: bool(op.groups > 1),
        "floats in 32-bit indices": floats,
        "vectors divide channels": vectors,
        "threads, registers and memory": threads,
    }

    def cost(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device, config: Config) -> float:
        b, x = Band.of(op, outs[0], config), outs[0]
        p, cores = program(op, ins, outs, True), device.cores if device.cores > 1 else CORES
        passes = [_needed(phase.absorb, len(ins)) for phase in p.phases]
        again = 0.0 if config["held"] else REREAD * sum(map(sum, passes))
        run = x.size if b.bands == 1 else b.width * np.dtype(x.dtype).itemsize
        partly = max(1.1 if run < 2 * SECTOR_BYTES else 1.0, SECTOR_BYTES / run)
        # few blocks, or few loads under way, do not keep memory busy
        loads = b.steps if config["held"] else min(config["items"], b.steps)
        under_way = b.blocks * b.block * loads * b.lanes * np.dtype(x.dtype).itemsize
        busy = min(under_way / (cores * UNDER_WAY_BYTES), reached(b.blocks, cores))
        if config["held"] and b.block * (len(ins) * b.lanes * b.steps + OTHERS) * 2 > REGISTERS:
            busy *= 0.75  # one block at a time reads, then computes, then writes
        moved = x.size_bytes * (len(ins) + 1 + again) * partly
        grids = 1 if b.parts == 1 else 1 + len(p.phases)
        return grids * LAUNCH_S + moved / (COPY_BYTES_S * cores * busy)

    def prefer(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device) -> Config:
        cores = device.cores if device.cores > 1 else CORES
        widths = [v for v in (8, 4, 2, 1) if vectors(op, ins, outs, device, vector=v)][:2]

        def tried() -> Iterator[dict[str, Any]]:
            for v in widths:
                for a in (8, 4, 2, 16, 32):
                    for t in (256, 512, 1024):
                        config = {"vector": v, "across": a, "threads": t}
                        yield {**config, "items": 4, "held": True, "parts": 1}
                        for items in (4, 8, 2):
                            streamed = {**config, "items": items, "held": False, "parts": 1}
                            yield streamed
                            few = blocks_of(2 * cores, Band.of(op, outs[0], streamed).blocks)
                            yield {**streamed, "parts": min(SPACE["parts"][-1], 1 << (few - 1).bit_length())}

        kept = [c for c in tried() if broken(hard, op, ins, outs, device, c) is None]
        first = {name: values[0] for name, values in SPACE.items()}
        return min(kept, key=lambda c: cost(op, ins, outs, device, c), default=first)

    def workspace(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], **config: Any) -> tuple[Spec, ...]:
        b, p = Band.of(op, outs[0], config), program(op, ins, outs, config["held"])
        count = sum(len(phase.merge.kinds) for phase in p.phases)
        return (Spec((b.blocks * b.left,)),) * count if b.parts > 1 else ()

    def of_bands(
        op: Any, ins: Sequence[Spec], outs: Sequence[Spec], epilogue: Epilogue, **config: Any
    ) -> Grid | tuple[Grid, ...]:
        b = Band.of(op, outs[0], config)
        return build(program(op, ins, outs, config["held"]), b, ins, outs, epilogue, config["items"], config["held"])

    template(family, "cuda", space=SPACE, fits=hard, workspace=workspace, prefer=prefer, cost=cost)(of_bands)


serve("standardize", standardize)
serve("standardize_grad", standardize_grad)
