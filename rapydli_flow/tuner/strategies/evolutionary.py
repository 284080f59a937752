"""A genetic algorithm: parents by tournament, values from either parent, now and then a step to a neighbour.

Children that break a constraint are replaced by a valid neighbour of a parent, so no trial is lost on them.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any

import numpy as np

from ...space import Point, Space
from .asking import Asking

POPULATION, MUTATION = 12, 0.25


def evolutionary(
    space: Space, start: Sequence[Point], rng: np.random.Generator, *, batch: int
) -> Generator[list[Point], Sequence[float], None]:
    """Generations of ``batch`` children of the best `POPULATION` points so far."""
    asking = Asking(space)
    yield from asking.ask(start)
    yield from asking.ask(asking.fresh(max(0, POPULATION - len(start)), rng))
    while not asking.done:
        parents = asking.best(POPULATION)
        children = [_child(space, parents, rng) for _ in range(4 * batch)] if parents else []
        points = asking.new(children)[:batch]
        if len(points) < batch:
            points = asking.new([*points, *asking.fresh(batch - len(points), rng)])
        if not points:
            return
        yield from asking.ask(points)


def _child(space: Space, parents: Sequence[tuple[float, Point]], rng: np.random.Generator) -> Point:
    one, two = (_winner(parents, rng) for _ in range(2))
    child: dict[str, Any] = {name: (one if rng.random() < 0.5 else two)[name] for name in space.names}
    if rng.random() < MUTATION or child in (one, two):
        near = space.neighbours(child if child in space else one, reach=2)
        return near[int(rng.integers(len(near)))] if near else one
    if child not in space:
        near = space.neighbours(one)
        return near[int(rng.integers(len(near)))] if near else one
    return child


def _winner(parents: Sequence[tuple[float, Point]], rng: np.random.Generator) -> Point:
    """The better of two by chance; parents are sorted."""
    return parents[min(int(rng.integers(len(parents))), int(rng.integers(len(parents))))][1]
