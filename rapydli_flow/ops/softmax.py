"""Softmax and its logarithm over the last axis of ``N,...,classes``, shifted by the largest score."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..spec import Array, Spec
from .base import LETTERS, Op, Reject, Sample, refuse

AXES = "x is N,...,classes."


def check_scores(op: Op, x: Spec, **others: Spec) -> None:
    """Refuse what is not floating scores on the last of two axes or more."""
    if len(x.shape) < 2 or not x.floating:
        raise refuse(op, "x has class scores on its last axis, and a batch", {"x": x, **others}, AXES)


def places(x: Spec) -> str:
    """Letters of all axes but the last."""
    return " ".join(LETTERS[: len(x.shape) - 1])


def softmax(x: Array) -> Array:
    e = np.exp(x - x.max(-1, keepdims=True))
    return np.asarray(e / e.sum(-1, keepdims=True))


class _OfScores(Op, abstract=True):
    """An op on rows of scores that gives rows of as many numbers."""

    def infer(self, x: Spec) -> Spec:
        check_scores(self, x)
        return x

    def index(self, x: Spec) -> str:
        return f"{places(x)} . -> {places(x)} ."

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return tuple(Sample(cls(), (Spec(shape),)) for shape in ((4, 8), (2, 3, 5)))

    @classmethod
    def rejects(cls) -> tuple[Reject, ...]:
        return (
            Reject(cls(), (Spec((4,)),), rf"{cls.name}: x has class scores on its last axis.*f32\[4\].*N,...,classes"),
            Reject(cls(), (Spec((4, 8), "int64"),), f"{cls.name}: x has class scores on its last axis"),
        )


class _Gradient(Op, abstract=True):
    """The gradient of such an op, from its output."""

    def infer(self, dy: Spec, y: Spec) -> Spec:
        if dy.shape != y.shape:
            raise refuse(self, "dy and y have one shape", {"dy": dy, "y": y}, "Give the gradient of y.")
        return y

    def index(self, dy: Spec, y: Spec) -> str:
        return f"{places(y)} ., {places(y)} . -> {places(y)} ."

    @classmethod
    def rejects(cls) -> tuple[Reject, ...]:
        return (Reject(cls(), (Spec((4, 8)), Spec((4, 7))), f"{cls.name}: dy and y have one shape"),)


class Softmax(_OfScores):
    """y[n] = exp(x[n]) / sum of exp(x[n])"""

    def reference(self, x: Array) -> Array:
        return softmax(x).astype(x.dtype)

    def vjp(self, dy: Any, y: Any, *inputs: Any) -> tuple[Any, ...]:
        return (SoftmaxGrad()(dy, y),)


class SoftmaxGrad(_Gradient):
    """dx[n] = y[n] (dy[n] - sum of dy[n] y[n])"""

    def reference(self, dy: Array, y: Array) -> Array:
        return np.asarray(y * (dy - (dy * y).sum(-1, keepdims=True)), y.dtype)

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (Sample(cls(), (Spec((2, 3, 5)), Spec((2, 3, 5)))),)


class LogSoftmax(_OfScores):
    """y[n] = x[n] - log(sum of exp(x[n]))"""

    def reference(self, x: Array) -> Array:
        z = x - x.max(-1, keepdims=True)
        return np.asarray(z - np.log(np.exp(z).sum(-1, keepdims=True)), x.dtype)

    def vjp(self, dy: Any, y: Any, *inputs: Any) -> tuple[Any, ...]:
        return (LogSoftmaxGrad()(dy, y),)


class LogSoftmaxGrad(_Gradient):
    """dx[n] = dy[n] - exp(y[n]) sum of dy[n]"""

    def reference(self, dy: Array, y: Array) -> Array:
        return np.asarray(dy - np.exp(y) * dy.sum(-1, keepdims=True), y.dtype)

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (Sample(cls(), (Spec((2, 3, 5)), Spec((2, 3, 5))), {1: (-4.0, 0.0)}),)
