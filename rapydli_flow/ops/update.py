"""Update rules of optimizers, and learning rates as functions of the step.

All pointwise: any block of a parameter can be updated alone.
"""

from __future__ import annotations

from typing import Any

from ..spec import Spec
from . import formula as f
from .base import Sample
from .pointwise import Pointwise

_W = Spec((3, 4))
_STEP = Spec((), "int64")
_SMALL = (0.0, 0.1)


class Momentum(Pointwise):
    """m' = beta m + g + decay w; w' = w - rate m' (Polyak's heavy ball, as Caffe and PyTorch write it)"""

    beta: float = 0.9
    decay: float = 0.0
    outputs = ("w", "m")

    def formula(self, w: Any, m: Any, g: Any, rate: Any) -> Any:
        if self.decay:
            g = g + self.decay * w
        m = self.beta * m + g
        return w - rate * m, m

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        ins = (_W, _W, _W, Spec(()))
        return Sample(cls(), ins, {3: _SMALL}), Sample(cls(beta=0.5, decay=0.01), ins, {3: _SMALL})


class Descent(Pointwise):
    """w' = w - rate (g + decay w)"""

    decay: float = 0.0

    def formula(self, w: Any, g: Any, rate: Any) -> Any:
        return w - rate * (g + self.decay * w if self.decay else g)

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return Sample(cls(), (_W, _W, Spec(())), {2: _SMALL}), Sample(cls(decay=0.1), (_W, _W, Spec(())))


class Adam(Pointwise):
    """Adam (Kingma, Ba 2015): ``correct_1``, ``correct_2`` are 1 / (1 - beta^t)."""

    beta_1: float = 0.9
    beta_2: float = 0.999
    eps: float = 1e-8
    decay: float = 0.0
    outputs = ("w", "m", "v")

    def formula(self, w: Any, m: Any, v: Any, g: Any, rate: Any, correct_1: Any, correct_2: Any) -> Any:
        if self.decay:
            g = g + self.decay * w
        m = self.beta_1 * m + (1.0 - self.beta_1) * g
        v = self.beta_2 * v + (1.0 - self.beta_2) * g * g
        return w - rate * (m * correct_1) / (f.sqrt(v * correct_2) + self.eps), m, v

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        ins = (_W, _W, _W, _W, Spec(()), Spec(()), Spec(()))
        ranges = {2: (0.1, 1.0), 4: _SMALL, 5: (1.0, 2.0), 6: (1.0, 2.0)}
        return Sample(cls(), ins, ranges), Sample(cls(decay=0.1), ins, ranges)


class _OfStep(Pointwise, abstract=True):
    """A scalar of dtype ``to`` that depends on the step."""

    to: str = "float32"

    def infer(self, *xs: Spec) -> Any:
        return Spec(xs[0].shape, self.to)

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        ranges = {0: (0, 50)}
        return Sample(cls(), (_STEP,), ranges), Sample(cls(to="float64"), (_STEP,), ranges)


class BiasCorrection(_OfStep):
    """1 / (1 - beta^(step + 1))"""

    beta: float = 0.9

    def formula(self, step: Any) -> Any:
        return 1.0 / (1.0 - f.power(self.beta, f.cast(step, self.to) + 1.0))


class ConstantRate(_OfStep):
    """The same rate at every step"""

    rate: float = 0.1

    def formula(self, step: Any) -> Any:
        return f.cast(step, self.to) * 0.0 + self.rate


class StepDecay(_OfStep):
    """rate * factor ^ floor(step / every): Caffe's policy 'step'"""

    rate: float = 0.1
    factor: float = 0.1
    every: int = 10

    def formula(self, step: Any) -> Any:
        middle = f.cast(step, self.to) + 0.5  # floor never sees a whole number, which division may round down
        return self.rate * f.power(self.factor, f.floor(middle / float(self.every)))

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        on_the_edge = tuple(Sample(cls(every=49, to=to), (_STEP,), {0: (49, 50)}) for to in ("float32", "float64"))
        return (*super().samples(), *on_the_edge)


class CosineDecay(_OfStep):
    """Linear rise over ``warmup`` steps, then half a cosine to 0 at ``steps`` (Loshchilov, Hutter 2017)"""

    rate: float = 0.1
    steps: int = 40
    warmup: int = 0

    def formula(self, step: Any) -> Any:
        t = f.cast(step, self.to)
        rest = f.minimum(f.maximum((t - float(self.warmup)) / float(max(1, self.steps - self.warmup)), 0.0), 1.0)
        rise = f.minimum((t + 1.0) / float(self.warmup + 1), 1.0)
        return rise * self.rate * 0.5 * (1.0 + f.cos(rest * 3.141592653589793))
