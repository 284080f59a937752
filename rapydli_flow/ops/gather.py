"""Elements that are chosen by whole numbers: along an axis (gather), or rows of a table (embedding).

    gather       y[a, j, c] = x[a, indices[a, j, c], c]       np.take_along_axis
    embedding    y[n, t, d] = table[ids[n, t], d]

A number outside of the axis gives NaN, and no gradient: nothing is read or written there. Negative ones are outside.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..spec import Array, Spec
from .base import LETTERS, Op, Reject, Sample, refuse


def _fibres(op: Gather | GatherGrad, x: tuple[int, ...]) -> str:
    """Axes of an operand: letters, with '.' for the axis that is chosen from."""
    return " ".join("." if i == op.axis else c for i, c in enumerate(LETTERS[: len(x)]))


class Gather(Op):
    """y[.., j, ..] = x[.., indices[.., j, ..], ..] along ``axis``; NaN where an index is outside of it."""

    axis: int

    def infer(self, x: Spec, indices: Spec) -> Spec:
        operands = {"x": x, "indices": indices}
        n = len(x.shape)
        if not x.floating or indices.floating:
            raise refuse(self, "x is floating and indices are whole numbers", operands, "Cast them.")
        if not 0 <= self.axis < n or len(indices.shape) != n:
            rule = f"x and indices have the same number of axes, {self.axis} one of them"
            raise refuse(self, rule, operands, "Reshape indices to the axes of x.")
        if any(a != b for i, (a, b) in enumerate(zip(x.shape, indices.shape, strict=True)) if i != self.axis):
            rule = f"x and indices differ in more than axis {self.axis}"
            raise refuse(self, rule, operands, "Only the axis that is gathered along may differ.")
        return Spec(indices.shape, x.dtype)

    def index(self, x: Spec, indices: Spec) -> str:
        axes = " ".join(LETTERS[: len(x.shape)])
        return f"{_fibres(self, x.shape)}, {axes} -> {axes}"

    def reference(self, x: Array, indices: Array) -> Array:
        size, at = x.shape[self.axis], indices.astype(np.int64)
        y = np.take_along_axis(x, np.clip(at, 0, size - 1), self.axis)
        y[(at < 0) | (at >= size)] = np.nan
        return y

    def vjp(self, dy: Any, y: Any, *inputs: Any) -> tuple[Any, ...]:
        x, indices = inputs
        return GatherGrad(axis=self.axis, size=x.shape[self.axis])(dy, indices), None

    def flops(self, *inputs: Spec) -> int:
        return 0

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (
            Sample(cls(axis=1), (Spec((2, 5, 3)), Spec((2, 4, 3), "int64")), {1: (0, 5)}),
            Sample(cls(axis=2), (Spec((3, 2, 4)), Spec((3, 2, 1), "int32")), {1: (0, 4)}),
        )

    @classmethod
    def rejects(cls) -> tuple[Reject, ...]:
        x, op = Spec((2, 5)), cls(axis=1)
        return (
            Reject(op, (x, x), "gather: x is floating and indices are whole numbers"),
            Reject(op, (x, Spec((2,), "int64")), "gather: x and indices have the same number of axes, 1 one of them"),
            Reject(op, (x, Spec((3, 5), "int64")), "gather: x and indices differ in more than axis 1"),
        )


class GatherGrad(Op):
    """dx[.., k, ..] = the sum of dy[.., j, ..] over all j with indices[.., j, ..] = k; ``size`` is that of the axis."""

    axis: int
    size: int

    def infer(self, dy: Spec, indices: Spec) -> Spec:
        if dy.shape != indices.shape or indices.floating or not 0 <= self.axis < len(dy.shape):
            rule = f"indices are whole numbers in the shape of dy, with an axis {self.axis}"
            raise refuse(self, rule, {"dy": dy, "indices": indices}, "They are those of gather.")
        return Spec((*dy.shape[: self.axis], self.size, *dy.shape[self.axis + 1 :]), dy.dtype)

    def index(self, dy: Spec, indices: Spec) -> str:
        axes = " ".join(LETTERS[: len(dy.shape)])
        return f"{axes}, {axes} -> {_fibres(self, dy.shape)}"

    def reference(self, dy: Array, indices: Array) -> Array:
        dx = np.zeros(self.infer(_spec(dy), _spec(indices)).shape, dy.dtype)
        places: list[Array] = list(np.indices(dy.shape))
        places[self.axis] = indices.astype(np.int64)
        inside = (places[self.axis] >= 0) & (places[self.axis] < self.size)
        np.add.at(dx, tuple(at[inside] for at in places), dy[inside])
        return dx

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (
            Sample(cls(axis=1, size=5), (Spec((2, 4, 3)), Spec((2, 4, 3), "int64")), {1: (0, 5)}),
            Sample(cls(axis=0, size=3), (Spec((6, 2)), Spec((6, 2), "int32")), {1: (0, 3)}),
        )

    @classmethod
    def rejects(cls) -> tuple[Reject, ...]:
        op = cls(axis=1, size=5)
        return (Reject(op, (Spec((2, 3)), Spec((2, 4), "int64")), "gather_grad: indices are whole numbers in the"),)


class Embedding(Op):
    """y[.., d] = table[ids[..], d]: a row of ``table`` (V, D) for each id; NaN where an id is not 0 to V - 1."""

    def infer(self, table: Spec, ids: Spec) -> Spec:
        operands = {"table": table, "ids": ids}
        if len(table.shape) != 2 or not table.floating:
            raise refuse(self, "table has a row of features for each id", operands, "table is V,features.")
        if ids.floating or not ids.shape:
            raise refuse(self, "ids are whole numbers, with the batch first", operands, "ids is N,... of int64.")
        return Spec((*ids.shape, table.shape[1]), table.dtype)

    def index(self, table: Spec, ids: Spec) -> str:
        axes = " ".join(LETTERS[: len(ids.shape)])
        return f". z, {axes} -> {axes} z"

    def reference(self, table: Array, ids: Array) -> Array:
        size, at = table.shape[0], ids.astype(np.int64)
        y = table[np.clip(at, 0, size - 1)]
        y[(at < 0) | (at >= size)] = np.nan
        return y

    def vjp(self, dy: Any, y: Any, *inputs: Any) -> tuple[Any, ...]:
        table, ids = inputs
        return EmbeddingGrad(vocabulary=table.shape[0])(dy, ids), None

    def flops(self, *inputs: Spec) -> int:
        return 0

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (
            Sample(cls(), (Spec((6, 5)), Spec((3, 4), "int64")), {1: (0, 6)}),
            Sample(cls(), (Spec((9, 3)), Spec((5,), "uint8")), {1: (0, 9)}),
        )

    @classmethod
    def rejects(cls) -> tuple[Reject, ...]:
        table = Spec((6, 5))
        return (
            Reject(cls(), (Spec((6,)), Spec((3,), "int64")), "embedding: table has a row of features"),
            Reject(cls(), (table, Spec((3,))), "embedding: ids are whole numbers"),
        )


class EmbeddingGrad(Op):
    """dtable[v] = the sum of dy[..] over all places with ids[..] = v, in the order of the places."""

    vocabulary: int

    def infer(self, dy: Spec, ids: Spec) -> Spec:
        if ids.floating or not ids.shape or dy.shape[:-1] != ids.shape:
            rule = "dy has a row of features for each of the whole numbers ids"
            raise refuse(self, rule, {"dy": dy, "ids": ids}, "dy is N,...,features and ids is N,....")
        return Spec((self.vocabulary, dy.shape[-1]), dy.dtype)

    def index(self, dy: Spec, ids: Spec) -> str:
        axes = " ".join(LETTERS[: len(ids.shape)])
        return f"{axes} z, {axes} -> . z"

    def reference(self, dy: Array, ids: Array) -> Array:
        out = np.zeros((self.vocabulary, dy.shape[-1]), dy.dtype)
        at = ids.astype(np.int64)
        inside = (at >= 0) & (at < self.vocabulary)
        np.add.at(out, at[inside], dy[inside])
        return out

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (
            Sample(cls(vocabulary=6), (Spec((3, 4, 5)), Spec((3, 4), "int64")), {1: (0, 6)}),
            Sample(cls(vocabulary=3), (Spec((9, 4)), Spec((9,), "uint8")), {1: (0, 3)}),
        )

    @classmethod
    def rejects(cls) -> tuple[Reject, ...]:
        op = cls(vocabulary=6)
        return (Reject(op, (Spec((3, 5)), Spec((4,), "int64")), "embedding_grad: dy has a row of features for each"),)


def _spec(x: Array) -> Spec:
    return Spec(x.shape, x.dtype.name)
