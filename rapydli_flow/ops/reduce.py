"""Sums over axes, and their transpose. A mean is a sum times a constant of the global shape."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np

from ..spec import Array, Block, Spec
from .base import LETTERS, Op, Reject, Sample, as_dtype, refuse, spec_of, summed


class Sum(Op):
    """The sum over ``axes``; ``keep`` leaves them in place with size 1. ``wide``: that of halves is float32."""

    axes: tuple[int, ...]
    keep: bool = False
    wide: bool = False
    usual: ClassVar[tuple[str, ...]] = ("wide",)
    linear = True

    def infer(self, x: Spec) -> Spec:
        n = len(x.shape)
        if any(not 0 <= axis < n for axis in self.axes) or len(set(self.axes)) != len(self.axes):
            raise refuse(
                self, f"axes {self.axes} are not different axes of x", {"x": x}, f"Axes are numbered 0 to {n - 1}."
            )
        dtype = summed(x.dtype, self.wide)
        if self.keep:
            return Spec(tuple(1 if i in self.axes else d for i, d in enumerate(x.shape)), dtype)
        return Spec(tuple(d for i, d in enumerate(x.shape) if i not in self.axes), dtype)

    def index(self, x: Spec) -> str:
        letters = LETTERS[: len(x.shape)]
        out = [("0" if self.keep else "") if i in self.axes else c for i, c in enumerate(letters)]
        return f"{' '.join(letters)} -> {' '.join(c for c in out if c) or '()'}"

    def reference(self, x: Array) -> Array:
        return np.asarray(x.sum(self.axes, keepdims=self.keep, dtype=x.dtype))

    def vjp(self, dy: Any, y: Any, *inputs: Any) -> tuple[Any, ...]:
        (x,) = inputs
        dy = as_dtype(dy, spec_of(x).dtype)
        return (Broadcast(axes=self.axes, shape=tuple(x.shape), keep=self.keep)(dy),)

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        x = Spec((3, 4, 2, 5))
        axes = ((0,), (1, 2), (0, 1, 2), (3,), (0, 1, 2, 3), (0, 2))
        return (*(Sample(cls(axes=a), (x,)) for a in axes), Sample(cls(axes=(1, 3), keep=True), (x,)))

    @classmethod
    def rejects(cls) -> tuple[Reject, ...]:
        return (Reject(cls(axes=(0, 2)), (Spec((2, 3)),), r"sum: axes \(0, 2\) are not .*numbered 0 to 1"),)


class Broadcast(Op):
    """``x`` repeated along ``axes`` to ``shape``: the gradient of `Sum`."""

    axes: tuple[int, ...]
    shape: tuple[int, ...]
    keep: bool = False
    linear = True

    def infer(self, x: Spec) -> Spec:
        want = Sum(axes=self.axes, keep=self.keep).infer(Spec(self.shape, x.dtype))
        if want != x:
            raise refuse(self, f"x must be {want} to become {self.shape}", {"x": x}, "Give x the summed shape.")
        return Spec(self.shape, x.dtype)

    def index(self, x: Spec) -> str:
        summed = Sum(axes=self.axes, keep=self.keep).index(Spec(self.shape)).split("->")
        return f"{summed[1]} -> {summed[0]}"

    def local(self, ins: Sequence[Block], outs: Sequence[Block]) -> Op:
        return replace(self, shape=outs[0].shape)

    def reference(self, x: Array) -> Array:
        whole = x if self.keep else np.expand_dims(x, self.axes)
        return np.array(np.broadcast_to(whole, self.shape), order="C")

    def vjp(self, dy: Any, y: Any, *inputs: Any) -> tuple[Any, ...]:
        return (Sum(axes=self.axes, keep=self.keep)(dy),)

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (
            Sample(cls(axes=(0,), shape=(3, 4)), (Spec((4,)),)),
            Sample(cls(axes=(1, 2), shape=(3, 4, 2, 5)), (Spec((3, 5)),)),
            Sample(cls(axes=(0,), shape=(3,)), (Spec(()),)),
            Sample(cls(axes=(), shape=()), (Spec(()),)),
            Sample(cls(axes=(0, 2), shape=(3, 4, 2), keep=True), (Spec((1, 4, 1)),)),
        )

    @classmethod
    def rejects(cls) -> tuple[Reject, ...]:
        return (Reject(cls(axes=(0,), shape=(3, 4)), (Spec((5,)),), r"broadcast: x must be f32\[4\]"),)
