"""The one order in which ranks meet: rank graphs run side by side, and wait where a collective lacks a rank."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from ..errors import GraphError
from ..graph import Graph

Step = Mapping[int, int]  # node numbers by rank: of one rank, or of all that take part in a collective


def side_by_side(graphs: Sequence[Graph]) -> Iterator[Step]:
    """All nodes of all ranks in an order in which they can run, a node of each rank in turn; GraphError where ranks
    would wait for ever."""
    at = [0] * len(graphs)
    waiting: dict[str, dict[int, int]] = {}  # ranks that have come to a collective, with their node
    running = True
    while running:
        running = False
        for rank, graph in enumerate(graphs):
            if at[rank] == len(graph.nodes):
                continue
            node = graph.nodes[at[rank]]
            if not node.op.collective:
                yield {rank: at[rank]}
                at[rank] += 1
                running = True
                continue
            here = waiting.setdefault(node.name, {})
            here[rank] = at[rank]
            if set(here) == set(getattr(node.op, "ranks", ())):
                yield dict(sorted(waiting.pop(node.name).items()))
                for other in here:
                    at[other] += 1
                running = True
    if waiting:
        names = ", ".join(f"rank {rank} at {name}" for name, here in waiting.items() for rank in here)
        raise GraphError(f"ranks wait for each other for ever: {names}.")
