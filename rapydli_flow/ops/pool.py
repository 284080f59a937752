"""Pooling over 1, 2 or 3 spatial axes: the maximum or the sum of each window, and their gradients.

Padding never wins a maximum and adds nothing to a sum. Max pooling also gives which tap won, so that
its gradient needs neither input nor output again; of equal values the first tap wins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod
from typing import Any

import numpy as np

from ..errors import DTypeError
from ..spec import Array, Block, Spec
from .base import Op, Reject, Sample, refuse
from .window import OUT, TAPS, Pair, local_padding, out_size, reading, scatter, taps, windows, writing


class _Pool(Op, abstract=True):
    """The attributes that pooling shares with its gradients."""

    window: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[Pair, ...]

    @property
    def geometry(self) -> dict[str, Any]:
        return {"window": self.window, "stride": self.stride, "padding": self.padding}

    @property
    def sliding(self) -> tuple[tuple[int, ...], tuple[Pair, ...], tuple[int, ...]]:
        return self.stride, self.padding, (1,) * len(self.window)

    @property
    def given(self) -> str:
        return " | " + " ".join(f"{r}={k}" for r, k in zip(TAPS[len(self.window)], self.window, strict=True))

    def pooled(self, x: Spec) -> Spec:
        n = len(self.window)
        if n not in OUT or len(x.shape) != n + 2 or len(self.stride) != n or len(self.padding) != n:
            got = f"{n}, {len(self.stride)} and {len(self.padding)}"
            rule = f"a window, stride and padding for each of 1 to 3 spatial axes, not {got}"
            raise refuse(self, rule, {"x": x}, "x is N,*space,C.")
        if not x.floating:
            raise DTypeError(f"{self.name}: x needs a floating dtype (x {x}). Cast it first.")
        sizes = []
        for size, window, stride, padding in zip(x.shape[1:-1], self.window, self.stride, self.padding, strict=True):
            out = out_size(size, window, stride, padding)
            if stride < 1 or out < 1 or max(padding) >= window:
                rule = f"a window of {window} (stride {stride}, padding {padding}) does not fit on {size}"
                raise refuse(self, rule, {"x": x}, "Use a smaller window; padding must be smaller than the window.")
            sizes.append(out)
        return Spec((x.shape[0], *sizes, x.shape[-1]), x.dtype)

    def gather_index(self) -> tuple[str, str]:
        """Index of the input, and of the output, of pooling."""
        n = len(self.window)
        return f"n {' '.join(reading(*self.sliding))} c", f"n {' '.join(OUT[n])} c"

    def scatter_index(self) -> tuple[str, str]:
        """Index of the output's gradient, and of the input's."""
        n = len(self.window)
        return f"n {' '.join(writing(*self.sliding))} c", f"n {' '.join(OUT[n])} c"

    def local(self, ins: Sequence[Block], outs: Sequence[Block]) -> Op:
        first = (0,) * len(self.window)
        return replace(self, padding=local_padding(ins[0], outs[0], first, self.window, *self.sliding))


class MaxPool(_Pool):
    """y = the largest value of each window, argmax = the tap (in memory order) where it was."""

    outputs = ("y", "argmax")

    def infer(self, x: Spec) -> tuple[Spec, Spec]:
        y = self.pooled(x)
        return y, Spec(y.shape, "uint8" if prod(self.window) <= 256 else "int32")

    def index(self, x: Spec) -> str:
        read, out = self.gather_index()
        return f"{read} -> {out}, {out}{self.given}"

    def reference(self, x: Array) -> tuple[Array, Array]:
        y, argmax = self.infer(Spec(x.shape, x.dtype.name))
        view = windows(x, y.shape[1:-1], self.window, *self.sliding, fill=-np.inf)
        n = len(self.window)
        flat = np.moveaxis(view, -1, 1 + n).reshape(*y.shape, -1)
        best = flat.argmax(-1)
        return np.take_along_axis(flat, best[..., None], -1)[..., 0], best.astype(argmax.dtype)

    def vjp(self, dy: Any, y: Any, *inputs: Any) -> tuple[Any, ...]:
        size = tuple(inputs[0].shape[1:-1])
        return (MaxPoolGrad(size=size, **self.geometry)(dy[0], y[1]),)

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return tuple(Sample(cls(**g), (x,)) for g, x in _cases())

    @classmethod
    def rejects(cls) -> tuple[Reject, ...]:
        return _rejects(cls)


class MaxPoolGrad(_Pool):
    """dx[i] = the sum of dy of all windows whose maximum was at i"""

    size: tuple[int, ...]

    def infer(self, dy: Spec, argmax: Spec) -> Spec:
        if dy.shape != argmax.shape or argmax.floating:
            raise refuse(
                self,
                "argmax has whole numbers in the shape of dy",
                {"dy": dy, "argmax": argmax},
                "It comes from max_pool.",
            )
        return Spec((dy.shape[0], *self.size, dy.shape[-1]), dy.dtype)

    def index(self, dy: Spec, argmax: Spec) -> str:
        read, out = self.scatter_index()
        return f"{read}, {read} -> {out}{self.given}"

    def local(self, ins: Sequence[Block], outs: Sequence[Block]) -> Op:
        return _local_grad(self, ins[0], outs[0])

    def reference(self, dy: Array, argmax: Array) -> Array:
        zero = np.zeros((), dy.dtype)
        parts = {t: np.where(argmax == i, dy, zero) for i, t in enumerate(taps(self.window))}
        return scatter(parts, self.size, *self.sliding)

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        out = []
        for g, x in _cases():
            y, argmax = MaxPool(**g).infer(x)
            out.append(Sample(cls(size=x.shape[1:-1], **g), (y, argmax), {1: (0, prod(g["window"]))}))
        return tuple(out)

    @classmethod
    def rejects(cls) -> tuple[Reject, ...]:
        op = cls(size=(4,), window=(2,), stride=(2,), padding=((0, 0),))
        return (Reject(op, (Spec((1, 2, 3)), Spec((1, 2, 3))), "max_pool_grad: argmax has whole numbers"),)


class SumPool(_Pool):
    """y = the sum of each window. An average is this over the number of elements inside: see nn.avg_pool."""

    linear = True

    def infer(self, x: Spec) -> Spec:
        return self.pooled(x)

    def index(self, x: Spec) -> str:
        read, out = self.gather_index()
        return f"{read} -> {out}{self.given}"

    def reference(self, x: Array) -> Array:
        y = self.infer(Spec(x.shape, x.dtype.name))
        n = len(self.window)
        view = windows(x, y.shape[1:-1], self.window, *self.sliding)
        return np.ascontiguousarray(view.sum(tuple(range(1 + n, 1 + 2 * n)), dtype=x.dtype))

    def vjp(self, dy: Any, y: Any, *inputs: Any) -> tuple[Any, ...]:
        return (SumPoolGrad(size=tuple(inputs[0].shape[1:-1]), **self.geometry)(dy),)

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return tuple(Sample(cls(**g), (x,)) for g, x in _cases())

    @classmethod
    def rejects(cls) -> tuple[Reject, ...]:
        return _rejects(cls)


class SumPoolGrad(_Pool):
    """dx[i] = the sum of dy of all windows that hold i"""

    size: tuple[int, ...]
    linear = True

    def infer(self, dy: Spec) -> Spec:
        return Spec((dy.shape[0], *self.size, dy.shape[-1]), dy.dtype)

    def index(self, dy: Spec) -> str:
        read, out = self.scatter_index()
        return f"{read} -> {out}{self.given}"

    def local(self, ins: Sequence[Block], outs: Sequence[Block]) -> Op:
        return _local_grad(self, ins[0], outs[0])

    def reference(self, dy: Array) -> Array:
        return scatter({t: dy for t in taps(self.window)}, self.size, *self.sliding)

    def vjp(self, dy: Any, y: Any, *inputs: Any) -> tuple[Any, ...]:
        return (SumPool(**self.geometry)(dy),)

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return tuple(Sample(cls(size=x.shape[1:-1], **g), (SumPool(**g).infer(x),)) for g, x in _cases())


def _local_grad(op: MaxPoolGrad | SumPoolGrad, dy: Block, dx: Block) -> Op:
    padding = local_padding(dx, dy, (0,) * len(op.window), op.window, *op.sliding)
    return replace(op, padding=padding, size=dx.shape[1:-1])


def _rejects(cls: Any) -> tuple[Reject, ...]:
    op = cls(window=(3, 3), stride=(2, 2), padding=((0, 0), (0, 0)))
    return (
        Reject(op, (Spec((2, 2, 5, 3)),), f"{cls.name}: a window of 3 .* does not fit on 2"),
        Reject(op, (Spec((2, 5, 3)),), f"{cls.name}: a window, stride and padding for each"),
        Reject(op, (Spec((2, 5, 5, 3), "uint8"),), f"{cls.name}: x needs a floating dtype"),
        Reject(replace(op, padding=((3, 0), (0, 0))), (Spec((2, 5, 5, 3)),), "padding must be smaller than the window"),
    )


def _cases() -> tuple[tuple[dict[str, Any], Spec], ...]:
    def case(
        x: tuple[int, ...], window: tuple[int, ...], stride: tuple[int, ...], padding: tuple[Pair, ...] = ()
    ) -> Any:
        return {"window": window, "stride": stride, "padding": padding or ((0, 0),) * len(window)}, Spec(x)

    return (
        case((2, 6, 6, 3), (2, 2), (2, 2)),
        case((2, 7, 6, 5), (3, 2), (2, 1), ((1, 1), (0, 1))),
        case((2, 8, 8, 17), (3, 3), (2, 2), ((0, 1), (0, 1))),
        case((2, 9, 3), (3,), (2,), ((1, 0),)),
        case((1, 4, 5, 4, 2), (2, 2, 3), (2, 1, 1), ((0, 0), (1, 0), (1, 1))),
    )
