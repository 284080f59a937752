"""Borders without copies: what an exchange puts a border around is computed where it will stand within it.

    y = exchange(x)        y  row of the rank above | x | row of the rank below |

x then has no memory of its own: its producer writes into y, the exchange fills the border, and all that reads x reads
it within y. That takes a region of y that is in one piece: y differs from x along one axis, and the axes before it
have size 1, as where one picture is divided by rows. Elsewhere x is copied.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import numpy as np

from ..graph import Graph, Value
from ..ops import Leaf
from ..spec import Block
from .arena import ALIGN
from .collective import Exchange


@dataclass(frozen=True)
class Inner:
    """Bytes ``first`` on of another value, ``whole``."""

    whole: Value
    first: int


def borders(graph: Graph) -> dict[Value, Inner]:
    """The values that lie in what an exchange makes of them.

    An exchange that gathers is none: what it makes would take its memory, mostly for others' parts, too early.
    """
    updates = set(graph.updates.values())
    found: dict[Value, Inner] = {}
    for i, node in enumerate(graph.nodes):
        if not isinstance(node.op, Exchange) or node.op.sums:  # a sum would overwrite its part
            continue
        inputs = dict(zip(node.op.held, node.inputs, strict=True))
        outputs = {target: (i, k) for k, target in enumerate(node.op.wanted)}
        for source, target, region in node.op.pieces:
            if source not in inputs or target not in outputs or region != node.op.have[source].block:
                continue
            v, whole, bordered = inputs[source], outputs[target], node.op.want[target][1]
            maker = graph.nodes[v[0]].op
            settled = v in found or not updates.isdisjoint((v, whole)) or isinstance(maker, Leaf | Exchange)
            first = _first(region, bordered)
            if settled or maker.view or first is None or 2 * region.size <= bordered.size:
                continue
            offset = first * np.dtype(node.op.dtype).itemsize
            if offset % ALIGN == 0:
                found[v] = Inner(whole, offset)
    return found


def _first(region: Block, outer: Block) -> int | None:
    """Where a region begins in an array that holds ``outer``, in elements; None if it is not in one piece there."""
    differs = [axis for axis, (a, b) in enumerate(zip(region.shape, outer.shape, strict=True)) if a != b]
    last = max(differs, default=0)
    if prod(outer.shape[:last]) != 1:
        return None
    return (region.lo[last] - outer.lo[last]) * prod(outer.shape[last + 1 :])
