"""How alike two shapes of the same operator are: what won for one is a good beginning for the other."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf, log2

from .cache import Winner
from .choice import Choice, Request

OTHER_OP = 4.0  # as far as one extent that is 16 times as large: another stride, another tail


def distance(request: Request, shapes: Sequence[Sequence[int]], op: str) -> float:
    """Doublings of extents between two requests of a family; inf if operands differ in number or rank."""
    mine = [spec.shape for spec in request.ins]
    if [len(s) for s in mine] != [len(s) for s in shapes]:
        return inf
    pairs = [(a, b) for s, t in zip(mine, shapes, strict=True) for a, b in zip(s, t, strict=True)]
    return sum(abs(log2((a + 1) / (b + 1))) for a, b in pairs) + (OTHER_OP if op != str(request.op) else 0.0)


def nearest(request: Request, winners: Sequence[Winner]) -> tuple[Choice, ...]:
    """The choices of the nearest requests first, each once."""
    ranked = sorted((distance(request, winner.shapes, winner.op), i) for i, winner in enumerate(winners))
    return tuple(dict.fromkeys(winners[i].choice for far, i in ranked if far < inf))
