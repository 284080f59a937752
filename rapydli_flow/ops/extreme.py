"""The largest and the smallest element over axes, their gradients, and where along an axis they are.

A NaN is larger and smaller than all, as in NumPy. The gradient is shared equally by all elements that are the extreme
(as torch.amax does); of equal elements the first one is at the argmax.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from ..errors import DTypeError
from ..spec import Array, Spec
from .base import LETTERS, Op, Reject, Sample, refuse

_X = Spec((3, 4, 2, 5))


class _Over(Op, abstract=True):
    """Axes that are reduced, and so never split; ``keep`` leaves them in place with size 1."""

    axes: tuple[int, ...]
    keep: bool = False
    least: ClassVar[bool] = False

    def reduced(self, x: Spec) -> Spec:
        n = len(x.shape)
        if not x.floating:
            raise DTypeError(f"{self.name}: x needs a floating dtype (x {x}). Cast it first.")
        if any(not 0 <= axis < n for axis in self.axes) or len(set(self.axes)) != len(self.axes):
            rule = f"axes {self.axes} are not different axes of x"
            raise refuse(self, rule, {"x": x}, f"Axes are numbered 0 to {n - 1}.")
        if any(x.shape[axis] == 0 for axis in self.axes):
            raise refuse(self, f"axes {self.axes} have no elements", {"x": x}, "Reduce axes of size 1 or more.")
        sizes = [1 if i in self.axes else size for i, size in enumerate(x.shape) if self.keep or i not in self.axes]
        return Spec(tuple(sizes), x.dtype)

    def formulas(self, x: Spec) -> tuple[str, str]:
        """Index of the whole operand, and of the reduced one."""
        letters = LETTERS[: len(x.shape)]
        kept = [("0" if self.keep else "") if i in self.axes else c for i, c in enumerate(letters)]
        whole = ["." if i in self.axes else c for i, c in enumerate(letters)]
        return " ".join(whole) or "()", " ".join(filter(None, kept)) or "()"

    def extreme(self, x: Array) -> Array:
        """The extremes of x, with the reduced axes in place."""
        return np.asarray((np.min if self.least else np.max)(x, self.axes, keepdims=True))

    @classmethod
    def bad_axes(cls, *before: Spec) -> tuple[Reject, ...]:
        return (
            Reject(cls(axes=(0, 2)), (*before, Spec((2, 3))), rf"{cls.name}: axes \(0, 2\) are not .*numbered 0 to 1"),
            Reject(cls(axes=(0,)), (*before, Spec((2, 3), "int64")), f"{cls.name}: x needs a floating dtype"),
            Reject(cls(axes=(1,)), (*before, Spec((2, 0))), rf"{cls.name}: axes \(1,\) have no elements"),
        )


class _Extreme(_Over, abstract=True):
    family = "extreme"

    def infer(self, x: Spec) -> Spec:
        return self.reduced(x)

    def index(self, x: Spec) -> str:
        return " -> ".join(self.formulas(x))

    def reference(self, x: Array) -> Array:
        y = self.extreme(x)
        return y if self.keep else np.asarray(np.squeeze(y, self.axes))

    def vjp(self, dy: Any, y: Any, *inputs: Any) -> tuple[Any, ...]:
        grad = MinGrad if self.least else MaxGrad
        return (grad(axes=self.axes, keep=self.keep)(dy, *inputs),)

    @classmethod
    def rejects(cls) -> tuple[Reject, ...]:
        return cls.bad_axes()


class _ExtremeGrad(_Over, abstract=True):
    """dx = dy over the number of elements that are the extreme, at these elements; 0 elsewhere."""

    family = "extreme_grad"

    def infer(self, dy: Spec, x: Spec) -> Spec:
        y = self.reduced(x)
        if y != dy:
            raise refuse(self, f"dy must be {y}", {"dy": dy, "x": x}, "Give dy the reduced shape.")
        return x

    def index(self, dy: Spec, x: Spec) -> str:
        whole, reduced = self.formulas(x)
        return f"{reduced}, {whole} -> {whole}"

    def reference(self, dy: Array, x: Array) -> Array:
        chosen = x == self.extreme(x)
        each = (dy if self.keep else np.expand_dims(dy, self.axes)) / np.maximum(
            chosen.sum(self.axes, keepdims=True), 1
        )
        return np.asarray(np.where(chosen, each, 0.0), x.dtype)

    @classmethod
    def rejects(cls) -> tuple[Reject, ...]:
        y = Spec((2,))
        return (
            *cls.bad_axes(y),
            Reject(cls(axes=(0,)), (y, Spec((2, 3))), rf"{cls.name}: dy must be f32\[3\]"),
        )


class Max(_Extreme):
    """The largest element over ``axes``."""

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (
            Sample(cls(axes=(1, 2)), (_X,)),
            Sample(cls(axes=(1, 3), keep=True), (_X,)),
            Sample(cls(axes=(0, 1)), (Spec((3, 4)),)),
        )


class Min(_Extreme):
    """The smallest element over ``axes``."""

    least = True

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (Sample(cls(axes=(1,)), (Spec((3, 4, 5)),)),)


class MaxGrad(_ExtremeGrad):
    """The gradient of `Max`."""

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (
            Sample(cls(axes=(1, 2)), (Spec((3, 5)), _X)),
            Sample(cls(axes=(1, 3), keep=True), (Spec((3, 1, 2, 1)), _X)),
        )


class MinGrad(_ExtremeGrad):
    """The gradient of `Min`."""

    least = True

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (Sample(cls(axes=(1,)), (Spec((3, 5)), Spec((3, 4, 5)))),)


class _Where(_Over, abstract=True):
    """The place of the extreme along one axis, as int64; the first one of equal ones. It has no gradient."""

    family = "arg_extreme"

    def infer(self, x: Spec) -> Spec:
        if len(self.axes) != 1:
            raise refuse(self, f"axes {self.axes} are one axis", {"x": x}, "Reshape x to search several as one.")
        return Spec(self.reduced(x).shape, "int64")

    def index(self, x: Spec) -> str:
        return " -> ".join(self.formulas(x))

    def reference(self, x: Array) -> Array:
        where = np.argmin if self.least else np.argmax
        return np.asarray(where(x, self.axes[0], keepdims=self.keep), np.int64)

    @classmethod
    def rejects(cls) -> tuple[Reject, ...]:
        x = Spec((2, 3))
        return (
            Reject(cls(axes=(0, 1)), (x,), rf"{cls.name}: axes \(0, 1\) are one axis"),
            Reject(cls(axes=(2,)), (x,), rf"{cls.name}: axes \(2,\) are not different axes of x"),
        )


class ArgMax(_Where):
    """Where along an axis the largest element is."""

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (Sample(cls(axes=(1,)), (Spec((3, 4)),)), Sample(cls(axes=(1,), keep=True), (Spec((2, 3, 4)),)))


class ArgMin(_Where):
    """Where along an axis the smallest element is."""

    least = True

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (Sample(cls(axes=(0,)), (Spec((5, 4)),)),)
