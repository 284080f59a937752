"""Losses and scores of rows of class scores, and their gradients; see `rows`.

A label that is no class gives a loss that is not a number, instead of reading elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rapydli_flow.spec import Spec

from .formulas import Formula
from .row_program import Phase, Program, exponentials
from .rows import serve
from .warp import FIRST_LARGEST, sums

SCORE = Formula(("(picked if label >= 0 else T(math.nan))",))


def _cross_entropy(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], held: bool) -> Program:
    phases, _ = exponentials(held, change=False)
    score, s = "score - top", float(op.smoothing)
    if s:
        mean = Phase(
            sums(1), Formula(("a0 + (x0 - top)",)), Formula((f"a0 * T({s / ins[0].shape[-1]!r})",)), ("others",)
        )
        phases, score = (*phases, mean), f"(score - top) * T({1.0 - s!r}) + others"
    out = Formula((f"log_total - ({score})",))
    return Program((0,), phases, out, whole=False, label=1, picked=0, prepare=SCORE, names=("score",))


def _cross_entropy_grad(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], held: bool) -> Program:
    phases, value = exponentials(held)
    s = float(op.smoothing)
    less = f" - T({s / ins[1].shape[-1]!r})" if s else ""
    out = Formula((f"({value} * share{less} - (T({1.0 - s!r}) if j == label else T(0.0))) * e0",))
    return Program((1,), phases, out, whole=True, label=2, each=(0,))


def _slope(op: Any, margin: str) -> str:
    steep = f"({margin}) + ({margin})" if op.power == 2 else "T(1.0)"
    return f"(T(0.0) if {margin} <= T(0.0) else {steep})"


def _hinge(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], held: bool) -> Program:
    margin = "((T(1.0) - x0) if j == label else (T(1.0) + x0))"
    if not op.one_against_all:
        margin = "(T(0.0) if j == label else (T(1.0) + x0 - score))"
    lines = (f"m = {margin}", "n = (T(0.0) if m <= T(0.0) else m)")
    absorb = Formula(("a0 + n * n" if op.power == 2 else "a0 + n",), lines=lines)
    share = 1.0 if op.one_against_all else 1.0 / ins[0].shape[-1]
    phase = Phase(sums(1), absorb, Formula(("a0",)), ("total",))
    out = Formula((f"(total + (score - score)) * T({share!r})",))
    return Program((0,), (phase,), out, whole=False, label=1, picked=0, prepare=SCORE, names=("score",))


def _hinge_grad(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], held: bool) -> Program:
    known: dict[str, Any] = {"label": 2, "each": (0,), "picked": 1, "prepare": SCORE, "names": ("score",)}
    if op.one_against_all:
        lines: tuple[str, ...] = ("own = T(1.0) - x0", "other = T(1.0) + x0")
        g = f"(-{_slope(op, 'own')} if j == label else {_slope(op, 'other')})"
        return Program((1,), (), Formula((f"{g} * e0",), lines=lines), whole=True, **known)
    lines = ("m = T(1.0) + x0 - score",)
    absorb = Formula((f"a0 + (T(0.0) if j == label else {_slope(op, 'm')})",), lines=lines)
    phase = Phase(sums(1), absorb, Formula(("a0",)), ("pulled",))
    share = 1.0 / ins[1].shape[-1]
    out = Formula((f"((-pulled) if j == label else {_slope(op, 'm')}) * T({share!r}) * e0",), lines=lines)
    return Program((1,), (phase,), out, whole=True, **known)


def _at_label(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], held: bool) -> Program:
    out = Formula(("score",))
    return Program((), (), out, whole=False, label=1, picked=0, prepare=SCORE, names=("score",))


def _at_label_grad(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], held: bool) -> Program:
    return Program((), (), Formula(("(e0 if j == label else T(0.0))",)), whole=True, label=1, each=(0,))


def _correct(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], held: bool) -> Program:
    lines = ("wins = (x0 > a0) | ((x0 != x0) & (a0 == a0)) | ((x0 == a0) & (j < a1))",)
    absorb = Formula(("(x0 if wins else a0)", "(j if wins else a1)"), dtypes=("float32", "int32"), lines=lines)
    phase = Phase(FIRST_LARGEST, absorb, Formula(("a1",), dtypes=("int32",)), ("where",))
    return Program((0,), (phase,), Formula(("(T(1.0) if where == label else T(0.0))",)), whole=False, label=1)


def _in_top(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], held: bool) -> Program:
    lines = (
        "larger_ = (x0 > picked) | ((x0 != x0) & (picked == picked))",
        "tie = (x0 == picked) | ((x0 != x0) & (picked != picked))",
        "before = larger_ | (tie & (j < label))",
    )
    absorb = Formula(("a0 + (T(1.0) if before else T(0.0))",), lines=lines)
    phase = Phase(sums(1), absorb, Formula(("a0",)), ("count",))
    out = Formula((f"(T(1.0) if (label >= 0) & (count < T({op.k})) else T(0.0))",))
    return Program((0,), (phase,), out, whole=False, label=1, picked=0)


serve("cross_entropy", _cross_entropy)
serve("cross_entropy_grad", _cross_entropy_grad)
serve("hinge", _hinge)
serve("hinge_grad", _hinge_grad)
serve("at_label", _at_label)
serve("at_label_grad", _at_label_grad)
serve("correct", _correct)
serve("in_top", _in_top)
