"""Local SGD: ranks that do not meet within a step. Each takes its own records for the whole batch.

    data-parallel   dw/sum = sum of dw over ranks           the gradient of the batch
    independent     dw/sum = dw * records / own records     that of its own records, as if there were no others

Parameters then drift apart, and are averaged now and then; see `rapydli_flow.runtime.segment`. This is another
computation than that of one worker, and says so. Source: Stich, "Local SGD converges fast and communicates little",
2019.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..errors import SettingError
from ..graph import Graph, Node, Tensor, rewrite
from ..ops import Scale
from .collective import AllReduce


def shares(records: Sequence[int]) -> list[float]:
    """Each rank's part of the batch, of the records that ranks have."""
    return [own / sum(records) for own in records]


def independent(graphs: Sequence[Graph]) -> tuple[Graph, ...]:
    """Data-parallel rank graphs without collectives; SettingError for others, which cannot do without."""
    every = tuple(range(len(graphs)))
    for graph in graphs:
        for node in graph:
            if node.op.collective and not (isinstance(node.op, AllReduce) and node.op.ranks == every):
                raise SettingError(
                    f"plan: average_every is for data-parallel plans, and {node.name} is none of their sums. Use "
                    "strategy='data' without splits and shards."
                )
    fed = graphs[0].leaves("batch")[0].name
    parts = shares([graph.find(fed).shape[0] for graph in graphs])
    return tuple(_alone(graph, share) for graph, share in zip(graphs, parts, strict=True))


def _alone(graph: Graph, share: float) -> Graph:
    def rule(new: Graph, node: Node, inputs: tuple[Tensor, ...]) -> Any:
        if not isinstance(node.op, AllReduce):
            return None
        made = [new.add(Scale(by=1.0 / share), (x,), f"{node.name}/own_{i}") for i, x in enumerate(inputs)]
        return made[0] if len(made) == 1 else tuple(made)

    return rewrite(graph, rule)
