"""Graphs as JSON, in and out: versioned, readable, no pickle; ops are looked up by name in the registry."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Any

from ..errors import GraphError, UnknownOp
from ..ops import Op, registry
from ..spec import Block
from .graph import Graph
from .verify import verify

FORMAT = "rapydli-graph"
VERSION = 1


def to_json(graph: Graph, *, indent: int | None = None) -> str:
    """The graph as a JSON document."""
    return json.dumps(_document(graph), indent=indent)


def _document(graph: Graph) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "version": VERSION,
        "nodes": [
            {
                "name": node.name,
                "op": encode(node.op),
                "inputs": [list(v) for v in node.inputs],
                **({"at": [list(node.at.lo), list(node.at.hi), list(node.at.whole)]} if node.at else {}),
            }
            for node in graph.nodes
        ],
        "outputs": {k: list(v) for k, v in graph.outputs.items()},
        "updates": {k: list(v) for k, v in graph.updates.items()},
        "gradients": {k: list(v) for k, v in graph.gradients.items()},
        "like": [[list(a), list(b)] for a, b in graph.like.items()],
        **({"network": _document(graph.network)} if graph.network else {}),
    }


def from_json(text: str) -> Graph:
    """The graph of a JSON document; GraphError or UnknownOp where it cannot be read."""
    try:
        return _graph(json.loads(text))
    except json.JSONDecodeError as error:
        raise GraphError(f"not a graph: the text is not JSON ({error}).") from None


def _graph(document: Any) -> Graph:
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise GraphError(f"not a graph: 'format' is not {FORMAT!r}.")
    if document.get("version") != VERSION:
        raise GraphError(
            f"this graph has format version {document.get('version')}, this package reads {VERSION}. "
            "Upgrade rapydli_flow, or save the graph again."
        )
    graph = Graph(where="")
    try:
        for row in document["nodes"]:
            inputs = [graph.tensor((int(i), int(k))) for i, k in row["inputs"]]
            at = Block(*(tuple(part) for part in row["at"])) if "at" in row else None
            graph.add(decode(row["op"]), inputs, row["name"], at)
            _count(graph, row["name"])
        graph.outputs = {k: (int(i), int(o)) for k, (i, o) in document["outputs"].items()}
        graph.updates = {k: (int(i), int(o)) for k, (i, o) in document["updates"].items()}
        graph.gradients = {k: (int(i), int(o)) for k, (i, o) in document.get("gradients", {}).items()}
        graph.like = {(a[0], a[1]): (b[0], b[1]) for a, b in document["like"]}
        graph.where = None
        graph.network = _graph(document["network"]) if "network" in document else None
    except (KeyError, IndexError, TypeError, ValueError) as error:
        if isinstance(error, UnknownOp | GraphError):
            raise
        raise GraphError(f"not a graph: {type(error).__name__} {error} while reading its nodes.") from None
    return verify(graph)


def _count(graph: Graph, name: str) -> None:
    """Let nodes that are added later not take this name, or its scope's."""
    parts = name.split("/")
    for i in range(1, len(parts) + 1):
        base, _, number = "/".join(parts[:i]).rpartition("_")
        if number.isdigit():
            graph.counts[base] = max(graph.counts.get(base, 0), int(number))


def encode(value: Any) -> Any:
    """An op, or an attribute of one, in terms of JSON."""
    if isinstance(value, Op):
        return {"op": value.name, **{f.name: encode(getattr(value, f.name)) for f in fields(value)}}  # type: ignore[arg-type]
    if isinstance(value, tuple):
        return [encode(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise GraphError(f"an attribute of type {type(value).__name__} cannot be written as JSON: {value!r}.")


def decode(value: Any) -> Any:
    """The op, or attribute, that `encode` wrote."""
    if isinstance(value, list):
        return tuple(decode(item) for item in value)
    if isinstance(value, dict):
        name = value.get("op")
        if name not in registry:
            raise UnknownOp(f"no op is named {name!r}; import the module that defines it before loading the graph.")
        known = {f.name for f in fields(registry[name])}  # type: ignore[arg-type]
        given = {k: decode(v) for k, v in value.items() if k != "op"}
        if set(given) - known:
            raise GraphError(f"{name} has no attribute {', '.join(sorted(set(given) - known))}.")
        return registry[name](**given)
    return value
