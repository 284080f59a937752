"""Matrix product, with either operand transposed: dense layers, attention, and their gradients."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import numpy as np

from ..errors import DTypeError
from ..spec import Array, Spec
from .base import LETTERS, Op, Reject, Sample, as_dtype, refuse, spec_of, summed


class _Product(Op, abstract=True):
    """The attributes of matrix products. ``ta``, ``tb``: an operand is given transposed.

    ``exact``: only kernels that add up the products of the formula, each rounded once. ``tf32``: float32 operands may
    be rounded to 10 bits of mantissa before they are multiplied, where that is faster. ``wide``: halves give float32,
    the sum as it was accumulated, and not halves.
    """

    ta: bool = False
    tb: bool = False
    exact: bool = False
    tf32: bool = False
    wide: bool = False
    usual: ClassVar[tuple[str, ...]] = ("exact", "tf32", "wide")

    def vjp(self, dy: Any, y: Any, *inputs: Any) -> tuple[Any, ...]:
        a, b = inputs
        dy = as_dtype(dy, spec_of(a).dtype)

        def of(ta: bool, tb: bool) -> Op:
            return replace(self, ta=ta, tb=tb, wide=False)

        da = of(self.tb, True)(b, dy) if self.ta else of(False, not self.tb)(dy, b)
        db = of(True, self.ta)(dy, a) if self.tb else of(not self.ta, False)(a, dy)
        return da, db


class Matmul(_Product):
    """y[m,k] = sum over i of a[m,i] b[i,k]; ``ta``: a is given as [i,m]; ``tb``: b is given as [k,i]."""

    def infer(self, a: Spec, b: Spec) -> Spec:
        operands = {"a": a, "b": b}
        if len(a.shape) != 2 or len(b.shape) != 2:
            raise refuse(self, "a and b are matrices", operands, "Flatten records to one axis first.")
        if a.dtype != b.dtype or not a.floating:
            raise DTypeError(f"matmul: operands need one floating dtype (a {a}, b {b}). Cast them first.")
        inner_a, inner_b = a.shape[1 - self.ta], b.shape[int(self.tb)]
        if inner_a != inner_b:
            raise refuse(self, f"a gives {inner_a} values but b expects {inner_b}", operands, "a is M,I and b is I,K.")
        return Spec((a.shape[int(self.ta)], b.shape[1 - self.tb]), summed(a.dtype, self.wide))

    def index(self, a: Spec, b: Spec) -> str:
        return f"{'i m' if self.ta else 'm i'}, {'k i' if self.tb else 'i k'} -> m k"

    def reference(self, a: Array, b: Array) -> Array:
        return (a.T if self.ta else a) @ (b.T if self.tb else b)

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        shapes = ((3, 4, 2), (7, 9, 33), (17, 5, 16), (5, 130, 21))
        return tuple(
            Sample(cls(ta=ta, tb=tb), (Spec((i, m) if ta else (m, i)), Spec((k, i) if tb else (i, k))))
            for ta in (False, True)
            for tb in (False, True)
            for m, i, k in shapes
        )

    @classmethod
    def rejects(cls) -> tuple[Reject, ...]:
        return (
            Reject(cls(), (Spec((2, 3)), Spec((4, 5))), r"matmul: a gives 3 values but b expects 4"),
            Reject(cls(), (Spec((2, 3, 1)), Spec((3, 5))), "matmul: a and b are matrices"),
            Reject(cls(), (Spec((2, 3)), Spec((3, 5), "float64")), "matmul: operands need one floating dtype"),
        )


class BatchMatmul(_Product):
    """y[n,m,k] = sum over i of a[n,m,i] b[n,i,k], for one or more leading axes n; ``ta``, ``tb`` as in `Matmul`."""

    def infer(self, a: Spec, b: Spec) -> Spec:
        operands = {"a": a, "b": b}
        if len(a.shape) < 3 or a.shape[:-2] != b.shape[:-2]:
            rule = "a and b have a matrix for each place of the same leading axes"
            raise refuse(self, rule, operands, "a is N,...,M,I and b is N,...,I,K; see Matmul for two matrices.")
        if a.dtype != b.dtype or not a.floating:
            raise DTypeError(f"batch_matmul: operands need one floating dtype (a {a}, b {b}). Cast them first.")
        inner_a, inner_b = a.shape[-2 if self.ta else -1], b.shape[-1 if self.tb else -2]
        if inner_a != inner_b:
            way_out = "a is N,...,M,I and b is N,...,I,K."
            raise refuse(self, f"a gives {inner_a} values but b expects {inner_b}", operands, way_out)
        matrix = (a.shape[-1 if self.ta else -2], b.shape[-2 if self.tb else -1])
        return Spec((*a.shape[:-2], *matrix), summed(a.dtype, self.wide))

    def index(self, a: Spec, b: Spec) -> str:
        n = " ".join(LETTERS[: len(a.shape) - 2])
        return f"{n} {'i m' if self.ta else 'm i'}, {n} {'k i' if self.tb else 'i k'} -> {n} m k"

    def reference(self, a: Array, b: Array) -> Array:
        left, right = np.swapaxes(a, -1, -2) if self.ta else a, np.swapaxes(b, -1, -2) if self.tb else b
        return np.asarray(np.matmul(left, right))

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (
            Sample(cls(), (Spec((2, 3, 5, 4)), Spec((2, 3, 4, 17)))),
            Sample(cls(ta=True), (Spec((3, 4, 7)), Spec((3, 4, 9)))),
            Sample(cls(tb=True), (Spec((3, 9, 8)), Spec((3, 18, 8)))),
            Sample(cls(ta=True, tb=True), (Spec((2, 3, 5)), Spec((2, 4, 3)))),
        )

    @classmethod
    def rejects(cls) -> tuple[Reject, ...]:
        a = Spec((2, 3, 4))
        return (
            Reject(cls(), (a, Spec((2, 3, 5))), "batch_matmul: a gives 4 values but b expects 3"),
            Reject(cls(), (a, Spec((3, 4, 5))), "batch_matmul: a and b have a matrix for each place"),
            Reject(cls(), (Spec((3, 4)), Spec((4, 5))), "batch_matmul: a and b have a matrix for each place"),
            Reject(cls(), (a, Spec((2, 4, 5), "float64")), "batch_matmul: operands need one floating dtype"),
        )
