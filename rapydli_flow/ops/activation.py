"""Activations: pointwise operators between layers, and their gradients.

A gradient reads the output where that tells the slope, so that the pre-activation need not be kept; it
reads the input where a value of the output comes from more than one place (GELU, Swish, PReLU).
Formulas are written so that no exponential overflows: all are exact at +-1000.
"""

from __future__ import annotations

from math import pi, sqrt
from typing import Any

from ..errors import SettingError
from ..spec import Spec
from . import formula as f
from .base import Op, Reject, Sample, refuse
from .pointwise import Pointwise, unbroadcast

_ROW = (Spec((3, 5)),)
_ROWS = (Spec((3, 5)), Spec((3, 5)))


class Relu(Pointwise):
    """y = max(x, 0)"""

    def formula(self, x: Any) -> Any:
        return f.maximum(x, 0.0)

    def vjp(self, dy: Any, y: Any, *inputs: Any) -> tuple[Any, ...]:
        return (ReluGrad()(dy, y),)

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (Sample(cls(), _ROW), Sample(cls(), (Spec((7,)),)))


class ReluGrad(Pointwise):
    """dx = dy where y > 0, else 0"""

    def formula(self, dy: Any, y: Any) -> Any:
        return f.where(y > 0.0, dy, 0.0)

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (Sample(cls(), _ROWS),)


class Tanh(Pointwise):
    """y = tanh(x)"""

    def formula(self, x: Any) -> Any:
        return f.tanh(x)

    def vjp(self, dy: Any, y: Any, *inputs: Any) -> tuple[Any, ...]:
        return (TanhGrad()(dy, y),)

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (Sample(cls(), _ROW),)


class TanhGrad(Pointwise):
    """dx = dy (1 - y^2)"""

    def formula(self, dy: Any, y: Any) -> Any:
        return dy * (1.0 - y * y)

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (Sample(cls(), _ROWS),)


def _not_negative(op: Op, field: str, value: float) -> None:
    if not value >= 0.0:
        raise SettingError(
            f"{op.name}: {field}={value} is not 0 or more; the sign of the output would not tell that of the input. "
            "Use nn.where for other branches."
        )


class LeakyRelu(Pointwise):
    """y = x where x > 0, else slope * x (Maas et al. 2013)"""

    slope: float = 0.01

    def infer(self, *xs: Spec) -> Any:
        _not_negative(self, "slope", self.slope)
        return super().infer(*xs)

    def formula(self, x: Any) -> Any:
        return f.where(x > 0.0, x, x * self.slope)

    def vjp(self, dy: Any, y: Any, *inputs: Any) -> tuple[Any, ...]:
        return (LeakyReluGrad(slope=self.slope)(dy, y),)

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (Sample(cls(slope=0.2), _ROW),)

    @classmethod
    def rejects(cls) -> tuple[Reject, ...]:
        return (Reject(cls(slope=-0.1), _ROW, "leaky_relu: slope=-0.1 is not 0 or more.*nn.where"),)


class LeakyReluGrad(Pointwise):
    """dx = dy where y > 0, else slope * dy"""

    slope: float = 0.01

    def formula(self, dy: Any, y: Any) -> Any:
        return f.where(y > 0.0, dy, dy * self.slope)

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (Sample(cls(slope=0.2), _ROWS),)


class Prelu(Pointwise):
    """y = x where x > 0, else slope * x, for a slope that is trained (He et al. 2015)"""

    def infer(self, *xs: Spec) -> Any:
        x, slope = xs
        spec = super().infer(x, slope)
        if spec.shape != x.shape:
            rule = "slope has more elements than x along an axis"
            raise refuse(self, rule, {"x": x, "slope": slope}, "It has one value, or one for each channel.")
        return spec

    def formula(self, x: Any, slope: Any) -> Any:
        return f.where(x > 0.0, x, slope * x)

    def vjp(self, dy: Any, y: Any, *inputs: Any) -> tuple[Any, ...]:
        x, slope = inputs
        return PreluGrad()(dy, x, slope), unbroadcast(PreluSlopeGrad()(dy, x), slope)

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (Sample(cls(), (Spec((2, 3, 4)), Spec((4,)))), Sample(cls(), (*_ROW, Spec(()))))

    @classmethod
    def rejects(cls) -> tuple[Reject, ...]:
        return (Reject(cls(), (Spec((4,)), Spec((3, 4))), "prelu: slope has more elements than x"),)


class PreluGrad(Pointwise):
    """dx = dy where x > 0, else slope * dy"""

    def formula(self, dy: Any, x: Any, slope: Any) -> Any:
        return f.where(x > 0.0, dy, slope * dy)

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (Sample(cls(), (*_ROWS, Spec((5,)))),)


class PreluSlopeGrad(Pointwise):
    """The part of each element in the gradient of the slope: dy * x where x <= 0, else 0"""

    def formula(self, dy: Any, x: Any) -> Any:
        return f.where(x > 0.0, 0.0, dy * x)

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (Sample(cls(), _ROWS),)


class Elu(Pointwise):
    """y = x where x > 0, else alpha (exp(x) - 1) (Clevert et al. 2016)"""

    alpha: float = 1.0

    def infer(self, *xs: Spec) -> Any:
        _not_negative(self, "alpha", self.alpha)
        return super().infer(*xs)

    def formula(self, x: Any) -> Any:
        return f.where(x > 0.0, x, f.expm1(f.minimum(x, 0.0)) * self.alpha)

    def vjp(self, dy: Any, y: Any, *inputs: Any) -> tuple[Any, ...]:
        return (EluGrad(alpha=self.alpha)(dy, y),)

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (Sample(cls(alpha=0.7), _ROW),)

    @classmethod
    def rejects(cls) -> tuple[Reject, ...]:
        return (Reject(cls(alpha=-1.0), _ROW, "elu: alpha=-1.0 is not 0 or more"),)


class EluGrad(Pointwise):
    """dx = dy where y > 0, else dy (y + alpha)"""

    alpha: float = 1.0

    def formula(self, dy: Any, y: Any) -> Any:
        return f.where(y > 0.0, dy, dy * (y + self.alpha))

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (Sample(cls(alpha=0.7), _ROWS),)


def logistic(x: Any) -> Any:
    """1 / (1 + exp(-x)), from the exponential of what is not positive: it cannot overflow."""
    e = f.exp(-f.absolute(x))
    return f.where(x < 0.0, e, 1.0) / (e + 1.0)


class Sigmoid(Pointwise):
    """y = 1 / (1 + exp(-x))"""

    def formula(self, x: Any) -> Any:
        return logistic(x)

    def vjp(self, dy: Any, y: Any, *inputs: Any) -> tuple[Any, ...]:
        return (SigmoidGrad()(dy, y),)

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (Sample(cls(), _ROW), Sample(cls(), _ROW, {0: (-1e3, 1e3)}))


class SigmoidGrad(Pointwise):
    """dx = dy y (1 - y)"""

    def formula(self, dy: Any, y: Any) -> Any:
        return dy * y * (1.0 - y)

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (Sample(cls(), _ROWS),)


class Softplus(Pointwise):
    """y = log(1 + exp(x))"""

    def formula(self, x: Any) -> Any:
        return f.maximum(x, 0.0) + f.log1p(f.exp(-f.absolute(x)))

    def vjp(self, dy: Any, y: Any, *inputs: Any) -> tuple[Any, ...]:
        return (SoftplusGrad()(dy, y),)

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (Sample(cls(), _ROW), Sample(cls(), _ROW, {0: (-1e3, 1e3)}))


class SoftplusGrad(Pointwise):
    """dx = dy (1 - exp(-y)): the sigmoid of x, from the output"""

    def formula(self, dy: Any, y: Any) -> Any:
        return dy * -f.expm1(-y)

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (Sample(cls(), _ROWS, {1: (0.0, 4.0)}),)


class Swish(Pointwise):
    """y = x sigmoid(x), also called SiLU (Elfwing et al. 2018, Ramachandran et al. 2017)"""

    def formula(self, x: Any) -> Any:
        return x * logistic(x)

    def vjp(self, dy: Any, y: Any, *inputs: Any) -> tuple[Any, ...]:
        return (SwishGrad()(dy, inputs[0]),)

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (Sample(cls(), _ROW),)


class SwishGrad(Pointwise):
    """dx = dy s (1 + x (1 - s)), s = sigmoid(x)"""

    def formula(self, dy: Any, x: Any) -> Any:
        s = logistic(x)
        return dy * s * (1.0 + x * (1.0 - s))

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (Sample(cls(), _ROWS),)


GELU_FORMS = ("none", "tanh")
_SLOPE, _CUBE = sqrt(2.0 / pi), 0.044715  # of the tanh form, Hendrycks and Gimpel (2016)


class Gelu(Pointwise):
    """y = x (1 + erf(x / sqrt 2)) / 2, or its approximation by a tanh (Hendrycks, Gimpel 2016)"""

    approximate: str = "none"

    def infer(self, *xs: Spec) -> Any:
        if self.approximate not in GELU_FORMS:
            raise SettingError(f"gelu: approximate={self.approximate!r} is not one of {', '.join(GELU_FORMS)}.")
        return super().infer(*xs)

    def formula(self, x: Any) -> Any:
        if self.approximate == "tanh":
            return x * 0.5 * (1.0 + f.tanh((x + x * x * x * _CUBE) * _SLOPE))
        return x * 0.5 * (1.0 + f.erf(x * sqrt(0.5)))

    def vjp(self, dy: Any, y: Any, *inputs: Any) -> tuple[Any, ...]:
        return (GeluGrad(approximate=self.approximate)(dy, inputs[0]),)

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return tuple(Sample(cls(approximate=form), _ROW) for form in GELU_FORMS)

    @classmethod
    def rejects(cls) -> tuple[Reject, ...]:
        return (Reject(cls(approximate="erf"), _ROW, "gelu: approximate='erf' is not one of none, tanh"),)


class GeluGrad(Pointwise):
    """dx = dy (P(x) + x P'(x)), where y = x P(x)"""

    approximate: str = "none"

    def formula(self, dy: Any, x: Any) -> Any:
        if self.approximate == "tanh":
            t = f.tanh((x + x * x * x * _CUBE) * _SLOPE)
            return dy * 0.5 * (1.0 + t + x * (1.0 - t * t) * (1.0 + x * x * (3.0 * _CUBE)) * _SLOPE)
        return dy * (0.5 * (1.0 + f.erf(x * sqrt(0.5))) + x * f.exp(x * x * -0.5) * (0.5 * _SLOPE))

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return tuple(Sample(cls(approximate=form), _ROWS) for form in GELU_FORMS)
