"""What the checks of operators share: seeded draws, comparison, and messages."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from typing import Any, NoReturn

import numpy as np

from ..ops import Sample
from ..spec import Array


def seeded(sample: Sample, check: str) -> np.random.Generator:
    """Random numbers that are the same for the same sample and check."""
    return np.random.default_rng(zlib.crc32(f"{check} {sample.op} {join(sample.ins)}".encode()))


def compare(sample: Sample, title: str, got: Array, want: Array, tolerance: float) -> None:
    """Equal up to ``tolerance`` times the largest value (at least 1); NaN is never equal."""
    if got.shape != want.shape:
        fail(sample, f"{title}: shape {got.shape}, not {want.shape}")
    if not got.size:
        return
    off = np.abs(np.asarray(got, np.float64) - np.asarray(want, np.float64))
    limit = tolerance * max(1.0, float(np.abs(want).max()))
    if not (off <= limit).all():
        wrong = ~(off <= limit)
        worst = np.unravel_index(int(np.argmax(np.where(np.isnan(off), math.inf, off))), off.shape)
        place = tuple(map(int, worst))
        fail(
            sample,
            f"{title}: at {place} {got[worst]:.9g}, not {want[worst]:.9g}; {wrong.sum()} of {off.size} wrong",
        )


def fail(sample: Sample, text: str) -> NoReturn:
    """Raise AssertionError with the op and its operands."""
    raise AssertionError(f"{sample.op} on {join(sample.ins)}: {text}")


def join(items: Sequence[Any]) -> str:
    """Specs, blocks or others as text."""
    return ", ".join(map(str, items)) or "nothing"
