"""A space as a layered diagram: one layer a parameter, one node for all beginnings that have the same future.

    rows    vectors   lanes                a node knows only what the constraints that are still open need:
    (.) --4-- (4) --1-- (4) --16-- (.)     here the product so far, not which rows and vectors gave it
       \\-8-- (8) --2-- (8) --8--- (.)     each edge is a value; each way from left to right is a valid point
                \\-4-- (32) --2-- (.)

Layers are built from left to right with whole columns: the values of a parameter for all nodes at once, the
constraints that are complete by then, and then the *maximal known parts* of those that are not: equal parts,
equal node. Counting from right to left gives each node the number of its completions, and with that the i-th
point, uniform samples and the whole list, none of which looks at a point that is not valid.

A diagram is made for each part of a space that no constraint connects with the rest, unless the part is small
enough for a `Table`. Method: a multi-valued
decision diagram compiled breadth first (Andersen et al. 2007, "A constraint store based on multivalued
decision diagrams"), with states merged by the partly evaluated constraints themselves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import SpaceError
from .expression import Node, name
from .vector import Column, Columns, Limits, column, grouped

Ints = NDArray[Any]
MOST_ROWS = 1 << 27  # beginnings that are looked at in one layer: about 10 GB


@dataclass(frozen=True)
class Domain:
    """What a parameter may be: ``values``, or for a deferred one ``chosen``, a call that gives some of them."""

    values: tuple[Any, ...]
    chosen: Node | None = None


@dataclass(frozen=True)
class Layer:
    """Edges, sorted by the node that they leave and by value; ``before`` counts the points of those before."""

    name: str
    start: Ints
    code: Ints
    target: Ints
    before: Ints


class Diagram:
    """The valid points of connected parameters, as positions in their domains. Points are numbered from 0."""

    def __init__(self, domains: Mapping[str, Domain], rules: Sequence[Node]) -> None:
        self.order = ordered(domains, rules)
        self._domains = domains
        whole = prod(max(1, len(d.values)) for d in domains.values())
        self.dtype: Any = np.int64 if whole < 2**62 else object
        values = {n: d.values for n, d in domains.items()}
        self._limits = Limits(values)
        self._columns = {n: column(v) for n, v in values.items()}
        self.layers = self._counted(self._grown(rules))
        self.count = int(self.layers[0].before[-1])

    # building ---------------------------------------------------------------------------------------

    def _grown(self, rules: Sequence[Node]) -> list[tuple[Ints, Ints, Ints, int]]:
        """For each parameter: node, value and next node of each edge, and the number of nodes."""
        pending = list(rules) + [d.chosen for d in self._domains.values() if d.chosen is not None]
        assigned: set[str] = set()
        state: dict[Node, Column] = {}
        nodes, out = 1, []
        for parameter in self.order:
            domain = self._domains[parameter]
            assigned.add(parameter)
            complete = [r for r in rules if parameter in r.names and r.names <= assigned]
            pending = [r for r in pending if r is not domain.chosen and not (r.names <= assigned and r in rules)]
            at, code = self._values(parameter, domain, state, nodes, complete)
            rows: dict[Node, Column] = {k: v[at] for k, v in state.items()}
            rows[name(parameter)] = self._columns[parameter][code]
            wanted = list(dict.fromkeys(part for r in pending for part in self._parts(r, assigned)))
            known = Columns(self._limits, rows)
            columns = {part: np.broadcast_to(known.value(part), at.shape) for part in wanted}
            if columns:
                target, first = grouped(list(columns.values()))
                state = {part: values[first] for part, values in columns.items()}
                out.append((at, code, target, nodes))
                nodes = len(first)
            else:
                out.append((at, code, np.zeros(len(at), np.int64), nodes))
                state, nodes = {}, 1
        return out

    def _values(
        self, parameter: str, domain: Domain, state: Mapping[Node, Column], nodes: int, complete: Sequence[Node]
    ) -> tuple[Ints, Ints]:
        """The edges of a layer: node and value of each that keeps the constraints."""
        values = self._columns[parameter]
        if nodes * max(1, len(values)) > MOST_ROWS:
            raise SpaceError(
                f"the space does not factor: {nodes:,} beginnings times {len(values):,} values of {parameter!r}. "
                "Add constraints on fewer parameters, or take values away."
            )
        safe = [r for r in complete if self._limits.safe(r)]
        if domain.chosen is None:
            columns = {k: v.reshape(-1, 1) for k, v in state.items()}
            columns[name(parameter)] = values.reshape(1, -1)
            known, mask = Columns(self._limits, columns), np.ones((nodes, len(values)), bool)
            for rule in safe:
                mask = mask & known.truth(rule)
            at, code = np.nonzero(mask)
            checks = [r for r in complete if r not in safe]
        else:
            lists = np.broadcast_to(Columns(self._limits, dict(state)).value(domain.chosen), (nodes,))
            places = {v: i for i, v in enumerate(domain.values)}
            each = [sorted(places[v] for v in found) for found in lists.tolist()]
            at = np.repeat(np.arange(nodes), [len(e) for e in each])
            code = np.array([c for e in each for c in e], np.int64)
            checks = [*safe, *(r for r in complete if r not in safe)]
        for rule in checks:  # those that could fail come last, and see only what the others leave
            columns = {k: v[at] for k, v in state.items()}
            columns[name(parameter)] = values[code]
            kept = np.broadcast_to(Columns(self._limits, columns).truth(rule), at.shape)
            at, code = at[kept], code[kept]
        return at, code

    def _parts(self, tree: Node, assigned: set[str]) -> list[Node]:
        """The largest parts of a constraint that are known now and can be computed for every point."""
        if not tree.names & assigned:
            return []
        if tree.names <= assigned and (tree.op == "name" or self._limits.safe(tree)):
            return [tree]
        return [part for a in tree.nodes for part in self._parts(a, assigned)]

    def _counted(self, grown: Sequence[tuple[Ints, Ints, Ints, int]]) -> list[Layer]:
        """From right to left: the completions of each node; edges without any go."""
        completions = np.ones(1, self.dtype)
        layers = []
        for parameter, (at, code, target, nodes) in zip(reversed(self.order), reversed(grown), strict=True):
            weight = completions[target]
            if not weight.all():
                kept = weight != 0
                at, code, target, weight = at[kept], code[kept], target[kept], weight[kept]
            before = np.concatenate([np.zeros(1, self.dtype), np.cumsum(weight, dtype=self.dtype)])
            start = np.searchsorted(at, np.arange(nodes + 1))
            completions = before[start[1:]] - before[start[:-1]]
            layers.append(Layer(parameter, start, code, target, before))
        return layers[::-1]

    # asking -----------------------------------------------------------------------------------------

    def points(self, numbers: Ints) -> dict[str, Ints]:
        """The points with these numbers: for each parameter the positions of its values."""
        node, rest = np.zeros(len(numbers), np.int64), np.asarray(numbers, self.dtype)
        out = {}
        for layer in self.layers:
            base = layer.before[layer.start[node]]
            edge = np.searchsorted(layer.before, base + rest, side="right") - 1
            rest = rest - (layer.before[edge] - base)
            node = layer.target[edge]
            out[layer.name] = layer.code[edge]
        return out

    def numbers(self, codes: Mapping[str, Ints]) -> Ints:
        """The numbers of points, -1 for those that are not valid."""
        n = len(next(iter(codes.values())))
        node, number, valid = np.zeros(n, np.int64), np.zeros(n, self.dtype), np.ones(n, bool)
        for layer in self.layers:
            width = max(1, len(self._domains[layer.name].values))
            at = np.repeat(np.arange(len(layer.start) - 1), np.diff(layer.start))
            keys = at * width + layer.code
            wanted = node * width + codes[layer.name]
            edge = np.searchsorted(keys, wanted)
            found = edge < len(keys)
            edge = np.where(found, edge, 0)
            valid &= found & (codes[layer.name] >= 0)
            if len(keys):
                valid &= keys[edge] == wanted
                number = number + (layer.before[edge] - layer.before[layer.start[node]])
                node = np.where(valid, layer.target[edge], 0)
        return np.where(valid, number, -1)

    def all(self) -> dict[str, Ints]:
        """Every point, in the order of their numbers."""
        node = np.zeros(1, np.int64)
        out = {}
        for layer in self.layers:
            first, degree = layer.start[node], layer.start[node + 1] - layer.start[node]
            offset = np.cumsum(degree) - degree
            edge = np.arange(int(degree.sum())) - np.repeat(offset - first, degree)
            weight = (layer.before[edge + 1] - layer.before[edge]).astype(np.int64)
            out[layer.name] = np.repeat(layer.code[edge].astype(_small(len(self._domains[layer.name].values))), weight)
            node = layer.target[edge]
        return out


def _small(size: int) -> Any:
    return np.uint8 if size <= 256 else np.uint16 if size <= 65536 else np.int64


def ordered(domains: Mapping[str, Domain], rules: Sequence[Node]) -> list[str]:
    """Which parameter comes when: constraint by constraint, first those with the fewest combinations that are new."""
    sizes = {n: max(1, len(d.values)) for n, d in domains.items()}
    needs = {n: (d.chosen.names if d.chosen is not None else frozenset()) for n, d in domains.items()}
    scopes = [r.names for r in rules if r.names]
    out: list[str] = []

    def place(parameter: str) -> None:
        if parameter in out:
            return
        for needed in sorted(needs[parameter], key=list(domains).index):
            place(needed)
        out.append(parameter)

    def cost(scope: frozenset[str]) -> tuple[int, float]:
        new = [sizes[n] for n in scope if n not in out]
        return (0 if not out or len(new) < len(scope) else 1, prod(new))

    while scopes:
        best = min(scopes, key=cost)
        shared = {n: sum(n in s for s in scopes) for n in best}
        for parameter in sorted(best, key=lambda n: (shared[n], list(domains).index(n))):
            place(parameter)
        scopes = [s for s in scopes if not s <= set(out)]
    for parameter in domains:
        place(parameter)
    return out
