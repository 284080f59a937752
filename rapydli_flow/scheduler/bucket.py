"""Bucket collectives: those of one kind that could go at the same time become one.

    before:  g1/sum  w1' <- g1/sum  g2/sum  w2' <- g2/sum
    after:   bucket(g1, g2, ...)  w1' <- bucket.y0  w2' <- bucket.y1

Each all-reduce is put off until something on some rank reads one; then all of the same ranks whose parts are there go
together. Sums that no other collective needs, those of gradients, may instead go behind the kernels that come next, as
soon as there are enough of them, and are waited for where they are read:

    behind:  ... g9 g8  bucket_1(g9, g8) g7 ... g2  bucket_2(g7, ..., g2)  g1  wait_1  w9' <- ...

Of a state that is divided over ranks, exchanges go together as well, as soon as there are enough of them: those that
add up a part of each gradient, so that the rest of it need not be kept; and those that gather parameters.

Source: Li et al., "PyTorch Distributed: experiences on accelerating data parallel training", 2020.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..graph import Graph, Node, Tensor, Value
from ..ops import Op
from .collective import AllReduce, Exchange, Wait
from .meetings import Step, side_by_side

LEAST_BYTES, MOST_BYTES, BUCKETS = 1 << 20, 25 << 20, 8  # of sums that go behind kernels


def bucket(graphs: Sequence[Graph], *, behind: bool = False, wire: str = "") -> tuple[Graph, ...]:
    """The same rank graphs with fewer collectives. ``behind``, and ``wire`` for float32: how sums of gradients go."""
    return _Bucket(graphs, behind, wire).run()


@dataclass(eq=False)
class _Waiting:
    """A collective that has not gone yet: its node on each rank, how it shall go, and how many operands it lacks."""

    nodes: Step
    op: AllReduce | Exchange
    dtype: str
    size_bytes: int
    lacks: int

    @property
    def kind(self) -> tuple[Any, ...]:
        """What is of one kind may go together."""
        if isinstance(self.op, Exchange):
            return self.op.ranks, self.dtype, self.op.sums
        return self.op.ranks, self.dtype, self.op.wire, self.op.behind

    @property
    def early(self) -> bool:
        """Does it go before it is needed?"""
        return isinstance(self.op, Exchange) or self.op.behind


class _Bucket:
    def __init__(self, graphs: Sequence[Graph], behind: bool, wire: str) -> None:
        self.graphs = graphs
        self.new = tuple(Graph(counts=dict(graph.counts)) for graph in graphs)
        self.to: list[dict[Value, Tensor]] = [{} for _ in graphs]
        self.coming: list[dict[Value, list[tuple[Value, Tensor]]]] = [{} for _ in graphs]  # by each of them, a bucket
        self.steps = list(side_by_side(graphs))
        self.waiting: list[_Waiting] = []
        self.put_off: dict[tuple[int, int], _Waiting] = {}  # by rank and node
        self.readers: dict[tuple[int, Value], list[_Waiting]] = {}
        needed = self.needed()
        self.updates = {(rank, v) for rank, graph in enumerate(graphs) for v in graph.updates.values()}
        for step in self.steps:
            node = self.one(step)
            if isinstance(node.op, AllReduce):
                last = node.name not in needed and any(spec.shape for spec in node.specs)
                rounded = wire if last and node.specs[0].dtype == "float32" else ""
                self.wait_for(step, replace(node.op, behind=behind and last, wire=rounded))
            elif isinstance(node.op, Exchange) and self.of_a_state(step):
                self.wait_for(step, node.op)
        total = sum(s.size_bytes for s in self.waiting if s.early)
        self.enough = min(MOST_BYTES, max(LEAST_BYTES, total // BUCKETS))
        self.ripe: list[_Waiting] = []  # those that may go at once

    def needed(self) -> set[str]:
        """Names of the all-reduces that other collectives need, on some rank."""
        found: set[str] = set()
        for graph in self.graphs:
            feeding: set[int] = set()
            for i in reversed(range(len(graph.nodes))):
                node = graph.nodes[i]
                if i in feeding:
                    found.add(node.name)
                if i in feeding or node.op.collective:
                    feeding.update(j for j, _ in node.inputs)
        return found

    def of_a_state(self, step: Step) -> bool:
        """Is an exchange, of all ranks, one that adds parts of a sum for each, or gives all a value of a leaf?"""
        op: Any = self.one(step).op
        if len(step) < len(self.graphs) or len(step) == 1:
            return False
        made = {(rank, (i, k)) for rank, i in step.items() for k in self.wanted(self.graphs[rank], i)}
        return op.sums or made <= self.updates

    def wanted(self, graph: Graph, i: int) -> range:
        """Numbers of the outputs of a collective that are something."""
        op = graph.nodes[i].op
        return range(len(op.wanted) if isinstance(op, Exchange) else len(graph.nodes[i].specs))

    def wait_for(self, step: Step, op: AllReduce | Exchange) -> None:
        """Put a collective off."""
        inputs = [(rank, v) for rank, i in step.items() for v in self.graphs[rank].nodes[i].inputs]
        specs = [self.graphs[rank].spec(v) for rank, v in inputs]
        size = sum(spec.size_bytes for spec in specs) // len(step)
        each = _Waiting(step, op, specs[0].dtype, size, len(inputs))
        self.waiting.append(each)
        self.put_off |= dict.fromkeys(step.items(), each)
        for key in inputs:
            self.readers.setdefault(key, []).append(each)

    def run(self) -> tuple[Graph, ...]:
        for step in self.steps:
            nodes = {rank: self.graphs[rank].nodes[i] for rank, i in step.items()}
            if next(iter(step.items())) in self.put_off:
                continue
            for rank, node in nodes.items():
                for v in node.inputs:
                    self.need(rank, v)
            for rank, node in nodes.items():
                xs = [self.to[rank][v] for v in node.inputs]
                self.new[rank].where = node.where
                made = self.new[rank].copy(self.graphs[rank], node, xs)
                for k, y in enumerate(made if isinstance(made, tuple) else (made,)):
                    self.keep(rank, (step[rank], k), y)
            if sum(s.size_bytes for s in self.ripe) >= self.enough:
                self.flush(self.ripe[0])
        while self.waiting:
            self.flush(self.waiting[0])
        for rank, (graph, new, to) in enumerate(zip(self.graphs, self.new, self.to, strict=True)):
            for v in (*graph.outputs.values(), *graph.updates.values()):
                self.need(rank, v)
            new.where = None
            new.outputs = {k: to[v].id for k, v in graph.outputs.items()}
            new.updates = {k: to[v].id for k, v in graph.updates.items()}
        return self.new

    def need(self, rank: int, value: Value) -> None:
        """Have a value on a rank, if it has to be summed or waited for."""
        if value in self.to[rank]:
            return
        if value not in self.coming[rank]:
            self.flush(self.put_off[rank, value[0]])
        for each, y in self.coming[rank].get(value, ()):
            self.new[rank].where = ""
            self.keep(rank, each, self.new[rank].add(Wait(), (y,), f"{y.name}/wait_{y.out}"))

    def flush(self, wanted: _Waiting) -> None:
        """Emit the collective that is wanted, with those of its kind that lack nothing."""
        for rank, i in wanted.nodes.items():
            for v in self.graphs[rank].nodes[i].inputs:
                self.need(rank, v)
        together = [s for s in self.waiting if s.kind == wanted.kind and not s.lacks]
        self.waiting = [s for s in self.waiting if s not in together]
        self.ripe = [s for s in self.ripe if s not in together]
        title = self.one(together[0].nodes).name
        more = sum(len(self.one(s.nodes).inputs) for s in together) - len(self.one(wanted.nodes).inputs)
        for rank in wanted.nodes:
            graph = self.graphs[rank]
            nodes = [graph.nodes[s.nodes[rank]] for s in together]
            values = [(s.nodes[rank], k) for s in together for k in self.wanted(graph, s.nodes[rank])]
            xs = [self.to[rank][v] for node in nodes for v in node.inputs]
            self.new[rank].where = ""
            if isinstance(wanted.op, Exchange):
                op: Op = Exchange.together([node.op for node in nodes if isinstance(node.op, Exchange)])
            else:
                op = replace(wanted.op, parts=len(xs))
            made = self.new[rank].add(op, xs, f"{title}/and_{more}_more" if more else title)
            ys = list(zip(values, made if isinstance(made, tuple) else (made,), strict=False))
            for value, y in ys:
                if op.behind:
                    self.coming[rank][value] = ys
                else:
                    self.keep(rank, value, y)

    def one(self, step: Step) -> Node:
        """The node of the first rank."""
        rank, i = next(iter(step.items()))
        return self.graphs[rank].nodes[i]

    def keep(self, rank: int, value: Value, y: Tensor) -> None:
        """A value is there; sums that lack nothing any more may go."""
        self.to[rank][value] = y
        for each in self.readers.get((rank, value), ()):
            each.lacks -= 1
            if not each.lacks and each.early:
                self.ripe.append(each)
