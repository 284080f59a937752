"""All-reduce of two processes of this host: shared memory beside torch.distributed's gloo.

Both sum float32 arrays in place, one thread a process.
"""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import numpy as np
from common import beside_torch
from pair import End, on_both, slower
from pytorch import torch
from torch import distributed

from rapydli_flow.runtime.transport import CHUNK_BYTES
from rapydli_flow.scheduler import AllReduce

SIZES = {"4 kB": 4_000, "64 kB": 64_000, "1 MB": 1_000_000, "25 MB": 25_000_000, "250 MB": 250_000_000}
TARGETS = {"1 MB": 2.0, "250 MB": 3.0}  # how many times as fast as gloo
OP = AllReduce(ranks=(0, 1))


def measure(given: Namespace) -> list[dict[str, Any]]:
    """A row for each size."""
    found = on_both(in_both, given.seconds)
    return [
        {"size": name, **beside_torch(slower([times[name] for times in found])), "target": TARGETS.get(name)}
        for name in SIZES
    ]


def in_both(end: End, seconds: float) -> dict[str, dict[str, list[float]]]:
    """Times of both sides in this process, by size."""
    end.gloo()
    transport = end.shared(CHUNK_BYTES)
    found = {name: of_size(end, transport, size // 4, seconds) for name, size in SIZES.items()}
    distributed.destroy_process_group()
    return found


def of_size(end: End, transport: Any, elements: int, seconds: float) -> dict[str, list[float]]:
    """Compare the sums, then let the two take turns."""
    drawn = [np.random.default_rng([elements, rank]).standard_normal(elements, dtype=np.float32) for rank in range(2)]
    whole, first = drawn[0] + drawn[1], drawn[end.rank] * np.float32(1e-3)
    x, y = drawn[end.rank].copy(), torch.from_numpy(drawn[end.rank].copy())
    runs = {
        "ours": lambda: transport.meet("the sum", OP, [x], [x]),
        "gloo": lambda: distributed.all_reduce(y),
    }

    def afresh() -> None:
        """Small again: each sum doubles what lies there."""
        x[...] = first
        y.numpy()[...] = first

    for name, run in runs.items():
        run()
        if not np.array_equal(x if name == "ours" else y.numpy(), whole):
            raise SystemExit(f"{name}: the sum of {elements} elements is wrong in process {end.rank}")
    del drawn, whole
    return end.turns(runs, seconds=seconds, before=afresh)
