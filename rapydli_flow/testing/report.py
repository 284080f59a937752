"""What the checks of operators share: seeded draws, comparison, messages, and the report when all is well."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np

from ..ops import Sample, spec_of
from ..spec import Array

WHOLE = 64  # elements of an array that a message shows whole


@dataclass(frozen=True)
class Report:
    """What the suite tried on an op and found right; what it left out, and what the op could have besides.

    ``passed`` says how many samples, cases or kernels each check tried. ``skipped`` and ``lacks`` give reasons.
    """

    op: str
    passed: Mapping[str, int]
    skipped: Mapping[str, str]
    lacks: Mapping[str, str]

    def __repr__(self) -> str:
        checks = ", ".join(f"{name} {count}" for name, count in self.passed.items())
        lines = [f"{self.op}: passed", f"  tried    {checks}"]
        for title, reasons in (("skipped", self.skipped), ("lacks", self.lacks)):
            for name, reason in reasons.items():
                lines.append(f"  {title:<8} {name}: {reason}")
                title = ""
        return "\n".join(lines)


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
        place, first = tuple(map(int, worst)), tuple(map(int, np.argwhere(wrong)[0]))
        text = f"{title}: at {place} {got[worst]:.9g}, not {want[worst]:.9g}; {wrong.sum()} of {off.size} wrong"
        if first != place:
            text += f", the first at {first}: {got[first]:.9g}, not {want[first]:.9g}"
        fail(sample, text)


def shown(title: str, value: Array, at: tuple[int, ...] | None) -> list[str]:
    """Lines of a message: a small array whole; of a large one its range, and the element ``at`` a place."""
    if value.size <= WHOLE:
        text = np.array2string(np.asarray(value), precision=6, separator=", ", max_line_width=100)
        return [f"  {title} {spec_of(value)} =", *(f"    {line}" for line in text.splitlines())]
    element = f", {value[at]:.9g} at {at}" if at is not None else ""
    return [f"  {title} {spec_of(value)} from {value.min():.6g} to {value.max():.6g}{element}"]


def fail(sample: Sample, text: str) -> NoReturn:
    """Raise AssertionError with the op and its operands."""
    raise AssertionError(f"{sample.op} on {join(sample.ins)}: {text}")


def join(items: Sequence[Any]) -> str:
    """Specs, blocks or others as text."""
    return ", ".join(map(str, items)) or "nothing"
