"""Group and instance norm of few channels a group: bands of neighbouring groups, so that what is read lies together.

Which configs of `group_kernels` fit, which are good untuned, what they take, and the templates; the `Program` is that
of `layer_norm`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from rapydli_flow.spec import Spec
from rapydli_flow.template import Config, Device, Epilogue, Rule, broken, template

from .cost import COPY_BYTES_S, LAUNCH_S
from .grid import INDEX_LIMIT, REGISTERS, Grid, blocks_of
from .group_bands import Band
from .group_kernels import build, needed
from .layer_norm import standardize, standardize_grad
from .row_program import Programs
from .rows import FLOATS, HELD, REREAD, SECTOR_BYTES, reached

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
OTHERS = 36  # registers of a thread beside those that hold elements
SLACK = 2**24  # indices of what is switched off


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

    hard: dict[str, Rule] = {
        "several groups": lambda op, ins, outs, device: bool(op.groups > 1),
        "floats in 32-bit indices": floats,
        "vectors divide channels": vectors,
        "threads, registers and memory": threads,
    }

    def cost(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device, config: Config) -> float:
        b, x = Band.of(op, outs[0], config), outs[0]
        p, cores = program(op, ins, outs, True), device.cores if device.cores > 1 else CORES
        passes = [needed(phase.absorb, len(ins)) for phase in p.phases]
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
