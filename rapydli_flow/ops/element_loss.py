"""Losses of single elements: pointwise operators of a prediction, or of its difference from a target."""

from __future__ import annotations

from typing import Any

from ..errors import SettingError
from ..spec import Spec
from . import formula as f
from .activation import logistic
from .base import Reject, Sample, spec_of
from .pointwise import Multiply, Pointwise, Scale, unbroadcast

_ROW = (Spec((3, 5)),)
_ROWS = (Spec((3, 5)), Spec((3, 5)))


class SmoothL1(Pointwise):
    """y = x^2 / (2 beta) where |x| < beta, else |x| - beta / 2 (Girshick 2015)"""

    beta: float = 1.0

    def infer(self, *xs: Spec) -> Any:
        if not self.beta > 0.0:
            raise SettingError(f"smooth_l1: beta={self.beta} is not positive. For 0, use nn.mean_absolute_error.")
        return super().infer(*xs)

    def formula(self, x: Any) -> Any:
        size = f.absolute(x)
        return f.where(size < self.beta, x * x * (0.5 / self.beta), size - 0.5 * self.beta)

    def vjp(self, dy: Any, y: Any, *inputs: Any) -> tuple[Any, ...]:
        return (SmoothL1Grad(beta=self.beta)(dy, inputs[0]),)

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (Sample(cls(beta=0.8), _ROW),)

    @classmethod
    def rejects(cls) -> tuple[Reject, ...]:
        return (Reject(cls(beta=0.0), _ROW, "smooth_l1: beta=0.0 is not positive.*mean_absolute_error"),)


class SmoothL1Grad(Pointwise):
    """dx = dy x / beta, with x / beta kept within -1 and 1"""

    beta: float = 1.0

    def formula(self, dy: Any, x: Any) -> Any:
        return dy * f.maximum(f.minimum(x * (1.0 / self.beta), 1.0), -1.0)

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (Sample(cls(beta=0.8), _ROWS),)


class SigmoidCrossEntropy(Pointwise):
    """y = -t log(sigmoid(x)) - (1 - t) log(1 - sigmoid(x)), as max(x, 0) - x t + log(1 + exp(-|x|))"""

    def formula(self, x: Any, target: Any) -> Any:
        return f.maximum(x, 0.0) - x * target + f.log1p(f.exp(-f.absolute(x)))

    def vjp(self, dy: Any, y: Any, *inputs: Any) -> tuple[Any, ...]:
        x, target = inputs
        dx = unbroadcast(SigmoidCrossEntropyGrad()(dy, x, target), x)
        if not spec_of(target).floating:
            return dx, None
        return dx, unbroadcast(Scale(by=-1.0)(Multiply()(dy, x)), target)

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (
            Sample(cls(), _ROWS, {1: (0.0, 1.0)}),
            Sample(cls(), (*_ROW, Spec((3, 5), "uint8")), {0: (-1e3, 1e3), 1: (0, 2)}),
        )


class SigmoidCrossEntropyGrad(Pointwise):
    """dx = dy (sigmoid(x) - t)"""

    def formula(self, dy: Any, x: Any, target: Any) -> Any:
        return dy * (logistic(x) - target)

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (Sample(cls(), (*_ROWS, Spec((3, 5)))),)
