"""Local response normalisation across channels.

Krizhevsky, Sutskever, Hinton, "ImageNet classification with deep convolutional neural networks", 2012;
alpha is divided by the size of the window, as Caffe and PyTorch do it. The window of channel c goes
from c - size // 2 to c + (size - 1) // 2: for an even size, which Caffe refuses, as in PyTorch.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..errors import DTypeError
from ..spec import Array, Spec
from .base import LETTERS, Op, Reject, Sample, refuse


class _Local(Op, abstract=True):
    """The attributes that `LocalResponse` shares with its gradient."""

    size: int = 5
    alpha: float = 1e-4
    beta: float = 0.75
    k: float = 1.0

    def check(self, x: Spec) -> None:
        if not x.floating:
            raise DTypeError(f"{self.name}: x needs a floating dtype (x {x}). Cast it first.")
        if len(x.shape) < 2:
            raise refuse(self, "x has samples and channels", {"x": x}, "x is N,*space,C.")
        if self.size < 1:
            raise refuse(self, f"a window of size={self.size} channels", {"x": x}, "Give a size of 1 or more.")

    def operand(self, x: Spec) -> str:
        return " ".join([*LETTERS[: len(x.shape) - 1], "."])

    def flops(self, *inputs: Spec) -> int:
        return len(inputs) * (2 * self.size + 6) * inputs[0].size

    def window_sum(self, x: Array, low: int, high: int) -> Array:
        """y[c] = sum of x[c - low] to x[c + high]"""
        padded = np.pad(x, [(0, 0)] * (x.ndim - 1) + [(low, high)])
        return np.asarray(np.lib.stride_tricks.sliding_window_view(padded, self.size, -1).sum(-1))

    def denominator(self, x: Array) -> Array:
        """k + alpha / size * sum of x^2 over the window"""
        squares = self.window_sum(x * x, self.size // 2, (self.size - 1) // 2)
        return np.asarray(self.k + self.alpha / self.size * squares)


class LocalResponse(_Local):
    """y = x / (k + alpha / size * sum of x^2 over ``size`` neighbouring channels)^beta"""

    def infer(self, x: Spec) -> Spec:
        self.check(x)
        return x

    def index(self, x: Spec) -> str:
        return f"{self.operand(x)} -> {self.operand(x)}"

    def reference(self, x: Array) -> Array:
        return np.asarray(x * self.denominator(x) ** -self.beta, x.dtype)

    def vjp(self, dy: Any, y: Any, *inputs: Any) -> tuple[Any, ...]:
        grad = LocalResponseGrad(size=self.size, alpha=self.alpha, beta=self.beta, k=self.k)
        return (grad(dy, inputs[0]),)

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return tuple(Sample(cls(**attributes), (x,)) for attributes, x in _cases())

    @classmethod
    def rejects(cls) -> tuple[Reject, ...]:
        return (
            Reject(cls(size=0), (Spec((2, 6)),), "local_response: a window of size=0 channels"),
            Reject(cls(), (Spec((6,)),), "local_response: x has samples and channels"),
            Reject(cls(), (Spec((2, 6), "uint8"),), "local_response: x needs a floating dtype"),
        )


class LocalResponseGrad(_Local):
    """dx[i] = dy[i] d[i]^-beta - 2 alpha beta / size * x[i] * sum of dy[j] x[j] d[j]^(-beta-1)

    over the channels j whose window holds i; d is what the output was divided by, before the power.
    """

    def infer(self, dy: Spec, x: Spec) -> Spec:
        self.check(x)
        if dy != x:
            raise refuse(self, "dy must be like x", {"dy": dy, "x": x}, "Both have the shape of the output.")
        return x

    def index(self, dy: Spec, x: Spec) -> str:
        return f"{self.operand(x)}, {self.operand(x)} -> {self.operand(x)}"

    def reference(self, dy: Array, x: Array) -> Array:
        d = self.denominator(x)
        reached = self.window_sum(dy * x * d ** (-self.beta - 1.0), (self.size - 1) // 2, self.size // 2)
        slope = 2.0 * self.alpha * self.beta / self.size
        return np.asarray(dy * d**-self.beta - slope * x * reached, x.dtype)

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return tuple(Sample(cls(**attributes), (x, x)) for attributes, x in _cases())

    @classmethod
    def rejects(cls) -> tuple[Reject, ...]:
        return (Reject(cls(), (Spec((2, 5)), Spec((2, 6))), "local_response_grad: dy must be like x"),)


def _cases() -> tuple[tuple[dict[str, Any], Spec], ...]:
    return (
        ({"alpha": 0.9, "k": 2.0}, Spec((2, 2, 3, 11))),
        ({"size": 4, "alpha": 1.3, "beta": 0.6}, Spec((5, 3))),
    )
