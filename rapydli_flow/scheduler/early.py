"""Early updates: a parameter is replaced as soon as its gradient is there and nothing reads the old one any more.

    before:  g2  dy1  g1  w1', m1' <- g1  w2', m2' <- g2        all gradients are kept to the end
    after:   g2  dy1  w2', m2' <- g2  g1  w1', m1' <- g1        each is there for a moment, and still in the cache

An update takes the memory of what it replaces, so to run it early takes none. Single numbers that only depend on
such, as the rate of a step, come early as well. Collectives keep their order, and all ranks' nodes the same.
"""

from __future__ import annotations

from collections import deque

from ..graph import Graph, Node, Value, rewrite
from ..ops import Leaf
from .collective import Wait
from .homes import homes, owners


def update_early(graph: Graph) -> Graph:
    """The same rank graph in another order."""
    return rewrite(graph, order=_Order(graph).run())


def movable(graph: Graph) -> dict[int, set[int]]:
    """The nodes that take no memory wherever they run, each with those that must run before."""
    home, readers = homes(graph), _readers(graph)
    found: dict[int, set[int]] = {}
    for i, node in enumerate(graph.nodes):
        if node.op.collective or isinstance(node.op, Leaf | Wait):
            continue
        old = [home[i, k] for k in range(len(node.specs)) if (i, k) in home]
        at_home = len(old) == len(node.specs) and _in_place(graph, node, old)
        if at_home or all(spec.shape == () for spec in (*node.specs, *map(graph.spec, node.inputs))):
            others = (readers.get(leaf, set()) for leaf in old)
            found[i] = {j for j, _ in node.inputs}.union(*others) - {i}
    return found


def _readers(graph: Graph) -> dict[Value, set[int]]:
    """The nodes that read a value, or a view of it."""
    owner = owners(graph, {})
    readers: dict[Value, set[int]] = {}
    for i, node in enumerate(graph.nodes):
        for v in node.inputs:
            readers.setdefault(owner.get(v, v), set()).add(i)
    return readers


def _in_place(graph: Graph, node: Node, old: list[Value]) -> bool:
    """Can each output be written where that lies which it replaces?"""
    index = node.op.indexing(*map(graph.spec, node.inputs))
    places = ((j, k) for k, leaf in enumerate(old) for j, v in enumerate(node.inputs) if v == leaf)
    return all(index.in_place(j, k) for j, k in places)


class _Order:
    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.order: list[int] = []
        self.done: set[int] = set()
        self.missing: dict[int, set[int]] = {}  # for each node that may run early, what has to come before it
        self.waiting: dict[int, list[int]] = {}  # for each node, those that it is missing for
        for i, needs in movable(graph).items():
            self.missing[i] = needs
            for j in needs:
                self.waiting.setdefault(j, []).append(i)

    def run(self) -> list[int]:
        """Numbers of nodes: leaves, then the others as they come, each followed by those that need nothing more."""
        leaves = [i for i, node in enumerate(self.graph.nodes) if isinstance(node.op, Leaf)]
        first = [i for i, needs in self.missing.items() if not needs]
        for i in (*leaves, *first, *range(len(self.graph.nodes))):
            self.place(i)
        return self.order

    def place(self, first: int) -> None:
        """Place a node, and those that waited for it alone."""
        todo = deque([first])
        while todo:
            i = todo.popleft()
            if i in self.done:
                continue
            self.done.add(i)
            self.order.append(i)
            for j in self.waiting.get(i, ()):
                self.missing[j].discard(i)
                if not self.missing[j]:
                    todo.append(j)
