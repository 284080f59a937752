"""Matrix product: y[m, k] = sum over i of a[m, i] b[i, k], either operand transposed, in fp32."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rapydli_flow.spec import Spec
from rapydli_flow.template import Config, Device, Epilogue, template

from . import tiles
from .grid import Grid
from .tiles import SPACE, Product, columns_loader, multiply, rows_loader


def product(op: Any, ins: Sequence[Spec], outs: Sequence[Spec]) -> Product:
    """m, n and k of the operands, and which way they lie."""
    a, b = ins
    return Product(a.shape[int(op.ta)], b.shape[1 - op.tb], a.shape[1 - op.ta], rows_a=not op.ta, rows_b=op.tb)


def _vectors(
    op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device, *, vector_a: int, vector_b: int
) -> bool:
    return ins[0].shape[1] % vector_a == 0 and ins[1].shape[1] % vector_b == 0


RULES = {"float32 operands": tiles.fp32, "loads divide rows": _vectors, **tiles.rules(product)}


def prefer(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device) -> Config:
    return tiles.first(RULES, op, ins, outs, device, tiles.prefer(*outs[0].shape, device))


@template("matmul", "cuda", space=SPACE, fits=RULES, prefer=prefer)
def simt(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], epilogue: Epilogue, **config: Any) -> Grid:
    """Register tiles of fused multiply-adds; both operands pass through shared memory."""
    p = product(op, ins, outs)
    (t, a, b), (pad_a, pad_b) = p.cut(config), p.pads(config["pad"])
    load_a = columns_loader(t.m, t.k, a, t.bm) if op.ta else rows_loader(t.m, t.k, a, t.bm + pad_a)
    load_b = rows_loader(t.n, t.k, b, t.bn + pad_b) if op.tb else columns_loader(t.n, t.k, b, t.bn)
    return multiply(t, load_a, load_b, epilogue)
