"""Parts of an array along its axes: slices and their gradient, and padding with a constant.

slice         y[h] = x[h * step + start]
slice_grad    dx[h * step + start] = dy[h], 0 elsewhere
pad           y[h] = x[h - low], the value where that is outside of x
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ..spec import Array, Block, Spec
from .base import LETTERS, Op, Reject, Sample, refuse, spec_of


class Slice(Op):
    """Every ``step``-th element from ``start`` to before ``stop``, for each axis.

    A stop of None, or behind the end, is the end: so the op holds for smaller batches too. Steps are 1 or more.
    """

    starts: tuple[int, ...]
    stops: tuple[int | None, ...]
    steps: tuple[int, ...]
    linear = True

    def ranges(self, x: Spec) -> list[range]:
        """The positions that are taken along each axis."""
        return [
            range(start, size if stop is None else min(stop, size), step)
            for start, stop, step, size in zip(self.starts, self.stops, self.steps, x.shape, strict=True)
        ]

    def infer(self, x: Spec) -> Spec:
        n = len(x.shape)
        if not len(self.starts) == len(self.stops) == len(self.steps) == n:
            given = f"{len(self.starts)}, {len(self.stops)} and {len(self.steps)}"
            raise refuse(self, f"{given} starts, stops and steps for {n} axes", {"x": x}, "Give one for each axis.")
        if min(self.starts, default=0) < 0 or min(self.steps, default=1) < 1:
            rule = f"starts {self.starts} are 0 or more and steps {self.steps} 1 or more"
            raise refuse(self, rule, {"x": x}, "Count from the first element, forwards.")
        taken = self.ranges(x)
        if any(not r and size for r, size in zip(taken, x.shape, strict=True)):
            rule = f"nothing lies between starts {self.starts} and stops {self.stops}"
            raise refuse(self, rule, {"x": x}, "A start is smaller than its stop, and than the size of its axis.")
        return Spec(tuple(map(len, taken)), x.dtype)

    def index(self, x: Spec) -> str:
        out = LETTERS[: len(x.shape)]
        # '+r' of size 1: where only the end is cut off, the axis of x is not the axis of y
        read = [
            c if r == range(size) else f"{c}*{r.step}+{r.start}+r"
            for c, r, size in zip(out, self.ranges(x), x.shape, strict=True)
        ]
        return f"{' '.join(read) or '()'} -> {' '.join(out) or '()'} | r=1"

    def local(self, ins: Sequence[Block], outs: Sequence[Block]) -> Op:
        (x,), (y,) = ins, outs
        starts = tuple(
            start + step * b - a for start, step, a, b in zip(self.starts, self.steps, x.lo, y.lo, strict=True)
        )
        ends = zip(starts, self.steps, y.shape, strict=True)
        return replace(self, starts=starts, stops=tuple(a + step * (size - 1) + 1 for a, step, size in ends))

    def reference(self, x: Array) -> Array:
        cuts = zip(self.starts, self.stops, self.steps, strict=True)
        return np.ascontiguousarray(x[tuple(slice(*cut) for cut in cuts)]).reshape(self.infer(_spec(x)).shape)

    def vjp(self, dy: Any, y: Any, *inputs: Any) -> tuple[Any, ...]:
        if not spec_of(inputs[0]).floating:
            return (None,)
        return (SliceGrad(starts=self.starts, steps=self.steps, shape=tuple(inputs[0].shape))(dy),)

    def flops(self, *inputs: Spec) -> int:
        return 0

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (
            Sample(cls(starts=(0, 3, 0), stops=(None, 9, 4), steps=(1, 2, 1)), (Spec((2, 10, 4)),)),
            Sample(cls(starts=(1, 0, 1), stops=(4, 3, 6), steps=(1, 1, 3)), (Spec((5, 4, 6)),)),
            Sample(cls(starts=(2,), stops=(None,), steps=(3,)), (Spec((9,), "int64"),)),
        )

    @classmethod
    def rejects(cls) -> tuple[Reject, ...]:
        x = Spec((2, 10))
        return (
            Reject(cls(starts=(0,), stops=(1,), steps=(1,)), (x,), "slice: 1, 1 and 1 starts, stops and steps for 2"),
            Reject(cls(starts=(0, -1), stops=(2, 5), steps=(1, 1)), (x,), r"slice: starts \(0, -1\) are 0 or more"),
            Reject(cls(starts=(0, 0), stops=(2, 5), steps=(1, 0)), (x,), r"steps \(1, 0\) 1 or more"),
            Reject(cls(starts=(0, 10), stops=(2, 12), steps=(1, 1)), (x,), "slice: nothing lies between"),
        )


class SliceGrad(Op):
    """dx of ``shape``: dy where `Slice` read, 0 elsewhere.

    Sliced axes are whole on every rank: the part of dy that a rank would need may be empty.
    """

    starts: tuple[int, ...]
    steps: tuple[int, ...]
    shape: tuple[int, ...]
    linear = True

    def stops(self, dy: Spec) -> tuple[int, ...]:
        ends = zip(self.starts, self.steps, dy.shape, strict=True)
        return tuple(start + step * (size - 1) + 1 for start, step, size in ends)

    def infer(self, dy: Spec) -> Spec:
        if not len(dy.shape) == len(self.shape) == len(self.starts) == len(self.steps):
            rule = f"{len(self.starts)} starts and {len(self.steps)} steps for shape {self.shape}"
            raise refuse(self, rule, {"dy": dy}, "Give one for each axis.")
        if any(stop > size for stop, size in zip(self.stops(dy), self.shape, strict=True)):
            rule = f"dy does not lie within {self.shape} from {self.starts} with steps {self.steps}"
            raise refuse(self, rule, {"dy": dy}, "dy has the shape of what slice makes.")
        return Spec(self.shape, dy.dtype)

    def index(self, dy: Spec) -> str:
        letters = zip(LETTERS, dy.shape, self.shape, strict=False)
        axes = " ".join(c if size == whole else "." for c, size, whole in letters) or "()"
        return f"{axes} -> {axes}"

    def local(self, ins: Sequence[Block], outs: Sequence[Block]) -> Op:
        return replace(self, shape=outs[0].shape)

    def reference(self, dy: Array) -> Array:
        dx = np.zeros(self.shape, dy.dtype)
        dx[tuple(map(slice, self.starts, self.stops(_spec(dy)), self.steps))] = dy
        return dx

    def vjp(self, dy: Any, y: Any, *inputs: Any) -> tuple[Any, ...]:
        stops = self.stops(Spec(tuple(inputs[0].shape)))
        return (Slice(starts=self.starts, stops=stops, steps=self.steps)(dy),)

    def flops(self, *inputs: Spec) -> int:
        return 0

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (
            Sample(cls(starts=(0, 3, 0), steps=(1, 2, 1), shape=(2, 10, 4)), (Spec((2, 3, 4)),)),
            Sample(cls(starts=(1, 0, 1), steps=(1, 1, 3), shape=(5, 4, 6)), (Spec((3, 3, 2)),)),
        )

    @classmethod
    def rejects(cls) -> tuple[Reject, ...]:
        op = cls(starts=(0, 3), steps=(1, 2), shape=(2, 10))
        return (
            Reject(op, (Spec((2, 5)),), r"slice_grad: dy does not lie within \(2, 10\)"),
            Reject(op, (Spec((2, 5, 1)),), "slice_grad: 2 starts and 2 steps for shape"),
        )


class Pad(Op):
    """``low`` elements of ``value`` before each axis, and ``high`` behind it.

    A padded axis can be split as long as every rank has some of x, as in a convolution with padding.
    """

    low: tuple[int, ...]
    high: tuple[int, ...]
    value: float = 0.0

    @property
    def linear(self) -> bool:  # type: ignore[override]
        return self.value == 0

    def infer(self, x: Spec) -> Spec:
        given = (*self.low, *self.high)
        if not len(self.low) == len(self.high) == len(x.shape) or any(v < 0 for v in given):
            rule = f"low {self.low} and high {self.high} are one number, 0 or more, for each axis"
            raise refuse(self, rule, {"x": x}, "To cut an axis off, slice it.")
        if not x.floating and self.value != int(self.value):
            raise refuse(self, f"{self.value} is not a whole number", {"x": x}, "Cast x, or pad with a whole number.")
        return Spec(tuple(low + n + high for low, n, high in zip(self.low, x.shape, self.high, strict=True)), x.dtype)

    def index(self, x: Spec) -> str:
        out = LETTERS[: len(x.shape)]
        read = [
            f"{c}-r-{low}" if low + high else c for c, low, high in zip(out, self.low, self.high, strict=True)
        ]  # '-r' of size 1: where only the end is padded, the axis of x is not the axis of y
        return f"{' '.join(read) or '()'} -> {' '.join(out) or '()'} | r=1"

    def local(self, ins: Sequence[Block], outs: Sequence[Block]) -> Op:
        (x,), (y,) = ins, outs
        low = tuple(p + a - b for p, a, b in zip(self.low, x.lo, y.lo, strict=True))
        high = tuple(whole - n - p for whole, n, p in zip(y.shape, x.shape, low, strict=True))
        return replace(self, low=low, high=high)

    def reference(self, x: Array) -> Array:
        return np.pad(x, tuple(zip(self.low, self.high, strict=True)), constant_values=self.value)

    def vjp(self, dy: Any, y: Any, *inputs: Any) -> tuple[Any, ...]:
        if not spec_of(inputs[0]).floating:
            return (None,)
        stops = tuple(low + n for low, n in zip(self.low, inputs[0].shape, strict=True))
        return (Slice(starts=self.low, stops=stops, steps=(1,) * len(stops))(dy),)

    def flops(self, *inputs: Spec) -> int:
        return 0

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (
            Sample(cls(low=(0, 2, 0, 0), high=(0, 1, 1, 0)), (Spec((2, 3, 4, 2)),)),
            Sample(cls(low=(1, 0, 3), high=(0, 2, 1), value=-1.5), (Spec((2, 3, 4)),)),
            Sample(cls(low=(1,), high=(2,), value=7.0), (Spec((4,), "int64"),)),
        )

    @classmethod
    def rejects(cls) -> tuple[Reject, ...]:
        return (
            Reject(cls(low=(0, -1), high=(0, 0)), (Spec((2, 3)),), r"pad: low \(0, -1\) and high \(0, 0\) are one"),
            Reject(cls(low=(0,), high=(0,)), (Spec((2, 3)),), "0 or more, for each axis"),
            Reject(cls(low=(1,), high=(0,), value=0.5), (Spec((2,), "int64"),), "pad: 0.5 is not a whole number"),
        )


def _spec(x: Array) -> Spec:
    return Spec(x.shape, x.dtype.name)
