"""Matrix products by fused multiply-adds: y[m, k] = sum over i of a[m, i] b[i, k], either operand transposed.

Leading axes of `batch_matmul` are products of a batch, in one launch. Where there are few outputs for a long sum, the
sum is split over blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

from rapydli_flow.spec import Spec
from rapydli_flow.template import Device, Epilogue, template

from .grid import Grid
from .tile_space import declared
from .tiles import Product, columns_loader, multiply, rows_loader


def product(op: Any, ins: Sequence[Spec], outs: Sequence[Spec]) -> Product:
    """m, n and k of the operands, and which way they lie."""
    a = ins[0]
    m, k = (a.shape[-1], a.shape[-2]) if op.ta else (a.shape[-2], a.shape[-1])
    n = outs[0].shape[-1]
    batch = prod(a.shape[:-2])
    base = (m * k, k * n, m * n) if batch > 1 else (0, 0, 0)
    return Product(m, n, k, rows_a=not op.ta, rows_b=op.tb, dtype=a.dtype, batch=batch, base=base)


def _vectors(
    op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device, *, vector_a: int, vector_b: int
) -> bool:
    return ins[0].shape[-1] % vector_a == 0 and ins[1].shape[-1] % vector_b == 0


DECLARED = declared({"loads divide rows": _vectors}, product)


@template("batch_matmul", "cuda", **DECLARED)
@template("matmul", "cuda", **DECLARED)
def simt(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], epilogue: Epilogue, **config: Any) -> tuple[Grid, ...]:
    """Register tiles of fused multiply-adds; both operands pass through shared memory."""
    p = product(op, ins, outs)
    (t, a, b), (pad_a, pad_b) = p.cut(config), p.pads(config["pad"])
    load_a = (columns_loader if op.ta else rows_loader)(p.dtype, t.m, t.k, a, pitch=t.bm + pad_a, base=p.base[0])
    load_b = (rows_loader if op.tb else columns_loader)(p.dtype, t.n, t.k, b, pitch=t.bn + pad_b, base=p.base[1])
    return multiply(t, load_a, load_b, epilogue)
