"""Layered layout: where the boxes and frames of a picture stand, and the lines between them. Geometry only.

A frame is a graph of its own, whose values enter and leave through ports on its edges, so that a line
crosses no box. Positions of a frame's items are from its top left corner; sizes are in pixels.

    layers    longest path from the inputs; a line that passes layers has a vertex (a bend) in each
    order     sweeps of barycentres; the order with the fewest crossings wins (Sugiyama 1981)
    x         vertices in a chain share one x, which is what makes lines straight (Brandes, Koepf 2001)

The longest frames of real networks have some hundred vertices, so nothing here is cleverer than quadratic.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

BOX_H, GAP, SEP, PAD, HEAD, BEND = 40.0, 24.0, 20.0, 12.0, 26.0, 8.0
Reads = Mapping[int, Sequence[int]]
Point = tuple[float, float]


@dataclass
class Box:
    """One op (or, compact, one layer): what is written on it."""

    nodes: tuple[int, ...]
    title: str
    detail: str = ""
    parameters: int = 0
    kind: str = ""
    tip: str = ""
    w: float = 0.0
    h: float = BOX_H

    def port(self, source: int, leaving: bool) -> float:
        """Where, from the middle, the value of a node enters or leaves."""
        return 0.0


@dataclass
class Route:
    """A line: vertical pieces, joined by curves. It has a head where it ends at a box."""

    points: list[Point]
    head: bool


@dataclass
class Frame:
    """Items that are laid out together; drawn with a border if it has a name."""

    name: str
    items: list[Box | Frame]
    x: list[float] = field(default_factory=list)
    y: list[float] = field(default_factory=list)
    layers: list[int] = field(default_factory=list)
    routes: list[Route] = field(default_factory=list)
    ports: dict[tuple[int, bool], float] = field(default_factory=dict)
    w: float = 0.0
    h: float = 0.0

    @property
    def nodes(self) -> tuple[int, ...]:
        return tuple(i for item in self.items for i in item.nodes)

    def port(self, source: int, leaving: bool) -> float:
        return self.ports.get((source, leaving), self.w / 2) - self.w / 2


Item = Box | Frame


@dataclass
class _Edge:
    """From vertex ``a`` to ``b``; where it touches them, from their middles."""

    a: int
    b: int
    out: float
    into: float


class _Layered:
    """The layered layout of one frame. Vertices: its items, ports for values that enter, and that leave, bends."""

    def __init__(self, frame: Frame, reads: Reads, layers: Sequence[int] | None) -> None:
        self.frame, items = frame, frame.items
        owner = {i: k for k, item in enumerate(items) for i in item.nodes}
        inner = [(p, k) for k, item in enumerate(items) for p in _sources(item, reads)]
        entering = list(dict.fromkeys(p for p, _ in inner if p not in owner))
        leaving = sorted({p for i, ps in reads.items() if i not in owner for p in ps if p in owner})
        self.widths = [item.w for item in items] + [BEND] * (len(entering) + len(leaving))
        n, m = len(items), len(items) + len(entering)
        self.doors = [(p, False) for p in entering] + [(p, True) for p in leaving]
        gate = {p: n + j for j, p in enumerate(entering)}
        self.edges: list[_Edge] = []
        for p, k in inner:
            if p in owner:
                a = owner[p]
                self.edges.append(_Edge(a, k, items[a].port(p, True), items[k].port(p, False)))
            else:
                self.edges.append(_Edge(gate[p], k, 0.0, items[k].port(p, False)))
        for j, p in enumerate(leaving):
            self.edges.append(_Edge(owner[p], m + j, items[owner[p]].port(p, True), 0.0))
        self.head = 1 if entering else 0
        self.layer = list(layers) if layers is not None else self._longest(n)
        self.layer += [0] * len(entering)
        self.count = max(self.layer, default=-1) + 1
        self.layer += [self.count] * len(leaving)
        self.foot = 1 if leaving else 0
        self.edges = [e for e in self.edges if self.layer[e.a] < self.layer[e.b]]
        self.real, self.exits = len(self.layer), len(leaving)
        self.chains = [self._bends(e) for e in self.edges]
        self.above: list[list[_Edge]] = [[] for _ in self.layer]
        self.below: list[list[_Edge]] = [[] for _ in self.layer]
        for edge in (e for chain in self.chains for e in chain):
            self.above[edge.b].append(edge)
            self.below[edge.a].append(edge)

    def _longest(self, n: int) -> list[int]:
        """Longest path from the inputs; an item that reads nothing stands right above what reads it."""
        inner = [e for e in self.edges if e.a < n and e.b < n]
        layer = [self.head] * n
        for e in sorted(inner, key=lambda e: e.b):  # items are in topological order
            layer[e.b] = max(layer[e.b], layer[e.a] + 1)
        for k in reversed(range(n)):
            readers = [layer[e.b] for e in inner if e.a == k]
            if readers and not any(e.b == k for e in self.edges):
                layer[k] = min(readers) - 1
        return layer

    def _bends(self, edge: _Edge) -> list[_Edge]:
        chain, a, out = [], edge.a, edge.out
        for layer in range(self.layer[edge.a] + 1, self.layer[edge.b]):
            self.layer.append(layer)
            self.widths.append(BEND)
            chain.append(_Edge(a, len(self.layer) - 1, out, 0.0))
            a, out = len(self.layer) - 1, 0.0
        return [*chain, _Edge(a, edge.b, out, edge.into)]

    def order(self) -> list[list[int]]:
        """The vertices of each layer from left to right."""
        rows: list[list[int]] = [[] for _ in range(self.count + self.foot)]
        for v, layer in enumerate(self.layer):
            rows[layer].append(v)
        best, fewest = rows, self._crossings(rows)
        for sweep in range(8):
            down = sweep % 2 == 0
            rows = [list(row) for row in rows]
            for row in rows if down else rows[::-1]:
                at = {v: i for other in rows for i, v in enumerate(other)}
                around = self.above if down else self.below
                middle = {}
                for v in row:
                    near = [at[e.a if down else e.b] for e in around[v]]
                    middle[v] = sum(near) / len(near) if near else at[v]
                row.sort(key=lambda v: middle[v])
            crossings = self._crossings(rows)
            if crossings < fewest:
                best, fewest = rows, crossings
        return best

    def _crossings(self, rows: list[list[int]]) -> int:
        at = {v: i for row in rows for i, v in enumerate(row)}
        total = 0
        for row in rows:
            ends = sorted((at[e.a], at[e.b]) for v in row for e in self.below[v])
            total += sum(b > d for i, (a, b) in enumerate(ends) for c, d in ends[i + 1 :] if a < c)
        return total

    def place(self, heights: Sequence[float] | None = None) -> Frame:
        """Coordinates of everything. ``heights``: of the layers, where they are shared with other columns."""
        rows, frame = self.order(), self.frame
        x = self._across(rows)
        n = len(frame.items)
        frame.w = max((x[v] + self.widths[v] / 2 for v in range(len(x))), default=0.0)
        if frame.name:
            least = max(frame.w, 6.4 * len(frame.name)) + 2 * PAD
            x = [v + (least - frame.w) / 2 for v in x]
            frame.w = least
        tall = [max([frame.items[v].h for v in row if v < n], default=0.0) for row in rows]
        if heights is not None:
            tall = list(heights)
            rows += [[]] * (len(tall) - len(rows))
        top, y = [], HEAD if frame.name and not self.head else 0.0
        for layer, height in enumerate(tall):
            top.append(y)
            moves = [abs(x[e.a] + e.out - x[e.b] - e.into) for v in rows[layer] for e in self.below[v]]
            move = max(moves, default=0.0)
            gap = 2 * GAP if heights is not None else GAP + min(36.0, 0.12 * move)
            if layer == len(tall) - 1:
                gap = PAD if frame.name and not self.foot else 0.0
            elif (layer == 0 and self.head) or (layer == len(tall) - 2 and self.foot):
                least = (HEAD if layer == 0 and self.head else PAD) if frame.name else 0.0
                gap = max(least, gap - GAP / 2 if move > 0.5 else 0.0)
            y += height + gap
        frame.h = y
        frame.layers = self.layer[:n]
        frame.x = [x[k] - item.w / 2 for k, item in enumerate(frame.items)]
        frame.y = [top[self.layer[k]] + (tall[self.layer[k]] - item.h) / 2 for k, item in enumerate(frame.items)]
        frame.ports = {door: x[n + j] for j, door in enumerate(self.doors)}
        frame.routes = [self._route(chain, x, top, tall) for chain in self.chains]
        return frame

    def _route(self, chain: list[_Edge], x: list[float], top: list[float], tall: list[float]) -> Route:
        def span(v: int) -> tuple[float, float]:
            if v < len(self.frame.items):
                return self.frame.y[v], self.frame.y[v] + self.frame.items[v].h
            return top[self.layer[v]], top[self.layer[v]] + tall[self.layer[v]]

        points: list[Point] = []
        for e in chain:
            start, end = x[e.a] + e.out, x[e.b] + e.into
            a, b = self.layer[e.a], self.layer[e.b]
            points += [(start, span(e.a)[1]), (start, top[a] + tall[a]), (end, top[b]), (end, span(e.b)[0])]
        last = chain[-1].b
        return Route(points, last < len(self.frame.items) and isinstance(self.frame.items[last], Box))

    def _across(self, rows: list[list[int]]) -> list[float]:
        """x of the middle of each vertex: chains as far left as they go, and as far right; then the mean."""
        root, shift = self._chains_of(rows)
        pairs = [(u, v, (self.widths[u] + self.widths[v]) / 2 + SEP) for row in rows for u, v in pairwise(row)]
        size = len(self.layer)
        left = [0.0] * size
        for v in range(size):
            left[root[v]] = max(left[root[v]], self.widths[v] / 2 - shift[v])
        _settle(pairs, root, shift, left, 1.0)
        width = max((left[root[v]] + shift[v] + self.widths[v] / 2 for v in range(size)), default=0.0)
        right = [width] * size
        for v in range(size):
            right[root[v]] = min(right[root[v]], width - self.widths[v] / 2 - shift[v])
        _settle(pairs, root, shift, right, -1.0)
        return [(left[root[v]] + right[root[v]]) / 2 + shift[v] for v in range(size)]

    def _chains_of(self, rows: list[list[int]]) -> tuple[list[int], list[float]]:
        """Vertices that share one x: the first of each one's chain, and how far right of it the vertex stands."""
        root, shift = list(range(len(self.layer))), [0.0] * len(self.layer)
        at = {v: i for row in rows for i, v in enumerate(row)}
        reach = [0] * len(self.layer)  # items below that a vertex leads to: the main line goes straight
        past = range(self.real - self.exits, self.real)  # outside of the frame it goes on
        for v in (v for row in rows[::-1] for v in row):
            reach[v] = max((reach[e.b] + (e.b < self.real) for e in self.below[v]), default=2 * (v in past))

        def rank(e: _Edge) -> tuple[int, int]:
            """Bends together first, then items together; of those the ones that lead furthest."""
            items = (e.a < self.real) + (e.b < self.real)
            return (0, 2, 1).index(items), -reach[e.b]

        for row in rows:
            kept: list[_Edge] = []
            for e in sorted((e for v in row for e in self.below[v]), key=rank):
                if all((at[e.a] - at[k.a]) * (at[e.b] - at[k.b]) > 0 for k in kept):
                    kept.append(e)
                    root[e.b], shift[e.b] = root[e.a], shift[e.a] + e.out - e.into
        return root, shift


def _settle(
    pairs: list[tuple[int, int, float]], root: list[int], shift: list[float], x: list[float], way: float
) -> None:
    """Move chains right (way 1) or left (way -1) until neighbours are as far apart as they must be."""
    moved = True
    while moved:
        moved = False
        for u, v, apart in pairs:
            over = x[root[u]] + shift[u] + apart - x[root[v]] - shift[v]
            if over > 1e-6:
                x[root[v] if way > 0 else root[u]] += way * over
                moved = True


def _sources(item: Item, reads: Reads) -> list[int]:
    """The nodes outside of an item that it reads."""
    inside = set(item.nodes)
    return list(dict.fromkeys(p for i in item.nodes for p in reads.get(i, ()) if p not in inside))


def arrange(
    name: str,
    items: list[Item],
    reads: Reads,
    *,
    layers: Sequence[int] | None = None,
    heights: Sequence[float] | None = None,
) -> Frame:
    """Lay out items, in topological order, that read each other's nodes. No name, no border.

    ``layers``: of each item, instead of the longest path; lines
    that would not go down are left out. ``heights``: of the layers, shared with other columns.
    """
    return _Layered(Frame(name, items), reads, layers).place(heights)
