"""What is done with rows that are reduced along memory, for `row_kernels`.

prepare   numbers of the row: its label, a value of another operand, the element at the label, the first one
phases    absorb all elements into a state, merge the states of a group of threads, derive numbers of the row from it
out       a formula for each element of the row, or one for the row
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rapydli_flow.spec import Spec

from .formulas import Formula
from .warp import EXPONENTIALS, MAXIMUM, Merge, sums


@dataclass(frozen=True)
class Phase:
    """One reduction of a row. ``change`` replaces operands first; only rows that are held can be changed."""

    merge: Merge
    absorb: Formula  # a0, .. are the state so far
    found: Formula  # numbers of the row, from the state
    names: tuple[str, ...]  # of these
    change: Formula | None = None


@dataclass(frozen=True)
class Program:
    """What is done with a row. Operands are numbers of inputs."""

    operands: tuple[int, ...]  # read along the row: x0, x1, ..
    phases: tuple[Phase, ...]
    out: Formula
    whole: bool  # a result for each element, or one for the row
    label: int | None = None  # whole numbers, one for each row: `label`, -1 where it is no class
    each: tuple[int, ...] = ()  # floats, one for each row: e0, ..
    picked: int | None = None  # of this operand the element at the label: `picked`, 0 where that is no class
    first: int | None = None  # of this operand the first element of the row: `first`
    prepare: Formula | None = None
    names: tuple[str, ...] = ()  # of what is prepared

    def row(self) -> tuple[str, ...]:
        """Names of the numbers of a row before its phases."""
        names: tuple[str, ...] = ("label",) if self.label is not None else ()
        names += tuple(f"e{k}" for k in range(len(self.each)))
        names += ("picked",) if self.picked is not None else ()
        return names + (("first",) if self.first is not None else ())


@dataclass(frozen=True)
class Runs:
    """How rows lie that are not in one piece: runs of ``run`` elements, each ``step`` behind the one before.

    ``beside`` rows lie beside each other, and fill the steps::

        [ row 0 | row 1 | .. ][ row 0 | row 1 | .. ] ..
    """

    run: int
    step: int
    beside: int


Programs = Callable[[Any, Sequence[Spec], Sequence[Spec], bool], Program]
"""``(op, ins, outs, held) -> Program``"""


def extent(p: Program, ins: Sequence[Spec], out: Spec, columns: int) -> tuple[int, int]:
    """Rows, and elements of a row."""
    if p.operands:
        return ins[p.operands[0]].size // columns, columns
    return (out.size // columns if p.whole else out.size), columns


def exponentials(held: bool, *, change: bool = True) -> tuple[tuple[Phase, ...], str]:
    """Phases that find `top`, the largest x0, `total`, the sum of exp(x0 - top), its reciprocal `share` and its
    logarithm `log_total`; and what exp(x0 - top) is called then.

    A row that is held is passed twice, and its exponentials are kept with ``change``; one that is streamed is
    passed once: the sum so far shrinks whenever a larger element comes.
    """
    found = ("{0}", "T(1.0) / {0}", "math.log({0})")
    names = ("total", "share", "log_total")
    if held:
        top = Phase(MAXIMUM, Formula(("larger(a0, x0)",)), Formula(("a0",)), ("top",))
        each = "x0" if change else "exp(x0 - top)"
        kept = Formula(("exp(x0 - top)",)) if change else None
        total = Phase(sums(1), Formula((f"a0 + {each}",)), Formula(tuple(f.format("a0") for f in found)), names, kept)
        return (top, total), each
    lines = ("d = x0 - a0", "e = exp(-abs(d))", "rises = d > T(0.0)")
    online = Formula(("larger(a0, x0)", "((a1 * e + T(1.0)) if rises else (a1 + e))"), lines=lines)
    # an infinite top makes the sum NaN
    results = ("a0", *(f.format("sum_") for f in found))
    ended = Formula(results, lines=("sum_ = a1 + (a0 - a0)",))
    return (Phase(EXPONENTIALS, online, ended, ("top", *names)),), "exp(x0 - top)"
