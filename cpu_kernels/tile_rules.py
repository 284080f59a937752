"""What tiles of sums must keep to, whichever template sums them: rules of `Template` over rows, vectors and lanes.

A template says which tile it makes of at most ``rows`` rows, and how many columns there are to cut into vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any, Protocol

import numpy as np

from rapydli_flow.spec import Spec
from rapydli_flow.template import Device

from .tile import holds

Rules = dict[str, Callable[..., bool]]


class Shape(Protocol):
    """The rows of a tile, or its lines and the rows of each, where it may have at most ``rows``."""

    def __call__(self, op: Any, ins: Sequence[Spec], outs: Sequence[Spec], rows: int) -> tuple[int, ...]: ...


class Count(Protocol):
    """A number that follows from the op: of columns that tiles share out among their vectors, or of rows."""

    def __call__(self, op: Any, ins: Sequence[Spec], outs: Sequence[Spec]) -> int: ...


def vector_rules(columns: Count, rows: Count) -> Rules:
    """The rules of a tile, or of several together, whose ``rows`` are not to be chosen."""

    def registers(
        op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device, *, vectors: int, lanes: int
    ) -> bool:
        return holds(rows(op, ins, outs), vectors, lanes, np.dtype(outs[0].dtype).itemsize, device.vector_bytes)

    return {"no empty vector": _filled(columns), "tile in registers": registers}


def _filled(columns: Count) -> Callable[..., bool]:
    def filled(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device, *, vectors: int, lanes: int) -> bool:
        return (vectors - 1) * lanes < columns(op, ins, outs)

    return filled


def tile_rules(shape: Shape, columns: Count, choices: Sequence[int]) -> Rules:
    """The rules of tiles; ``choices`` are the values that ``rows`` may have. They come after a rule that
    there are elements to write."""

    def once(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device, *, rows: int) -> bool:
        """No smaller ``rows`` means the same tile."""
        made = shape(op, ins, outs, rows)
        return not any(r < rows and shape(op, ins, outs, r) == made for r in choices)

    def registers(
        op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device, *, rows: int, vectors: int, lanes: int
    ) -> bool:
        size = prod(shape(op, ins, outs, rows))
        return holds(size, vectors, lanes, np.dtype(outs[0].dtype).itemsize, device.vector_bytes)

    return {"a tile once": once, "no empty vector": _filled(columns), "tile in registers": registers}
