"""Passes that do the same to a node on all ranks that have it: copies of a value would differ in bits otherwise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..graph import Fused, Graph, fuse


def fuse_alike(graphs: Sequence[Graph]) -> tuple[Graph, ...]:
    """Tails fused, each on all ranks that have it or on none."""
    apart: frozenset[str] = frozenset()
    while True:
        fused = tuple(fuse(graph, apart) for graph in graphs)
        known: dict[str, Any] = {}
        different = set()
        for graph in fused:
            for node in graph:
                if known.setdefault(node.name, _kinds(node.op)) != _kinds(node.op):
                    different.add(node.name)
        if not different:
            return fused
        apart |= different


def _kinds(op: Any) -> tuple[type, ...]:
    return (type(op.anchor), *(type(each) for each, _ in op.tail)) if isinstance(op, Fused) else (type(op),)
