"""What this machine can do at most, measured: multiply-adds in registers, and bytes moved to and from memory.

Both by kernels of ours with the threads that are asked for. Bytes: the sum of two arrays into a third one (STREAM's
'add'), arrays that no cache holds; read and written bytes count, not the lines that a processor reads before it writes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from cpu_kernels.compile import compile_kernel
from cpu_kernels.driver import CallList, address_of
from cpu_kernels.peak import PEAK, operands, tile_flops, values

from ..ops import Add, Matmul
from ..spec import HALVES, Spec
from ..template import Device, Epilogue
from ..tuner import Request, Tuning
from .card_measure import seconds_of
from .rank import memory_of

ROUNDS, ROUND_S = 5, 0.02
SUM_BYTES = 1 << 27  # of each array: several times the last level of a large cache


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
    """Measure it. A multiply-add counts as two operations."""
    if device.kind != "cpu":
        return _of_card(device, threads)
    run, flops = in_registers(device)
    best = 0.0
    for _ in range(ROUNDS):
        begin, done = time.perf_counter(), 0
        while (spent := time.perf_counter() - begin) < ROUND_S:
            run(threads)
            done += 1
        best = max(best, done * flops / spent)
    return Peak(best, _moved(device, threads), threads)


def _of_card(device: Device, threads: int) -> Peak:
    """A large product of matrices, and a sum of large arrays, by the kernels that serve untuned."""
    long = Spec((SUM_BYTES // 4 if not device.emulated else 1024,))
    added = Request(Add(), (long, long), Epilogue.none(long))
    flops_s = _products(device, Matmul(), "float32", 4096)
    return Peak(flops_s, 3 * long.size_bytes / seconds_of(added, device), threads)


def tensor_cores(device: Device) -> dict[str, float]:
    """Operations a second of a card's tensor cores, in products of large matrices, by what these are rounded to."""
    rates = {"tf32": _products(device, Matmul(tf32=True), "float32", 8192)}
    return rates | {half: _products(device, Matmul(), half, 8192) for half in HALVES}


def _products(device: Device, op: Matmul, dtype: str, side: int) -> float:
    """Operations a second of a product of square matrices, by the kernel that serves it untuned."""
    side = 16 if device.emulated else side
    square = Spec((side, side), dtype)
    return 2 * side**3 / seconds_of(Request(op, (square, square), Epilogue.none(square)), device)


def in_registers(device: Device) -> tuple[Callable[[int], None], int]:
    """A kernel of multiply-adds in registers, to be called with a number of threads; operations of a call."""
    lanes = min(16, device.vector_bytes // 4)
    config = {"rows": 14 if lanes == 16 else 6, "vectors": 2, "lanes": lanes, "tasks": 16}
    ins, outs = operands(**config)
    kernel = compile_kernel(PEAK, "peak", ins, outs, device, config)
    buffers = [*map(values, ins), *map(values, outs), np.zeros(2, np.int64)]
    calls = CallList([(kernel, [address_of(b) for b in buffers])])

    def run(threads: int, kept: object = buffers) -> None:  # calls know their addresses only
        calls.run(threads=threads)

    return run, tile_flops(**config)


def _moved(device: Device, threads: int) -> float:
    """Bytes a second that a kernel reads and writes."""
    spec = Spec((SUM_BYTES // 4,))
    request = Request(Add(), (spec, spec), Epilogue.none(spec))
    choice = Tuning(device).choose(request)
    template, config = choice.find(request, device), dict(choice.config)
    kernel = compile_kernel(template, request.op, request.ins, request.outs, device, config)
    memory = memory_of(3 * SUM_BYTES)
    memory[:] = 0  # every page is there
    at = np.array([0, spec.shape[0]], np.int64)
    addresses = [memory.ctypes.data + i * SUM_BYTES for i in range(3)]
    calls = CallList([(kernel, [*addresses, address_of(at)])])
    best = 0.0
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        calls.run(threads=threads)
        best = max(best, 3 * SUM_BYTES / (time.perf_counter() - begin))
    return best


_known: dict[tuple[str, int], Peak] = {}


def peak_here(device: Device, threads: int, *, again: bool = False) -> Peak:
    """The best peak that was measured in this process; measured once, and ``again`` where that is asked for."""
    key = (device.key, threads)
    if again or key not in _known:
        found = measured_peak(device, threads)
        _known[key] = _known.get(key, found).better(found)
    return _known[key]
