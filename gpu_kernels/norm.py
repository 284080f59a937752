"""Sums over everything but channels, for batch normalisation; see `slabs`.

moments          sum of x - shift,  sum of (x - shift)^2
normalize_sums   sum of dy,         sum of dy (x - mean), over sqrt(var + eps)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rapydli_flow.spec import Spec

from .formulas import Formula
from .slab_program import Program
from .slabs import serve
from .warp import sums


def _but_channels(op: Any, x: Spec) -> tuple[int, ...]:
    return tuple(range(len(x.shape) - 1))


def _moments(op: Any, ins: Sequence[Spec], outs: Sequence[Spec]) -> Program:
    absorb = Formula(("a0 + d", "a1 + d * d"), lines=("d = x0 - x1",))
    return Program((0,), sums(2), absorb, Formula(("a0", "a1")), channels=(1,))


def _normalize_sums(op: Any, ins: Sequence[Spec], outs: Sequence[Spec]) -> Program:
    absorb = Formula(("a0 + x0", "a1 + x0 * (x1 - x2)"))
    out = Formula(("a0", f"a1 / math.sqrt(x0 + T({float(op.eps)!r}))"))
    return Program((0, 1), sums(2), absorb, out, channels=(2,), ends=(3,))


serve("moments", _moments, _but_channels)
serve("normalize_sums", _normalize_sums, _but_channels, 1)
