"""Tracing pointwise formulas: one Python expression runs on NumPy arrays and turns into source text.

A formula uses operators and the functions of this module. On arrays they compute; on an `Expr` they
build an expression, which `trace` writes out as a `Scalar` for Numba and Numba-CUDA. Constants take
the dtype of the op (``T(0.5)``), so that float32 stays float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..random import keep as _keep
from ..template import Scalar


class Expr:
    """A node of an expression over one element."""

    __slots__ = ("args", "code", "uses")
    __array_ufunc__ = None

    def __init__(self, code: str, *args: Any, uses: str = "") -> None:
        self.code, self.args, self.uses = code, args, uses

    def __add__(self, other: Any) -> Expr:
        return Expr("{} + {}", self, other)

    def __radd__(self, other: Any) -> Expr:
        return Expr("{} + {}", other, self)

    def __sub__(self, other: Any) -> Expr:
        return Expr("{} - {}", self, other)

    def __rsub__(self, other: Any) -> Expr:
        return Expr("{} - {}", other, self)

    def __mul__(self, other: Any) -> Expr:
        return Expr("{} * {}", self, other)

    def __rmul__(self, other: Any) -> Expr:
        return Expr("{} * {}", other, self)

    def __truediv__(self, other: Any) -> Expr:
        return Expr("{} / {}", self, other)

    def __rtruediv__(self, other: Any) -> Expr:
        return Expr("{} / {}", other, self)

    def __neg__(self) -> Expr:
        return Expr("-{}", self)

    def __gt__(self, other: Any) -> Expr:
        return Expr("{} > {}", self, other)

    def __ge__(self, other: Any) -> Expr:
        return Expr("{} >= {}", self, other)

    def __lt__(self, other: Any) -> Expr:
        return Expr("{} < {}", self, other)

    def __le__(self, other: Any) -> Expr:
        return Expr("{} <= {}", self, other)


def _function(text: str, numpy_function: Callable[..., Any], uses: str = "") -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        if any(isinstance(a, Expr) for a in args):
            return Expr(text, *args, uses=uses)
        return numpy_function(*args)

    return call


# NumPy has no erf; one call for each element is enough for the slow twin
_erf = np.vectorize(math.erf, otypes=[np.float64])

absolute = _function("math.fabs({})", np.abs)
cos = _function("math.cos({})", np.cos)
erf = _function("math.erf({})", lambda x: _erf(x).astype(np.asarray(x).dtype))
floor = _function("math.floor({})", np.floor)
exp = _function("math.exp({})", np.exp)
expm1 = _function("math.expm1({})", np.expm1)
log = _function("math.log({})", np.log)
log1p = _function("math.log1p({})", np.log1p)
sqrt = _function("math.sqrt({})", np.sqrt)
tanh = _function("math.tanh({})", np.tanh)
maximum = _function("({0} if not {0} <= {1} else {1})", np.maximum)
minimum = _function("({0} if not {0} >= {1} else {1})", np.minimum)
equal = _function("{} == {}", np.equal)
where = _function("({1} if {0} else {2})", np.where)
power = _function("{} ** {}", np.power)


def cast(x: Any, dtype: str) -> Any:
    """``x`` in the dtype of the op's output."""
    if isinstance(x, Expr):
        return Expr("T({})", x)
    with np.errstate(over="ignore"):  # what float16 cannot hold is infinite
        return np.asarray(x).astype(dtype)


def keep(seed: Any, step: Any, stream: int, index: Any, threshold: int) -> Any:
    """Dropout's decision for the element ``index``; see `rapydli_flow.random.keep`."""
    text = f"keep(U({{}}), U({{}}), U({stream}), U({{}}), U({threshold}))"
    if any(isinstance(a, Expr) for a in (seed, step, index)):
        return Expr(text, seed, step, index, uses="keep")
    u = np.uint64
    with np.errstate(over="ignore"):
        return _keep(np.asarray(seed, u), np.asarray(step, u), u(stream), index, u(threshold))


def trace(formula: Callable[..., Any], names: Sequence[str], *, indexed: bool = False) -> Scalar:
    """Run ``formula`` on symbols called ``names`` (and ``index``, last, if indexed); write the result out."""
    symbols = [Expr(name) for name in names]
    results = formula(*symbols, *([Expr("index")] if indexed else []))
    results = results if isinstance(results, tuple) else (results,)
    lines: list[str] = []
    seen: dict[int, str] = {}
    uses: dict[str, None] = {}

    def write(value: Any) -> str:
        if not isinstance(value, Expr):
            return f"T({value!r})" if not isinstance(value, bool | np.bool_) else repr(bool(value))
        if not value.args:
            return value.code
        if id(value) not in seen:
            text = value.code.format(*(write(arg) for arg in value.args))
            if value.uses:
                uses[value.uses] = None
            seen[id(value)] = f"t{len(lines)}"
            lines.append(f"t{len(lines)} = {text}")
        return seen[id(value)]

    return Scalar(tuple(names), *_finish(lines, [write(r) for r in results]), tuple(uses), indexed)


def _finish(lines: list[str], results: list[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    return tuple(lines), tuple(results)
