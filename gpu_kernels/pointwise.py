"""Pointwise operators with any broadcasting, from their formula: one thread computes a few neighbours.

An operand of the output's shape is read where the element lies, as a vector; any other where the element
projects to: as a vector if it has the output's last axis, else once for all lanes.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np

from rapydli_flow.spec import HALVES, Spec
from rapydli_flow.template import Config, Device, Epilogue, template

from .grid import INDEX_LIMIT, Grid, blocks_of
from .ptx import append, cuda, load, load_one, store, unroll
from .scalar import formula, nowhere, place, project
from .tail import tail

SPACE = {"threads": (256, 128, 512), "vector": (4, 2, 1, 8), "items": (1, 2, 4)}


def _reach(spec: Spec, out: Spec) -> str:
    """How an operand is read: 'element', 'row' (it has the last axis of ``out``) or 'one'."""
    if spec.shape == out.shape:
        return "element"
    if spec.size == 1 or spec.shape[-1] != out.shape[-1] or out.shape[-1] == 1:
        return "one"
    return "row"


def fits(
    op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device, *, threads: int, vector: int, items: int
) -> bool:
    out = outs[0]
    if not all(0 < spec.size < INDEX_LIMIT - 2**20 for spec in (*ins, *outs)):
        return False
    wide = [spec.dtype for spec in ins if _reach(spec, out) != "one"] + [spec.dtype for spec in outs]
    if any(np.dtype(dtype).itemsize * vector > 16 for dtype in wide):
        return False
    return (out.shape[-1] if out.shape else 1) % vector == 0


def _vectors(ins: Sequence[Spec], outs: Sequence[Spec]) -> tuple[int, ...]:
    """Widths to try: 16 bytes of the narrowest floats first."""
    halves = any(spec.dtype in HALVES for spec in (*ins, *outs))
    return (8, 4, 2, 1) if halves else (4, 2, 1)


def prefer(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device) -> Config:
    """Small arrays are spread over many threads, large ones take more elements a thread."""
    many = prod(outs[0].shape) > 2**20
    tried = ({"threads": 256, "vector": v, "items": 2 if many else 1} for v in _vectors(ins, outs))
    return next(c for c in tried if fits(op, ins, outs, device, **c) or c["vector"] == 1)


@template("pointwise", "cuda", space=SPACE, fits=fits, prefer=prefer)
def elementwise(
    op: Any,
    ins: Sequence[Spec],
    outs: Sequence[Spec],
    epilogue: Epilogue,
    *,
    threads: int,
    vector: int,
    items: int,
) -> Grid:
    """Each element once, in one pass over all operands."""
    out = outs[0]
    size, channels, lanes = out.size, (out.shape or (1,))[-1], vector
    reach = tuple(_reach(spec, out) for spec in ins)
    from_element = tuple(project(out.shape, spec.shape) for spec in ins)
    loads = tuple(
        (load_one if kind == "one" else load)(spec.dtype, lanes) for spec, kind in zip(ins, reach, strict=True)
    )
    scalar = op.scalar(tuple(f"x{i}" for i in range(len(ins))))
    apply = formula(scalar, tuple(spec.dtype for spec in ins), out.dtype, lanes)
    where = place(out.shape) if scalar.indexed else nowhere()
    end, last = tail(epilogue, lanes), store(out.dtype, lanes)
    operands, results = len(ins), len(outs)
    of_block = threads * lanes

    def kernel(ins: Any, outs: Any, work: Any, extras: Any, at: Any) -> None:
        first = cuda.blockIdx.x * (of_block * items) + cuda.threadIdx.x * lanes
        for item in unroll(items):
            element = first + item * of_block
            active = element < size
            values = ()
            for k in unroll(operands):
                if reach[k] == "element":
                    values = append(values, loads[k](active, ins[k], element))
                else:
                    values = append(values, loads[k](active, ins[k], from_element[k](element)))
            found = apply(values, where(element, at))
            end.finish(active, outs[0], found[0], element, element % channels, extras, at)
            for k in unroll(results - 1):
                last(active, outs[k + 1], element, found[k + 1])

    return Grid(kernel, blocks_of(size, of_block * items), threads)
