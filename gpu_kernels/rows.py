"""Rows that are reduced along memory, and what follows from the results: softmax, losses, layer norm, short sums.

Which configs of `row_kernels` fit a `Program`, which are good untuned, what they take, and the templates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import prod
from typing import Any

import numpy as np

from rapydli_flow.spec import HALVES, Spec
from rapydli_flow.template import Config, Device, Epilogue, broken, template

from .cost import COPY_BYTES_S, LAUNCH_S
from .grid import INDEX_LIMIT, Grid, blocks_of
from .row_kernels import build
from .row_program import Program, Programs, Runs, extent
from .warp import WARP

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
RunsOf = Callable[[Any, Sequence[Spec], Sequence[Spec]], Runs | None]


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
        busy: float = min(1.0, rows * config["group"] / (cores * 256))  # of the threads that keep memory busy
        if lie is not None:
            busy = min(busy, reached(max(1, rows * config["group"] // config["threads"]), cores))
        return LAUNCH_S + moved(p, ins, outs, run, held) / (COPY_BYTES_S * cores * busy)

    return guess


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
