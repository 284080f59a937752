"""A graph as an aligned table: node, op, output, parameters, GFLOP, bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..ops import Leaf

if TYPE_CHECKING:
    from .graph import Graph, Node

HEADER = ("node", "op", "output", "parameters", "GFLOP", "bytes")


def rows(graph: Graph) -> list[tuple[str, ...]]:
    """One row for each input and op, in the words of `HEADER`; parameters count where they are first read."""
    counted: set[int] = set()
    out: list[tuple[str, ...]] = []
    for node in graph.nodes:
        if isinstance(node.op, Leaf) and node.op.kind != "batch":
            continue
        parameters = 0
        for i, _ in node.inputs:
            leaf = graph.nodes[i].op
            if isinstance(leaf, Leaf) and leaf.kind == "param" and i not in counted:
                counted.add(i)
                parameters += graph.nodes[i].specs[0].size
        size_bytes = sum(spec.size_bytes for spec in node.specs)
        out.append(
            (
                node.name,
                _op(node),
                ", ".join(map(str, node.specs)),
                f"{parameters:,}" if parameters else "",
                _giga(_flops(graph, node)),
                f"{size_bytes:,}",
            )
        )
    return out


def total(graph: Graph) -> tuple[str, ...]:
    """The last row: sums over the graph."""
    flops = sum(_flops(graph, node) for node in graph.nodes)
    size_bytes = sum(spec.size_bytes for node in graph.nodes for spec in node.specs)
    return "total", f"{len(graph.nodes)} nodes", "", f"{graph.parameters:,}", _giga(flops), f"{size_bytes:,}"


def text(graph: Graph) -> str:
    """The table as aligned text."""
    table = [HEADER, *rows(graph), total(graph)]
    widths = [max(len(row[i]) for row in table) for i in range(len(HEADER))]

    def line(row: tuple[str, ...]) -> str:
        left = [cell.ljust(width) for cell, width in zip(row[:3], widths[:3], strict=True)]
        right = [cell.rjust(width) for cell, width in zip(row[3:], widths[3:], strict=True)]
        return "  ".join([*left, *right]).rstrip()

    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    return "\n".join([line(HEADER), rule, *map(line, table[1:-1]), rule, line(table[-1])])


def _op(node: Node) -> str:
    return f"{node.op.name} ({node.op.kind})" if isinstance(node.op, Leaf) else node.op.title


def _flops(graph: Graph, node: Node) -> int:
    return 0 if isinstance(node.op, Leaf) else node.op.flops(*(graph.spec(v) for v in node.inputs))


def _giga(flops: int) -> str:
    return f"{flops / 1e9:.3g}" if flops >= 5e5 else ("<0.001" if flops else "")
