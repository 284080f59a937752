"""Softmax, its logarithm, and their gradients: rows that are passed once where they fit in registers; see `rows`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rapydli_flow.spec import Spec

from .formulas import Formula
from .row_program import Phase, Program, exponentials
from .rows import serve
from .warp import sums


def _softmax(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], held: bool) -> Program:
    phases, value = exponentials(held)
    return Program((0,), phases, Formula((f"{value} * share",)), whole=True)


def _log_softmax(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], held: bool) -> Program:
    phases, _ = exponentials(held, change=False)
    return Program((0,), phases, Formula(("x0 - top - log_total",)), whole=True)


def _softmax_grad(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], held: bool) -> Program:
    dot = Phase(sums(1), Formula(("a0 + x0 * x1",)), Formula(("a0",)), ("dot",))
    return Program((0, 1), (dot,), Formula(("x1 * (x0 - dot)",)), whole=True)


def _log_softmax_grad(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], held: bool) -> Program:
    total = Phase(sums(1), Formula(("a0 + x0",)), Formula(("a0",)), ("total",))
    return Program((0, 1), (total,), Formula(("x0 - exp(x1) * total",)), whole=True)


serve("softmax", _softmax)
serve("log_softmax", _log_softmax)
serve("softmax_grad", _softmax_grad)
serve("log_softmax_grad", _log_softmax_grad)
