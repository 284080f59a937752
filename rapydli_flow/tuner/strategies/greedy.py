"""Greedy neighbourhood search with restarts: from the best point to its best neighbour, as long as one is better.

Neighbours differ in one parameter; those one step away are tried first, then those farther away. Where no
neighbour is better, the search goes on from a random point that was not tried.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from math import inf

import numpy as np

from ...space import Point, Space
from .asking import Asking


def greedy(
    space: Space, start: Sequence[Point], rng: np.random.Generator, *, batch: int
) -> Generator[list[Point], Sequence[float], None]:
    """Hill climbing from the best of ``start``, then from points by chance."""
    asking = Asking(space)
    told = yield from asking.ask(start)
    while not asking.done:
        time_s, point = min(told, key=lambda pair: pair[0], default=(inf, None))
        while point is not None:
            time_s, point = yield from _step(asking, time_s, point, batch)
        points = asking.fresh(1, rng)
        if not points:
            return
        told = yield from asking.ask(points)


def _step(
    asking: Asking, time_s: float, point: Point, batch: int
) -> Generator[list[Point], Sequence[float], tuple[float, Point | None]]:
    """The first better neighbour of those asked together; none if there is none."""
    waiting = asking.new(asking.space.neighbours(point))
    for first in range(0, len(waiting), batch):
        told = yield from asking.ask(waiting[first : first + batch])
        best = min(told, key=lambda pair: pair[0], default=(inf, None))
        if best[0] < time_s:
            return best
    return time_s, None
