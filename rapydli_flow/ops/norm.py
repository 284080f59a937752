"""Batch normalisation as moments + normalize.

`Moments` gives sums over everything but channels, so ranks can add theirs and the statistics are
those of the whole batch. They are sums of ``x - shift``, with the running mean as shift: one pass,
without the cancellation of E[x^2] - E[x]^2 (shifted data algorithm; Chan, Golub, LeVeque 1983). Of an x of halves,
they may be float32, as its running mean is.
`Normalize` applies a mean and a variance, those of the batch or the running ones.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..spec import HALVES, Array, Spec
from . import formula as f
from .base import LETTERS, Op, Reject, Sample, refuse
from .pointwise import Multiply, Pointwise

_X = Spec((2, 3, 4, 5))
_C = Spec((5,))
_POSITIVE = (0.5, 2.0)


def _per_channel(op: Op, x: Spec, **channels: Spec) -> None:
    dtypes = (x.dtype, "float32") if x.dtype in HALVES else (x.dtype,)
    for name, spec in channels.items():
        if spec.shape != x.shape[-1:] or spec.dtype not in dtypes:
            rule = f"{name} must have one value for each of the {x.shape[-1]} channels of x, in its dtype"
            raise refuse(op, rule, {"x": x, **channels}, "Channels are the last axis.")


def _sums_index(x: Spec, full: int, channel: int) -> str:
    letters = " ".join(LETTERS[: len(x.shape) - 1])
    ins = [f"{letters} z"] * full + ["z"] * channel
    return f"{', '.join(ins)} -> z, z"


class Moments(Op):
    """sum = sum of (x - shift), squares = sum of (x - shift)^2, over all axes but the last."""

    outputs = ("sum", "squares")

    def infer(self, x: Spec, shift: Spec) -> tuple[Spec, Spec]:
        _per_channel(self, x, shift=shift)
        return shift, shift

    def index(self, x: Spec, shift: Spec) -> str:
        return _sums_index(x, 1, 1)

    def reference(self, x: Array, shift: Array) -> tuple[Array, Array]:
        d = (x - shift).reshape(-1, x.shape[-1])
        return d.sum(0, dtype=np.float64).astype(x.dtype), (d * d).sum(0, dtype=np.float64).astype(x.dtype)

    def vjp(self, dy: Any, y: Any, *inputs: Any) -> tuple[Any, ...]:
        x, shift = inputs
        return MomentsGrad()(x, shift, dy[0], dy[1]), None  # the running mean is not trained

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (Sample(cls(), (_X, _C)), Sample(cls(), (Spec((7, 3)), Spec((3,)))))

    @classmethod
    def rejects(cls) -> tuple[Reject, ...]:
        return (Reject(cls(), (_X, Spec((4,))), "moments: shift must have one value for each of the 5 channels"),)


class MomentsGrad(Pointwise):
    """dx = dsum + 2 (x - shift) dsquares"""

    def formula(self, x: Any, shift: Any, dsum: Any, dsquares: Any) -> Any:
        return dsum + 2.0 * (x - shift) * dsquares

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (Sample(cls(), (_X, _C, _C, _C)),)


class Statistics(Pointwise):
    """Mean and variance of ``count`` records from `Moments`, and the running ones after this step.

    mean = mean0 + sum / count; var = squares / count - (sum / count)^2;
    running = momentum * running + (1 - momentum) * now. The running ones carry no gradient.
    """

    count: int
    momentum: float = 0.9
    outputs = ("mean", "var", "running_mean", "running_var")
    no_gradient = ("running_mean", "running_var")

    def formula(self, total: Any, squares: Any, mean0: Any, var0: Any) -> Any:
        shift = total * (1.0 / self.count)
        mean = mean0 + shift
        var = f.maximum(squares * (1.0 / self.count) - shift * shift, 0.0)
        old, new = self.momentum, 1.0 - self.momentum
        return mean, var, old * mean0 + new * mean, old * var0 + new * var

    def vjp(self, dy: Any, y: Any, *inputs: Any) -> tuple[Any, ...]:
        dsum, dsquares = StatisticsSumsGrad(count=self.count)(dy[0], dy[1], inputs[0])
        return dsum, dsquares, None, None

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (Sample(cls(count=6, momentum=0.8), (_C, _C, _C, _C), {1: (2.0, 3.0)}),)


class StatisticsSumsGrad(Pointwise):
    """Gradients of `Statistics` with respect to the sums."""

    count: int
    outputs = ("dsum", "dsquares")

    def formula(self, dmean: Any, dvar: Any, total: Any) -> Any:
        one = 1.0 / self.count
        return dmean * one - (2.0 * one * one) * total * dvar, dvar * one

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (Sample(cls(count=6), (_C, _C, _C)),)


class NormalizeScale(Pointwise):
    """scale = gain / sqrt(var + eps): what batch normalisation multiplies a channel by"""

    eps: float = 1e-5

    def formula(self, var: Any, gain: Any) -> Any:
        return gain / f.sqrt(var + self.eps)

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (Sample(cls(), (_C, _C), {0: _POSITIVE}),)


class NormalizeBy(Pointwise):
    """y = (x - mean) scale + bias"""

    def formula(self, x: Any, mean: Any, scale: Any, bias: Any) -> Any:
        return (x - mean) * scale + bias

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (Sample(cls(), (_X, _C, _C, _C)),)


class Normalize(Pointwise):
    """y = (x - mean) / sqrt(var + eps) * gain + bias"""

    eps: float = 1e-5

    def once_a_channel(self, *inputs: Any) -> tuple[Op, tuple[Any, ...]]:
        x, mean, var, gain, bias = inputs
        return NormalizeBy(), (x, mean, NormalizeScale(eps=self.eps)(var, gain), bias)

    def formula(self, x: Any, mean: Any, var: Any, gain: Any, bias: Any) -> Any:
        return (x - mean) / f.sqrt(var + self.eps) * gain + bias

    def vjp(self, dy: Any, y: Any, *inputs: Any) -> tuple[Any, ...]:
        x, mean, var, gain, _ = inputs
        dbias, dgain = NormalizeSums(eps=self.eps)(dy, x, mean, var)
        dmean, dvar = StatisticsGrad(eps=self.eps)(var, gain, dbias, dgain)
        return NormalizeGrad(eps=self.eps)(dy, var, gain), dmean, dvar, dgain, dbias

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (Sample(cls(), (_X, _C, _C, _C, _C), {2: _POSITIVE}),)


class NormalizeGrad(Pointwise):
    """dx = dy gain / sqrt(var + eps): the part that does not go through the statistics"""

    eps: float = 1e-5

    def once_a_channel(self, *inputs: Any) -> tuple[Op, tuple[Any, ...]]:
        dy, var, gain = inputs
        return Multiply(), (dy, NormalizeScale(eps=self.eps)(var, gain))

    def formula(self, dy: Any, var: Any, gain: Any) -> Any:
        return dy * (gain / f.sqrt(var + self.eps))

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (Sample(cls(), (_X, _C, _C), {1: _POSITIVE}),)


class NormalizeSums(Op):
    """dbias = sum of dy, dgain = sum of dy (x - mean) / sqrt(var + eps), over all axes but the last."""

    eps: float = 1e-5
    outputs = ("dbias", "dgain")

    def infer(self, dy: Spec, x: Spec, mean: Spec, var: Spec) -> tuple[Spec, Spec]:
        _per_channel(self, x, mean=mean, var=var)
        if dy != x:
            raise refuse(self, "dy must be like x", {"dy": dy, "x": x}, "Both are N,*space,C.")
        return mean, mean

    def index(self, dy: Spec, x: Spec, mean: Spec, var: Spec) -> str:
        return _sums_index(x, 2, 2)

    def reference(self, dy: Array, x: Array, mean: Array, var: Array) -> tuple[Array, Array]:
        c = x.shape[-1]
        z = (x - mean) / np.sqrt(var + np.asarray(self.eps, x.dtype))
        dbias = dy.reshape(-1, c).sum(0, dtype=np.float64).astype(x.dtype)
        return dbias, (dy * z).reshape(-1, c).sum(0, dtype=np.float64).astype(x.dtype)

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (Sample(cls(), (_X, _X, _C, _C), {3: _POSITIVE}),)

    @classmethod
    def rejects(cls) -> tuple[Reject, ...]:
        return (
            Reject(cls(), (_X, _X, _C, Spec((4,))), "normalize_sums: var must have one value for each of the 5"),
            Reject(cls(), (_C, _X, _C, _C), "normalize_sums: dy must be like x"),
        )


class StatisticsGrad(Pointwise):
    """Gradients of `Normalize` with respect to mean and variance, from its sums."""

    eps: float = 1e-5
    outputs = ("dmean", "dvar")

    def formula(self, var: Any, gain: Any, dbias: Any, dgain: Any) -> Any:
        return -gain * dbias / f.sqrt(var + self.eps), -0.5 * gain * dgain / (var + self.eps)

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (Sample(cls(), (_C, _C, _C, _C), {0: _POSITIVE}),)
