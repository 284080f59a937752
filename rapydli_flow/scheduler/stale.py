"""Asynchronous data parallelism: the training step in two halves, which ranks run each at its own pace.

    gradients   parameters, records -> loss, gradients of a rank's own records      on every rank, step after step
    update      sums of gradients, a part of the state -> the part after a step     on the rank that owns the part

Parameters and optimizer state are divided over ranks. What the first half hands over is cut to the owners' parts,
summed there in the order of the ranks, and the parts after the update go back to all. Between the two lie as many steps
as a plan's ``staleness`` allows; with none this is the synchronous run. Where the forward pass itself needs sums over
all records, as batch norm does, each rank takes those of its own; running statistics, state that is updated without
gradients, are averaged. Source: Ho et al., "More effective distributed ML via a stale synchronous parallel parameter
server", 2013.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..graph import Graph, Tensor, Value, finds_scale, rewrite
from ..graph.scaling import OUTPUT
from ..ops import Leaf, Scale
from .independent import independent, shares
from .layout import Layout, along_longest
from .split import split

HANDED = "handed/"  # scope of what one half hands to the other: gradients, and state after a step


def halves(step: Graph, ranks: int, layouts: Mapping[str, Layout]) -> tuple[tuple[Graph, ...], tuple[Graph, ...]]:
    """The gradient halves and the update halves of all ranks. ``layouts``: which records each rank has."""
    handed = _handed(step)
    first = _part(step, {**step.outputs, **{name: value for value, name in handed.items()}}, {}, {})
    update = _part(step, {}, step.updates, handed)
    owned = {leaf.name: along_longest(leaf.shape, ranks) for leaf in update.leaves("param", "state", "batch")}
    alone = independent(split(first, ranks, layouts))
    records = [graph.leaves("batch")[0].shape[0] for graph in alone]
    parts = split(update, ranks, {name: layout for name, layout in owned.items() if layout})
    return tuple(map(_summands, alone, shares(records))), parts


def sends(handed: Sequence[int], owned: Sequence[int], rank: int) -> dict[int, int]:
    """Bytes that a rank sends to each of the others in a step: of gradients what they own, of its own parts all.

    ``handed``, ``owned``: for each rank, bytes of gradients that come to it, and of parameters and state that it has.
    """
    return {other: size + owned[rank] for other, size in enumerate(handed) if other != rank}


def _handed(step: Graph) -> dict[Value, str]:
    """What the update takes from the rest, with names: gradients, state that is updated without them, and the loss
    where it says whether there is an update."""
    gradients = {value: name for name, value in step.gradients.items()}
    gradients |= {step.outputs["loss"]: f"{OUTPUT}/loss"} if finds_scale(step) else {}
    of_batch: set[Value] = set()
    found: dict[Value, str] = {}
    for i, node in enumerate(step.nodes):
        fed = isinstance(node.op, Leaf) and node.op.kind == "batch"
        if fed or any(v in of_batch for v in node.inputs):
            values = {(i, k) for k in range(len(node.specs))}
            found |= {v: HANDED + gradients[v] for v in values & gradients.keys()}
            of_batch |= values - gradients.keys()
    return found | {value: HANDED + name for name, value in step.updates.items() if value in of_batch}


def _part(graph: Graph, outputs: Mapping[str, Value], updates: Mapping[str, Value], fed: Mapping[Value, str]) -> Graph:
    """What outputs and updates need of a graph; values that are ``fed`` become leaves, without what is before them."""
    needed: set[int] = set()
    todo = [*outputs.values(), *updates.values(), *(graph.find(name).id for name in updates)]
    while todo:
        value = todo.pop()
        if value not in fed and value[0] not in needed:
            needed.add(value[0])
            todo += graph.nodes[value[0]].inputs
    new = Graph(counts=dict(graph.counts))
    to: dict[Value, Tensor] = {}
    for i, node in enumerate(graph.nodes):
        new.where = node.where
        for k in range(len(node.specs)):
            if (i, k) in fed:
                to[i, k] = new.leaf("batch", fed[i, k], node.specs[k])
        if i in needed:
            made = new.copy(graph, node, [to[v] for v in node.inputs])
            for k, y in enumerate(made if isinstance(made, tuple) else (made,)):
                to.setdefault((i, k), y)
    new.where = None
    new.outputs = {name: to[value].id for name, value in outputs.items()}
    new.updates = {name: to[value].id for name, value in updates.items()}
    new.like = {to[a].id: to[b].id for a, b in graph.like.items() if a in to and b in to}
    return new


def _summands(graph: Graph, share: float) -> Graph:
    """What is handed over as a rank's part of the sum over all ranks, not as if its records were all."""
    for name, value in graph.outputs.items():
        if name.startswith(HANDED):
            node = graph.nodes[value[0]]
            whole = node.op == Scale(by=1.0 / share)
            graph.outputs[name] = node.inputs[0] if whole else Scale(by=share)(graph.tensor(value)).id
    return rewrite(graph)
