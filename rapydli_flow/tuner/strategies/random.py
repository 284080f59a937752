"""Uniform samples without replacement: what every other strategy has to beat."""

from __future__ import annotations

from collections.abc import Generator, Sequence

import numpy as np

from ...space import Point, Space
from .asking import Asking


def random(
    space: Space, start: Sequence[Point], rng: np.random.Generator, *, batch: int
) -> Generator[list[Point], Sequence[float], None]:
    """Points by chance, until all were asked."""
    asking = Asking(space)
    yield from asking.ask(start)
    while not asking.done:
        points = asking.fresh(batch, rng)
        if not points:
            return
        yield from asking.ask(points)
