"""Matrix products on Hopper's tensor cores: y[m, k] = sum over i of a[m, i] b[i, k], either operand transposed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rapydli_flow.spec import Spec
from rapydli_flow.template import Device, Epilogue, template

from . import wgmma as machinery
from .grid import Grid, blocks_of
from .hopper import depth_of
from .tensor_core import kind_of
from .wgmma import SPACE, box_operand, cut, lines_operand, products
from .wgmma_passes import laid_out, lay_out


def inner(op: Any, ins: Sequence[Spec]) -> int:
    """The length of the sum."""
    return ins[0].shape[int(not op.ta)]


def size(op: Any, ins: Sequence[Spec], outs: Sequence[Spec]) -> tuple[int, int, int]:
    """Rows, columns, and lines of the inner sum."""
    return *outs[0].shape, blocks_of(inner(op, ins), depth_of(ins[0].dtype))  # type: ignore[return-value]


def _as_it_lies(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device) -> bool:
    """Rows of 16 bytes."""
    return machinery.wide(*ins, *outs)


def workspace(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], **config: Any) -> tuple[Spec, ...]:
    return laid_out(kind_of(op, ins[0].dtype), ins[1], 1, inner(op, ins), outs[0].shape[1])


RULES = {
    "a Hopper": machinery.card,
    "floats": machinery.floats,
    "operands as they lie": _as_it_lies,
    **machinery.rules(size, across=lambda op: bool(op.ta)),
}
PREFER, COST = machinery.preferring(RULES, size), machinery.costing(size)


@template("matmul", "cuda", space=SPACE, fits=RULES, prefer=PREFER, cost=COST, workspace=workspace)
def wgmma(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], epilogue: Epilogue, **config: Any) -> tuple[Grid, ...]:
    """Warpgroup products; halves come through the copy engine as they lie, b of float32 is laid out first."""
    t = cut(op, ins[0].dtype, size(op, ins, outs), config)
    of_a, of_b = (spec.shape[::-1] for spec in ins)
    a = box_operand(0, t.dtype, of_a, t.bm, 0, mn_major=bool(op.ta))
    if t.kind == "half":
        return (products(t, a, box_operand(1, t.dtype, of_b, t.bn, 1, mn_major=not op.tb), epilogue),)
    first = lay_out(t.kind, ins[1], 1, inner(op, ins), t.n, along=bool(op.tb), by_threads=bool(op.ta))
    return (first, products(t, a, lines_operand(t, 1, inner(op, ins)), epilogue))
