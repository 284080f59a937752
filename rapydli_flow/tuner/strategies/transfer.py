"""Start from what won on similar shapes, and look around it.

``start`` holds the default and the winners for other shapes of the same operator (`TuningCache.winners`, the most
similar first); those that this space does not allow are replaced by the point that differs least.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence

import numpy as np

from ...space import Point, Space
from .greedy import greedy


def transfer(
    space: Space, start: Sequence[Point], rng: np.random.Generator, *, batch: int
) -> Generator[list[Point], Sequence[float], None]:
    """Greedy search from the best of ``start``, brought into the space."""
    inside = [point if point in space else nearest(space, point) for point in start]
    return greedy(space, [point for point in inside if point is not None], rng, batch=batch)


def nearest(space: Space, point: Point, *, most: int = 20000) -> Point | None:
    """The valid point with the most equal values, and the fewest steps in the others; None if names differ."""
    if set(point) != set(space.names) or not space.count():
        return None
    rng = np.random.default_rng(0)
    points = list(space) if space.count() <= most else space.sample(most, rng)
    places = {name: {v: i for i, v in enumerate(domain.values)} for name, domain in space.domains.items()}

    def distance(other: Point) -> tuple[int, int]:
        off = [name for name in space.names if other[name] != point[name]]
        steps = [abs(places[n][other[n]] - places[n].get(point[n], len(places[n]))) for n in off]
        return len(off), sum(steps)

    return min(points, key=distance)
