"""Update rules of optimizers, and what happens to gradients before them and to parameters after them.

All pointwise: any block of a parameter can be updated alone. ``decay`` is an L2 penalty: it adds
``decay w`` to the gradient. w' is the new w; the formulas are PyTorch's.
"""

from __future__ import annotations

from typing import Any

from ..spec import Spec
from . import formula as f
from .base import Sample
from .pointwise import Pointwise

_W = Spec((3, 4))
_SMALL = (0.0, 0.1)
_SQUARE = (0.1, 1.0)


class Momentum(Pointwise):
    """m' = beta m + g + decay w; w' = w - rate m' (Polyak's heavy ball, as Caffe and PyTorch write it)

    ``nesterov``: w' = w - rate (g + decay w + beta m') (Sutskever et al. 2013, as PyTorch writes it).
    """

    beta: float = 0.9
    decay: float = 0.0
    nesterov: bool = False
    outputs = ("w", "m")

    def formula(self, w: Any, m: Any, g: Any, rate: Any) -> Any:
        g = _decayed(g, w, self.decay)
        m = self.beta * m + g
        return w - rate * (g + self.beta * m if self.nesterov else m), m

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        ins = (_W, _W, _W, Spec(()))
        return Sample(cls(), ins, {3: _SMALL}), Sample(cls(beta=0.5, decay=0.01, nesterov=True), ins, {3: _SMALL})


class Descent(Pointwise):
    """w' = w - rate (g + decay w)"""

    decay: float = 0.0

    def formula(self, w: Any, g: Any, rate: Any) -> Any:
        return w - rate * _decayed(g, w, self.decay)

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return Sample(cls(), (_W, _W, Spec(())), {2: _SMALL}), Sample(cls(decay=0.1), (_W, _W, Spec(())))


class Adagrad(Pointwise):
    """v' = v + g^2; w' = w - rate g / (sqrt(v') + eps) (Duchi et al. 2011)"""

    eps: float = 1e-10
    decay: float = 0.0
    outputs = ("w", "v")

    def formula(self, w: Any, v: Any, g: Any, rate: Any) -> Any:
        g = _decayed(g, w, self.decay)
        v = v + g * g
        return w - rate * g / (f.sqrt(v) + self.eps), v

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (Sample(cls(decay=0.1), (_W, _W, _W, Spec(())), {1: _SQUARE, 3: _SMALL}),)


class Rmsprop(Pointwise):
    """v' = alpha v + (1 - alpha) g^2; w' = w - rate g / (sqrt(v') + eps) (Tieleman, Hinton 2012)"""

    alpha: float = 0.99
    eps: float = 1e-8
    decay: float = 0.0
    outputs = ("w", "v")

    def formula(self, w: Any, v: Any, g: Any, rate: Any) -> Any:
        g = _decayed(g, w, self.decay)
        v = self.alpha * v + (1.0 - self.alpha) * g * g
        return w - rate * g / (f.sqrt(v) + self.eps), v

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (Sample(cls(decay=0.1), (_W, _W, _W, Spec(())), {1: _SQUARE, 3: _SMALL}),)


class RmspropMomentum(Pointwise):
    """v' = alpha v + (1 - alpha) g^2; m' = beta m + g / (sqrt(v') + eps); w' = w - rate m'"""

    alpha: float = 0.99
    eps: float = 1e-8
    decay: float = 0.0
    beta: float = 0.9
    outputs = ("w", "v", "m")

    def formula(self, w: Any, v: Any, m: Any, g: Any, rate: Any) -> Any:
        g = _decayed(g, w, self.decay)
        v = self.alpha * v + (1.0 - self.alpha) * g * g
        m = self.beta * m + g / (f.sqrt(v) + self.eps)
        return w - rate * m, v, m

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (Sample(cls(decay=0.1), (_W, _W, _W, _W, Spec(())), {1: _SQUARE, 4: _SMALL}),)


class Adadelta(Pointwise):
    """v' = rho v + (1 - rho) g^2; s = g sqrt(d + eps) / sqrt(v' + eps); d' = rho d + (1 - rho) s^2; w' = w - rate s

    Zeiler 2012.
    """

    rho: float = 0.9
    eps: float = 1e-6
    decay: float = 0.0
    outputs = ("w", "v", "d")

    def formula(self, w: Any, v: Any, d: Any, g: Any, rate: Any) -> Any:
        g = _decayed(g, w, self.decay)
        v = self.rho * v + (1.0 - self.rho) * g * g
        s = f.sqrt(d + self.eps) / f.sqrt(v + self.eps) * g
        return w - rate * s, v, self.rho * d + (1.0 - self.rho) * s * s

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        ranges = {1: _SQUARE, 2: _SQUARE, 4: _SMALL}
        return (Sample(cls(decay=0.1), (_W, _W, _W, _W, Spec(())), ranges),)


class Adam(Pointwise):
    """Adam (Kingma, Ba 2015): ``correct_1``, ``correct_2`` are 1 / (1 - beta^t).

    m' = beta_1 m + (1 - beta_1) g; v' = beta_2 v + (1 - beta_2) g^2;
    w' = w - rate (m' correct_1) / (sqrt(v' correct_2) + eps).
    ``decoupled``: decay is no part of g, but w shrinks by rate decay w first (Loshchilov, Hutter 2019).
    """

    beta_1: float = 0.9
    beta_2: float = 0.999
    eps: float = 1e-8
    decay: float = 0.0
    decoupled: bool = False
    outputs = ("w", "m", "v")

    def formula(self, w: Any, m: Any, v: Any, g: Any, rate: Any, correct_1: Any, correct_2: Any) -> Any:
        if self.decoupled:
            w = w - rate * self.decay * w
        else:
            g = _decayed(g, w, self.decay)
        m = self.beta_1 * m + (1.0 - self.beta_1) * g
        v = self.beta_2 * v + (1.0 - self.beta_2) * g * g
        return w - rate * (m * correct_1) / (f.sqrt(v * correct_2) + self.eps), m, v

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        ins = (_W, _W, _W, _W, Spec(()), Spec(()), Spec(()))
        ranges = {2: _SQUARE, 4: _SMALL, 5: (1.0, 2.0), 6: (1.0, 2.0)}
        return Sample(cls(decay=0.1), ins, ranges), Sample(cls(decay=0.1, decoupled=True), ins, ranges)


class ClipFactor(Pointwise):
    """min(1, max_norm / (sqrt(squares) + 1e-6)): what brings gradients of this sum of squares to the norm"""

    max_norm: float = 1.0

    def formula(self, squares: Any) -> Any:
        return f.minimum(self.max_norm / (f.sqrt(squares) + 1e-6), 1.0)

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (Sample(cls(), (Spec(()),), {0: (0.2, 4.0)}),)


class ClipValue(Pointwise):
    """y = x, but not beyond -limit and limit"""

    limit: float = 1.0

    def formula(self, x: Any) -> Any:
        return f.minimum(f.maximum(x, -self.limit), self.limit)

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (Sample(cls(), (_W,)),)


class Accumulate(Pointwise):
    """mean = (total + g) / every; total' = 0 where it is the ``turn``, else total + g"""

    every: int = 4
    outputs = ("total", "mean")

    def formula(self, total: Any, g: Any, turn: Any) -> Any:
        now = total + g
        return f.where(turn > 0.5, 0.0, now), now / float(self.every)

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (Sample(cls(), (_W, _W, Spec(())), {2: (0.0, 1.0)}),)


class OnTurn(Pointwise):
    """y = new where it is the ``turn``, else old"""

    def infer(self, *xs: Spec) -> Any:
        new, old, turn = xs
        return super().infer(new, old, Spec(turn.shape, new.dtype))

    def formula(self, new: Any, old: Any, turn: Any) -> Any:
        return f.where(turn > 0.5, new, old)

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (Sample(cls(), (_W, _W, Spec(())), {2: (0.0, 1.0)}),)


class CountOnTurn(Pointwise):
    """count' = count + 1 where it is the ``turn``, else count: a whole number"""

    def infer(self, *xs: Spec) -> Any:
        count, turn = xs
        return super().infer(count, Spec(turn.shape, count.dtype))

    def formula(self, count: Any, turn: Any) -> Any:
        return count + f.cast(turn, "int64")

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (Sample(cls(), (Spec((), "int64"), Spec(())), {0: (0, 99), 1: (0.0, 1.0)}),)


class Finite(Pointwise):
    """y = 1 where the magnitude of x is no more than ``most``, by default of any finite float32, else 0; NaN gives 0"""

    most: float = 3.4028234663852886e38

    def formula(self, x: Any) -> Any:
        return f.where(f.absolute(x) <= self.most, 1.0, 0.0)

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (Sample(cls(most=1.0), (_W,)),)


class LossScaleRule(Pointwise):
    """The scale of the loss after a step, and updates in a row: times ``growth`` after ``every`` ``finite`` ones, times
    ``backoff`` after one that is not; within 1 and ``most``"""

    growth: float = 2.0
    backoff: float = 0.5
    every: int = 2000
    most: float = 2.0**24
    outputs = ("scale", "row")

    def formula(self, scale: Any, row: Any, finite: Any) -> Any:
        full = row + 1.0 >= float(self.every)
        grown = f.where(full, f.minimum(scale * self.growth, self.most), scale)
        shrunk = f.maximum(scale * self.backoff, 1.0)
        return f.where(finite > 0.5, grown, shrunk), f.where(finite > 0.5, f.where(full, 0.0, row + 1.0), 0.0)

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (Sample(cls(every=3), (Spec(()),) * 3, {0: (2.0, 99.0), 1: (0.0, 4.0), 2: (0.0, 1.0)}),)


class MovingAverage(Pointwise):
    """a' = decay a + (1 - decay) w"""

    decay: float = 0.99

    def formula(self, a: Any, w: Any) -> Any:
        return self.decay * a + (1.0 - self.decay) * w

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (Sample(cls(decay=0.7), (_W, _W)),)


def _decayed(g: Any, w: Any, decay: float) -> Any:
    return g + decay * w if decay else g
