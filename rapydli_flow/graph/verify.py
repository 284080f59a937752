"""The rules that every graph obeys; run after each pass in tests and when RAPYDLI_VERIFY is set."""

from __future__ import annotations

from collections.abc import Callable

from ..config import settings
from ..errors import GraphError
from ..ops import Leaf
from .graph import Graph


def verify(graph: Graph) -> Graph:
    """Return the graph, or raise GraphError with the first rule that it breaks."""
    names: set[str] = set()
    for i, node in enumerate(graph.nodes):
        if node.name in names:
            raise GraphError(f"two nodes are named {node.name!r}.")
        names.add(node.name)
        for j, k in node.inputs:
            if not 0 <= j < i or not 0 <= k < len(graph.nodes[j].specs):
                raise GraphError(f"{node.name}: reads value {(j, k)}, which does not exist before node {i}.")
        specs = node.op.out_specs(*(graph.spec(v) for v in node.inputs))
        if specs != node.specs:
            raise GraphError(f"{node.name}: has {_join(node.specs)} but its op gives {_join(specs)}.")
    for kind, values in (("output", graph.outputs), ("update", graph.updates)):
        for name, (j, k) in values.items():
            if not 0 <= j < len(graph.nodes) or not 0 <= k < len(graph.nodes[j].specs):
                raise GraphError(f"{kind} {name}: value {(j, k)} does not exist.")
    for name, value in graph.updates.items():
        leaf = graph.find(name)
        if not isinstance(graph.nodes[leaf.node].op, Leaf):
            raise GraphError(f"update {name}: {leaf.name} is not a leaf.")
        if leaf.spec != graph.spec(value):
            raise GraphError(f"update {name}: a leaf {leaf.spec} cannot become {graph.spec(value)}.")
    return graph


def checked(pass_: Callable[[Graph], Graph]) -> Callable[[Graph], Graph]:
    """A pass whose result is verified when RAPYDLI_VERIFY is set."""

    def run(graph: Graph) -> Graph:
        out = pass_(graph)
        return verify(out) if settings().verify else out

    return run


def _join(specs: tuple[object, ...]) -> str:
    return ", ".join(map(str, specs))
