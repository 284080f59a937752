"""Where values of a rank graph lie, as far as the graph alone says it: views, and updates of leaves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from ..graph import Graph, Value


def owners(graph: Graph, parts: Mapping[Value, Value]) -> dict[Value, Value]:
    """For each value without memory of its own, the one that it lies in: views, and ``parts``, given with theirs."""
    found = dict(parts)
    found |= {(i, 0): node.inputs[0] for i, node in enumerate(graph.nodes) if node.op.view}
    for value, owner in found.items():
        while owner in found:
            owner = found[owner]
        found[value] = owner
    return found


def homes(graph: Graph) -> dict[Value, Value]:
    """For each value that replaces a leaf, and only one, that leaf: where the value is written if it can be."""
    times = Counter(graph.updates.values())
    return {value: graph.find(name).id for name, value in graph.updates.items() if times[value] == 1}
