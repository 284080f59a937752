"""Pooling to a given size over 1 to 3 spatial axes: the average or the maximum of each of ``size`` bins, and gradients.

Along an axis of L elements and O bins, bin o is ``floor(o L / O)`` to ``ceil((o + 1) L / O)``: bins overlap where
O does not divide L, and hold one element or more even where O is larger than L. Seen from element i the bins
that hold it are those of the same formula with L and O exchanged. Spatial axes are never split.

Source of the method: the adaptive pooling of PyTorch; bins as in He et al., "Spatial pyramid pooling" (2014).
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from math import prod
from typing import Any

import numpy as np

from ..errors import DTypeError
from ..spec import Array, Spec
from .base import Op, Reject, Sample, refuse
from .window import OUT

Places = tuple[Any, ...]  # what NumPy takes between brackets


def bins(length: int, count: int) -> list[slice]:
    """The bins of an axis of ``length`` elements."""
    return [slice(o * length // count, -(-(o + 1) * length // count)) for o in range(count)]


class _Adaptive(Op, abstract=True):
    """Pooling to ``size``: the spatial axes of the output, whatever those of the input are."""

    size: tuple[int, ...]

    def pooled(self, **operands: Spec) -> Spec:
        x = next(iter(operands.values()))
        n = len(self.size)
        if n not in OUT or len(x.shape) != n + 2 or min(*self.size, *x.shape[1:-1]) < 1:
            rule = f"a size of 1 or more for each of 1 to 3 spatial axes, not {self.size}"
            raise refuse(self, rule, operands, "The layout is N,*space,C.")
        if not x.floating:
            raise DTypeError(f"{self.name}: {next(iter(operands))} needs a floating dtype ({x}). Cast it first.")
        return Spec((x.shape[0], *self.size, x.shape[-1]), x.dtype)

    def axes(self) -> str:
        return f"n {' '.join('.' * len(self.size))} c"

    def all_bins(self, long: tuple[int, ...], short: tuple[int, ...]) -> Iterator[tuple[Places, Places]]:
        """Every bin: its place among the ``short`` axes, and what it holds of the ``long`` ones."""
        each = [bins(*extents) for extents in zip(long, short, strict=True)]
        for place in product(*map(range, short)):
            yield place, tuple(axis[o] for axis, o in zip(each, place, strict=True))


class AdaptiveAvgPool(_Adaptive):
    """y = the mean of each bin"""

    linear = True

    def infer(self, x: Spec) -> Spec:
        return self.pooled(x=x)

    def index(self, x: Spec) -> str:
        return f"{self.axes()} -> {self.axes()}"

    def reference(self, x: Array) -> Array:
        y = np.empty((x.shape[0], *self.size, x.shape[-1]), x.dtype)
        for place, held in self.all_bins(x.shape[1:-1], self.size):
            y[(slice(None), *place)] = x[(slice(None), *held)].mean(tuple(range(1, 1 + len(self.size))))
        return y

    def vjp(self, dy: Any, y: Any, *inputs: Any) -> tuple[Any, ...]:
        return (AdaptiveAvgPoolGrad(size=tuple(inputs[0].shape[1:-1]))(dy),)

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return tuple(Sample(cls(size=size), (x,)) for x, size in _CASES)

    @classmethod
    def rejects(cls) -> tuple[Reject, ...]:
        return _rejects(cls)


class AdaptiveAvgPoolGrad(_Adaptive):
    """dx[i] = the sum of dy / (elements of the bin) over all bins that hold i; ``size`` is that of x"""

    linear = True

    def infer(self, dy: Spec) -> Spec:
        return self.pooled(dy=dy)

    def index(self, dy: Spec) -> str:
        return f"{self.axes()} -> {self.axes()}"

    def reference(self, dy: Array) -> Array:
        dx = np.zeros((dy.shape[0], *self.size, dy.shape[-1]), dy.dtype)
        for place, held in self.all_bins(self.size, dy.shape[1:-1]):
            count = prod(axis.stop - axis.start for axis in held)
            each = dy[(slice(None), *place)] / dy.dtype.type(count)
            dx[(slice(None), *held)] += each.reshape(len(dy), *(1 for _ in held), -1)
        return dx

    def vjp(self, dy: Any, y: Any, *inputs: Any) -> tuple[Any, ...]:
        return (AdaptiveAvgPool(size=tuple(inputs[0].shape[1:-1]))(dy),)

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return tuple(Sample(cls(size=x.shape[1:-1]), (AdaptiveAvgPool(size=s).infer(x),)) for x, s in _CASES)

    @classmethod
    def rejects(cls) -> tuple[Reject, ...]:
        return _rejects(cls)


class AdaptiveMaxPool(_Adaptive):
    """y = the largest value of each bin, argmax = where it was among the spatial axes of x, in memory order.

    Of equal values the first wins; a NaN wins over all others.
    """

    outputs = ("y", "argmax")

    def infer(self, x: Spec) -> tuple[Spec, Spec]:
        y = self.pooled(x=x)
        return y, Spec(y.shape, "int32")

    def index(self, x: Spec) -> str:
        return f"{self.axes()} -> {self.axes()}, {self.axes()}"

    def reference(self, x: Array) -> tuple[Array, Array]:
        shape = (x.shape[0], *self.size, x.shape[-1])
        y, argmax = np.empty(shape, x.dtype), np.empty(shape, np.int32)
        places = _places(x.shape[1:-1])
        for place, held in self.all_bins(x.shape[1:-1], self.size):
            inside = x[(slice(None), *held)].reshape(len(x), -1, x.shape[-1])
            best = inside.argmax(1)
            at = (slice(None), *place)
            y[at] = np.take_along_axis(inside, best[:, None], 1)[:, 0]
            argmax[at] = places[held].reshape(-1)[best]
        return y, argmax

    def vjp(self, dy: Any, y: Any, *inputs: Any) -> tuple[Any, ...]:
        return (AdaptiveMaxPoolGrad(size=tuple(inputs[0].shape[1:-1]))(dy[0], y[1]),)

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return tuple(Sample(cls(size=size), (x,)) for x, size in _CASES)

    @classmethod
    def rejects(cls) -> tuple[Reject, ...]:
        return _rejects(cls)


class AdaptiveMaxPoolGrad(_Adaptive):
    """dx[i] = the sum of dy of all bins whose maximum was at i; ``size`` is that of x"""

    def infer(self, dy: Spec, argmax: Spec) -> Spec:
        if dy.shape != argmax.shape or argmax.floating:
            rule = "argmax has whole numbers in the shape of dy"
            raise refuse(self, rule, {"dy": dy, "argmax": argmax}, "It comes from adaptive_max_pool.")
        return self.pooled(dy=dy, argmax=argmax)

    def index(self, dy: Spec, argmax: Spec) -> str:
        return f"{self.axes()}, {self.axes()} -> {self.axes()}"

    def reference(self, dy: Array, argmax: Array) -> Array:
        dx = np.zeros((dy.shape[0], *self.size, dy.shape[-1]), dy.dtype)
        places = _places(self.size)[..., None]
        zero, one = np.zeros((), dy.dtype), (1,) * len(self.size)
        for place, held in self.all_bins(self.size, dy.shape[1:-1]):
            at = (slice(None), *place)
            winner, given = (v[at].reshape(len(dy), *one, -1) for v in (argmax, dy))
            dx[(slice(None), *held)] += np.where(places[held] == winner, given, zero)
        return dx

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        made = ((x, AdaptiveMaxPool(size=size).infer(x)) for x, size in _CASES)
        return tuple(Sample(cls(size=x.shape[1:-1]), ys, {1: (0, prod(x.shape[1:-1]))}) for x, ys in made)

    @classmethod
    def rejects(cls) -> tuple[Reject, ...]:
        op = cls(size=(5,))
        dy = Spec((1, 2, 3))
        return (
            Reject(op, (dy, dy), "adaptive_max_pool_grad: argmax has whole numbers"),
            Reject(cls(size=(5, 5)), (dy, Spec(dy.shape, "int32")), "adaptive_max_pool_grad: a size of 1 or more"),
        )


def _places(size: tuple[int, ...]) -> Array:
    """The number of every element, in memory order."""
    return np.arange(prod(size), dtype=np.int32).reshape(size)


# an axis that is made longer, and one that divides; 1 and 3 axes
_CASES = (
    (Spec((2, 7, 3, 5)), (3, 5)),
    (Spec((3, 5, 17)), (2,)),
    (Spec((1, 3, 4, 5, 2)), (2, 2, 3)),
)


def _rejects(cls: Any) -> tuple[Reject, ...]:
    op = cls(size=(2, 2))
    return (
        Reject(op, (Spec((2, 5, 3)),), f"{op.name}: a size of 1 or more for each .*, not \\(2, 2\\)"),
        Reject(cls(size=(2, 0)), (Spec((2, 5, 5, 3)),), f"{op.name}: a size of 1 or more"),
        Reject(op, (Spec((2, 5, 5, 3), "uint8"),), f"{op.name}: .* needs a floating dtype"),
    )
