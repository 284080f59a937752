"""What pooling and its gradients share: sizes of windows on three spatial axes, rules, and which configs to try."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Any

import numpy as np

from rapydli_flow.spec import Spec
from rapydli_flow.template import Config, Device, Rule, broken

from .copies import countable
from .grid import INDEX_LIMIT

MOST_TAPS = 64  # that are written out: larger windows are loops
MOST_SUMS = 64  # registers for results of one thread
Three = tuple[int, int, int]


def three(values: Sequence[int], missing: int) -> Three:
    """A value for each of three spatial axes."""
    a, b, c = (missing,) * (3 - len(values)) + tuple(values)
    return a, b, c


@dataclass(frozen=True)
class Geometry:
    """Sizes of windows that slide, with three spatial axes; ``big`` is what they slide over."""

    n: int
    size: Three
    out: Three
    c: int
    window: Three
    stride: Three
    low: Three

    @classmethod
    def of(cls, op: Any, big: Spec, small: Spec) -> Geometry:
        return cls(
            big.shape[0],
            three(big.shape[1:-1], 1),
            three(small.shape[1:-1], 1),
            big.shape[-1],
            three(op.window, 1),
            three(op.stride, 1),
            three([low for low, _ in op.padding], 0),
        )

    @property
    def margin(self) -> int:
        """Elements beyond the array whose place is computed, though nothing is read there."""
        reach = [s + 2 * (k + 4 * step) for s, k, step in zip(self.size, self.window, self.stride, strict=True)]
        return 2 * prod(reach) * self.c


def geometry(op: Any, ins: Sequence[Spec], outs: Sequence[Spec]) -> Geometry:
    back = hasattr(op, "size")
    return Geometry.of(op, outs[0] if back else ins[0], ins[0] if back else outs[0])


def channels_fit(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device, *, vector: int) -> bool:
    """Vectors divide channels, and no access is wider than 16 bytes."""
    sizes = [np.dtype(spec.dtype).itemsize * vector for spec in (*ins, *outs)]
    return outs[0].shape[-1] % vector == 0 and max(sizes) <= 16


def _indices(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device) -> bool:
    if not countable(op, ins, outs, device):
        return False
    return ins[0].size + outs[0].size + geometry(op, ins, outs).margin < INDEX_LIMIT


COMMON: dict[str, Rule] = {"channels in vectors": channels_fit, "32-bit indices": _indices}


def first_of(
    rules: Mapping[str, Rule],
    op: Any,
    ins: Sequence[Spec],
    outs: Sequence[Spec],
    device: Device,
    tried: Sequence[Config],
) -> Config:
    """The first that keeps the rules."""
    return next((c for c in tried if broken(rules, op, ins, outs, device, c) is None), tried[-1])


def enough(device: Device) -> int:
    """Threads that keep a card's memory busy."""
    return 512 * (device.cores if device.cores > 1 else 132)


def tried(outs: Sequence[Spec], device: Device, tiles: Sequence[tuple[int, int, int]]) -> list[Config]:
    """Wide vectors and large tiles first, as long as there are threads enough. A tile: down, across, its elements."""
    vectors = (8, 4, 2, 1)
    many = [
        {"threads": 256, "vector": v, "down": down, "across": across}
        for v, (down, across, elements) in product(vectors, tiles)
        if outs[0].size // (v * elements) >= enough(device)
    ]
    down, across, _ = tiles[-1]
    few = [{"threads": 128, "vector": v, "down": down, "across": across} for v in (1, 2, 4, 8)]
    return [*many, *few]


def tap_of(at: int, window: int) -> int:
    return at if 0 <= at < window else -1
