"""Matrix product: y[m, k] = sum over i of a[m, i] b[i, k], either operand transposed, in fp32."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rapydli_flow.spec import Spec
from rapydli_flow.template import Config, Device, Epilogue, template

from . import tiles
from .grid import Grid
from .tiles import SPACE, Share, Tile, columns_loader, holds, multiply, rows_loader, share


def _cut(op: Any, ins: Sequence[Spec], config: Config) -> tuple[Tile, Share | None, Share | None, tuple[int, int]]:
    """The tile, what a thread loads of each operand, and the padding of their rows in shared memory."""
    a, b = ins
    m, k, n = a.shape[int(op.ta)], a.shape[1 - op.ta], b.shape[1 - op.tb]
    cut = {name: config[name] for name in ("bm", "bn", "bk", "tm", "tn", "stages", "order", "resident")}
    t = Tile(m, n, k, **cut)
    of_a = (t.bk, t.bm) if op.ta else (t.bm, t.bk)
    of_b = (t.bn, t.bk) if op.tb else (t.bk, t.bn)
    pads = (0 if op.ta else config["pad"], config["pad"] if op.tb else 0)
    return (
        t,
        share(*of_a, config["vector_a"], t.threads),
        share(*of_b, config["vector_b"], t.threads),
        pads,
    )


def fits(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device, **config: Any) -> bool:
    if not tiles.fp32(*ins, *outs) or any(s.shape[1] % config[f"vector_{x}"] for s, x in zip(ins, "ab", strict=True)):
        return False
    t, a, b, pads = _cut(op, ins, config)
    return holds(t, (a, b), pads)


def prefer(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device) -> Config:
    if not tiles.fp32(*ins, *outs):
        return {name: values[0] for name, values in SPACE.items()}
    tried = tiles.prefer(*outs[0].shape, device)
    return next((c for c in tried if fits(op, ins, outs, device, **c)), {n: v[0] for n, v in SPACE.items()})


@template("matmul", "cuda", space=SPACE, fits={**tiles.RULES, "operands, loads and indices": fits}, prefer=prefer)
def simt(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], epilogue: Epilogue, **config: Any) -> Grid:
    """Register tiles of fused multiply-adds; both operands pass through shared memory."""
    t, a, b, (pad_a, pad_b) = _cut(op, ins, config)
    assert a is not None  # fits
    assert b is not None
    load_a = columns_loader(t.m, t.k, a, t.bm) if op.ta else rows_loader(t.m, t.k, a, t.bm + pad_a)
    load_b = rows_loader(t.n, t.k, b, t.bn + pad_b) if op.tb else columns_loader(t.n, t.k, b, t.bn)
    return multiply(t, load_a, load_b, epilogue)
