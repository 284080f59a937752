"""What this machine can do at most, measured: multiply-adds in registers, and bytes copied from memory to memory."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from cpu_kernels.compile import compile_kernel
from cpu_kernels.driver import CallList, address_of
from cpu_kernels.peak import PEAK, operands, tile_flops, values

from ..template import Device

ROUNDS, ROUND_S = 5, 0.02
COPY_BYTES = 1 << 28


@dataclass(frozen=True)
class Peak:
    """float32 operations and bytes a second, with so many threads; the best of a few rounds."""

    flops_s: float
    bytes_s: float
    threads: int

    def better(self, other: Peak) -> Peak:
        """The larger figure of each: what slows a machine down makes a peak smaller, never larger."""
        return Peak(max(self.flops_s, other.flops_s), max(self.bytes_s, other.bytes_s), self.threads)

    def __str__(self) -> str:
        return f"{self.flops_s / 1e9:,.0f} GFLOP/s, {self.bytes_s / 1e9:,.1f} GB/s with {self.threads} threads"


def measured_peak(device: Device, threads: int) -> Peak:
    """Measure it. A multiply-add counts as two operations, a copied byte once."""
    lanes = min(16, device.vector_bytes // 4)
    config = {"rows": 14 if lanes == 16 else 6, "vectors": 2, "lanes": lanes, "tasks": 16}
    ins, outs = operands(**config)
    kernel = compile_kernel(PEAK, "peak", ins, outs, device, config)
    buffers = [*map(values, ins), *map(values, outs), np.zeros(2, np.int64)]
    calls = CallList([(kernel, [address_of(b) for b in buffers])])
    best = 0.0
    for _ in range(ROUNDS):
        begin, done = time.perf_counter(), 0
        while (spent := time.perf_counter() - begin) < ROUND_S:
            calls.run(threads=threads)
            done += 1
        best = max(best, done * tile_flops(**config) / spent)
    return Peak(best, _copied(), threads)


def _copied() -> float:
    """Bytes a second that NumPy copies with one thread: half of it read, half written."""
    source, target = np.ones(COPY_BYTES // 4, np.float32), np.empty(COPY_BYTES // 4, np.float32)
    best = 0.0
    for _ in range(3):
        begin = time.perf_counter()
        np.copyto(target, source)
        best = max(best, COPY_BYTES / (time.perf_counter() - begin))
    return best
