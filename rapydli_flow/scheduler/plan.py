"""Plan: how a graph is divided over ranks. A value, made without side effects."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..errors import ShapeError
from ..graph import Graph, checked, fuse, merge_equal
from ..spec import Block, even_bounds
from .bucket import bucket
from .collective import AllReduce, Exchange
from .split import Layout, split


@dataclass(frozen=True)
class Plan:
    """Number of ranks, threads of each, and how leaves lie on them (leaves not named are whole on each)."""

    ranks: int = 1
    threads: int = 1
    layouts: Mapping[str, Layout] = field(default_factory=dict)

    def rank_graphs(self, graph: Graph) -> tuple[Graph, ...]:
        """Equal nodes merged, split, then the passes on rank graphs: collectives bucketed, tails fused.

        The graphs of all ranks have the same nodes in the same order. So nothing is merged after the split
        (two nodes may be equal on one rank only), and tails are fused on all ranks or on none.
        """
        graph = checked(merge_equal)(graph)
        parts = split(graph, self.ranks, self.layouts) if self.ranks > 1 else (graph,)
        parts = tuple(checked(bucket)(part) for part in parts)
        fused = tuple(checked(fuse)(part) for part in parts)
        return fused if len({tuple(node.name for node in part) for part in fused}) == 1 else parts

    def explain(self, graph: Graph) -> str:
        """What each rank holds of the divided inputs, and the bytes that ranks send each other in a step."""
        lines = [f"{self.ranks} rank{'s' if self.ranks > 1 else ''}, {self.threads} thread(s) each"]
        for name, layout in self.layouts.items():
            lines.append(f"  {name}: " + "  ".join(f"rank {r} {block}" for r, block in enumerate(layout)))
        first = self.rank_graphs(graph)[0]
        meetings = [node for node in first if isinstance(node.op, AllReduce | Exchange)]
        size_bytes = sum(spec.size_bytes for node in meetings for spec in node.specs)
        lines.append(f"  {len(meetings)} collectives and {size_bytes:,} bytes a step")
        return "\n".join(lines)


def data_parallel(graph: Graph, ranks: int, *, threads: int = 1) -> Plan:
    """Divide every input that is fed along its first axis; the first ranks get the larger parts."""
    layouts: dict[str, Layout] = {}
    for leaf in graph.leaves("batch"):
        shape = leaf.spec.shape
        if not shape or shape[0] < ranks:
            raise ShapeError(
                f"plan: {leaf.name} has {shape[0] if shape else 1} records for {ranks} ranks. "
                "Use a larger batch or fewer ranks."
            )
        layouts[leaf.name] = Block.along(shape, 0, even_bounds(shape[0], ranks))
    return Plan(ranks, threads, layouts if ranks > 1 else {})
