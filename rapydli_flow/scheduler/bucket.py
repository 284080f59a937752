"""Bucket collectives: all-reduces that could go at the same time become one.

    before:  g1/sum  w1' <- g1/sum  g2/sum  w2' <- g2/sum
    after:   bucket(g1, g2, ...)  w1' <- bucket.y0  w2' <- bucket.y1

Each all-reduce is put off until something on some rank reads one; then all of the same ranks whose parts are there go
together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ..graph import Graph, Node, Tensor, Value
from .collective import AllReduce
from .meetings import Step, side_by_side


def bucket(graphs: Sequence[Graph]) -> tuple[Graph, ...]:
    """The same rank graphs with fewer all-reduces."""
    return _Bucket(graphs).run()


class _Bucket:
    def __init__(self, graphs: Sequence[Graph]) -> None:
        self.graphs = graphs
        self.new = tuple(Graph(counts=dict(graph.counts)) for graph in graphs)
        self.to: list[dict[Value, Tensor]] = [{} for _ in graphs]
        self.steps = list(side_by_side(graphs))
        self.waiting = [step for step in self.steps if isinstance(self.one(step).op, AllReduce)]

    def run(self) -> tuple[Graph, ...]:
        for step in self.steps:
            nodes = {rank: self.graphs[rank].nodes[i] for rank, i in step.items()}
            for rank, node in nodes.items():
                while missing := [v for v in node.inputs if v not in self.to[rank]]:
                    self.flush(next(w for w in self.waiting if w.get(rank) == missing[0][0]))
            if isinstance(self.one(step).op, AllReduce):
                continue
            for rank, node in nodes.items():
                xs = [self.to[rank][v] for v in node.inputs]
                self.new[rank].where = node.where
                self.keep(
                    rank,
                    [(step[rank], k) for k in range(len(node.specs))],
                    self.new[rank].copy(self.graphs[rank], node, xs),
                )
        while self.waiting:
            self.flush(self.waiting[0])
        for graph, new, to in zip(self.graphs, self.new, self.to, strict=True):
            new.where = None
            new.outputs = {k: to[v].id for k, v in graph.outputs.items()}
            new.updates = {k: to[v].id for k, v in graph.updates.items()}
        return self.new

    def flush(self, wanted: Step) -> None:
        """Emit the all-reduce that is wanted, with those of the same ranks and dtype whose parts are there."""
        first = self.one(wanted)
        together = [w for w in self.waiting if self.alike(self.one(w), first) and self.ready(w)]
        self.waiting = [w for w in self.waiting if w not in together]
        more = sum(len(self.one(w).specs) for w in together) - len(first.specs)
        title = self.one(together[0]).name if not more else f"{self.one(together[0]).name}/and_{more}_more"
        for rank in wanted:
            nodes = [self.graphs[rank].nodes[w[rank]] for w in together]
            values = [(w[rank], k) for w, node in zip(together, nodes, strict=True) for k in range(len(node.specs))]
            xs = [self.to[rank][v] for node in nodes for v in node.inputs]
            op: Any = nodes[0].op
            self.new[rank].where = ""
            self.keep(rank, values, self.new[rank].add(replace(op, parts=len(xs)), xs, title))

    def one(self, step: Step) -> Node:
        """The node of the first rank."""
        rank, i = next(iter(step.items()))
        return self.graphs[rank].nodes[i]

    def ready(self, step: Step) -> bool:
        return all(v in self.to[rank] for rank, i in step.items() for v in self.graphs[rank].nodes[i].inputs)

    @staticmethod
    def alike(a: Node, b: Node) -> bool:
        keys = [(getattr(node.op, "ranks", ()), node.specs[0].dtype) for node in (a, b)]
        return keys[0] == keys[1]

    def keep(self, rank: int, values: Sequence[Value], made: Any) -> None:
        for value, y in zip(values, made if isinstance(made, tuple) else (made,), strict=True):
            self.to[rank][value] = y
