"""What work and transfers take, roughly: rooflines of one rank, and of the links between ranks.

Good enough to tell ways to divide a node apart, which differ by factors. A `Machine` is a value: that of a real
cluster is measured, and these are figures of a core with AVX2 and of shared memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..ops import Op
from ..spec import Spec


@dataclass(frozen=True)
class Machine:
    """Rates of one rank, and of what it sends to others."""

    flops_s: float = 5e10
    memory_bytes_s: float = 1e10
    link_bytes_s: float = 2e9
    latency_s: float = 2e-5

    def compute_s(self, flops: float, size_bytes: float) -> float:
        """Seconds of a kernel: arithmetic or memory, whichever is slower (Williams, Waterman, Patterson 2009)."""
        return max(flops / self.flops_s, size_bytes / self.memory_bytes_s)

    def move_s(self, size_bytes: float) -> float:
        """Seconds until a rank has got so many bytes of others."""
        return self.latency_s + size_bytes / self.link_bytes_s if size_bytes else 0.0


def touched_bytes(ins: Sequence[Spec], outs: Sequence[Spec]) -> int:
    """Bytes that a node reads and writes at least."""
    return sum(spec.size_bytes for spec in (*ins, *outs))


def node_s(op: Op, ins: Sequence[Spec], outs: Sequence[Spec], machine: Machine) -> float:
    """Seconds of a whole node on one rank."""
    return machine.compute_s(op.flops(*ins), touched_bytes(ins, outs))
