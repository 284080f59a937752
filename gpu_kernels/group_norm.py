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
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import lcm, prod
from typing import Any

import numpy as np

from rapydli_flow.spec import Spec
from rapydli_flow.template import Config, Device, Epilogue, broken, template

from .cost import COPY_BYTES_S, LAUNCH_S
from .grid import INDEX_LIMIT, REGISTERS, Grid, blocks_of
from .layer_norm import standardize, standardize_grad
from .ptx import append, cuda, float32, hold, load, take, unroll
from .rows import FLOATS, HELD, REREAD, SECTOR_BYTES, Program, Programs
from .tail import tail
from .warp import Formula, either, fold, get, give, lanewise, merged, start

SPACE = {
    "vector": (4, 8, 2, 1),
    "across": (8, 4, 2, 16, 32),  # the most vectors of a band, if a group is not wider
    "threads": (256, 512, 1024, 128),  # at most
    "items": (4, 2, 8),  # positions under way, of bands that are streamed
    "held": (True, False),
}
MOST_UNITS = 64  # merged in order
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

    @classmethod
    def of(cls, op: Any, x: Spec, config: Config) -> Band:
        lead, lanes, channels = len(x.shape) - op.axes, config["vector"], x.shape[-1]
        samples, space, size = prod(x.shape[:lead]), prod(x.shape[lead:-1]), channels // op.groups
        least = lcm(size, lanes)
        most = max(1, config["across"] * lanes // least)
        across = least // lanes * max(n for n in range(1, most + 1) if channels // least % n == 0)
        down = max(1, min(config["threads"] // across, 1 << (space - 1).bit_length()))
        return cls(samples, space, channels, size, lanes, across, down)

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
    def blocks(self) -> int:
        return self.samples * self.bands

    @property
    def steps(self) -> int:
        """Positions of a thread."""
        return blocks_of(self.space, self.down)

    @property
    def folded(self) -> bool:
        """Are all lanes of one group?"""
        return self.size % self.lanes == 0

    @property
    def units(self) -> int:
        """States of a group that are left when those of all positions are one."""
        return self.size // self.lanes if self.folded else self.size


def _apart(formula: Formula, names: tuple[str, ...]) -> Formula:
    return replace(formula, row=names, apart=True)


def _needed(formula: Formula, operands: int) -> tuple[bool, ...]:
    """Which operands a formula names."""
    text = " ".join((*formula.results, *formula.lines))
    return tuple(f"x{k}" in text for k in range(operands))


def build(
    p: Program, b: Band, ins: Sequence[Spec], outs: Sequence[Spec], epilogue: Epilogue, items: int, held: bool
) -> Grid:
    """The kernel."""
    lanes, across, down, width, channels = b.lanes, b.across, b.down, b.width, b.channels
    space, size, bands, units = b.space, b.size, b.bands, b.units
    folded = b.folded
    alike = tuple(folded and i > 0 for i in range(lanes))  # lanes that have what lane 0 has
    operand, operands, phases = p.operands, len(p.operands), len(p.phases)
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
    join_unit = tuple(merged(phase.merge, 1) for phase in p.phases)
    absorbs, finds, needs = [], [], []
    for phase, state in zip(p.phases, states, strict=True):
        absorbs.append(lanewise(_apart(phase.absorb, names), state, operands, lanes))
        finds.append(lanewise(_apart(phase.found, names), state, 0, lanes))
        needs.append(_needed(phase.absorb, operands))
        names += phase.names
    absorb, find, need = tuple(absorbs), tuple(finds), (*needs, (True,) * operands)
    count_found = tuple(len(phase.names) for phase in p.phases)
    halves = tuple(1 << k for k in reversed(range((down - 1).bit_length())))
    level = len(halves)
    shared_size = max((*states, 1)) * plane

    # results
    result = lanewise(_apart(p.out, names), 0, operands, lanes)
    end = tail(epilogue, lanes)
    keep, gather = hold(lanes), take(lanes)
    vectors, full = b.steps, space // down
    steps = 0 if held else full // items
    left = steps * items
    rest = vectors - left
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
        band_at = cuda.blockIdx.x // bands * (space * channels) + cuda.blockIdx.x % bands * width
        channel = cuda.blockIdx.x % bands * width + column * lanes
        base = band_at + column * lanes
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
            for i in unroll(vectors):
                n = i * down + r
                if i < full:
                    read(everything, r < down, ins, values, i, base + n * channels)
                else:
                    read(everything, n < space, ins, values, i, base + n * channels)
        for k in unroll(phases):
            state = starts[k]()
            for step in range(steps):
                for u in unroll(items):
                    n = (step * items + u) * down + r
                    read(k, r < down, ins, values, u, base + n * channels)
                for u in unroll(items):
                    xs = ()
                    for q in unroll(operands):
                        xs = append(xs, gather(values, (q * pitch + u) * lanes))
                    state = absorb[k](state, xs, row, 0)
            if not held:
                for i in unroll(rest):
                    n = (left + i) * down + r
                    read(k, n < space, ins, values, i, base + n * channels)
            for i in unroll(rest):
                xs = ()
                for q in unroll(operands):
                    xs = append(xs, gather(values, (q * pitch + i) * lanes))
                fresh = absorb[k](state, xs, row, 0)
                if left + i < full:  # noqa: SIM108 - decided when the kernel is built
                    state = fresh
                else:
                    state = masks[k]((left + i) * down + r < space, fresh, state)
            if folded:  # noqa: SIM108
                part = folds[k](state)
            else:
                part = state
            here = (r * across + column) * parts
            for h in unroll(level):
                passed = (r >= halves[h]) & (r < halves[h] * 2)
                hand[k](passed, shared, here - halves[h] * across * parts, part)
                cuda.syncthreads()
                part = combine[k](part, fetch[k]((r < halves[h]) & (r + halves[h] < down), shared, here))
                cuda.syncthreads()
            hand[k](r == 0, shared, here, part)
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
        for step in range(steps):
            for u in unroll(items):
                n = (step * items + u) * down + r
                read(everything, r < down, ins, values, u, base + n * channels)
            for u in unroll(items):
                n = (step * items + u) * down + r
                xs = ()
                for q in unroll(operands):
                    xs = append(xs, gather(values, (q * pitch + u) * lanes))
                results = result((), xs, row, 0)
                end.finish(r < down, outs[0], results[0], base + n * channels, channel, extras, at)
        if not held:
            for i in unroll(rest):
                n = (left + i) * down + r
                read(everything, n < space, ins, values, i, base + n * channels)
        for i in unroll(rest):
            n = (left + i) * down + r
            xs = ()
            for q in unroll(operands):
                xs = append(xs, gather(values, (q * pitch + i) * lanes))
            results = result((), xs, row, 0)
            end.finish(n < space, outs[0], results[0], base + n * channels, channel, extras, at)

    return Grid(kernel, b.blocks, b.block)


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
    ) -> bool:
        b = Band.of(op, outs[0], {"vector": vector, "across": across, "threads": threads})
        if b.across > threads or b.units > MOST_UNITS:
            return False
        shared = 12 * b.width * max(1, b.down // 2) // (b.lanes if b.folded else 1)
        kept = len(ins) * vector
        if held:
            return shared <= 40 << 10 and items == 4 and kept * b.steps <= (HELD if threads <= 512 else HELD // 2)
        return shared <= 40 << 10 and kept * items <= 32 and b.steps >= items

    hard = {
        "several groups": lambda op, ins, outs, device: bool(op.groups > 1),
        "floats in 32-bit indices": floats,
        "vectors divide channels": vectors,
        "threads, registers and memory": threads,
    }

    def cost(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device, config: Config) -> float:
        b, x = Band.of(op, outs[0], config), outs[0]
        p, cores = program(op, ins, outs, True), device.cores if device.cores > 1 else 132
        passes = [_needed(phase.absorb, len(ins)) for phase in p.phases]
        again = 0.0 if config["held"] else REREAD * sum(map(sum, passes))
        run = x.size if b.bands == 1 else b.width * np.dtype(x.dtype).itemsize
        partly = max(1.0, SECTOR_BYTES / run)
        # a block of few threads, or few blocks, do not keep memory busy; narrow accesses less than wide ones
        busy = min(1.0, b.blocks * b.block / (cores * 256), 1.5 * b.blocks / cores)
        busy *= min(1.0, 0.5 + b.lanes * np.dtype(x.dtype).itemsize / 16)
        if config["held"] and b.block * (len(ins) * b.lanes * b.steps + OTHERS) * 2 > REGISTERS:
            busy *= 0.75  # one block at a time reads, then computes, then writes
        moved = x.size_bytes * (len(ins) + 1 + again) * partly
        return LAUNCH_S + moved / (COPY_BYTES_S * cores * busy)

    def prefer(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device) -> Config:
        def tried() -> list[dict[str, Any]]:
            widths = [v for v in (8, 4, 2, 1) if vectors(op, ins, outs, device, vector=v)][:2]
            return [
                {"vector": v, "across": a, "threads": t, "items": i, "held": h}
                for v in widths
                for h, i in ((True, 4), (False, 4), (False, 2))
                for a in (8, 4, 2, 16, 32)
                for t in (256, 512, 1024)
            ]

        kept = [c for c in tried() if broken(hard, op, ins, outs, device, c) is None]
        first = {name: values[0] for name, values in SPACE.items()}
        return min(kept, key=lambda c: cost(op, ins, outs, device, c), default=first)

    def of_bands(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], epilogue: Epilogue, **config: Any) -> Grid:
        b = Band.of(op, outs[0], config)
        return build(program(op, ins, outs, config["held"]), b, ins, outs, epilogue, config["items"], config["held"])

    template(family, "cuda", space=SPACE, fits=hard, prefer=prefer, cost=cost)(of_bands)


serve("standardize", standardize)
serve("standardize_grad", standardize_grad)
