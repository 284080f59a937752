"""What a strategy has asked and been told: points once each, by their numbers."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from math import inf

import numpy as np

from ...space import Point, Space


class Asking:
    """The points asked so far and their seconds. Points that are not valid are not asked."""

    def __init__(self, space: Space) -> None:
        self.space = space
        self.times: dict[int, float] = {}

    def ask(self, points: Sequence[Point]) -> Generator[list[Point], Sequence[float], list[tuple[float, Point]]]:
        """Ask for those that are new; returns (seconds, point) of each."""
        fresh: dict[int, Point] = {}
        for number, point in zip(self.space.numbers(points), points, strict=True):
            if number >= 0 and number not in self.times:
                fresh.setdefault(number, point)
        if not fresh:
            return []
        times = yield list(fresh.values())
        self.times.update(zip(fresh, times, strict=True))
        return list(zip(times, fresh.values(), strict=True))

    def new(self, points: Sequence[Point]) -> list[Point]:
        """Those that were not asked yet, each once."""
        numbers = self.space.numbers(points)
        unseen = {n: p for n, p in zip(numbers, points, strict=True) if n >= 0 and n not in self.times}
        return list(unseen.values())

    def fresh(self, n: int, rng: np.random.Generator) -> list[Point]:
        """Up to ``n`` random points that were not asked yet."""
        return self.new(self.space.sample(n + min(len(self.times), 4 * n + 64), rng))[:n] or self._left(n, rng)

    def _left(self, n: int, rng: np.random.Generator) -> list[Point]:
        """As `fresh`, where most of the space is known: look at all that is left."""
        count = self.space.count()
        if count > 1 << 20:
            return []
        left = np.setdiff1d(np.arange(count), np.fromiter(self.times, np.int64, len(self.times)))
        return self.space.points(rng.permutation(left)[:n])

    @property
    def done(self) -> bool:
        """Is there nothing left to ask?"""
        return len(self.times) >= self.space.count()

    def best(self, n: int = 1) -> list[tuple[float, Point]]:
        """The fastest points that have a time."""
        ranked = sorted((t, number) for number, t in self.times.items() if t < inf)[:n]
        return [(t, p) for (t, _), p in zip(ranked, self.space.points([number for _, number in ranked]), strict=True)]
