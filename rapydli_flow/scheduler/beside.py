"""Pointwise nodes of one kind side by side: for cards, where one kernel does many of them.

    before:  c1  conv  c2  conv  dw2  u2  dw1  u1        casts of weights, and updates by their gradients
    after:   c1  c2  conv  conv  dw2  dw1  u2  u1

An update that takes the memory of what it replaces waits for others, and so does its gradient, in memory: until
``most`` elements wait, or somebody reads a new value. What is computed of parameters alone comes with the first of its
kind. All else keeps its order, collectives among it. Whether kernels may really be one is told by what they touch, in
the memory that is planned for this order.
"""

from __future__ import annotations

from collections.abc import Hashable

from ..graph import Graph, parts, rewrite
from ..ops import Leaf
from .early import movable
from .homes import homes
from .together import MOST, Step, together


def side_by_side(graph: Graph, *, most: int = MOST) -> Graph:
    """The same rank graph in another order."""
    for order_of in (_with_the_first, _updates_late):
        order = order_of(graph, most)
        if order != sorted(order):
            graph = rewrite(graph, order=order)
    return graph


def _kind(graph: Graph, i: int) -> Hashable | None:
    """Equal for nodes that one kernel may do; None for those that go alone."""
    node = graph.nodes[i]
    if isinstance(node.op, Leaf):
        return None
    specs = [graph.spec(v) for v in node.inputs]
    anchor, _, _ = parts(node.op, specs)
    same = all(spec.shape in ((), node.specs[0].shape) for spec in specs)
    if anchor.family != "pointwise" or anchor.indexed or not same:
        return None
    return node.op, tuple((spec.dtype, spec.shape == ()) for spec in (*specs, *node.specs))


def _with_the_first(graph: Graph, most: int) -> list[int]:
    """Numbers of nodes: those that read parameters alone come with the first one of their kind."""
    given = {leaf.node for leaf in graph.leaves("param", "state")}
    kinds: dict[Hashable, list[int]] = {}
    for i, node in enumerate(graph.nodes):
        if node.inputs and all(j in given for j, _ in node.inputs) and node.specs[0].size < most:
            kind = _kind(graph, i)
            if kind is not None:
                kinds.setdefault(kind, []).append(i)
    begins: dict[int, list[int]] = {}  # of a group: its nodes
    for members in kinds.values():
        group: list[int] = []
        size = 0
        for i in members:
            group.append(i)
            size += graph.nodes[i].specs[0].size
            if size >= most or i == members[-1]:
                begins[group[0]] = group
                group, size = [], 0
    leaves = [i for i, node in enumerate(graph.nodes) if isinstance(node.op, Leaf)]
    order: dict[int, None] = dict.fromkeys(leaves)
    for i in range(len(graph.nodes)):
        order |= dict.fromkeys(begins.get(i, [i]))
    return list(order)


def _updates_late(graph: Graph, most: int) -> list[int]:
    """Numbers of nodes: updates in place wait for others of their kind."""
    late, home = movable(graph), homes(graph)
    steps: list[Step] = []
    values: list[int] = []  # for each node, the number of its first output
    for i, node in enumerate(graph.nodes):
        values.append(values[-1] + len(graph.nodes[i - 1].specs) if i else 0)
        waits = i in late and (i, 0) in home and node.specs[0].size < most
        reads = tuple((values[j] + k, values[j] + k + 1) for j, k in node.inputs)
        made = (values[i], values[i] + len(node.specs))
        steps.append(Step(_kind(graph, i) if waits else None, reads, (made,), node.specs[0].size))
    return [i for group in together(steps, most=most) for i in group]
