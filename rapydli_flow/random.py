"""Counter-based random numbers: a hash of (seed, step, stream, index), with no state and no rank.

Element ``index`` of the infinite field ``(seed, step, stream)`` is the same number on any worker, in
any block, on any device. The mixing function is SplitMix64's (Steele, Lea, Flood: Fast Splittable
Pseudorandom Number Generators, OOPSLA 2014), applied to a counter. The functions hold for NumPy
arrays and scalars and, unchanged, for Numba: every constant is a uint64.
"""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np

from .spec import Array, Block

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
MIX_2 = np.uint64(0x94D049BB133111EB)
SHIFT_30, SHIFT_27, SHIFT_31, SHIFT_40 = np.uint64(30), np.uint64(27), np.uint64(31), np.uint64(40)


def mix(z: Any) -> Any:
    """SplitMix64's finaliser: uint64 -> uint64."""
    z = (z ^ (z >> SHIFT_30)) * MIX_1
    z = (z ^ (z >> SHIFT_27)) * MIX_2
    return z ^ (z >> SHIFT_31)


def random_bits(seed: Any, step: Any, stream: Any, index: Any) -> Any:
    """64 random bits of element ``index``; all arguments uint64."""
    return mix(mix(mix(seed + GOLDEN) ^ (step * MIX_1 + stream)) + index * GOLDEN)


def keep(seed: Any, step: Any, stream: Any, index: Any, threshold: Any) -> Any:
    """Is element ``index`` kept by dropout? True with probability ``1 - threshold / 2**24``.

    An integer comparison, so that every dtype and device drops the same elements.
    """
    return (random_bits(seed, step, stream, index) >> SHIFT_40) >= threshold


def stream_of(name: str) -> int:
    """The stream of a node: a 32-bit hash of its scoped name."""
    return zlib.crc32(name.encode())


def indices(at: Block) -> Array:
    """uint64 linear indices, in the global array, of the elements of a block."""
    index = np.zeros((), np.uint64)
    for axis, (lo, hi, size) in enumerate(zip(at.lo, at.hi, at.whole, strict=True)):
        along = np.arange(lo, hi, dtype=np.uint64).reshape(-1, *[1] * (len(at.whole) - 1 - axis))
        index = index * np.uint64(size) + along
    return np.asarray(index)


def uniform(seed: int, step: int, stream: int, at: Block) -> Array:
    """float64 in [0, 1) for each element of a block."""
    return _uniform(seed, step, stream, indices(at))


def normal(seed: int, stream: int, at: Block) -> Array:
    """Standard normal float64 for each element of a block (Box-Muller)."""
    return _normal(seed, stream, indices(at), 0)


def truncated_normal(seed: int, stream: int, at: Block, bound: float) -> Array:
    """Standard normal float64 in [-bound, bound] for each element of a block; what is outside is drawn again."""
    index = indices(at)
    out, attempt = _normal(seed, stream, index, 0), 0
    outside = np.abs(out) > bound
    while outside.any():
        attempt += 1
        out[outside] = _normal(seed, stream, index[outside], attempt)
        outside = np.abs(out) > bound
    return out


def _uniform(seed: int, step: int, stream: int, index: Array) -> Array:
    with np.errstate(over="ignore"):
        bits = random_bits(np.uint64(seed), np.uint64(step), np.uint64(stream), index)
    return np.asarray((bits >> np.uint64(11)).astype(np.float64) / 2.0**53)


def _normal(seed: int, stream: int, index: Array, attempt: int) -> Array:
    radius = np.sqrt(-2.0 * np.log1p(-_uniform(seed, 2 * attempt, stream, index)))
    return np.asarray(radius * np.cos(2.0 * np.pi * _uniform(seed, 2 * attempt + 1, stream, index)))
