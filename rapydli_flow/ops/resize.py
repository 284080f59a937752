"""Linear interpolation over 1 to 3 spatial axes, and its gradient.

Element centres lie at half positions (torch.nn.functional.interpolate with align_corners=False):

    position of output h on the input:  p = max(0, (h + 1/2) * size / new size - 1/2)
    y[h] = (1 - w) x[i] + w x[min(i + 1, size - 1)],   i = floor(p), w = p - i

and so along each spatial axis in turn: bilinear over two, trilinear over three. Shrinking takes the nearest two
elements too, without averaging what lies between.
"""

from __future__ import annotations

from functools import reduce
from typing import Any

import numpy as np

from ..errors import DTypeError
from ..spec import Array, Spec
from .base import Op, Reject, Sample, refuse


def weights(size: int, new: int) -> Array:
    """The matrix (new, size) of interpolation along one axis, float64."""
    position = np.maximum((np.arange(new) + 0.5) * size / new - 0.5, 0.0)
    first = np.minimum(position.astype(np.int64), size - 1)
    share = position - first
    out = np.zeros((new, size))
    rows = np.arange(new)
    np.add.at(out, (rows, first), 1.0 - share)
    np.add.at(out, (rows, np.minimum(first + 1, size - 1)), share)
    return out


class _Resize(Op, abstract=True):
    """``size``: the spatial sizes of the output. Spatial axes are read whole and never split."""

    size: tuple[int, ...]
    linear = True

    def infer(self, x: Spec) -> Spec:
        n = len(self.size)
        if n not in (1, 2, 3) or len(x.shape) != n + 2 or min(self.size) < 1 or 0 in x.shape[1:-1]:
            rule = f"size {self.size} is one positive number for each of 1 to 3 spatial axes"
            raise refuse(self, rule, {"x": x}, "x is N,*space,C, its spatial sizes 1 or more.")
        if not x.floating:
            raise DTypeError(f"{self.name}: x needs a floating dtype (x {x}). Cast it first.")
        return Spec((x.shape[0], *self.size, x.shape[-1]), x.dtype)

    def index(self, x: Spec) -> str:
        dots = " ." * len(self.size)
        return f"n{dots} c -> n{dots} c"

    def matrices(self, x: tuple[int, ...]) -> list[Array]:
        """What is multiplied from the left along each spatial axis."""
        return [weights(old, new) for old, new in zip(x, self.size, strict=True)]

    def reference(self, x: Array) -> Array:
        def along(value: Array, step: tuple[int, Array]) -> Array:
            axis, matrix = step
            return np.moveaxis(np.tensordot(matrix, value, (1, axis)), 0, axis)

        return np.ascontiguousarray(reduce(along, enumerate(self.matrices(x.shape[1:-1]), 1), x).astype(x.dtype))

    def flops(self, *inputs: Spec) -> int:
        (x,) = inputs
        points = max(x.size, self.infer(x).size)
        return (2 << len(self.size)) * points

    @classmethod
    def rejects(cls) -> tuple[Reject, ...]:
        return (
            Reject(cls(size=(4,)), (Spec((2, 3, 3, 1)),), rf"{cls.name}: size \(4,\) is one positive number for each"),
            Reject(cls(size=(4, 0)), (Spec((2, 3, 3, 1)),), rf"{cls.name}: size \(4, 0\) is one positive number"),
            Reject(cls(size=(4,)), (Spec((2, 3, 1), "uint8"),), f"{cls.name}: x needs a floating dtype"),
        )


class Resize(_Resize):
    """Linear interpolation of x, ``N, *space, C``, to spatial sizes ``size``."""

    def vjp(self, dy: Any, y: Any, *inputs: Any) -> tuple[Any, ...]:
        return (ResizeGrad(size=tuple(inputs[0].shape[1:-1]))(dy),)

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (
            Sample(cls(size=(6, 5)), (Spec((2, 3, 4, 5)),)),
            Sample(cls(size=(3,)), (Spec((2, 7, 3)),)),
            Sample(cls(size=(2, 4, 5)), (Spec((1, 3, 2, 5, 2)),)),
        )


class ResizeGrad(_Resize):
    """The gradient of `Resize`, its transpose; ``size``: the spatial sizes of what was resized."""

    def matrices(self, x: tuple[int, ...]) -> list[Array]:
        return [weights(new, old).T for old, new in zip(x, self.size, strict=True)]

    def vjp(self, dy: Any, y: Any, *inputs: Any) -> tuple[Any, ...]:
        return (Resize(size=tuple(inputs[0].shape[1:-1]))(dy),)

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (
            Sample(cls(size=(3, 4)), (Spec((2, 6, 5, 5)),)),
            Sample(cls(size=(7,)), (Spec((2, 3, 3)),)),
            Sample(cls(size=(3, 2, 5)), (Spec((1, 2, 4, 5, 2)),)),
        )
