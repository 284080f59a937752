"""Normalisation within samples: rows, with mean and variance in two phases; see `rows`.

A row is a sample, or a group of its channels at all positions, in runs of the channels of a group; `group_norm` serves
groups of few channels better. Elements are taken less the first of the row, so that a large mean does not cancel.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

from rapydli_flow.spec import Spec

from .formulas import Formula
from .row_program import Phase, Program, Runs
from .rows import serve
from .warp import sums


def members(op: Any, ins: Sequence[Spec], outs: Sequence[Spec]) -> int:
    """Elements of a mean."""
    return prod(outs[0].shape[len(outs[0].shape) - op.axes :]) // int(op.groups)


def _channels(op: Any, ins: Sequence[Spec], outs: Sequence[Spec]) -> int:
    return outs[0].shape[-1] // int(op.groups)


def _runs(op: Any, ins: Sequence[Spec], outs: Sequence[Spec]) -> Runs | None:
    return None if op.groups == 1 else Runs(_channels(op, ins, outs), outs[0].shape[-1], int(op.groups))


def _mean(op: Any, size: int, x: str) -> tuple[tuple[Phase, ...], str]:
    """The phase that finds the mean, if there is one, and what x less its mean is called then."""
    if not op.centered:
        return (), x
    mean = Formula((f"a0 * T({1.0 / size!r})",))
    return (Phase(sums(1), Formula((f"a0 + ({x} - first)",)), mean, ("mean",)),), f"({x} - first - mean)"


def _scale(op: Any, size: int) -> str:
    return f"T(1.0) / math.sqrt(a0 * T({1.0 / size!r}) + T({float(op.eps)!r}))"


def standardize(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], held: bool) -> Program:
    """y = (x - mean) scale"""
    size = members(op, ins, outs)
    phases, each = _mean(op, size, "x0")
    scale = Phase(sums(1), Formula((f"a0 + {each} * {each}",)), Formula((_scale(op, size),)), ("scale",))
    first = 0 if op.centered else None
    return Program((0,), (*phases, scale), Formula((f"{each} * scale",)), whole=True, first=first)


def standardize_grad(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], held: bool) -> Program:
    """dx = (dy - mean(dy) - (x - mean) mean(dy (x - mean)) scale^2) scale"""
    size = members(op, ins, outs)
    phases, each = _mean(op, size, "x1")
    absorb = Formula(("a0 + e * e", "a1 + x0", "a2 + x0 * e"), lines=(f"e = {each}",))
    shift = f"a1 * T({1.0 / size!r})" if op.centered else "T(0.0)"
    found = Formula(("s", shift, f"a2 * T({1.0 / size!r}) * s * s"), lines=(f"s = {_scale(op, size)}",))
    last = Phase(sums(3), absorb, found, ("scale", "shift", "slope"))
    out = Formula((f"(x0 - shift - {each} * slope) * scale",))
    first = 1 if op.centered else None
    return Program((0, 1), (*phases, last), out, whole=True, first=first)


serve("standardize", standardize, members, channels=_channels, runs=_runs)
serve("standardize_grad", standardize_grad, members, channels=_channels, runs=_runs)
