"""Elementary functions of one number, element by element: powers, exponential, logarithm, root, magnitude."""

from __future__ import annotations

from math import isfinite
from typing import Any

from ..errors import SettingError
from ..spec import Spec
from . import formula as f
from .base import Reject, Sample
from .pointwise import Divide, Multiply, Pointwise, Scale

_ROW = (Spec((3, 5)),)
_ROWS = (Spec((3, 5)), Spec((3, 5)))
MOST_PRODUCTS = 16  # whole exponents up to here are products: faster than a power, and as exact


def power(x: Any, exponent: float) -> Any:
    """x ** exponent as a formula. Whole exponents take any x; others give NaN where x is negative."""
    if exponent == 0.5:
        return f.sqrt(x)
    if not float(exponent).is_integer() or abs(exponent) > MOST_PRODUCTS:
        return f.power(x, float(exponent))
    left, factor = abs(int(exponent)), x
    y: Any = None
    if not left:
        return f.where(x > 0.0, 1.0, 1.0)  # not a bare constant: kernels take the shape from x
    while left:
        if left % 2:
            y = factor if y is None else y * factor
        left //= 2
        factor = factor * factor if left else factor
    return 1.0 / y if exponent < 0 else y


class Power(Pointwise):
    """y = x ** exponent, for a constant. NaN where x is negative and the exponent not whole; x ** 0 is 1."""

    exponent: float

    def infer(self, *xs: Spec) -> Any:
        if not isfinite(self.exponent):
            raise SettingError(f"power: the exponent {self.exponent} is not a finite number.")
        return super().infer(*xs)

    def formula(self, x: Any) -> Any:
        return power(x, self.exponent)

    def vjp(self, dy: Any, y: Any, *inputs: Any) -> tuple[Any, ...]:
        if self.exponent in (0.0, 1.0):
            return (Scale(by=float(self.exponent))(dy),)
        return (PowerGrad(exponent=self.exponent)(dy, inputs[0]),)

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (
            Sample(cls(exponent=3.0), _ROW),
            Sample(cls(exponent=-2.0), _ROW, {0: (-2.0, -0.5)}),
            Sample(cls(exponent=1.7), _ROW, {0: (0.5, 2.0)}),
        )

    @classmethod
    def rejects(cls) -> tuple[Reject, ...]:
        return (Reject(cls(exponent=float("inf")), _ROW, "power: the exponent inf is not a finite number"),)


class PowerGrad(Pointwise):
    """dx = dy exponent x ** (exponent - 1)"""

    exponent: float

    def formula(self, dy: Any, x: Any) -> Any:
        return dy * (power(x, self.exponent - 1.0) * float(self.exponent))

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (Sample(cls(exponent=3.0), _ROWS), Sample(cls(exponent=1.7), _ROWS, {1: (0.5, 2.0)}))


class Exp(Pointwise):
    """y = exp(x)"""

    def formula(self, x: Any) -> Any:
        return f.exp(x)

    def vjp(self, dy: Any, y: Any, *inputs: Any) -> tuple[Any, ...]:
        return (Multiply()(dy, y),)

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (Sample(cls(), _ROW),)


class Log(Pointwise):
    """y = log(x), the natural logarithm; NaN where x is negative"""

    def formula(self, x: Any) -> Any:
        return f.log(x)

    def vjp(self, dy: Any, y: Any, *inputs: Any) -> tuple[Any, ...]:
        return (Divide()(dy, inputs[0]),)

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (Sample(cls(), _ROW, {0: (0.1, 4.0)}),)


class Sqrt(Pointwise):
    """y = the root of x; NaN where x is negative. The gradient at 0 is not finite."""

    def formula(self, x: Any) -> Any:
        return f.sqrt(x)

    def vjp(self, dy: Any, y: Any, *inputs: Any) -> tuple[Any, ...]:
        return (Divide()(Scale(by=0.5)(dy), y),)

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (Sample(cls(), _ROW, {0: (0.1, 4.0)}),)


class Abs(Pointwise):
    """y = x where x > 0, else -x"""

    def formula(self, x: Any) -> Any:
        return f.absolute(x)

    def vjp(self, dy: Any, y: Any, *inputs: Any) -> tuple[Any, ...]:
        return (AbsGrad()(dy, inputs[0]),)

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (Sample(cls(), _ROW),)


class AbsGrad(Pointwise):
    """dx = dy where x > 0, -dy where x < 0, else 0"""

    def formula(self, dy: Any, x: Any) -> Any:
        return f.where(x > 0.0, dy, f.where(x < 0.0, -dy, 0.0))

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (Sample(cls(), _ROWS),)
