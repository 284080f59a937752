"""The slow twin of the runtime: a graph, node by node, with each op's `reference`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from ..errors import DTypeError, GraphError, ShapeError
from ..graph import Graph
from ..ops import Leaf, spec_of
from ..spec import Array, Block


class Values(NamedTuple):
    """What one run of a graph gives: its outputs, and the next values of its leaves, by name."""

    outputs: dict[str, Array]
    updates: dict[str, Array]


def interpret(graph: Graph, feeds: Mapping[str, Any], seed: int = 0, step: int = 0) -> Values:
    """Run ``graph`` on ``feeds``: batches, and parameters and state that do not start anew from ``seed``."""
    every = run_nodes(graph, feeds, seed, step)
    return Values(
        {name: every[i][k] for name, (i, k) in graph.outputs.items()},
        {name: every[i][k] for name, (i, k) in graph.updates.items()},
    )


def run_nodes(graph: Graph, feeds: Mapping[str, Any], seed: int = 0, step: int = 0) -> list[tuple[Array, ...]]:
    """The outputs of every node of the graph."""
    clocks = {"seed": np.asarray(seed, np.int64), "step": np.asarray(step, np.int64)}
    clocks |= {x.label: x.start(seed, Block.all(x.shape)) for x in _leaves(graph) if x.kind == "clock" and x.init}
    given = {**start(graph, seed), **clocks, **feeds}
    every: list[tuple[Array, ...]] = []
    for node in graph.nodes:
        if isinstance(node.op, Leaf):
            every.append((_fed(node.op, given),))
        else:
            every.append(node.op.run(*(every[i][k] for i, k in node.inputs), at=node.at))
    return every


def start(graph: Graph, seed: int = 0) -> dict[str, Array]:
    """The first values of parameters and state."""
    return {x.label: x.start(seed, Block.all(x.shape)) for x in _leaves(graph) if x.kind in ("param", "state")}


def _leaves(graph: Graph) -> list[Leaf]:
    return [node.op for node in graph.nodes if isinstance(node.op, Leaf)]


def _fed(leaf: Leaf, given: Mapping[str, Any]) -> Array:
    if leaf.label not in given:
        raise GraphError(f"interpret: nothing is fed for {leaf.label} ({leaf.infer()}).")
    value = np.asarray(given[leaf.label])
    if value.shape != leaf.shape:
        raise ShapeError(f"interpret: {leaf.label} is {leaf.infer()} but {spec_of(value)} is fed.")
    if value.dtype != leaf.dtype:
        raise DTypeError(f"interpret: {leaf.label} is {leaf.infer()} but {spec_of(value)} is fed. Cast it first.")
    return value
