"""All ranks of a split graph in one thread: node by node, in NumPy, meeting at collectives."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rapydli_flow.graph import Graph, verify
from rapydli_flow.ops import Leaf
from rapydli_flow.scheduler import Plan, side_by_side, split
from rapydli_flow.scheduler.collective import meet
from rapydli_flow.spec import Array, Block
from rapydli_flow.testing.interpret import interpret, start

SEED, STEP = 3, 1
Layouts = Mapping[str, Sequence[Block]]


def lockstep(graphs: Sequence[Graph], feeds: Mapping[str, Any]) -> list[dict[int, tuple[Array, ...]]]:
    """Values of every node of every rank; ``feeds`` are whole arrays."""
    given = {"seed": np.int64(SEED), "step": np.int64(STEP), **feeds}
    every: list[dict[int, tuple[Array, ...]]] = [{} for _ in graphs]
    for step in side_by_side(graphs):
        ins = {r: [every[r][j][k] for j, k in graphs[r].nodes[i].inputs] for r, i in step.items()}
        ops = {r: graphs[r].nodes[i].op for r, i in step.items()}
        if next(iter(ops.values())).collective:
            made = meet({r: (op, ins[r]) for r, op in ops.items()})
        else:
            (rank,) = step
            node = graphs[rank].nodes[step[rank]]
            if isinstance(node.op, Leaf):
                block = node.at or Block.all(node.specs[0].shape)
                made = {rank: (np.asarray(given[node.name])[block.slices],)}
            else:
                made = {rank: node.op.run(*ins[rank], at=node.at)}
        for r, ys in made.items():
            node = graphs[r].nodes[step[r]]
            for spec, y in zip(node.specs, ys, strict=True):
                assert (y.shape, y.dtype.name) == (spec.shape, spec.dtype), f"{node.name} on rank {r}"
            every[r][step[r]] = tuple(ys)
    return every


def assert_same_graphs(graph: Graph, graphs: Sequence[Graph], feeds: Mapping[str, Any], scale: float = 0.0) -> None:
    """Outputs on every rank, and updates put together from the blocks of the ranks, are those of ``graph``."""
    want = interpret(graph, feeds, SEED, STEP)
    every = lockstep([verify(part) for part in graphs], feeds)
    for name, value in want.outputs.items():
        for r, part in enumerate(graphs):
            i, k = part.outputs[name]
            assert_close(name, every[r][i][k], value, scale)
    for name, value in want.updates.items():
        found = np.full(value.shape, np.nan)
        for r, part in enumerate(graphs):
            if name not in part.updates:
                continue
            i, k = part.updates[name]
            at = part[name].at or Block.all(value.shape)
            found[at.slices] = every[r][i][k]
        assert_close(name, found, value, scale)


def assert_close(name: str, got: Array, want: Array, scale: float = 0.0) -> None:
    """Equal up to 1e-12 of the largest element, or of ``scale``."""
    assert got.shape == want.shape, name
    limit = 1e-12 * max(scale, float(np.abs(want).max(initial=0.0)), 1e-300)
    assert float(np.abs(got - want).max(initial=0.0)) <= limit, name


def assert_split(
    graph: Graph, ranks: int, layouts: Layouts, feeds: Mapping[str, Any], scale: float = 0.0
) -> tuple[Graph, ...]:
    """The split graph, and the rank graphs of a plan, give what the graph gives. The rank graphs of the plan."""
    given = {**start(graph, SEED), **feeds}
    layouts = {name: tuple(layout) for name, layout in layouts.items()}
    assert_same_graphs(graph, split(graph, ranks, layouts), given, scale)
    graphs = Plan(ranks, 1, layouts).rank_graphs(graph)
    assert_same_graphs(graph, graphs, given, scale)
    return graphs


def collectives(graph: Graph) -> list[str]:
    return [str(node.op) for node in graph if node.op.collective]
