"""Convolution over 1, 2 or 3 spatial axes, with stride, padding, dilation and groups, and its gradients.

    y[n, h, w, k] = sum over r, s, c of x[n, h*stride+r*dilation-padding, ..., c] * w[r, s, c, k]

x is ``N, *spatial, C``; w is ``*window, C / groups, K``; padding is a (low, high) pair for each axis.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod
from typing import Any, ClassVar

import numpy as np

from ..errors import DTypeError
from ..spec import Array, Block, Spec
from .base import Op, Reject, Sample, as_dtype, refuse, spec_of, summed
from .window import OUT, TAPS, Pair, local_padding, out_size, reading, scatter, taps, windows, writing

LAYOUT = "x is N,*space,C and w is *window,C/groups,K."


def check_dtypes(op: Op, **operands: Spec) -> None:
    """DTypeError unless all operands have one floating dtype."""
    dtypes = {spec.dtype for spec in operands.values()}
    if len(dtypes) > 1 or not all(spec.floating for spec in operands.values()):
        given = ", ".join(f"{name} {spec}" for name, spec in operands.items())
        raise DTypeError(f"{op.name}: operands need one floating dtype ({given}). Cast them first.")


class _Sliding(Op, abstract=True):
    """The attributes that a convolution shares with its gradients.

    ``exact``: only kernels that add up the products of this formula, no faster algorithm with larger rounding errors.
    ``tf32``: float32 operands may be rounded to 10 bits of mantissa before they are multiplied, where that is faster.
    ``wide``: halves give float32, the sum as it was accumulated, and not halves.
    """

    stride: tuple[int, ...]
    padding: tuple[Pair, ...]
    dilation: tuple[int, ...]
    groups: int = 1
    exact: bool = False
    tf32: bool = False
    wide: bool = False
    usual: ClassVar[tuple[str, ...]] = ("exact", "tf32", "wide")

    @property
    def geometry(self) -> dict[str, Any]:
        names = ("stride", "padding", "dilation", "groups", "exact", "tf32")
        return {name: getattr(self, name) for name in names}

    @property
    def sliding(self) -> tuple[tuple[int, ...], tuple[Pair, ...], tuple[int, ...]]:
        return self.stride, self.padding, self.dilation

    def channels(self, c: int, k: int) -> tuple[str, str, str, str]:
        """Index of the channels of x, of w, the filters, and the extents: c and k are per group."""
        if self.groups == 1:
            return "c", "c", "k", ""
        return f"g*{c}+c", ".", f"g*{k}+k", f" | g={self.groups} c={c} k={k}"

    def group_of(self, x: Array, g: int) -> Array:
        """The g-th of ``groups`` equal parts of the last axis."""
        size = x.shape[-1] // self.groups
        return x[..., g * size : (g + 1) * size]


class Conv(_Sliding):
    """y[n,h,k] = sum over r, c of x[n, h*stride+r*dilation-padding, c] * w[r,c,k]"""

    def infer(self, x: Spec, w: Spec) -> Spec:
        operands = {"x": x, "w": w}
        n = len(self.stride)
        if n not in OUT or len(x.shape) != n + 2 or len(w.shape) != n + 2:
            raise refuse(self, f"{n} strides need x and w with {n + 2} axes, 1 to 3 of them spatial", operands, LAYOUT)
        if len(self.padding) != n or len(self.dilation) != n:
            rule = f"{n} strides but {len(self.padding)} paddings and {len(self.dilation)} dilations"
            raise refuse(self, rule, operands, "Give one of each for every spatial axis.")
        check_dtypes(self, x=x, w=w)
        c, k = w.shape[-2:]
        if self.groups < 1 or x.shape[-1] != c * self.groups:
            times = f" x {self.groups} groups" if self.groups != 1 else ""
            raise refuse(self, f"x has {x.shape[-1]} channels but w expects {c}{times}", operands, LAYOUT)
        if k % self.groups:
            raise refuse(
                self, f"{k} filters are not divisible by {self.groups} groups", operands, "Change filters or groups."
            )
        sizes = []
        for size, window, stride, padding, dilation in zip(x.shape[1:-1], w.shape, *self.sliding, strict=False):
            out = out_size(size, window, stride, padding, dilation)
            if stride < 1 or dilation < 1 or window < 1 or out < 1:
                rule = f"a window of {window} (stride {stride}, dilation {dilation}) does not fit in {size}"
                rule += f" + padding {padding}"
                raise refuse(
                    self, rule, operands, "Use a smaller window or more padding; stride and dilation are 1 or more."
                )
            sizes.append(out)
        return Spec((x.shape[0], *sizes, k), summed(x.dtype, self.wide))

    def index(self, x: Spec, w: Spec) -> str:
        n = len(self.stride)
        cx, cw, k, given = self.channels(w.shape[-2], w.shape[-1] // self.groups)
        space, tap = " ".join(reading(*self.sliding)), " ".join(TAPS[n])
        return f"n {space} {cx}, {tap} {cw} {k} -> n {' '.join(OUT[n])} {k}{given}"

    def local(self, ins: Sequence[Block], outs: Sequence[Block]) -> Op:
        x, w = ins
        padding = local_padding(x, outs[0], w.lo, w.shape[:-2], *self.sliding)
        return replace(self, padding=padding, groups=local_groups(self.groups, outs[0]))

    def reference(self, x: Array, w: Array) -> Array:
        out = self.infer(Spec(x.shape, x.dtype.name), Spec(w.shape, w.dtype.name)).shape[1:-1]
        letters, tap = OUT[len(out)], TAPS[len(out)]
        parts = [
            np.einsum(
                f"n{letters}{tap}c,{tap}ck->n{letters}k",
                windows(self.group_of(x, g), out, w.shape[:-2], *self.sliding),
                self.group_of(w, g),
            )
            for g in range(self.groups)
        ]
        return np.ascontiguousarray(np.concatenate(parts, -1)).astype(x.dtype, copy=False)

    def vjp(self, dy: Any, y: Any, *inputs: Any) -> tuple[Any, ...]:
        x, w = inputs
        dy = as_dtype(dy, spec_of(x).dtype)
        dx = ConvInputGrad(size=tuple(x.shape[1:-1]), **self.geometry)(dy, w)
        return dx, ConvFilterGrad(window=tuple(w.shape[:-2]), **self.geometry)(x, dy)

    def flops(self, *inputs: Spec) -> int:
        return 2 * self.infer(*inputs).size * prod(inputs[1].shape[:-1])

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return tuple(Sample(cls(**g), ins) for g, ins in _cases())

    @classmethod
    def rejects(cls) -> tuple[Reject, ...]:
        x = Spec((2, 6, 6, 3))
        one = cls(stride=(1, 1), padding=((0, 0), (0, 0)), dilation=(1, 1))
        return (
            Reject(one, (x, Spec((3, 3, 6, 8))), r"conv: x has 3 channels but w expects 6 \(x f32\[2,6,6,3\], w "),
            Reject(one, (x, Spec((7, 3, 3, 8))), "conv: a window of 7 .* does not fit in 6"),
            Reject(one, (Spec((2, 6, 3)), Spec((3, 3, 8))), "conv: 2 strides need x and w with 4 axes"),
            Reject(
                replace(one, dilation=(1,)), (x, Spec((3, 3, 3, 8))), "conv: 2 strides but 2 paddings and 1 dilations"
            ),
            Reject(replace(one, groups=3), (x, Spec((3, 3, 1, 8))), "conv: 8 filters are not divisible by 3 groups"),
            Reject(one, (x, Spec((3, 3, 3, 8), "float64")), "conv: operands need one floating dtype"),
        )


class ConvInputGrad(_Sliding):
    """dx[n,i,c] = sum over h, r with h*stride+r*dilation-padding = i, and over k, of dy[n,h,k] * w[r,c,k]

    As an op of a network this is the transposed convolution of dy.
    """

    size: tuple[int, ...]

    def infer(self, dy: Spec, w: Spec) -> Spec:
        n = len(self.stride)
        if not len(dy.shape) == len(w.shape) == n + 2 or len(self.size) != n:
            rule = f"{n} strides need dy and w with {n + 2} axes and {n} sizes, not {self.size}"
            raise refuse(self, rule, {"dy": dy, "w": w}, LAYOUT)
        check_dtypes(self, dy=dy, w=w)
        if dy.shape[-1] != w.shape[-1] or w.shape[-1] % self.groups:
            rule = f"dy has {dy.shape[-1]} channels but w has {w.shape[-1]} filters in {self.groups} groups"
            raise refuse(self, rule, {"dy": dy, "w": w}, LAYOUT)
        return Spec((dy.shape[0], *self.size, w.shape[-2] * self.groups), summed(dy.dtype, self.wide))

    def index(self, dy: Spec, w: Spec) -> str:
        n = len(self.stride)
        cx, cw, k, given = self.channels(w.shape[-2], w.shape[-1] // self.groups)
        space, tap = " ".join(writing(*self.sliding)), " ".join(TAPS[n])
        return f"n {space} {k}, {tap} {cw} {k} -> n {' '.join(OUT[n])} {cx}{given}"

    def local(self, ins: Sequence[Block], outs: Sequence[Block]) -> Op:
        dy, w = ins
        padding = local_padding(outs[0], dy, w.lo, w.shape[:-2], *self.sliding)
        return replace(self, padding=padding, size=outs[0].shape[1:-1], groups=local_groups(self.groups, outs[0]))

    def reference(self, dy: Array, w: Array) -> Array:
        tap = taps(w.shape[:-2])
        parts = [
            scatter({t: self.group_of(dy, g) @ self.group_of(w, g)[t].T for t in tap}, self.size, *self.sliding)
            for g in range(self.groups)
        ]
        return np.ascontiguousarray(np.concatenate(parts, -1))

    def vjp(self, dy: Any, y: Any, *inputs: Any) -> tuple[Any, ...]:
        g, w = inputs
        dy = as_dtype(dy, spec_of(g).dtype)
        return Conv(**self.geometry)(dy, w), ConvFilterGrad(window=tuple(w.shape[:-2]), **self.geometry)(dy, g)

    def flops(self, *inputs: Spec) -> int:
        return 2 * inputs[0].size * prod(inputs[1].shape[:-1])

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return tuple(Sample(cls(size=x.shape[1:-1], **g), (Conv(**g).infer(x, w), w)) for g, (x, w) in _cases())

    @classmethod
    def rejects(cls) -> tuple[Reject, ...]:
        op = cls(size=(6,), stride=(1,), padding=((0, 0),), dilation=(1,))
        dy = Spec((2, 4, 8))
        return (
            Reject(op, (dy, Spec((3, 3, 8), "float64")), "conv_input_grad: operands need one floating dtype"),
            Reject(op, (dy, Spec((3, 3, 6))), "conv_input_grad: dy has 8 channels but w has 6 filters in 1 groups"),
            Reject(replace(op, groups=3), (dy, Spec((3, 1, 8))), "conv_input_grad: dy has 8 .* in 3 groups"),
            Reject(op, (dy, Spec((3, 3, 3, 8))), "conv_input_grad: 1 strides need dy and w with 3 axes and 1 sizes"),
            Reject(replace(op, size=(6, 6)), (dy, Spec((3, 3, 8))), r"3 axes and 1 sizes, not \(6, 6\)"),
        )


class ConvFilterGrad(_Sliding):
    """dw[r,c,k] = sum over n, h of x[n, h*stride+r*dilation-padding, c] * dy[n,h,k]"""

    window: tuple[int, ...]

    def infer(self, x: Spec, dy: Spec) -> Spec:
        check_dtypes(self, x=x, dy=dy)
        if x.shape[0] != dy.shape[0] or x.shape[-1] % self.groups or dy.shape[-1] % self.groups:
            rule = f"x and dy must hold the same samples, and channels divisible by {self.groups} groups"
            raise refuse(self, rule, {"x": x, "dy": dy}, LAYOUT)
        shape = (*self.window, x.shape[-1] // self.groups, dy.shape[-1])
        return Spec(shape, summed(dy.dtype, self.wide))

    def index(self, x: Spec, dy: Spec) -> str:
        n = len(self.stride)
        cx, cw, k, given = self.channels(x.shape[-1] // self.groups, dy.shape[-1] // self.groups)
        space, tap = " ".join(reading(*self.sliding)), " ".join(TAPS[n])
        return f"n {space} {cx}, n {' '.join(OUT[n])} {k} -> {tap} {cw} {k}{given}"

    def local(self, ins: Sequence[Block], outs: Sequence[Block]) -> Op:
        x, dy = ins
        dw = outs[0]
        padding = local_padding(x, dy, dw.lo, dw.shape[:-2], *self.sliding)
        return replace(self, padding=padding, window=dw.shape[:-2], groups=local_groups(self.groups, dw))

    def reference(self, x: Array, dy: Array) -> Array:
        out = dy.shape[1:-1]
        letters, tap = OUT[len(out)], TAPS[len(out)]
        parts = [
            np.einsum(
                f"n{letters}{tap}c,n{letters}k->{tap}ck",
                windows(self.group_of(x, g), out, self.window, *self.sliding),
                self.group_of(dy, g),
            )
            for g in range(self.groups)
        ]
        return np.ascontiguousarray(np.concatenate(parts, -1)).astype(dy.dtype, copy=False)

    def vjp(self, dy: Any, y: Any, *inputs: Any) -> tuple[Any, ...]:
        x, g = inputs
        dy = as_dtype(dy, spec_of(x).dtype)
        return ConvInputGrad(size=tuple(x.shape[1:-1]), **self.geometry)(g, dy), Conv(**self.geometry)(x, dy)

    def flops(self, *inputs: Spec) -> int:
        return 2 * inputs[1].size * prod(self.window) * (inputs[0].shape[-1] // self.groups)

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return tuple(Sample(cls(window=w.shape[:-2], **g), (x, Conv(**g).infer(x, w))) for g, (x, w) in _cases())

    @classmethod
    def rejects(cls) -> tuple[Reject, ...]:
        op = cls(window=(3,), stride=(1,), padding=((0, 0),), dilation=(1,))
        x, dy, message = Spec((2, 6, 3)), Spec((2, 4, 8)), "conv_filter_grad: x and dy must hold the same samples"
        return (
            Reject(op, (x, Spec((2, 4, 8), "int64")), "conv_filter_grad: operands need one floating dtype"),
            Reject(op, (x, Spec((3, 4, 8))), message),
            Reject(replace(op, groups=3), (x, dy), message + ", and channels divisible by 3 groups"),
        )


def local_groups(groups: int, split: Block) -> int:
    """How many of the groups lie in a block of an operand whose last axis is grouped."""
    return groups * split.shape[-1] // split.whole[-1] if groups > 1 else 1


def _cases() -> tuple[tuple[dict[str, Any], tuple[Spec, Spec]], ...]:
    """Geometries and specs of x and w: 1, 2 and 3 axes, strides, odd and asymmetric padding, dilation, groups."""

    def case(
        x: tuple[int, ...], w: tuple[int, ...], stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1
    ) -> Any:
        n = len(x) - 2

        def each(value: Any) -> tuple[Any, ...]:
            return value if isinstance(value, tuple) else (value,) * n

        pairs = tuple(p if isinstance(p, tuple) else (p, p) for p in each(padding))
        geometry = {"stride": each(stride), "padding": pairs, "dilation": each(dilation), "groups": groups}
        return geometry, (Spec(x), Spec(w))

    return (
        case((2, 5, 6, 5), (3, 3, 5, 5), padding=1),
        case((2, 7, 6, 3), (3, 2, 3, 4), stride=(2, 1), padding=((1, 0), (2, 1))),
        case((1, 9, 9, 1), (5, 5, 1, 20), stride=2),
        case((2, 8, 7, 3), (2, 3, 3, 17), padding=1, dilation=(3, 2)),
        case((2, 5, 5, 4), (3, 3, 2, 6), padding=1, groups=2),
        case((2, 5, 4, 3), (3, 3, 1, 3), padding=1, groups=3),
        case((3, 4, 5, 6), (1, 1, 6, 33)),
        case((2, 7, 7, 3), (1, 1, 3, 4), stride=3),
        case((2, 11, 3), (4, 3, 5), stride=2, padding=((2, 1),)),
        case((1, 4, 5, 3, 2), (2, 3, 2, 2, 3), stride=(1, 2, 1), padding=((1, 0), (1, 1), (0, 0))),
    )
