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

import numpy as np
from dask._task_spec import Task, TaskRef

from cpu_kernels.driver import run_kernel

from ..errors import SettingError
from ..graph import Graph, Node, Value
from ..ops import Leaf
from ..scheduler import AllReduce, Exchange, side_by_side
from ..scheduler.collective import assemble, halves
from ..spec import Array, Block
from ..template import Device
from ..tuner import Choice, Request, Tuning
from .participant import at_array, run_reference
from .rank import kernel_of

GRANULARITIES = ("op", "stage")


@dataclass(frozen=True)
class Ref:
    """A value that a task makes, or a future, or an array: ``source``, and which item of it."""

    source: Any
    item: int | str | None = None


@dataclass(frozen=True)
class Kernel:
    """What it takes to run one node on arrays."""

    request: Request
    choice: Choice
    at: Block | None


@dataclass(frozen=True)
class Group:
    """Nodes that one task runs. Inputs are (True, argument) or (False, (node of the group, output))."""

    kernels: tuple[Kernel, ...]
    inputs: tuple[tuple[tuple[bool, Any], ...], ...]
    gives: tuple[tuple[int, int], ...]
    device: Device
    threads: int


def kernel_for(node: Node, graph: Graph, tuning: Tuning) -> Kernel:
    """The request of a node, and the choice that serves it."""
    request, choice = tuning.serve(node.op, [graph.spec(v) for v in node.inputs])
    at = (node.at or Block.all(node.specs[0].shape)) if node.op.indexed else None
    return Kernel(request, choice, at)


def run_node(kernel: Kernel, arrays: Sequence[Array], device: Device, threads: int) -> tuple[Array, ...]:
    """One kernel on arrays of its own; the results are new arrays."""
    request, choice = kernel.request, kernel.choice
    if choice.reference:
        return run_reference(request, arrays, kernel.at)
    n = len(request.ins)
    outs = tuple(np.empty(s.shape, s.dtype) for s in request.outs)
    specs = Tuning(device).workspace(request, choice)
    work = tuple(np.empty(s.shape, s.dtype) for s in specs)
    at = at_array(kernel.at or Block.all(outs[0].shape))
    ins = [np.ascontiguousarray(x) for x in arrays]
    run_kernel(kernel_of(request, choice, device), ins[:n], outs, work=work, extras=ins[n:], at=at, threads=threads)
    return outs


def run_group(group: Group, picks: tuple[Any, ...], *sources: Any) -> tuple[Array, ...]:
    """The body of a task: run a group of nodes on what other tasks gave."""
    arguments = [pick(sources[i], item) for i, item in picks]
    made: list[tuple[Array, ...]] = []
    for kernel, inputs in zip(group.kernels, group.inputs, strict=True):
        arrays = [arguments[at] if outer else made[at[0]][at[1]] for outer, at in inputs]
        made.append(run_node(kernel, arrays, group.device, group.threads))
    return tuple(made[i][k] for i, k in group.gives)


def run_collective(op: AllReduce | Exchange, picks: tuple[Any, ...], *sources: Any) -> tuple[Array, ...]:
    """The body of a collective's task: all ranks' parts in, in the order of the ranks, the result out."""
    arguments = [pick(sources[i], item) for i, item in picks]
    if isinstance(op, AllReduce):
        return tuple(halves(arguments[i :: op.parts]) for i in range(op.parts))
    return assemble(op, dict(zip((i for r in op.ranks for i in op.held_by(r)), arguments, strict=True)))


def pick(value: Any, item: int | str | None) -> Array:
    """An item of what a task gave."""
    return np.asarray(value if item is None else value[item])


@dataclass
class Lowered:
    """Tasks by key, and where the outputs and updates of each rank are."""

    tasks: dict[Any, Any]
    outputs: list[dict[str, Ref]]
    updates: list[dict[str, Ref]]


def lower(
    graphs: Sequence[Graph],
    leaves: Sequence[Mapping[str, Ref]],
    tuning: Tuning,
    *,
    token: str,
    granularity: str = "op",
    threads: int = 1,
) -> Lowered:
    """The Dask tasks of one run of rank graphs; ``leaves`` says for each rank where its leaves come from."""
    if granularity not in GRANULARITIES:
        raise SettingError(f"granularity {granularity!r} is not one of {', '.join(GRANULARITIES)}.")
    return _Lower(graphs, leaves, tuning, token, granularity, threads).run()


class _Lower:
    def __init__(
        self,
        graphs: Sequence[Graph],
        leaves: Sequence[Mapping[str, Ref]],
        tuning: Tuning,
        token: str,
        granularity: str,
        threads: int,
    ) -> None:
        self.graphs, self.leaves, self.tuning = graphs, leaves, tuning
        self.token, self.granularity, self.threads = token, granularity, threads
        self.tasks: dict[Any, Any] = {}
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
        kernels = tuple(kernel_for(graph.nodes[i], graph, self.tuning) for i in members)
        group = Group(kernels, tuple(inputs), tuple((place[i], k) for i, k in gives), self.tuning.device, self.threads)
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
