"""A small part of a space as a table: all its combinations are looked at, at once.

    rows    (4, 8)         mask over (rows, vectors)       points 0 1 2: codes of rows     0 0 1
    vectors (1, 2, 4)      1 1 0   rows * vectors <= 8                   codes of vectors  0 1 0
                           1 0 0

It answers what a `Diagram` answers, and needs a few array operations where that needs some for each layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import numpy as np

from .diagram import Diagram, Domain, Ints
from .expression import Node, name
from .vector import Column, Columns, Limits, column

MOST = 4096  # combinations


class Table:
    """The valid points of connected parameters, as positions in their domains; the last parameter counts fastest."""

    dtype: Any = np.int64

    def __init__(self, domains: Mapping[str, Domain], rules: Sequence[Node]) -> None:
        self.order = list(domains)
        self._shape = tuple(len(d.values) for d in domains.values())
        kept = np.ones(self._shape, bool)
        if rules:
            values = {n: d.values for n, d in domains.items()}
            limits, last = Limits(values), len(values) - 1
            axes = {n: column(v).reshape(-1, *(1,) * (last - i)) for i, (n, v) in enumerate(values.items())}
            grid = Columns(limits, {name(n): axis for n, axis in axes.items()})
            safe = [r for r in rules if limits.safe(r)]
            for rule in safe:
                kept = kept & grid.truth(rule)
            for rule in sorted((r for r in rules if r not in safe), key=lambda r: len(r.names)):
                at = np.nonzero(kept)  # what the others leave: for the rest it may not be computable
                rows: dict[Node, Column] = {
                    name(n): axis.reshape(-1)[i] for i, (n, axis) in zip(at, axes.items(), strict=True)
                }
                kept[at] = Columns(limits, rows).truth(rule)
        self._keys = np.flatnonzero(kept)
        self._codes = dict(zip(self.order, np.nonzero(kept), strict=True))
        self.count = len(self._keys)

    def points(self, numbers: Ints) -> dict[str, Ints]:
        """The points with these numbers: for each parameter the positions of its values."""
        return {n: codes[numbers] for n, codes in self._codes.items()}

    def numbers(self, codes: Mapping[str, Ints]) -> Ints:
        """The numbers of points, -1 for those that are not valid."""
        wanted = np.zeros(len(codes[self.order[0]]), np.int64)
        known = np.ones(len(wanted), bool)
        for n, size in zip(self.order, self._shape, strict=True):
            wanted = wanted * size + codes[n]
            known &= codes[n] >= 0
        if not self.count:
            return np.full(len(wanted), -1)
        number = np.minimum(np.searchsorted(self._keys, wanted), self.count - 1)
        return np.where(known & (self._keys[number] == wanted), number, -1)

    def all(self) -> dict[str, Ints]:
        """Every point, in the order of their numbers."""
        return self._codes


Part = Table | Diagram


def connected(domains: Mapping[str, Domain], rules: Sequence[Node]) -> Part:
    """Parameters that are connected with one another, and the constraints on them."""
    deferred = any(d.chosen is not None for d in domains.values())
    small = prod(len(d.values) for d in domains.values()) <= MOST
    return Table(domains, rules) if small and not deferred else Diagram(domains, rules)
