"""Reductions over any axes but along short rows: sums of pixels for each channel, or of everything.

Which configs of `slab_kernels` fit, which are good untuned, what they take, and the templates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from rapydli_flow.spec import HALVES, Spec
from rapydli_flow.template import Config, Device, Epilogue, Rule, broken, template

from .cost import COPY_BYTES_S, LAUNCH_S
from .grid import INDEX_LIMIT, Grid, blocks_of
from .slab_kernels import CORES, build
from .slab_program import Cut, Layout, Programs

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
Axes = Callable[[Any, Spec], Sequence[int]]


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

    hard: dict[str, Rule] = {
        "float operands in 32-bit indices": floats,
        "vectors divide rows": vectors,
        "threads and memory": threads,
    }

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
