"""Learning rates as functions of the step, and other scalars that follow from it. Steps are numbered from 0.

The policies are Caffe's (Jia et al. 2014), half a cosine (Loshchilov, Hutter 2017) and a linear rise.
"""

from __future__ import annotations

from typing import Any

from ..spec import Spec
from . import formula as f
from .base import Sample
from .pointwise import Pointwise

STEP = Spec((), "int64")


class OfStep(Pointwise, abstract=True):
    """A scalar of dtype ``to`` that depends on the step."""

    to: str = "float32"

    def infer(self, *xs: Spec) -> Any:
        return Spec(xs[0].shape, self.to)

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (Sample(cls(to="float64"), (STEP,), {0: (0, 50)}),)


class BiasCorrection(OfStep):
    """1 / (1 - beta^(step + 1))"""

    beta: float = 0.9

    def formula(self, step: Any) -> Any:
        return 1.0 / (1.0 - f.power(self.beta, f.cast(step, self.to) + 1.0))


class ConstantRate(OfStep):
    """The same rate at every step"""

    rate: float = 0.1

    def formula(self, step: Any) -> Any:
        return f.cast(step, self.to) * 0.0 + self.rate


class StepDecay(OfStep):
    """rate * factor ^ floor(step / every): Caffe's policy 'step'"""

    rate: float = 0.1
    factor: float = 0.1
    every: int = 10

    def formula(self, step: Any) -> Any:
        middle = f.cast(step, self.to) + 0.5  # floor never sees a whole number, which division may round down
        return self.rate * f.power(self.factor, f.floor(middle / float(self.every)))

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        on_the_edge = tuple(Sample(cls(every=49, to=to), (STEP,), {0: (49, 50)}) for to in ("float32", "float64"))
        return (*super().samples(), *on_the_edge)


class MultistepDecay(OfStep):
    """rate * factor ^ (how many of ``steps`` are reached): Caffe's policy 'multistep'"""

    rate: float = 0.1
    factor: float = 0.1
    steps: tuple[int, ...] = (10, 20)

    def formula(self, step: Any) -> Any:
        now = f.cast(step, self.to)
        reached = sum((f.where(now >= float(at), 1.0, 0.0) for at in self.steps), 0.0 * now)
        return self.rate * f.power(self.factor, reached)


class ExponentialDecay(OfStep):
    """rate * factor ^ step: Caffe's policy 'exp'"""

    rate: float = 0.1
    factor: float = 0.99

    def formula(self, step: Any) -> Any:
        return self.rate * f.power(self.factor, f.cast(step, self.to))


class InverseDecay(OfStep):
    """rate * (1 + gamma step) ^ -power: Caffe's policy 'inv'"""

    rate: float = 0.1
    gamma: float = 0.01
    power: float = 0.75

    def formula(self, step: Any) -> Any:
        return self.rate * f.power(1.0 + self.gamma * f.cast(step, self.to), -self.power)


class PolynomialDecay(OfStep):
    """rate * (1 - step / steps) ^ power, 0 from ``steps`` on: Caffe's policy 'poly'"""

    rate: float = 0.1
    steps: int = 40
    power: float = 1.0

    def formula(self, step: Any) -> Any:
        rest = f.maximum(1.0 - f.cast(step, self.to) / float(self.steps), 0.0)
        return self.rate * f.power(rest, self.power)


class SigmoidDecay(OfStep):
    """rate / (1 + exp(-gamma (step - middle))): Caffe's policy 'sigmoid'; it falls where gamma < 0"""

    rate: float = 0.1
    gamma: float = -0.2
    middle: int = 20

    def formula(self, step: Any) -> Any:
        away = -self.gamma * (f.cast(step, self.to) - float(self.middle))
        return self.rate / (1.0 + f.exp(f.minimum(away, 80.0)))  # exp(80) is still a float32


class CosineDecay(OfStep):
    """Linear rise over ``warmup`` steps, then half a cosine to 0 at ``steps`` (Loshchilov, Hutter 2017)"""

    rate: float = 0.1
    steps: int = 40
    warmup: int = 0

    def formula(self, step: Any) -> Any:
        t = f.cast(step, self.to)
        rest = f.minimum(f.maximum((t - float(self.warmup)) / float(max(1, self.steps - self.warmup)), 0.0), 1.0)
        rise = f.minimum((t + 1.0) / float(self.warmup + 1), 1.0)
        return rise * self.rate * 0.5 * (1.0 + f.cos(rest * 3.141592653589793))


class LinearRise(OfStep):
    """From ``start`` at step 0 to 1 at ``steps``, and 1 from then on"""

    steps: int = 10
    start: float = 0.0

    def formula(self, step: Any) -> Any:
        share = f.minimum(f.cast(step, self.to) / float(self.steps), 1.0)
        return self.start + (1.0 - self.start) * share


class Turn(OfStep):
    """1 at the last step of every ``every``, else 0"""

    every: int = 4

    def formula(self, step: Any) -> Any:
        now, after = ((step + add) / float(self.every) for add in (0.5, 1.5))  # not cast: exact for any step
        return f.cast(f.floor(after) - f.floor(now), self.to)


class Turns(Pointwise):
    """How many times ``every`` steps are complete before this step: floor(step / every), a whole number"""

    every: int = 4

    def formula(self, step: Any) -> Any:
        return f.cast(f.floor(step / self.every), "int64")

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (Sample(cls(), (STEP,), {0: (0, 50)}),)
