"""Losses and scores, one value a sample. A mean over the batch is a sum and a constant of the whole batch."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..spec import Array, Spec
from .base import Op, Reject, Sample, refuse


def _check(op: Op, x: Spec, label: Spec) -> None:
    operands = {"x": x, "label": label}
    if len(x.shape) != 2 or not x.floating:
        raise refuse(op, "x has one row of class scores a sample", operands, "x is N,classes; label is N.")
    if label.floating or label.shape != x.shape[:1]:
        raise refuse(op, "label has one whole number a sample", operands, "x is N,classes; label is N.")


def _softmax(x: Array) -> Array:
    e = np.exp(x - x.max(1, keepdims=True))
    return np.asarray(e / e.sum(1, keepdims=True))


class CrossEntropy(Op):
    """y[n] = log(sum of exp x[n]) - x[n, label[n]]: softmax and cross entropy with whole-number labels."""

    def infer(self, x: Spec, label: Spec) -> Spec:
        _check(self, x, label)
        return Spec(x.shape[:1], x.dtype)

    def index(self, x: Spec, label: Spec) -> str:
        return "n ., n -> n"

    def reference(self, x: Array, label: Array) -> Array:
        z = x - x.max(1, keepdims=True)
        return np.asarray(np.log(np.exp(z).sum(1)) - z[np.arange(len(z)), label], x.dtype)

    def vjp(self, dy: Any, y: Any, *inputs: Any) -> tuple[Any, ...]:
        return CrossEntropyGrad()(dy, *inputs), None

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (
            Sample(cls(), (Spec((4, 8)), Spec((4,), "int64"))),
            Sample(cls(), (Spec((3, 10)), Spec((3,), "uint8"))),
        )

    @classmethod
    def rejects(cls) -> tuple[Reject, ...]:
        return _rejects(cls())


class CrossEntropyGrad(Op):
    """dx[n] = dy[n] (softmax(x[n]) - onehot(label[n]))"""

    def infer(self, dy: Spec, x: Spec, label: Spec) -> Spec:
        _check(self, x, label)
        return x

    def index(self, dy: Spec, x: Spec, label: Spec) -> str:
        return "n, n ., n -> n ."

    def reference(self, dy: Array, x: Array, label: Array) -> Array:
        p = _softmax(x)
        p[np.arange(len(p)), label] -= 1
        return np.asarray(p * dy[:, None], x.dtype)

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (Sample(cls(), (Spec((4,)), Spec((4, 8)), Spec((4,), "int64"))),)


class Softmax(Op):
    """y[n] = exp(x[n]) / sum of exp(x[n])"""

    def infer(self, x: Spec) -> Spec:
        if len(x.shape) != 2 or not x.floating:
            raise refuse(self, "x has one row of class scores a sample", {"x": x}, "x is N,classes.")
        return x

    def index(self, x: Spec) -> str:
        return "n . -> n ."

    def reference(self, x: Array) -> Array:
        return _softmax(x).astype(x.dtype)

    def vjp(self, dy: Any, y: Any, *inputs: Any) -> tuple[Any, ...]:
        return (SoftmaxGrad()(dy, y),)

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (Sample(cls(), (Spec((4, 8)),)),)

    @classmethod
    def rejects(cls) -> tuple[Reject, ...]:
        return (Reject(cls(), (Spec((4, 8, 2)),), "softmax: x has one row of class scores"),)


class SoftmaxGrad(Op):
    """dx[n] = y[n] (dy[n] - sum of dy[n] y[n])"""

    def infer(self, dy: Spec, y: Spec) -> Spec:
        return y

    def index(self, dy: Spec, y: Spec) -> str:
        return "n ., n . -> n ."

    def reference(self, dy: Array, y: Array) -> Array:
        return np.asarray(y * (dy - (dy * y).sum(1, keepdims=True)), y.dtype)

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (Sample(cls(), (Spec((4, 8)), Spec((4, 8)))),)


class Correct(Op):
    """y[n] = 1 where the first largest score of x[n] is at label[n], else 0."""

    def infer(self, x: Spec, label: Spec) -> Spec:
        _check(self, x, label)
        return Spec(x.shape[:1], x.dtype)

    def index(self, x: Spec, label: Spec) -> str:
        return "n ., n -> n"

    def reference(self, x: Array, label: Array) -> Array:
        return np.asarray(x.argmax(1) == label, x.dtype)

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (Sample(cls(), (Spec((5, 3)), Spec((5,), "int64")), {1: (0, 3)}),)

    @classmethod
    def rejects(cls) -> tuple[Reject, ...]:
        return _rejects(cls())


def _rejects(op: Op) -> tuple[Reject, ...]:
    return (
        Reject(op, (Spec((4, 8)), Spec((4,))), f"{op.name}: label has one whole number a sample"),
        Reject(op, (Spec((4, 8)), Spec((5,), "int64")), f"{op.name}: label has one whole number a sample"),
        Reject(op, (Spec((4, 8, 1)), Spec((4,), "int64")), f"{op.name}: x has one row of class scores"),
    )
