"""Matrix products on Hopper's tensor cores: y[m, k] = sum over i of a[m, i] b[i, k], either operand transposed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rapydli_flow.spec import Spec
from rapydli_flow.template import Device, Epilogue, template

from . import wgmma as machinery
from .grid import Grid, blocks_of
from .hopper import DEPTH
from .wgmma import SPACE, box_operand, cut, products


def size(op: Any, ins: Sequence[Spec], outs: Sequence[Spec]) -> tuple[int, int, int]:
    """Rows, columns, and 64s of the inner sum."""
    m, n = outs[0].shape
    return m, n, blocks_of(ins[0].shape[int(not op.ta)], DEPTH)


def _strides(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device) -> bool:
    """16 bytes: the copy engine's, and those of stores."""
    return all(spec.shape[1] % 8 == 0 for spec in (*ins, *outs))


RULES = {
    "a Hopper": machinery.card,
    "halves": machinery.halves,
    "rows of 16 bytes": _strides,
    **machinery.rules(size),
}
PREFER, COST = machinery.preferring(RULES, size), machinery.costing(size)


@template("matmul", "cuda", space=SPACE, fits=RULES, prefer=PREFER, cost=COST)
def wgmma(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], epilogue: Epilogue, **config: Any) -> Grid:
    """Warpgroup products; both operands come through the copy engine as they lie."""
    t = cut(ins[0].dtype, size(op, ins, outs), config)
    (of_a, of_b), dtype = (spec.shape[::-1] for spec in ins), ins[0].dtype
    a = box_operand(0, dtype, of_a, t.bm, 0, mn_major=bool(op.ta))
    b = box_operand(1, dtype, of_b, t.bn, 1, mn_major=not op.tb)
    return products(t, a, b, epilogue)
