"""Bucket collectives: all-reduces that could go at the same time become one.

    before:  g1/sum  w1' <- g1/sum  g2/sum  w2' <- g2/sum
    after:   bucket(g1, g2, ...)  w1' <- bucket.y0  w2' <- bucket.y1

Each all-reduce is put off until something reads one; then all whose parts are there go together.
"""

from __future__ import annotations

from ..graph import Graph, Tensor, Value
from .collective import AllReduce


def bucket(graph: Graph) -> Graph:
    """The same rank graph with fewer all-reduces; every rank's graph is changed alike."""
    return _Bucket(graph).run()


class _Bucket:
    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.new = Graph(counts=dict(graph.counts))
        self.to: dict[Value, Tensor] = {}
        self.waiting = [(i, node) for i, node in enumerate(graph.nodes) if isinstance(node.op, AllReduce)]

    def run(self) -> Graph:
        graph, new = self.graph, self.new
        for i, node in enumerate(graph.nodes):
            if isinstance(node.op, AllReduce):
                continue
            while any(v not in self.to for v in node.inputs):
                self.flush()
            made = new.add(node.op, [self.to[v] for v in node.inputs], node.name, node.at)
            for k, y in enumerate(made if isinstance(made, tuple) else (made,)):
                self.to[i, k] = y
        while self.waiting:
            self.flush()
        new.outputs = {k: self.to[v].id for k, v in graph.outputs.items()}
        new.updates = {k: self.to[v].id for k, v in graph.updates.items()}
        return new

    def flush(self) -> None:
        """Emit what is ready: one all-reduce for each dtype."""
        ready = [(i, node) for i, node in self.waiting if all(v in self.to for v in node.inputs)]
        self.waiting = [item for item in self.waiting if item not in ready]
        for dtype in sorted({node.specs[0].dtype for _, node in ready}):
            group = [(i, node) for i, node in ready if node.specs[0].dtype == dtype]
            values = [(i, k) for i, node in group for k in range(len(node.specs))]
            inputs = [self.to[v] for _, node in group for v in node.inputs]
            name = group[0][1].name if len(values) == 1 else f"{group[0][1].name}/and_{len(values) - 1}_more"
            made = self.new.add(AllReduce(parts=len(inputs)), inputs, name)
            for value, y in zip(values, made if isinstance(made, tuple) else (made,), strict=True):
                self.to[value] = y
