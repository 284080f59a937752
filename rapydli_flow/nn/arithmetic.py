"""Functions of single elements: powers, exponential, logarithm, magnitude, the larger and smaller, choices."""

from __future__ import annotations

from typing import Any

from ..errors import GraphError
from ..graph import Tensor
from ..ops import Abs, Clip, Exp, Fill, Log, Maximum, Minimum, Power, Sqrt, Where


def exp(x: Tensor) -> Any:
    """e to the power of x"""
    return Exp()(x)


def log(x: Tensor) -> Any:
    """The natural logarithm; NaN where x is negative."""
    return Log()(x)


def sqrt(x: Tensor) -> Any:
    """The square root; NaN where x is negative. Its gradient is not finite where x is 0."""
    return Sqrt()(x)


def abs(x: Tensor) -> Any:
    """The magnitude of x; its gradient is 0 where x is 0."""
    return Abs()(x)


def power(x: Tensor, exponent: float) -> Any:
    """x to the power of a number. NaN where x is negative, unless the exponent is whole."""
    return Power(exponent=float(exponent))(x)


def maximum(a: Tensor | float, b: Tensor | float) -> Any:
    """The larger of a and b, which broadcast; one may be a number. Equal ones get half the gradient each."""
    return Maximum()(*_pair("maximum", a, b))


def minimum(a: Tensor | float, b: Tensor | float) -> Any:
    """The smaller of a and b, which broadcast; one may be a number. Equal ones get half the gradient each."""
    return Minimum()(*_pair("minimum", a, b))


def clip(x: Tensor, low: float | None = None, high: float | None = None) -> Any:
    """x kept within low and high; one may be None. The gradient passes where low <= x <= high."""
    return Clip(low=None if low is None else float(low), high=None if high is None else float(high))(x)


def where(condition: Tensor, a: Tensor | float, b: Tensor | float) -> Any:
    """a where the condition is not 0, else b; all broadcast, and a or b may be a number.

    Conditions are whole numbers or floats, as ``x > y`` gives; no gradient passes through them. Of what
    was not chosen no gradient comes back, so that it may even be NaN.
    """
    if not isinstance(condition, Tensor):
        raise GraphError(f"where: the condition is {type(condition).__name__}, not a tensor. Write x > 0, for example.")
    return Where()(condition, *_pair("where", a, b))


def _pair(function: str, a: Tensor | float, b: Tensor | float) -> tuple[Tensor, Tensor]:
    """Two tensors: a number takes the dtype of the other operand, if it is a value of that."""
    for this, other in ((a, b), (b, a)):
        if isinstance(this, Tensor):
            if isinstance(other, int | float):
                dtype = this.dtype if this.spec.floating or float(other).is_integer() else "float32"
                made: Tensor = this.graph.add(Fill(value=float(other), shape=(), dtype=dtype))
                return (this, made) if this is a else (made, this)
            if isinstance(other, Tensor):
                return a, b  # type: ignore[return-value]
    given = f"{type(a).__name__} and {type(b).__name__}"
    raise GraphError(f"{function}: the operands are {given}. One is a tensor, the other a tensor or a number.")
