"""Pointwise choices: the larger or smaller of two, limits, a choice by a condition, comparisons.

Gradients go to the operand that was chosen. Ties are as in PyTorch: two equal operands of a maximum get
half each, and a number that lies on a limit of `Clip` passes its gradient on.
"""

from __future__ import annotations

from typing import Any

from ..errors import SettingError
from ..spec import Spec
from . import formula as f
from .base import Reject, Sample
from .pointwise import Pointwise, unbroadcast

_ROW = (Spec((3, 5)),)
_ROWS = (Spec((3, 5)), Spec((3, 5)))
_CHANNEL = (Spec((2, 3, 4)), Spec((4,)))
_TRUTH = {0: (0, 2)}


class Maximum(Pointwise):
    """y = the larger of a and b; NaN where one of them is NaN"""

    def formula(self, a: Any, b: Any) -> Any:
        return f.where(f.equal(b, b), f.maximum(a, b), b)  # f.maximum alone keeps a NaN of a only

    def vjp(self, dy: Any, y: Any, *inputs: Any) -> tuple[Any, ...]:
        a, b = inputs
        return unbroadcast(WinnerGrad()(dy, a, b), a), unbroadcast(WinnerGrad()(dy, b, a), b)

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return tuple(Sample(cls(), ins) for ins in (_ROWS, _CHANNEL))

    @classmethod
    def rejects(cls) -> tuple[Reject, ...]:
        return (Reject(cls(), (Spec((2, 3)), Spec((2,))), "maximum: operands do not broadcast"),)


class Minimum(Pointwise):
    """y = the smaller of a and b; NaN where one of them is NaN"""

    def formula(self, a: Any, b: Any) -> Any:
        return f.where(f.equal(b, b), f.minimum(a, b), b)

    def vjp(self, dy: Any, y: Any, *inputs: Any) -> tuple[Any, ...]:
        a, b = inputs
        return unbroadcast(WinnerGrad()(dy, b, a), a), unbroadcast(WinnerGrad()(dy, a, b), b)

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return tuple(Sample(cls(), ins) for ins in (_ROWS, _CHANNEL))

    @classmethod
    def rejects(cls) -> tuple[Reject, ...]:
        return (Reject(cls(), (Spec((2, 3)), Spec((2,))), "minimum: operands do not broadcast"),)


class WinnerGrad(Pointwise):
    """dx = dy where a > b, half of it where they are equal, else 0"""

    def formula(self, dy: Any, a: Any, b: Any) -> Any:
        return f.where(a > b, dy, f.where(f.equal(a, b), dy * 0.5, 0.0))

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (Sample(cls(), (*_ROWS, Spec((5,)))),)


class Clip(Pointwise):
    """y = x within the limits ``low`` and ``high``, each of which may be None"""

    low: float | None = None
    high: float | None = None

    def infer(self, *xs: Spec) -> Any:
        if self.low is None and self.high is None:
            raise SettingError("clip: there is neither low nor high. Give one limit, or both.")
        if self.low is not None and self.high is not None and not self.low <= self.high:
            raise SettingError(f"clip: low={self.low} is larger than high={self.high}. Exchange them.")
        return super().infer(*xs)

    def formula(self, x: Any) -> Any:
        y = x if self.low is None else f.maximum(x, float(self.low))
        return y if self.high is None else f.minimum(y, float(self.high))

    def vjp(self, dy: Any, y: Any, *inputs: Any) -> tuple[Any, ...]:
        return (ClipGrad(low=self.low, high=self.high)(dy, inputs[0]),)  # y does not tell x on a limit from x beyond

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (Sample(cls(low=-0.7, high=1.2), _ROW), Sample(cls(high=0.0), _ROW))

    @classmethod
    def rejects(cls) -> tuple[Reject, ...]:
        return (
            Reject(cls(), _ROW, "clip: there is neither low nor high"),
            Reject(cls(low=2.0, high=1.0), _ROW, "clip: low=2.0 is larger than high=1.0"),
        )


class ClipGrad(Pointwise):
    """dx = dy where low <= x <= high, else 0"""

    low: float | None = None
    high: float | None = None

    def formula(self, dy: Any, x: Any) -> Any:
        dx = dy if self.high is None else f.where(x <= float(self.high), dy, 0.0)
        return dx if self.low is None else f.where(x >= float(self.low), dx, 0.0)

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (Sample(cls(low=-0.7, high=1.2), _ROWS),)


class Where(Pointwise):
    """y = a where the condition is not zero, else b; the condition holds whole numbers or floats"""

    def infer(self, *xs: Spec) -> Any:
        condition, a, b = xs
        return super().infer(Spec(condition.shape, a.dtype), a, b)

    def formula(self, condition: Any, a: Any, b: Any) -> Any:
        return f.where(f.equal(condition, 0.0), b, a)

    def vjp(self, dy: Any, y: Any, *inputs: Any) -> tuple[Any, ...]:
        condition, a, b = inputs
        da, db = WhereGrad(of=1)(dy, condition), WhereGrad(of=0)(dy, condition)
        return None, unbroadcast(da, a), unbroadcast(db, b)

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (
            Sample(cls(), (Spec((3, 5), "uint8"), *_ROWS), _TRUTH),
            Sample(cls(), (Spec((3, 1), "int64"), Spec((3, 5)), Spec(())), _TRUTH),
        )

    @classmethod
    def rejects(cls) -> tuple[Reject, ...]:
        c, a = Spec((2, 3), "uint8"), Spec((2, 3))
        return (
            Reject(cls(), (Spec((2,), "uint8"), a, a), "where: operands do not broadcast"),
            Reject(cls(), (c, a, Spec((2, 3), "float64")), "where: operands have dtypes float32 and float64"),
        )


class WhereGrad(Pointwise):
    """dx = dy where operand ``of`` was chosen (1: the condition is not zero, 0: it is), else 0"""

    of: int

    def infer(self, *xs: Spec) -> Any:
        dy, condition = xs
        return super().infer(dy, Spec(condition.shape, dy.dtype))

    def formula(self, dy: Any, condition: Any) -> Any:
        zero = f.equal(condition, 0.0)
        return f.where(zero, 0.0, dy) if self.of else f.where(zero, dy, 0.0)

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return tuple(Sample(cls(of=of), (Spec((3, 5)), Spec((3, 1), "uint8")), {1: (0, 2)}) for of in (0, 1))


class Comparison(Pointwise, abstract=True):
    """1 where a relation holds, else 0, in the dtype of the operands. No gradient passes."""

    no_gradient = ("y",)

    def vjp(self, dy: Any, y: Any, *inputs: Any) -> tuple[Any, ...]:
        return None, None

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (Sample(cls(), _CHANNEL),)

    @classmethod
    def rejects(cls) -> tuple[Reject, ...]:
        return (Reject(cls(), (Spec((2, 3)), Spec((2,))), f"{cls.name}: operands do not broadcast"),)


class Greater(Comparison):
    """y = 1 where a > b, else 0"""

    def formula(self, a: Any, b: Any) -> Any:
        return f.where(a > b, 1.0, 0.0)


class Less(Comparison):
    """y = 1 where a < b, else 0"""

    def formula(self, a: Any, b: Any) -> Any:
        return f.where(a < b, 1.0, 0.0)


class Equal(Comparison):
    """y = 1 where a = b, else 0"""

    def formula(self, a: Any, b: Any) -> Any:
        return f.where(f.equal(a, b), 1.0, 0.0)

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (Sample(cls(), (Spec((3, 5), "int64"), Spec((5,), "int64")), {0: (0, 3), 1: (0, 3)}),)
