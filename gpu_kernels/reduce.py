"""Sums over any axes, and their transpose: slabs, or rows where the last axes are short and summed; see both."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from rapydli_flow.spec import Spec
from rapydli_flow.template import Config, Device, Epilogue, Scalar, template

from . import elements, pointwise, row_program, rows, slab_program, slabs
from .formulas import Formula
from .grid import Grid
from .warp import sums

COPY = SimpleNamespace(scalar=lambda names: Scalar(tuple(names), (), tuple(names)))


def _slabs(op: Any, ins: Sequence[Spec], outs: Sequence[Spec]) -> slab_program.Program:
    return slab_program.Program((0,), sums(1), Formula(("a0 + x0",)), Formula(("a0",)))


def _rows(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], held: bool) -> row_program.Program:
    total = row_program.Phase(sums(1), Formula(("a0 + x0",)), Formula(("a0",)), ("total",))
    return row_program.Program((0,), (total,), Formula(("total",)), whole=False)


slabs.serve("sum", _slabs, lambda op, x: op.axes)
rows.serve("sum", _rows, rows.trailing(lambda op, x: op.axes), rows.contiguous(lambda op, x: op.axes))


def _whole(op: Any, x: Spec) -> tuple[Spec, ...]:
    """The operand with the summed axes in place."""
    return (Spec(tuple(1 if axis in op.axes else size for axis, size in enumerate(op.shape)), x.dtype),)


def _fits(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device, **config: Any) -> bool:
    return elements.fits(COPY, _whole(op, ins[0]), outs, device, **config)


def _prefer(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device) -> Config:
    return elements.prefer(COPY, _whole(op, ins[0]), outs, device)


@template("broadcast", "cuda", space=elements.SPACE, fits=_fits, prefer=_prefer)
def repeat(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], epilogue: Epilogue, **config: Any) -> Grid:
    """The pointwise kernel of a formula that says y = x."""
    grid: Grid = pointwise.elementwise(COPY, _whole(op, ins[0]), outs, epilogue, **config)
    return grid
