"""Passes: Graph -> Graph. Each leaves its input alone, drops dead nodes, and keeps names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from ..errors import GraphError
from ..ops import Leaf, Phase
from .graph import Graph, Node, Tensor, Value

Rule = Callable[[Graph, Node, tuple[Tensor, ...]], Any]


def _keep(new: Graph, node: Node, inputs: tuple[Tensor, ...]) -> Any:
    return None


def rewrite(graph: Graph, rule: Rule = _keep, order: Sequence[int] | None = None) -> Graph:
    """A copy without dead nodes, in another order where one is given (of all nodes, each after what it reads).

    ``rule(new graph, node, its new inputs)`` may answer with the tensor, or tuple of tensors, that
    replaces the node's outputs; None copies the node. Inputs that are fed (batch, clock) stay.
    """
    live: set[int] = set()
    todo = [*graph.outputs.values(), *graph.updates.values(), *(x.id for x in graph.leaves("clock", "batch"))]
    todo += [graph.find(name).id for name in graph.updates]
    todo += [(i, 0) for i, node in enumerate(graph.nodes) if node.op.collective]  # others wait for this rank there
    while todo:
        i = todo.pop()[0]
        if i not in live:
            live.add(i)
            todo += graph.nodes[i].inputs
    new = Graph(counts=dict(graph.counts), network=graph.network, where="")
    to: dict[Value, Tensor] = {}
    for i in range(len(graph.nodes)) if order is None else order:
        if i not in live:
            continue
        node = graph.nodes[i]
        inputs = tuple(to[v] for v in node.inputs)
        new.where = node.where
        made = rule(new, node, inputs)
        if made is None:
            made = new.copy(graph, node, inputs)
        for k, y in enumerate(made if isinstance(made, tuple) else (made,)):
            to[i, k] = y
    new.where = None
    new.outputs = {k: to[v].id for k, v in graph.outputs.items()}
    new.updates = {k: to[v].id for k, v in graph.updates.items()}
    new.gradients = {k: to[v].id for k, v in graph.gradients.items() if v in to}
    new.like = {to[a].id: to[b].id for a, b in graph.like.items() if a in to and b in to}
    return new


def clean(graph: Graph) -> Graph:
    """Drop nodes that nothing needs."""
    return rewrite(graph)


def training(graph: Graph) -> Graph:
    """Resolve `Phase` ops for training: batch statistics, dropout."""
    return rewrite(rewrite(graph, lambda new, node, xs: xs[0] if isinstance(node.op, Phase) else None))


def predicting(graph: Graph) -> Graph:
    """Resolve `Phase` ops for prediction: running statistics, no dropout, no updates."""
    out = rewrite(graph, lambda new, node, xs: xs[1] if isinstance(node.op, Phase) else None)
    out.updates = {}
    return rewrite(out)


def check_graph(given: Any, where: str) -> None:
    """GraphError for what is no graph, such as a network that was not traced."""
    if not isinstance(given, Graph):
        what = getattr(given, "__name__", None) or repr(given)
        raise GraphError(f"{where}: {what} is not a graph. Trace the network first: rf.trace(network, rf.Spec(shape)).")


def exact(graph: Graph) -> Graph:
    """The same graph with exact convolutions and matrix products: no faster algorithm with larger rounding errors, such
    as Winograd's.

    The gradients of an exact convolution are exact as well: ``rf.train_step(rf.exact(rf.trace(network, x)), ...)``.
    """
    return _with(graph, "exact")


def tf32(graph: Graph) -> Graph:
    """The same graph, whose convolutions and matrix products may round float32 operands to TF32 (10 bits of mantissa)
    before they multiply them; sums stay float32. Their gradients may, too. On CPUs nothing changes.

    ``rf.train_step(rf.tf32(rf.trace(network, x)), ...)``
    """
    return _with(graph, "tf32")


def _with(graph: Graph, attribute: str) -> Graph:
    """Every op that has an attribute, with it on."""
    check_graph(graph, attribute)

    def rule(new: Graph, node: Node, inputs: tuple[Tensor, ...]) -> Any:
        if getattr(node.op, attribute, None) is not False:
            return None
        op: Any = node.op
        return new.add(replace(op, **{attribute: True}), inputs, node.name, node.at)

    return rewrite(graph, rule)


def merge_equal(graph: Graph) -> Graph:
    """Common-subexpression removal: one node for equal ops on equal inputs."""
    seen: dict[tuple[Any, ...], Sequence[Tensor] | Tensor] = {}

    def rule(new: Graph, node: Node, inputs: tuple[Tensor, ...]) -> Any:
        if isinstance(node.op, Leaf):
            return None
        key = (node.op, tuple(x.id for x in inputs), node.at)
        if key not in seen:
            seen[key] = new.copy(graph, node, inputs)
        return seen[key]

    return rewrite(graph, rule)


def hoist(graph: Graph) -> Graph:
    """Equal nodes merged, and what depends on the channel only computed once a channel, not for every element."""

    def rule(new: Graph, node: Node, inputs: tuple[Tensor, ...]) -> Any:
        new.scope = [node.name]
        made = node.op.once_a_channel(*inputs)
        new.scope = []
        return None if made is None else new.add(*made, node.name, node.at)

    return merge_equal(rewrite(merge_equal(graph), rule))


def with_batch(graph: Graph, size: int) -> Graph:
    """The same graph for another number of records a batch; only for graphs that predict."""
    if graph.updates:
        raise GraphError("with_batch: a graph with updates depends on its batch size; trace it again instead.")
    records = {x.spec.shape[0] for x in graph.leaves("batch") if x.spec.shape}

    def rule(new: Graph, node: Node, inputs: tuple[Tensor, ...]) -> Any:
        op = node.op
        if isinstance(op, Leaf) and op.kind == "batch" and op.shape:
            return new.leaf("batch", op.label, type(node.specs[0])((size, *op.shape[1:]), op.dtype), op.init)
        return None

    if len(records) != 1:
        raise GraphError(f"with_batch: inputs hold {sorted(records)} records; they must hold the same number.")
    return rewrite(graph, rule)
