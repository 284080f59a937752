"""Matrix products on tensor cores: y[m, k] = sum over i of a[m, i] b[i, k], either operand transposed."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

from rapydli_flow.spec import Spec
from rapydli_flow.template import Epilogue, template

from .grid import Grid
from .mma import Part, Problem, cut, loader, multiply, vector_of
from .mma_rules import settings
from .tensor_core import kind_of


def problems(op: Any, ins: Sequence[Spec], outs: Sequence[Spec]) -> tuple[Problem]:
    """m, n and k of the operands, and which way they lie; leading axes are a batch."""
    a, b = ins
    (i, j), dtype = a.shape[-2:], a.dtype
    m, k = (j, i) if op.ta else (i, j)
    n = b.shape[-2 if op.tb else -1]
    batch = prod(a.shape[:-2])
    vectors: dict[str, Any] = {"vector_a": vector_of(dtype, a.shape[-1]), "vector_b": vector_of(dtype, b.shape[-1])}
    lie: dict[str, Any] = {"rows_a": not op.ta, "rows_b": bool(op.tb), "batch": batch}
    base = (m * k, k * n, m * n) if batch > 1 else (0, 0, 0)
    return (Problem(dtype, kind_of(op, dtype), m, n, k, **lie, **vectors, base=base),)


SETTINGS = settings(problems)


@template("batch_matmul", "cuda", **SETTINGS)
@template("matmul", "cuda", **SETTINGS)
def tensor_cores(
    op: Any, ins: Sequence[Spec], outs: Sequence[Spec], epilogue: Epilogue, **config: Any
) -> tuple[Grid, ...]:
    """Tiles of mma.sync; both operands pass through shared memory by asynchronous copies."""
    (p,) = problems(op, ins, outs)
    t = cut(p, config)
    return multiply([Part(t, loader(t, True), loader(t, False))], epilogue)
