"""Numbers on their way between ranks: float32 as it is, or rounded to the nearest bfloat16, half the bytes.

bfloat16 is the upper half of a float32: sign, 8 bits of exponent, 7 of fraction; ties go to the even one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numba import njit

from ..spec import Array


@njit(nogil=True, cache=True)
def _round(bits, out):  # type: ignore[no-untyped-def]
    """The upper halves of float32 values, rounded; a NaN stays one."""
    for i in range(bits.size):
        x = bits[i]
        if (x & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000):
            out[i] = np.uint16((x >> np.uint32(16)) | np.uint32(0x40))
        else:
            out[i] = np.uint16((x + np.uint32(0x7FFF) + ((x >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


def coded(parts: Sequence[Array], wire: str) -> Sequence[Array]:
    """Arrays as they go: for 'bfloat16' one array of the upper halves of all."""
    if not wire:
        return parts
    out, end = np.empty(sum(part.size for part in parts), np.uint16), 0
    for part in parts:
        _round(part.view(np.uint32), out[end : end + part.size])
        end += part.size
    return [out]


def decoded(data: Array, dtype: np.dtype, wire: str) -> Array:
    """What came, as flat numbers of a dtype."""
    if not wire:
        return data.view(dtype)
    out = np.empty(data.nbytes // 2, np.uint32)
    np.left_shift(data.view(np.uint16), 16, out=out, dtype=np.uint32, casting="unsafe")
    return out.view(dtype)
