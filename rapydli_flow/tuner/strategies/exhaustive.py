"""Every point of the space, those to start with first, then in the order of their numbers."""

from __future__ import annotations

from collections.abc import Generator, Sequence

import numpy as np

from ...space import Point, Space
from .asking import Asking


def exhaustive(
    space: Space, start: Sequence[Point], rng: np.random.Generator, *, batch: int
) -> Generator[list[Point], Sequence[float], None]:
    """Walk the whole space."""
    asking = Asking(space)
    for first in range(0, len(start), batch):
        yield from asking.ask(start[first : first + batch])
    count = space.count()
    for first in range(0, count, batch):
        yield from asking.ask(space.points(range(first, min(first + batch, count))))
