"""Recomputation: less memory for more arithmetic.

    forward    c = conv(x)     r = relu(normalize(c))   z = conv(r)  ...
    backward                                                          r' = relu(normalize(again(c)))   uses of r'

The backward pass reads r long after it was made, so it would be kept until then. c is kept in any case, for the
gradient of the normalisation; so r is made a second time, shortly before it is needed, and its memory is free between.

Only pointwise operators are made again, for they cost little, and only of values that are kept in any case. Random
ones give the same numbers: those are a function of seed, step and element.
Source of the method: Chen et al., "Training deep nets with sublinear memory cost" (2016).
"""

from __future__ import annotations

from ..errors import GraphError
from ..ops import Again, Leaf, Pointwise
from .graph import Graph, Node, Tensor, Value

SMALL = 1 << 14  # elements: values no larger are kept and not counted


def remat(graph: Graph) -> Graph:
    """A training step that makes pointwise results of the forward pass again in the backward pass.

    It computes the same bits. GraphError for a graph that is no training step.
    """
    if graph.network is None:
        raise GraphError("remat: this graph has no backward pass; give it the result of rf.train_step.")
    return _Remat(graph).run()


class _Remat:
    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.read_late = {v for node in graph.nodes if _late(node) for v in node.inputs}
        self.again = self._cheap()
        self.new = Graph(counts=dict(graph.counts), network=graph.network, where="")
        self.to: dict[Value, Tensor] = {}
        self.made: dict[Value, Tensor] = {}

    def _cheap(self) -> set[int]:
        """Nodes of the forward pass that can be made again of what is kept."""
        found: set[int] = set()
        for i, node in enumerate(self.graph.nodes):
            single = isinstance(node.op, Pointwise) and len(node.specs) == 1 and node.specs[0].size > SMALL
            if single and not _late(node) and all(self._there(v, found) for v in node.inputs):
                found.add(i)
        return found

    def _there(self, value: Value, found: set[int]) -> bool:
        """Is a value kept in any case, or on the way from what is? What is made again itself does not count: a chain of
        residual sums would go back to the first layer, and hold all of it until it is needed there."""
        if self.graph.spec(value).size <= SMALL or isinstance(self.graph.nodes[value[0]].op, Leaf):
            return True
        return (value in self.read_late) != (value[0] in found)

    def run(self) -> Graph:
        graph, new = self.graph, self.new
        for i, node in enumerate(graph.nodes):
            new.where = node.where
            inputs = tuple(self.later(v) if _late(node) else self.to[v] for v in node.inputs)
            made = new.copy(graph, node, inputs)
            for k, y in enumerate(made if isinstance(made, tuple) else (made,)):
                self.to[i, k] = y
        new.where = None
        new.outputs = {k: self.to[v].id for k, v in graph.outputs.items()}
        new.updates = {k: self.to[v].id for k, v in graph.updates.items()}
        new.gradients = {k: self.to[v].id for k, v in graph.gradients.items()}
        new.like = {self.to[a].id: self.to[b].id for a, b in graph.like.items()}
        return new

    def later(self, value: Value) -> Tensor:
        """What the backward pass reads in place of a value."""
        if value[0] not in self.again:
            return self.to[value]
        if value not in self.made:
            node = self.graph.nodes[value[0]]
            inputs = [self.later(v) if v[0] in self.again else self._kept(v) for v in node.inputs]
            self.made[value] = self.new.add(node.op, inputs, f"{node.name}/again", node.at)
        return self.made[value]

    def _kept(self, value: Value) -> Tensor:
        """A kept value, marked, so that equal nodes are not merged with those of the forward pass."""
        if self.graph.spec(value).size <= SMALL:
            return self.to[value]
        if value not in self.made:
            self.made[value] = self.new.add(Again(), (self.to[value],), f"{self.graph.nodes[value[0]].name}/kept")
        return self.made[value]


def _late(node: Node) -> bool:
    """Is this a node of the backward pass?"""
    return node.name.startswith("grad/")
