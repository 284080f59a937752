"""Normalisation of samples of one group: rows, with mean and variance in two phases; see `rows`.

Elements are taken less the first of the row, so that a large mean does not cancel.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

from rapydli_flow.spec import Spec
from rapydli_flow.template import Device

from .rows import Phase, Program, serve
from .warp import Formula, sums


def _columns(op: Any, ins: Sequence[Spec], outs: Sequence[Spec]) -> int:
    return prod(outs[0].shape[len(outs[0].shape) - op.axes :])


def _channels(op: Any, ins: Sequence[Spec], outs: Sequence[Spec]) -> int:
    return outs[0].shape[-1]


def _one_group(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device) -> bool:
    return bool(op.groups == 1)


def _phases(op: Any, size: int, x: str) -> tuple[tuple[Phase, ...], str]:
    """Phases that find `scale`, and what x less its mean is called then."""
    each, phases = x, ()
    if op.centered:
        mean = Formula((f"a0 * T({1.0 / size!r})",))
        phases, each = (Phase(sums(1), Formula((f"a0 + ({x} - first)",)), mean, ("mean",)),), f"({x} - first - mean)"
    scale = Formula((f"T(1.0) / math.sqrt(a0 * T({1.0 / size!r}) + T({float(op.eps)!r}))",))
    return (*phases, Phase(sums(1), Formula((f"a0 + {each} * {each}",)), scale, ("scale",))), each


def _standardize(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], held: bool) -> Program:
    phases, each = _phases(op, _columns(op, ins, outs), "x0")
    first = 0 if op.centered else None
    return Program((0,), phases, Formula((f"{each} * scale",)), whole=True, first=first)


def _standardize_grad(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], held: bool) -> Program:
    size = _columns(op, ins, outs)
    phases, each = _phases(op, size, "x1")
    along = Formula((f"a0 * T({1.0 / size!r})" if op.centered else "T(0.0)", f"a1 * T({1.0 / size!r}) * scale * scale"))
    last = Phase(sums(2), Formula(("a0 + x0", f"a1 + x0 * {each}")), along, ("shift", "slope"))
    out = Formula((f"(x0 - shift - {each} * slope) * scale",))
    first = 1 if op.centered else None
    return Program((0, 1), (*phases, last), out, whole=True, first=first)


serve("standardize", _standardize, _columns, _one_group, _channels)
serve("standardize_grad", _standardize_grad, _columns, _one_group, _channels)
