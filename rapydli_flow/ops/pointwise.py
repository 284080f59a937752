"""Pointwise operators: one formula each, from which everything else follows.

A formula runs on NumPy arrays (`reference`) and is traced to source text (`scalar`) for Numba and
Numba-CUDA. Operands broadcast by NumPy's rules. To add one, write a class with a `formula`, and a
`vjp` built of ops; shapes, index, fusion, in-place, kernels and tests come by themselves.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np

from ..errors import DTypeError, ShapeError
from ..spec import HALVES, Array, Block, Spec
from ..template import Scalar
from . import formula as f
from .base import LETTERS, Op, Reject, Sample, spec_of
from .reduce import Sum


class Pointwise(Op, abstract=True):
    """Everything follows from `formula`, a function of one element of each operand."""

    family = "pointwise"

    formula: ClassVar[Callable[..., Any]]

    def infer(self, *xs: Spec) -> Any:
        try:
            shape = np.broadcast_shapes(*(x.shape for x in xs))
        except ValueError:
            given = ", ".join(map(str, xs))
            raise ShapeError(
                f"{self.name}: operands do not broadcast ({given}). "
                "Axes are matched from the last; sizes are equal or 1."
            ) from None
        spec = Spec(shape, self._dtype(xs, shape))
        return spec if len(self.outputs) == 1 else (spec,) * len(self.outputs)

    def _dtype(self, xs: Sequence[Spec], shape: tuple[int, ...]) -> str:
        """That of the floating operands. Where float32 is read beside halves, as a bias is, the result is halves: that
        takes an operand of halves in its shape."""
        floating = sorted({x.dtype for x in xs if x.floating})
        if len(floating) < 2:
            return floating[0] if floating else xs[0].dtype
        half = next((x.dtype for x in xs if x.dtype in HALVES and x.shape == shape), None)
        if half is None or set(floating) != {half, "float32"}:
            given = ", ".join(map(str, xs))
            raise DTypeError(f"{self.name}: operands have dtypes {' and '.join(floating)} ({given}). Cast one of them.")
        return half

    def reference(self, *xs: Array, **at: Block) -> Any:
        specs = self.out_specs(*(Spec(x.shape, x.dtype.name) for x in map(np.asarray, xs)))
        ys = self.formula(*xs)
        ys = ys if isinstance(ys, tuple) else (ys,)
        out = tuple(np.asarray(np.broadcast_to(y, s.shape), s.dtype) for y, s in zip(ys, specs, strict=True))
        return out if len(out) > 1 else out[0]

    def index(self, *xs: Spec) -> str:
        n = max((len(x.shape) for x in xs), default=0)
        out = self.out_specs(*xs)[0].shape
        letters = LETTERS[:n]

        def operand(x: Spec) -> str:
            skip = n - len(x.shape)
            axes = (letters[skip + i] if size == out[skip + i] else "0" for i, size in enumerate(x.shape))
            return " ".join(axes) or "()"

        return ", ".join(map(operand, xs)) + " -> " + ", ".join([" ".join(letters) or "()"] * len(self.outputs))

    def scalar(self, names: tuple[str, ...] | None = None) -> Scalar:
        """The formula as source text."""
        return f.trace(self.formula, names or formula_names(self), indexed=self.indexed)

    def flops(self, *inputs: Spec) -> int:
        return self.out_specs(*inputs)[0].size * max(
            1, len(self.scalar(tuple(f"x{i}" for i in range(len(inputs)))).lines)
        )


def formula_names(op: Pointwise) -> tuple[str, ...]:
    """Operand names as the formula calls them."""
    names = tuple(inspect.signature(op.formula).parameters)
    return names[:-1] if op.indexed else names


def unbroadcast(dy: Any, x: Any) -> Any:
    """Sum ``dy`` over the axes along which ``x`` was broadcast; of halves to float32, if x is."""
    extra, wide = len(dy.shape) - len(x.shape), spec_of(x).dtype == "float32" and spec_of(dy).dtype in HALVES
    if extra:
        dy = Sum(axes=tuple(range(extra)), wide=wide)(dy)
    kept = tuple(i for i, size in enumerate(x.shape) if size == 1 and dy.shape[i] != 1)
    return Sum(axes=kept, keep=True, wide=wide)(dy) if kept else dy


_PAIR = (Spec((2, 3, 4)), Spec((2, 3, 4)))
_CHANNEL = (Spec((2, 3, 4)), Spec((4,)))
_GRID = (Spec((2, 3, 4)), Spec((3, 1)))


def _binary_rejects(op: Op) -> tuple[Reject, ...]:
    return (
        Reject(op, (Spec((2, 3)), Spec((2,))), f"{op.name}: operands do not broadcast .*matched from the last"),
        Reject(op, (Spec((2,)), Spec((2,), "float64")), f"{op.name}: operands have dtypes float32 and float64"),
    )


class Add(Pointwise):
    """y = a + b"""

    linear = True

    def formula(self, a: Any, b: Any) -> Any:
        return a + b

    def vjp(self, dy: Any, y: Any, *inputs: Any) -> tuple[Any, ...]:
        a, b = inputs
        return unbroadcast(dy, a), unbroadcast(dy, b)

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return tuple(Sample(cls(), ins) for ins in (_PAIR, _CHANNEL, _GRID, (Spec(()), Spec(()))))

    @classmethod
    def rejects(cls) -> tuple[Reject, ...]:
        return _binary_rejects(cls())


class Subtract(Pointwise):
    """y = a - b"""

    linear = True

    def formula(self, a: Any, b: Any) -> Any:
        return a - b

    def vjp(self, dy: Any, y: Any, *inputs: Any) -> tuple[Any, ...]:
        a, b = inputs
        return unbroadcast(dy, a), unbroadcast(Scale(by=-1.0)(dy), b)

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return tuple(Sample(cls(), ins) for ins in (_PAIR, _CHANNEL))

    @classmethod
    def rejects(cls) -> tuple[Reject, ...]:
        return _binary_rejects(cls())


class Multiply(Pointwise):
    """y = a * b"""

    def formula(self, a: Any, b: Any) -> Any:
        return a * b

    def vjp(self, dy: Any, y: Any, *inputs: Any) -> tuple[Any, ...]:
        a, b = inputs
        return unbroadcast(Multiply()(dy, b), a), unbroadcast(Multiply()(dy, a), b)

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return tuple(Sample(cls(), ins) for ins in (_PAIR, _CHANNEL, _GRID))

    @classmethod
    def rejects(cls) -> tuple[Reject, ...]:
        return _binary_rejects(cls())


class Divide(Pointwise):
    """y = a / b"""

    def formula(self, a: Any, b: Any) -> Any:
        return a / b

    def vjp(self, dy: Any, y: Any, *inputs: Any) -> tuple[Any, ...]:
        a, b = inputs
        da = Divide()(dy, b)
        return unbroadcast(da, a), unbroadcast(Scale(by=-1.0)(Multiply()(da, y)), b)

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return tuple(Sample(cls(), ins, {1: (0.5, 2.0)}) for ins in (_PAIR, _GRID))

    @classmethod
    def rejects(cls) -> tuple[Reject, ...]:
        return _binary_rejects(cls())


class Scale(Pointwise):
    """y = by * x, for a constant"""

    by: float
    linear = True

    def formula(self, x: Any) -> Any:
        return x * self.by

    def vjp(self, dy: Any, y: Any, *inputs: Any) -> tuple[Any, ...]:
        return (self(dy),)

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (Sample(cls(by=-0.3), (Spec((3, 5)),)),)


class Copy(Pointwise):
    """y = x"""

    linear = True

    def formula(self, x: Any) -> Any:
        return x

    def vjp(self, dy: Any, y: Any, *inputs: Any) -> tuple[Any, ...]:
        return (dy,)

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (Sample(cls(), (Spec((3, 5)),)), Sample(cls(), (Spec((), "float64"),)))


class Cast(Pointwise):
    """x in another floating dtype; its gradient goes back to the dtype of x, and to no integer."""

    to: str = "float32"

    def infer(self, *xs: Spec) -> Any:
        return Spec(xs[0].shape, self.to)

    def formula(self, x: Any) -> Any:
        return f.cast(x, self.to)

    def vjp(self, dy: Any, y: Any, *inputs: Any) -> tuple[Any, ...]:
        x = spec_of(inputs[0])
        return (Cast(to=x.dtype)(dy) if x.floating else None,)

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (
            Sample(cls(), (Spec((3, 4), "uint8"),)),
            Sample(cls(to="float64"), (Spec((3, 4), "int64"),)),
            Sample(cls(to="float64"), (Spec((3, 4)),)),
        )
