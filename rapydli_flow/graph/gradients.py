"""Reverse mode: append the gradient of a scalar to its graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..errors import GraphError, NotDifferentiable
from ..ops import Fill, Leaf, Op, as_dtype
from .graph import Graph, Tensor, Value
from .where import short


def gradients(graph: Graph, loss: Tensor, wanted: Sequence[Tensor]) -> list[Tensor]:
    """The gradient of ``loss`` (a scalar) with respect to each wanted value; nodes are added to ``graph``.

    Only nodes that lead from a wanted value to the loss are visited, so an op without a gradient is
    an error only where one is needed.
    """
    if loss.spec.shape != ():
        raise GraphError(f"gradients: the loss {loss.name} is {loss.spec}, not a scalar. Sum or average it.")
    needed = _between(graph, {x.node for x in wanted}, loss.node)
    cotangent: dict[Value, Tensor] = {loss.id: _fill(graph, loss, 1.0)}
    for i in sorted(needed, reverse=True):
        node = graph.nodes[i]
        given = [cotangent.get((i, k)) for k in range(len(node.specs))]
        if isinstance(node.op, Leaf) or all(g is None for g in given):
            continue
        if type(node.op).vjp is Op.vjp:
            made = f" It was made at {short(node.where)}." if node.where else ""
            raise NotDifferentiable(
                f"{node.name}: {node.op.name} has no gradient, but the loss is reached through it.{made}"
            )
        outer, graph.scope, graph.where = graph.scope, ["grad", node.name], node.where
        ys = [Tensor(graph, i, k) for k in range(len(node.specs))]
        dys = [_fill(graph, y, 0.0) if g is None else g for g, y in zip(given, ys, strict=True)]
        one = len(dys) == 1
        xs = [graph.tensor(v) for v in node.inputs]
        found = node.op.vjp(dys[0] if one else tuple(dys), ys[0] if one else tuple(ys), *xs)
        for v, dx in zip(node.inputs, found, strict=True):
            if dx is None or v[0] not in needed:
                continue
            dx = as_dtype(dx, graph.spec(v).dtype)
            graph.like[dx.id] = v
            cotangent[v] = total = dx if v not in cotangent else cotangent[v] + dx
            graph.like[total.id] = v
        graph.scope, graph.where = outer, None
    missing = [x.name for x in wanted if x.id not in cotangent]
    if missing:
        raise GraphError(f"gradients: the loss {loss.name} does not depend on {', '.join(missing)}.")
    return [cotangent[x.id] for x in wanted]


def _fill(graph: Graph, like: Tensor, value: float) -> Any:
    return graph.add(Fill(value=value, shape=like.spec.shape, dtype=like.spec.dtype), name=graph.unique("fill"))


def _between(graph: Graph, first: set[int], last: int) -> set[int]:
    """Nodes on a path from ``first`` to ``last``."""
    forward = set(first)
    for i, node in enumerate(graph.nodes[: last + 1]):
        if any(j in forward for j, _ in node.inputs):
            forward.add(i)
    backward = {last}
    for i in range(last, -1, -1):
        if i in backward:
            backward.update(j for j, _ in graph.nodes[i].inputs)
    return forward & backward
