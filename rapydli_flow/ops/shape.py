"""Ops that keep all elements: reshape, transpose, concatenate.

The first axis is the batch, and should stay it: what moves it (a transpose, a join along axis 0) works, but splits by
samples then mean another axis, and data that is no longer a batch cannot be trained on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from math import prod
from typing import Any

import numpy as np

from ..errors import DTypeError
from ..spec import Array, Block, Spec
from .base import LETTERS, Op, Reject, Sample, refuse, spec_of
from .slice import Slice


class Reshape(Op):
    """The same elements of each sample in another shape: ``N, ...`` becomes ``N, *shape``."""

    shape: tuple[int, ...]
    linear = True
    view = True

    def infer(self, x: Spec) -> Spec:
        if not x.shape or prod(x.shape[1:]) != prod(self.shape):
            rule = f"samples of {prod(x.shape[1:])} elements cannot become {self.shape}"
            raise refuse(self, rule, {"x": x}, "The first axis stays; the others keep their number of elements.")
        return Spec((x.shape[0], *self.shape), x.dtype)

    def index(self, x: Spec) -> str:
        return f"n{' .' * (len(x.shape) - 1)} -> n{' .' * len(self.shape)}"

    def local(self, ins: Sequence[Block], outs: Sequence[Block]) -> Op:
        return replace(self, shape=outs[0].shape[1:])

    def reference(self, x: Array) -> Array:
        return x.reshape(x.shape[0], *self.shape)

    def vjp(self, dy: Any, y: Any, *inputs: Any) -> tuple[Any, ...]:
        return (Reshape(shape=tuple(inputs[0].shape[1:]))(dy),)

    def flops(self, *inputs: Spec) -> int:
        return 0

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (Sample(cls(shape=(12,)), (Spec((2, 3, 4)),)), Sample(cls(shape=(3, 2)), (Spec((4, 6)),)))

    @classmethod
    def rejects(cls) -> tuple[Reject, ...]:
        return (Reject(cls(shape=(5,)), (Spec((2, 3, 4)),), r"reshape: samples of 12 elements cannot become \(5,\)"),)


class GroupRecords(Op):
    """Neighbouring records in groups: ``N, ...`` becomes ``N / size, size, ...``."""

    size: int
    linear = True
    view = True

    def infer(self, x: Spec) -> Spec:
        if not x.shape or self.size < 1 or x.shape[0] % self.size:
            records = x.shape[0] if x.shape else 1
            rule = f"{records} records cannot be put into groups of {self.size}"
            raise refuse(self, rule, {"x": x}, "The batch must be a multiple of the group.")
        return Spec((x.shape[0] // self.size, self.size, *x.shape[1:]), x.dtype)

    def index(self, x: Spec) -> str:
        rest = " ".join(LETTERS[2 : 1 + len(x.shape)])
        return f"a*{self.size}+b {rest} -> a . {rest} | b={self.size}"

    def reference(self, x: Array) -> Array:
        return x.reshape(-1, self.size, *x.shape[1:])

    def vjp(self, dy: Any, y: Any, *inputs: Any) -> tuple[Any, ...]:
        return (JoinRecords()(dy),)

    def flops(self, *inputs: Spec) -> int:
        return 0

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (Sample(cls(size=2), (Spec((6, 3, 4)),)), Sample(cls(size=3), (Spec((6,)),)))

    @classmethod
    def rejects(cls) -> tuple[Reject, ...]:
        return (Reject(cls(size=4), (Spec((6, 3)),), "group_records: 6 records cannot be put into groups of 4"),)


class JoinRecords(Op):
    """Groups of records as one batch: ``G, size, ...`` becomes ``G * size, ...``."""

    linear = True
    view = True

    def infer(self, x: Spec) -> Spec:
        if len(x.shape) < 2:
            raise refuse(self, "x has no groups of records", {"x": x}, "It is groups, records, ...")
        return Spec((x.shape[0] * x.shape[1], *x.shape[2:]), x.dtype)

    def index(self, x: Spec) -> str:
        rest, size = " ".join(LETTERS[2 : len(x.shape)]), x.shape[1]
        return f"a . {rest} -> a*{size}+b {rest} | b={size}"

    def reference(self, x: Array) -> Array:
        return x.reshape(-1, *x.shape[2:])

    def vjp(self, dy: Any, y: Any, *inputs: Any) -> tuple[Any, ...]:
        return (GroupRecords(size=inputs[0].shape[1])(dy),)

    def flops(self, *inputs: Spec) -> int:
        return 0

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (Sample(cls(), (Spec((3, 2, 3, 4)),)), Sample(cls(), (Spec((2, 3)),)))

    @classmethod
    def rejects(cls) -> tuple[Reject, ...]:
        return (Reject(cls(), (Spec((6,)),), "join_records: x has no groups of records"),)


class Again(Op):
    """The same array: what is computed of it is not merged with what was computed of it before"""

    linear = True
    view = True

    def infer(self, x: Spec) -> Spec:
        return x

    def index(self, x: Spec) -> str:
        axes = " ".join(LETTERS[: len(x.shape)]) or "()"
        return f"{axes} -> {axes}"

    def reference(self, x: Array) -> Array:
        return x.copy()

    def vjp(self, dy: Any, y: Any, *inputs: Any) -> tuple[Any, ...]:
        return (dy,)

    def flops(self, *inputs: Spec) -> int:
        return 0

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (Sample(cls(), (Spec((2, 3, 4)),)),)


class Transpose(Op):
    """y has the axes of x in another order: axis i of y is axis ``order[i]`` of x."""

    order: tuple[int, ...]
    linear = True

    def infer(self, x: Spec) -> Spec:
        n = len(x.shape)
        if sorted(self.order) != list(range(n)):
            rule = f"order {self.order} does not name each of the {n} axes once"
            raise refuse(self, rule, {"x": x}, f"It is an order of {', '.join(map(str, range(n))) or 'no axes'}.")
        return Spec(tuple(x.shape[axis] for axis in self.order), x.dtype)

    def index(self, x: Spec) -> str:
        letters = LETTERS[: len(x.shape)]
        return f"{' '.join(letters) or '()'} -> {' '.join(letters[axis] for axis in self.order) or '()'}"

    def reference(self, x: Array) -> Array:
        return np.asarray(x.transpose(self.order), order="C")

    def vjp(self, dy: Any, y: Any, *inputs: Any) -> tuple[Any, ...]:
        if not spec_of(inputs[0]).floating:
            return (None,)
        back = sorted(range(len(self.order)), key=self.order.__getitem__)
        return (Transpose(order=tuple(back))(dy),)

    def flops(self, *inputs: Spec) -> int:
        return 0

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (
            Sample(cls(order=(0, 2, 1, 3)), (Spec((2, 3, 4, 5)),)),
            Sample(cls(order=(2, 0, 1)), (Spec((3, 2, 5)),)),
            Sample(cls(order=(1, 0)), (Spec((4, 3), "int64"),)),
        )

    @classmethod
    def rejects(cls) -> tuple[Reject, ...]:
        return (
            Reject(
                cls(order=(0, 0, 1)), (Spec((2, 3, 4)),), r"transpose: order \(0, 0, 1\) does not name each of the 3"
            ),
            Reject(cls(order=(0, 1)), (Spec((2, 3, 4)),), "It is an order of 0, 1, 2"),
        )


class Concatenate(Op):
    """All operands, one behind the other along ``axis``; their other axes are equal."""

    axis: int
    linear = True

    def infer(self, *xs: Spec) -> Spec:
        operands = {f"x{i}": x for i, x in enumerate(xs)}
        if not xs or not 0 <= self.axis < len(xs[0].shape):
            way_out = f"Axes are numbered 0 to {len(xs[0].shape) - 1}." if xs else "Give one or more operands."
            raise refuse(self, f"{len(xs)} operands have no axis {self.axis}", operands, way_out)
        if len({x.dtype for x in xs}) > 1:
            given = ", ".join(map(str, xs))
            raise DTypeError(f"{self.name}: operands have several dtypes ({given}). Cast them to one.")
        if len({(*x.shape[: self.axis], -1, *x.shape[self.axis + 1 :]) for x in xs}) > 1:
            raise refuse(self, f"operands differ in more than axis {self.axis}", operands, "Reshape or slice them.")
        joined = sum(x.shape[self.axis] for x in xs)
        return Spec((*xs[0].shape[: self.axis], joined, *xs[0].shape[self.axis + 1 :]), xs[0].dtype)

    def index(self, *xs: Spec) -> str:
        axes = " ".join("." if i == self.axis else c for i, c in enumerate(LETTERS[: len(xs[0].shape)]))
        return f"{', '.join([axes] * len(xs))} -> {axes}"

    def reference(self, *xs: Array) -> Array:
        return np.concatenate(xs, self.axis)

    def vjp(self, dy: Any, y: Any, *inputs: Any) -> tuple[Any, ...]:
        if not spec_of(inputs[0]).floating:
            return (None,) * len(inputs)
        n = len(inputs[0].shape)
        bounds = (0, *accumulate(x.shape[self.axis] for x in inputs))

        def along(value: int, other: int | None) -> tuple[Any, ...]:
            return tuple(value if axis == self.axis else other for axis in range(n))

        return tuple(
            Slice(starts=along(lo, 0), stops=along(hi, None), steps=(1,) * n)(dy) for lo, hi in pairwise(bounds)
        )

    def flops(self, *inputs: Spec) -> int:
        return 0

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (
            Sample(cls(axis=2), (Spec((2, 3, 4)), Spec((2, 3, 1)), Spec((2, 3, 5)))),
            Sample(cls(axis=1), (Spec((2, 3, 4)), Spec((2, 2, 4)))),
            Sample(cls(axis=0), (Spec((3,), "int64"), Spec((2,), "int64"))),
        )

    @classmethod
    def rejects(cls) -> tuple[Reject, ...]:
        x = Spec((2, 3))
        return (
            Reject(cls(axis=2), (x, x), "concatenate: 2 operands have no axis 2 .*numbered 0 to 1"),
            Reject(cls(axis=0), (), "Give one or more operands"),
            Reject(cls(axis=1), (x, Spec((3, 3))), "concatenate: operands differ in more than axis 1"),
            Reject(cls(axis=1), (x, Spec((2, 3), "float64")), "concatenate: operands have several dtypes"),
        )
