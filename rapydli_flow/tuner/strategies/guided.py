"""Model-guided search: a forest of trees learns the times so far and says where to look next.

The model (scikit-learn's `ExtraTreesRegressor`, as in SMAC: Hutter, Hoos, Leyton-Brown 2011) predicts the logarithm of
the time from the values of parameters and the products of any two, for caches and registers hold products of blocks and
a tree by itself cuts along one parameter at a time. Points are asked by expected improvement over the best so far,
where the spread of the trees stands for what the model does not know, and half of them next to the best, for trees are
blunt where a slope is gentle. Candidates are all points of a small space; of a large one a sample, and the neighbours
of the best. Points without a time count as slow as the slowest, so that regions that fail are left.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from itertools import combinations
from math import erf, inf
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...space import Point, Space
from .asking import Asking

FIRST, TREES, CANDIDATES = 12, 60, 4096


def guided(
    space: Space, start: Sequence[Point], rng: np.random.Generator, *, batch: int
) -> Generator[list[Point], Sequence[float], None]:
    """Expected improvement on a random forest."""
    from sklearn.ensemble import ExtraTreesRegressor  # a second to import, and only searches need it

    asking = Asking(space)
    yield from asking.ask(start)
    yield from asking.ask(_spread(space, asking, FIRST, rng))
    while not asking.done:
        numbers, times = list(asking.times), np.fromiter(asking.times.values(), float)
        known = times < inf
        if not known.any():
            candidates = asking.fresh(batch, rng)
        else:
            slow = times[known].max()
            target = np.log(np.where(known, times, slow))
            forest = ExtraTreesRegressor(TREES, min_samples_leaf=1, random_state=int(rng.integers(2**31)))
            forest.fit(features(space, space.points(numbers)), target)
            candidates = _candidates(space, asking, rng)
            if candidates:
                table = features(space, candidates)
                each = np.stack([tree.predict(table) for tree in forest.estimators_])
                gain = _improvement(each.mean(0), each.std(0), float(target.min()))
                candidates = _chosen(space, asking, candidates, gain, each.mean(0), batch)
        if not candidates:
            return
        yield from asking.ask(candidates)


def features(space: Space, points: Sequence[Point]) -> NDArray[np.float64]:
    """What the forest sees of points: each parameter, and the sum (of logarithms: the product) of any two."""
    columns = _columns(space, points)
    sums = [columns[:, a] + columns[:, b] for a, b in combinations(range(columns.shape[1]), 2)]
    return np.column_stack([columns, *sums])


def _columns(space: Space, points: Sequence[Point]) -> NDArray[np.float64]:
    """Points as numbers: logarithms of positive ones, else places in the list of values."""
    columns = []
    for name, domain in space.domains.items():
        values = domain.values
        if all(isinstance(v, int | float) and not isinstance(v, bool) and v > 0 for v in values):
            columns.append(np.log2([float(p[name]) for p in points]))
        else:
            places = {v: float(i) for i, v in enumerate(values)}
            columns.append(np.array([places[p[name]] for p in points]))
    return np.stack(columns, axis=1) if columns else np.zeros((len(points), 0))


def _spread(space: Space, asking: Asking, n: int, rng: np.random.Generator) -> list[Point]:
    """Points by chance that lie far from one another and from those known."""
    pool = asking.fresh(16 * n, rng)
    if not pool:
        return []
    table = _columns(space, pool)
    scale = np.ptp(table, axis=0)
    table = table / np.where(scale > 0, scale, 1.0)
    chosen = [int(rng.integers(len(pool)))]
    far = np.linalg.norm(table - table[chosen[0]], axis=1)
    while len(chosen) < min(n, len(pool)):
        chosen.append(int(far.argmax()))
        far = np.minimum(far, np.linalg.norm(table - table[chosen[-1]], axis=1))
    return [pool[i] for i in chosen]


def _chosen(
    space: Space, asking: Asking, candidates: list[Point], gain: NDArray[Any], mean: NDArray[Any], batch: int
) -> list[Point]:
    """The most expected improvement; every other one a neighbour of the best, so that no slope is left half-way."""
    (_, best) = asking.best()[0]
    near = set(space.numbers(space.neighbours(best, reach=1)))
    close = np.array([number in near for number in space.numbers(candidates)])
    order = np.argsort(-gain, kind="stable").tolist()
    beside = [i for i in np.argsort(mean, kind="stable").tolist() if close[i]][: batch // 2]
    wanted = list(dict.fromkeys([*beside, *order]))[:batch]
    return [candidates[i] for i in wanted]


def _candidates(space: Space, asking: Asking, rng: np.random.Generator) -> list[Point]:
    if space.count() <= CANDIDATES:
        left = np.setdiff1d(np.arange(space.count()), np.fromiter(asking.times, np.int64, len(asking.times)))
        return space.points(left)
    near = [p for _, best in asking.best(4) for p in space.neighbours(best)]
    return asking.new([*near, *space.sample(CANDIDATES, rng)])


def _improvement(mean: NDArray[Any], spread: NDArray[Any], best: float) -> NDArray[np.float64]:
    """The expected improvement of normally distributed predictions."""
    sure = np.maximum(spread, 1e-9)
    z = (best - mean) / sure
    density = np.exp(-0.5 * z * z) / np.sqrt(2 * np.pi)
    below = 0.5 * (1 + np.array([erf(v) for v in z / np.sqrt(2)]))
    out: NDArray[np.float64] = sure * (z * below + density)
    return out
