"""The order of micro-batches: one forward, one backward, as soon as there is one.

    rank 0   F0 F1 .  .  .  B0 F2 B1 F3 B2 .  B3     F0: forward of micro-batch 0, B0: backward
    rank 1      F0 B0 F1 B1 .  F2 B2 .  F3 B3        a rank has no more micro-batches in flight than stages follow

Nodes of all ranks are put in the order in which they would run if each took as long as its roofline: backward before
forward, earlier micro-batches first. As it is one order for all, ranks never wait for each other in a circle.
Source: Narayanan et al., "PipeDream: generalized pipeline parallelism for DNN training" (2019).
"""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import ShapeError
from ..graph import Graph, Node, rewrite
from ..ops import Leaf
from .cost import Machine, node_s
from .layout import MARK
from .naming import GRADIENTS


def micro_batch(name: str) -> int | None:
    """The micro-batch that a node of a rank graph belongs to; None: it is there once for all."""
    _, mark, number = name.rpartition(MARK)
    return int(number) if mark else None


def in_turns(graphs: Sequence[Graph], depth: Sequence[int], machine: Machine) -> tuple[Graph, ...]:
    """The same rank graphs with their nodes in the order of micro-batches.

    ``depth``: for each rank, how many micro-batches may be in flight there. ShapeError where one cannot go on without
    the others.
    """
    orders = _Turns(graphs, depth, machine).run()
    return tuple(rewrite(graph, order=order) for graph, order in zip(graphs, orders, strict=True))


Ready = tuple[int, int, int]  # phase, micro-batch, node number: the least comes first


class _Turns:
    def __init__(self, graphs: Sequence[Graph], depth: Sequence[int], machine: Machine) -> None:
        self.graphs, self.depth, self.machine = graphs, depth, machine
        self.clock = [0.0] * len(graphs)
        self.orders: list[list[int]] = [[] for _ in graphs]
        self.ready: list[list[Ready]] = [[] for _ in graphs]
        self.now: list[tuple[int, int]] = [(2, 0) for _ in graphs]  # phase and micro-batch that a rank is at
        self.held: list[list[Ready]] = [[] for _ in graphs]  # ready, of micro-batches that may not begin yet
        self.meeting: dict[str, dict[int, int]] = {}
        self.missing = [[len({j for j, _ in node.inputs}) for node in graph] for graph in graphs]
        self.readers: list[list[list[int]]] = [[[] for _ in graph] for graph in graphs]
        self.left: list[dict[int, int]] = [{} for _ in graphs]  # nodes to do of each micro-batch
        for rank, graph in enumerate(graphs):
            for i, node in enumerate(graph):
                for j in {j for j, _ in node.inputs}:
                    self.readers[rank][j].append(i)
                micro = micro_batch(node.name)
                if micro is not None:
                    self.left[rank][micro] = self.left[rank].get(micro, 0) + 1

    def run(self) -> list[list[int]]:
        for rank, graph in enumerate(self.graphs):
            for i, node in enumerate(graph):
                if isinstance(node.op, Leaf):
                    self.done(rank, i)
            for i, node in enumerate(graph):
                if not node.inputs and not isinstance(node.op, Leaf):
                    self.wake(rank, i)
        while self.step():
            pass
        if any(len(order) < len(graph.nodes) for order, graph in zip(self.orders, self.graphs, strict=True)):
            raise ShapeError(
                f"plan: a micro-batch cannot go through the pipeline without the others: {self.blocked()} reads all of "
                "them. A batch norm does unless it is nn.batch_norm(x, group=n), with n the records of a micro-batch "
                "or fewer."
            )
        return self.orders

    def step(self) -> bool:
        """Run the node that can begin soonest, on its rank, or a collective, on all of its ranks."""
        best: tuple[float, Ready, int] | None = None
        for rank, ready in enumerate(self.ready):
            if ready:
                candidate = (self.clock[rank], min(ready, key=lambda each: self.precedence(rank, each)), rank)
                best = candidate if best is None else min(best, candidate)
        for name, here in self.meeting.items():
            rank, i = next(iter(here.items()))
            if len(here) < len(getattr(self.graphs[rank].nodes[i].op, "ranks", ())):
                continue
            begin = max(self.clock[r] for r in here)
            if best is None or begin <= best[0]:
                del self.meeting[name]
                self.meet(here, begin)
                return True
        if best is None:
            return False
        _, chosen, rank = best
        self.ready[rank].remove(chosen)
        self.now[rank], i = chosen[:2], chosen[2]
        node = self.graphs[rank].nodes[i]
        ins = [self.graphs[rank].spec(v) for v in node.inputs]
        self.clock[rank] += node_s(node.op, ins, node.specs, self.machine)
        self.done(rank, i)
        return True

    def meet(self, here: dict[int, int], begin: float) -> None:
        size = max(sum(s.size_bytes for s in self.graphs[rank].nodes[i].specs) for rank, i in here.items())
        for rank, i in here.items():
            self.clock[rank] = begin + self.machine.move_s(size)
            self.done(rank, i)

    def done(self, rank: int, i: int) -> None:
        """A node has run: others may be ready now, and a further micro-batch begin."""
        self.orders[rank].append(i)
        for reader in self.readers[rank][i]:
            self.missing[rank][reader] -= 1
            if not self.missing[rank][reader]:
                self.wake(rank, reader)
        micro = micro_batch(self.graphs[rank].nodes[i].name)
        if micro is not None:
            self.left[rank][micro] -= 1
            if not self.left[rank][micro]:
                held, self.held[rank] = self.held[rank], []
                for each in held:
                    self.wake(rank, each[2])

    def wake(self, rank: int, i: int) -> None:
        """All inputs of a node are there."""
        node = self.graphs[rank].nodes[i]
        entry = self.entry(node, i)
        micro = micro_batch(node.name)
        if micro is not None and micro >= self.finished(rank) + self.depth[rank]:
            self.held[rank].append(entry)
        elif node.op.collective:
            self.meeting.setdefault(node.name, {})[rank] = i
        else:
            self.ready[rank].append(entry)

    def precedence(self, rank: int, each: Ready) -> tuple[bool, Ready]:
        """What a rank has begun it goes on with; then backward, earlier micro-batches, and the order of the graph."""
        return each[:2] != self.now[rank], each

    def finished(self, rank: int) -> int:
        """How many micro-batches are done on a rank."""
        return sum(1 for left in self.left[rank].values() if not left)

    @staticmethod
    def entry(node: Node, i: int) -> Ready:
        """A node as it waits to run."""
        micro = micro_batch(node.name)
        if micro is None:
            return 2, 0, i
        return (0 if node.name.startswith(GRADIENTS) else 1), micro, i

    def blocked(self) -> str:
        """What a micro-batch waits for that all of them are needed for, or anything that waits."""
        waits = "a node"
        for graph, order in zip(self.graphs, self.orders, strict=True):
            ran = set(order)
            for node in (node for i, node in enumerate(graph) if i not in ran):
                waits = node.name if waits == "a node" else waits
                shared = [graph.nodes[j].name for j, _ in node.inputs if j not in ran]
                shared = [name for name in shared if micro_batch(name) is None]
                if micro_batch(node.name) is not None and shared:
                    return shared[0]
        for graph in self.graphs:
            for node in graph:
                of = {micro_batch(graph.nodes[j].name) for j, _ in node.inputs} - {None, micro_batch(node.name)}
                if of and micro_batch(node.name) is not None and "/added" not in node.name:
                    return node.name.partition(MARK)[0]
        return waits
