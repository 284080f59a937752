"""Which layer of a network, and which phase of its training step, a kernel of the step belongs to.

    forward    what the outputs (loss, metrics, predictions) are computed from
    backward   what else the gradients of parameters are computed from
    update     all the rest: optimizer, learning rate, running statistics

A layer is a scope of the network, such as 'conv_1', or an op outside of any. A gradient belongs to the layer of the
node that it is the gradient of, an update to the layer of its parameter. A kernel with a pointwise tail belongs where
its anchor does: that is where its time goes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..graph import Fused, Graph
from ..ops import Leaf

FORWARD, BACKWARD, UPDATE = "forward", "backward", "update"
PHASES = (FORWARD, BACKWARD, UPDATE)
GRADIENT = "grad/"  # the scope of gradients: grad/<node>/<op>
SHARED = "(all)"  # the layer of an update that belongs to no single one, such as the learning rate's


@dataclass(frozen=True)
class Place:
    """Where a kernel belongs."""

    layer: str
    phase: str


def places(graph: Graph, rank_graph: Graph) -> dict[str, Place]:
    """The place of each node of the graph that runs, by name. ``graph``: the same before tails were fused."""
    graph_of = _Attribution(graph)
    return {node.name: graph_of.place(graph_of.anchor(node.name, node.op)) for node in rank_graph}


def copied(name: str, graph: Graph) -> Place:
    """The place of a copy at the end of a step, 'conv_1/w/copy' or 'conv_1/w/old/copy'."""
    leaf = name.removesuffix("/copy").removesuffix("/old")
    return Place(_scope(leaf) if leaf in graph else SHARED, UPDATE)


class _Attribution:
    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.forward = self._behind(v[0] for v in graph.outputs.values())
        self.backward = self._behind(v[0] for v in graph.gradients.values()) - self.forward
        self.updated: dict[int, set[str]] = {}
        for name, value in graph.updates.items():
            for i in self._behind([value[0]], within=self.forward | self.backward):
                self.updated.setdefault(i, set()).add(_scope(self._parameter(name)))

    def _behind(self, last: Iterable[int], within: frozenset[int] | set[int] = frozenset()) -> set[int]:
        """Nodes that these are computed from, and they themselves; not those of ``within``, nor what lies behind."""
        found: set[int] = set()
        todo = list(last)
        while todo:
            i = todo.pop()
            if i not in found and i not in within:
                found.add(i)
                todo += [j for j, _ in self.graph.nodes[i].inputs]
        return found

    def _parameter(self, name: str) -> str:
        """The parameter that a leaf belongs to: 'conv_1/w' of 'conv_1/w/momentum'."""
        owners = [leaf.name for leaf in self.graph.leaves("param") if name.startswith(f"{leaf.name}/")]
        return max(owners, key=len, default=name)

    def anchor(self, name: str, op: object) -> int:
        """The node, before fusion, whose loops a kernel runs: back from the end of its tail."""
        i = self.graph.find(name).node
        for _, slots in reversed(op.tail if isinstance(op, Fused) else ()):
            i = self.graph.nodes[i].inputs[slots.index(-1)][0]
        return i

    def place(self, i: int) -> Place:
        name = self.graph.nodes[i].name
        if i in self.forward or isinstance(self.graph.nodes[i].op, Leaf):
            return Place(_scope(name), FORWARD)
        if i in self.backward:
            of = self._differentiated(name)
            return Place(_scope(of) if of else SHARED, BACKWARD)
        layers = self.updated.get(i, set())
        return Place(next(iter(layers)) if len(layers) == 1 else SHARED, UPDATE)

    def _differentiated(self, name: str) -> str:
        """The node that a node of the gradient was made for; '' of the loss's own, which is 1."""
        inside = name.removeprefix(GRADIENT)
        while "/" in inside:
            inside = inside.rpartition("/")[0]
            if inside in self.graph:
                return inside
        return ""


def _scope(name: str) -> str:
    return name.rpartition("/")[0] or name
