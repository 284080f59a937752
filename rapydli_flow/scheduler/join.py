"""Concatenation without copies: which kernels write their channels straight into the joined array.

    y = concatenate([conv_1(x), conv_2(x)], -1)        y  n h w | channels of conv_1 | of conv_2 |

A part of y then has no memory of its own, and there is nothing left to do where the parts meet. What reads a part
besides, such as ReLU's gradient, must be able to read y instead: the tail of a slice of an array like y, at the same
channels. Where one part cannot be written or read so, the parts are copied.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from itertools import accumulate

from ..graph import Fused, Graph, Node, Value
from ..ops import Concatenate, Leaf, Slice
from ..tuner import Tuning


@dataclass(frozen=True)
class Part:
    """Channels ``first`` on of another value, ``whole``."""

    whole: Value
    first: int


def joins(graph: Graph, tuning: Tuning) -> dict[Value, Part]:
    """The values that are parts of others."""
    readers: dict[Value, list[int]] = defaultdict(list)
    for i, node in enumerate(graph.nodes):
        for v in node.inputs:
            readers[v].append(i)
    kept = {*graph.outputs.values(), *graph.updates.values()}
    found: dict[Value, Part] = {}
    for i, node in enumerate(graph.nodes):
        if not isinstance(node.op, Concatenate) or node.op.axis != len(node.specs[0].shape) - 1:
            continue
        sizes = [graph.spec(v).shape[-1] for v in node.inputs]
        each = {
            v: Part((i, 0), first)
            for v, first in zip(node.inputs, accumulate(sizes, initial=0), strict=False)
            if v not in kept and v not in found and _writes(graph, graph.nodes[v[0]], tuning)
        }
        if len(each) == len(node.inputs) and all(
            r == i or (r > i and _reads(graph, graph.nodes[r], v, part)) for v, part in each.items() for r in readers[v]
        ):
            found |= each
    return found


def _writes(graph: Graph, node: Node, tuning: Tuning) -> bool:
    """Is a node served by a kernel that can write into longer rows? Those of convolutions can."""
    if isinstance(node.op, Leaf) or node.op.view or node.op.collective or len(node.specs) > 1:
        return False
    request, choice = tuning.serve(node.op, [graph.spec(v) for v in node.inputs])
    return not choice.reference and choice.find(request, tuning.device).joins


def _reads(graph: Graph, node: Node, part: Value, at: Part) -> bool:
    """Can a node read a part where the whole has it: in a tail, as its slice reads another array?"""
    op, whole = node.op, graph.spec(at.whole)
    if not isinstance(op, Fused) or not isinstance(op.anchor, Slice) or op.indexed or part in node.inputs[: op.arity]:
        return False
    cut = [range(size) for size in whole.shape[:-1]]
    cut.append(range(at.first, at.first + graph.spec(part).shape[-1]))
    source, out = graph.spec(node.inputs[0]), node.specs[0]
    others = [v for v in node.inputs[op.arity :] if v != part and graph.spec(v).shape == out.shape]
    return source.shape == whole.shape and op.anchor.ranges(source) == cut and not others
