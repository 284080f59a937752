"""Cost: a guess of how long kernels take, for choosing between templates before anything was measured.

Rates are of one multiprocessor, as an H200 was seen to reach or as its data sheet lets expect; only their proportions
matter, and they are much the same on other cards.
"""

from __future__ import annotations

from math import ceil

from rapydli_flow.template import Device

COPY_BYTES_S = 4.0e12 / 132  # of one multiprocessor's share of the memory's rate
LAUNCH_S = 2e-6
FLOPS_S = {  # of one multiprocessor
    "fp32": 42e12 / 132,  # fused multiply-adds
    "3xtf32": 75e12 / 132,  # three products on tensor cores for one of float32
    "tf32": 150e12 / 132,  # mma.sync
    "half": 370e12 / 132,
    "wgmma 3xtf32": 125e12 / 132,
    "wgmma tf32": 345e12 / 132,
    "wgmma half": 680e12 / 132,
}


def seconds(device: Device, *, flops: float, size_bytes: float, unit: str, blocks: int, resident: int = 1) -> float:
    """Time of a kernel of ``blocks`` equal blocks, of which a multiprocessor holds ``resident`` at once."""
    cores = device.cores if device.cores > 1 else 132
    places = cores * resident
    busy = blocks / (places * ceil(blocks / places))  # of the places, on average over the kernel's time
    return LAUNCH_S + max(flops / (FLOPS_S[unit] * cores * busy), size_bytes / (COPY_BYTES_S * cores))
