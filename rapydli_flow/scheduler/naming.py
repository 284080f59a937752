"""Which nodes a name in a plan means: a layer, a scope, or a pattern of either, in the forward pass."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from fnmatch import fnmatchcase
from itertools import accumulate

from ..errors import ShapeError
from ..graph import Graph, Node, Value
from ..ops import Leaf
from .layout import Split, divisible, letter_of

GRADIENTS = "grad/"  # the scope of what the backward pass adds: 'grad/conv_1/conv_1/conv_filter_grad_1'


def batched(graph: Graph) -> set[Value]:
    """Values whose first axis is that of the batch: it comes from the first axis of what is fed."""
    found = {x.id for x in graph.leaves("batch") if x.spec.shape}
    for i, node in enumerate(graph.nodes):
        if not node.inputs:
            continue
        index = node.op.indexing(*map(graph.spec, node.inputs))
        reads = zip(node.inputs, index.inputs, strict=True)
        letters = {
            letter for v, operand in reads if v in found for axis in operand[:1] if axis for letter in axis.letters
        }
        found |= {(i, k) for k, o in enumerate(index.outputs) if o and o[0] and letters.intersection(o[0].letters)}
    return found


def forward(graph: Graph) -> list[int]:
    """Numbers of the nodes of the forward pass that compute something of what is fed."""
    reached = {x.node for x in graph.leaves("batch")}
    out = []
    for i, node in enumerate(graph.nodes):
        if node.name.startswith(GRADIENTS):
            break
        if any(j in reached for j, _ in node.inputs):
            reached.add(i)
            out.append(i)
    return out


def divided_nodes(graph: Graph, splits: Mapping[str, Split]) -> dict[str, Split]:
    """The split of each node that a name means; of several names that mean a node the last one counts.

    In a layer only nodes that have all the axes to divide are divided so; ShapeError where none has, or nothing has
    such a name.
    """
    found: dict[str, Split] = {}
    known = batched(graph)
    nodes = [(i, graph.nodes[i]) for i in forward(graph)]
    for pattern, split in splits.items():
        named = [(i, node) for i, node in nodes if _means(pattern, node.name)]
        if not named:
            near = ", ".join(difflib.get_close_matches(pattern, _scopes(graph, nodes), n=3))
            raise ShapeError(f"plan: no layer is named {pattern!r}.{f' Nearest: {near}.' if near else ''}")
        fit = [node.name for i, node in named if _has(graph, node, split, (i, 0) in known)]
        if not fit:
            what = f"can be divided along {', '.join(split.axes)}" if split.axes else "depends on records"
            raise ShapeError(f"plan: nothing in {pattern!r} {what}.")
        found |= dict.fromkeys(fit, split)
    return found


def _means(pattern: str, name: str) -> bool:
    """Does a name mean a node: the path of a scope from the top, or a pattern of a path or of how one ends?"""
    scopes = list(accumulate(name.split("/"), "{}/{}".format))
    if not set("*?[") & set(pattern):
        return pattern in scopes
    return any(fnmatchcase(scope, pattern) or fnmatchcase(scope, f"*/{pattern}") for scope in scopes)


def _scopes(graph: Graph, nodes: list[tuple[int, Node]]) -> list[str]:
    return list(dict.fromkeys(s for _, node in nodes for s in accumulate(node.name.split("/"), "{}/{}".format)))


def _has(graph: Graph, node: Node, split: Split, batch: bool) -> bool:
    """Has the formula of a node all the axes of a split?"""
    assert not isinstance(node.op, Leaf)
    index = node.op.indexing(*map(graph.spec, node.inputs))
    letters = {name: letter_of(name, index) for name in split.axes}
    if not batch and (not letters or "samples" in letters):
        return False  # of what has no records only the named axes can be divided
    return all(letter is not None and divisible(letter, index) for letter in letters.values())
