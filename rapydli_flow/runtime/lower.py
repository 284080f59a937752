"""Lowering: rank graphs -> a Dask graph of kernel calls, with arrays on its edges.

A task runs a group of nodes and gives the values that later groups read. At granularity 'op' each
node is a group; at 'stage' a group is all that a rank does between two collectives. A collective is a
task that reads the parts of all ranks.

    x, w -> conv_relu -(y)-> matmul_add -> ... -> all_reduce(g of rank 0, g of rank 1) -> momentum -> w'
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dask._task_spec import Task, TaskRef

from ..errors import SettingError
from ..graph import Graph, Node, Value
from ..ops import Leaf
from ..scheduler import AllReduce, side_by_side
from ..spec import Block
from ..tuner import Tuning
from .bodies import Group, Kernel, run_collective, run_group
from .devices import tell_hosted

GRANULARITIES = ("op", "stage")


@dataclass(frozen=True)
class Ref:
    """A value that a task makes, or a future, or an array: ``source``, and which item of it."""

    source: Any
    item: int | str | None = None


def kernel_for(node: Node, graph: Graph, tuning: Tuning) -> Kernel:
    """The request of a node, and the choice that serves it."""
    request, choice = tuning.serve(node.op, [graph.spec(v) for v in node.inputs])
    at = (node.at or Block.all(node.specs[0].shape)) if node.op.indexed else None
    return Kernel(request, choice, at)


@dataclass
class Lowered:
    """Tasks by key, and where the outputs and updates of each rank are."""

    tasks: dict[Any, Any]
    outputs: list[dict[str, Ref]]
    updates: list[dict[str, Ref]]


def lower(
    graphs: Sequence[Graph],
    leaves: Sequence[Mapping[str, Ref]],
    tunings: Sequence[Tuning],
    *,
    token: str,
    granularity: str = "op",
    threads: int = 1,
) -> Lowered:
    """The Dask tasks of one run of rank graphs; ``leaves`` says for each rank where its leaves come from, ``tunings``
    what it is on."""
    if granularity not in GRANULARITIES:
        raise SettingError(f"granularity {granularity!r} is not one of {', '.join(GRANULARITIES)}.")
    return _Lower(graphs, leaves, tunings, token, granularity, threads).run()


class _Lower:
    def __init__(
        self,
        graphs: Sequence[Graph],
        leaves: Sequence[Mapping[str, Ref]],
        tunings: Sequence[Tuning],
        token: str,
        granularity: str,
        threads: int,
    ) -> None:
        self.graphs, self.leaves, self.tunings = graphs, leaves, tunings
        self.token, self.granularity, self.threads = token, granularity, threads
        self.tasks: dict[Any, Any] = {}
        self.hosted: dict[str, None] = {}  # ops for a card that no kernel serves
        self.where: list[dict[Value, Ref]] = [{} for _ in graphs]
        self.waiting: list[list[int]] = [[] for _ in graphs]

    def run(self) -> Lowered:
        for step in side_by_side(self.graphs):
            nodes = {rank: self.graphs[rank].nodes[i] for rank, i in step.items()}
            rank, node = next(iter(nodes.items()))
            if node.op.collective:
                for each in nodes:
                    self.flush(each)
                self.collective(step, nodes)
            elif isinstance(node.op, Leaf):
                if node.name not in self.leaves[rank]:
                    raise SettingError(f"{node.name} ({node.op.kind}) is not fed; give it a value.")
                self.where[rank][step[rank], 0] = self.leaves[rank][node.name]
            else:
                self.waiting[rank].append(step[rank])
                if self.granularity == "op":
                    self.flush(rank)
        for rank in range(len(self.graphs)):
            self.flush(rank)
        tell_hosted(self.hosted)
        outputs = [{k: self.where[r][v] for k, v in g.outputs.items()} for r, g in enumerate(self.graphs)]
        updates = [{k: self.where[r][v] for k, v in g.updates.items()} for r, g in enumerate(self.graphs)]
        return Lowered(self.tasks, outputs, updates)

    def flush(self, rank: int) -> None:
        """Emit the waiting nodes of a rank as one task."""
        members, self.waiting[rank] = self.waiting[rank], []
        if members:
            self.group(rank, members)

    def group(self, rank: int, members: list[int]) -> None:
        graph = self.graphs[rank]
        place = {i: n for n, i in enumerate(members)}
        arguments: dict[Value, int] = {}
        inputs = []
        for i in members:
            refs: list[tuple[bool, Any]] = []
            for v in graph.nodes[i].inputs:
                if v[0] in place:
                    refs.append((False, (place[v[0]], v[1])))
                else:
                    refs.append((True, arguments.setdefault(v, len(arguments))))
            inputs.append(tuple(refs))
        gives = [v for v in self.read_outside(graph, place)]
        tuning = self.tunings[rank]
        kernels = tuple(kernel_for(graph.nodes[i], graph, tuning) for i in members)
        if tuning.device.kind != "cpu":
            self.hosted |= {kernel.request.title: None for kernel in kernels if kernel.choice.reference}
        group = Group(kernels, tuple(inputs), tuple((place[i], k) for i, k in gives), tuning.device, self.threads)
        title = graph.nodes[members[0]].op.title if len(members) == 1 else "stage"
        key = self.key(title, rank, members[0])
        self.emit(key, run_group, group, [self.where[rank][v] for v in arguments])
        for n, v in enumerate(gives):
            self.where[rank][v] = Ref(key, n)

    def read_outside(self, graph: Graph, place: Mapping[int, int]) -> list[Value]:
        """Values of a group that something outside it reads."""
        wanted = {v for i, node in enumerate(graph.nodes) if i not in place for v in node.inputs}
        wanted |= {*graph.outputs.values(), *graph.updates.values()}
        return sorted(v for v in wanted if v[0] in place)

    def collective(self, step: Mapping[int, int], nodes: Mapping[int, Node]) -> None:
        """One task for an all-reduce, whose result all ranks read; one a rank for an exchange."""
        ops: dict[int, Any] = {rank: node.op for rank, node in nodes.items()}
        first, op = next(iter(ops.items()))
        parts = [self.where[rank][v] for rank in op.ranks for v in nodes[rank].inputs]
        for rank, node in nodes.items():
            owner = first if isinstance(op, AllReduce) else rank
            key = self.key(op.title, owner, step[owner])
            if key not in self.tasks:
                self.emit(key, run_collective, ops[rank], parts)
            for k in range(len(node.specs)):
                self.where[rank][step[rank], k] = Ref(key, k)

    def key(self, title: str, rank: int, node: int) -> tuple[str, int, int]:
        return f"{re.sub('[^a-z0-9]+', '_', title)}-{self.token}", rank, node

    def emit(self, key: Any, function: Any, what: Any, refs: Sequence[Ref]) -> None:
        sources: dict[Any, int] = {}
        values: list[Any] = []
        picks = []
        for ref in refs:
            name = id(ref.source) if not _is_key(ref.source) else ref.source
            if name not in sources:
                sources[name] = len(values)
                values.append(TaskRef(ref.source) if _is_key(ref.source) else ref.source)
            picks.append((sources[name], ref.item))
        self.tasks[key] = Task(key, function, what, tuple(picks), *values)


def _is_key(source: Any) -> bool:
    return isinstance(source, str) or (isinstance(source, tuple) and bool(source) and isinstance(source[0], str))
