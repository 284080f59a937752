"""Locally connected convolution over 1 to 3 spatial axes: every output position has filters of its own.

    y[n, h, v, k] = sum over r, s, c of x[n, h*stride+r-padding, v*stride+s-padding, c] * w[h, v, r, s, c, k]

x is ``N, *spatial, C``; w is ``*out, *window, C, K`` for an output ``N, *out, K``; padding is a (low, high)
pair for each axis. Filters are divided as the output's positions are, so a split along rows splits them too.

Source of the method: LeCun, "Generalization and network design strategies" (1989), local connections without shared
weights; Taigman et al., "DeepFace" (2014).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ..spec import Array, Block, Spec
from .base import Op, Reject, Sample, refuse
from .conv import check_dtypes
from .window import OUT, TAPS, Pair, local_padding, out_size, reading, scatter, taps, windows, writing

LAYOUT = "x is N,*space,C and w is *out,*window,C,K."


class _Local(Op, abstract=True):
    """The attributes that a locally connected convolution shares with its gradients."""

    stride: tuple[int, ...]
    padding: tuple[Pair, ...]

    @property
    def geometry(self) -> dict[str, Any]:
        return {"stride": self.stride, "padding": self.padding}

    @property
    def sliding(self) -> tuple[tuple[int, ...], tuple[Pair, ...], tuple[int, ...]]:
        return self.stride, self.padding, (1,) * len(self.stride)

    def window_of(self, w: Any) -> tuple[int, ...]:
        """The extents of the window, from anything with the axes of filters."""
        n = len(self.stride)
        return tuple(w.shape[n : 2 * n])

    def local_pairs(self, x: Block, y: Block, w: Block) -> tuple[Pair, ...]:
        n = len(self.stride)
        return local_padding(x, y, w.lo[n : 2 * n], self.window_of(w), *self.sliding)

    def axes(self) -> tuple[str, str]:
        """Index of the output's positions, and of filters."""
        n = len(self.stride)
        out = " ".join(OUT[n])
        return out, f"{out} {' '.join(TAPS[n])} c k"


class LocalConv(_Local):
    """y[n,h,k] = sum over r, c of x[n, h*stride+r-padding, c] * w[h,r,c,k]"""

    def positions(self, x: Spec, window: Sequence[int]) -> tuple[int, ...]:
        """The output's spatial axes; ShapeError where the window does not fit."""
        n = len(self.stride)
        if n not in OUT or len(x.shape) != n + 2 or len(self.padding) != n or len(window) != n:
            got = f"{n}, {len(self.padding)} and {len(window)}"
            rule = f"a stride, padding and window for each of 1 to 3 spatial axes, not {got}"
            raise refuse(self, rule, {"x": x}, LAYOUT)
        sizes = []
        for size, extent, stride, padding in zip(x.shape[1:-1], window, self.stride, self.padding, strict=True):
            out = out_size(size, extent, stride, padding) if stride > 0 else 0
            if extent < 1 or out < 1:
                rule = f"a window of {extent} (stride {stride}) does not fit in {size} + padding {padding}"
                raise refuse(self, rule, {"x": x}, "Use a smaller window or more padding; stride is 1 or more.")
            sizes.append(out)
        return tuple(sizes)

    def infer(self, x: Spec, w: Spec) -> Spec:
        n, operands = len(self.stride), {"x": x, "w": w}
        if len(w.shape) != 2 * n + 2:
            raise refuse(self, f"{n} strides need w with {2 * n + 2} axes", operands, LAYOUT)
        check_dtypes(self, **operands)
        if x.shape[-1] != w.shape[-2]:
            raise refuse(self, f"x has {x.shape[-1]} channels but w expects {w.shape[-2]}", operands, LAYOUT)
        out = self.positions(x, self.window_of(w))
        if w.shape[:n] != out:
            raise refuse(self, f"w has filters for positions {w.shape[:n]} but there are {out}", operands, LAYOUT)
        return Spec((x.shape[0], *out, w.shape[-1]), x.dtype)

    def index(self, x: Spec, w: Spec) -> str:
        out, filters = self.axes()
        return f"n {' '.join(reading(*self.sliding))} c, {filters} -> n {out} k"

    def local(self, ins: Sequence[Block], outs: Sequence[Block]) -> Op:
        return replace(self, padding=self.local_pairs(ins[0], outs[0], ins[1]))

    def reference(self, x: Array, w: Array) -> Array:
        n = len(self.stride)
        h, r = OUT[n], TAPS[n]
        view = windows(x, w.shape[:n], self.window_of(w), *self.sliding)
        return np.ascontiguousarray(np.einsum(f"n{h}{r}c,{h}{r}ck->n{h}k", view, w))

    def vjp(self, dy: Any, y: Any, *inputs: Any) -> tuple[Any, ...]:
        x, w = inputs
        dx = LocalConvInputGrad(size=tuple(x.shape[1:-1]), **self.geometry)(dy, w)
        return dx, LocalConvFilterGrad(window=self.window_of(w), **self.geometry)(x, dy)

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return tuple(Sample(cls(**g), ins) for g, ins in _cases())

    @classmethod
    def rejects(cls) -> tuple[Reject, ...]:
        op = cls(stride=(1,), padding=((0, 0),))
        x = Spec((2, 6, 3))
        return (
            Reject(op, (x, Spec((3, 3, 8))), "local_conv: 1 strides need w with 4 axes"),
            Reject(op, (x, Spec((4, 3, 2, 8))), "local_conv: x has 3 channels but w expects 2"),
            Reject(op, (x, Spec((5, 3, 3, 8))), r"local_conv: w has filters for positions \(5,\) but there are \(4,\)"),
            Reject(op, (x, Spec((4, 7, 3, 8))), "local_conv: a window of 7 .* does not fit in 6"),
            Reject(op, (x, Spec((4, 3, 3, 8), "float64")), "local_conv: operands need one floating dtype"),
            Reject(op, (Spec((2, 6, 6, 3)), Spec((4, 3, 3, 8))), "local_conv: a stride, padding and window for each"),
        )


class LocalConvInputGrad(_Local):
    """dx[n,i,c] = sum over h, r with h*stride+r-padding = i, and over k, of dy[n,h,k] * w[h,r,c,k]"""

    size: tuple[int, ...]

    def infer(self, dy: Spec, w: Spec) -> Spec:
        n, operands = len(self.stride), {"dy": dy, "w": w}
        check_dtypes(self, **operands)
        if len(w.shape) != 2 * n + 2 or dy.shape[1:] != (*w.shape[:n], w.shape[-1]):
            raise refuse(self, "dy must have the positions and filters of w", operands, "dy is N,*out,K. " + LAYOUT)
        return Spec((dy.shape[0], *self.size, w.shape[-2]), dy.dtype)

    def index(self, dy: Spec, w: Spec) -> str:
        out, _ = self.axes()
        at = " ".join(writing(*self.sliding))
        return f"n {at} k, {at} {' '.join(TAPS[len(self.stride)])} c k -> n {out} c"

    def local(self, ins: Sequence[Block], outs: Sequence[Block]) -> Op:
        dy, w = ins
        return replace(self, padding=self.local_pairs(outs[0], dy, w), size=outs[0].shape[1:-1])

    def reference(self, dy: Array, w: Array) -> Array:
        n = len(self.stride)
        h = OUT[n]
        every: list[Any] = [slice(None)] * n
        parts = {t: np.einsum(f"n{h}k,{h}ck->n{h}c", dy, w[(*every, *t)]) for t in taps(self.window_of(w))}
        return scatter(parts, self.size, *self.sliding)

    def vjp(self, dy: Any, y: Any, *inputs: Any) -> tuple[Any, ...]:
        g, w = inputs
        return LocalConv(**self.geometry)(dy, w), LocalConvFilterGrad(window=self.window_of(w), **self.geometry)(dy, g)

    def flops(self, *inputs: Spec) -> int:
        return 2 * inputs[0].shape[0] * inputs[1].size

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return tuple(Sample(cls(size=x.shape[1:-1], **g), (LocalConv(**g).infer(x, w), w)) for g, (x, w) in _cases())

    @classmethod
    def rejects(cls) -> tuple[Reject, ...]:
        op = cls(size=(6,), stride=(1,), padding=((0, 0),))
        dy, message = Spec((2, 4, 8)), "local_conv_input_grad: dy must have the positions and filters of w"
        return (
            Reject(op, (dy, Spec((4, 3, 3, 8), "float64")), "local_conv_input_grad: operands need one floating dtype"),
            Reject(op, (dy, Spec((4, 3, 3, 6))), message),
            Reject(op, (dy, Spec((5, 3, 3, 8))), message),
        )


class LocalConvFilterGrad(_Local):
    """dw[h,r,c,k] = sum over n of x[n, h*stride+r-padding, c] * dy[n,h,k]"""

    window: tuple[int, ...]

    def infer(self, x: Spec, dy: Spec) -> Spec:
        n, operands = len(self.stride), {"x": x, "dy": dy}
        check_dtypes(self, **operands)
        if not len(x.shape) == len(dy.shape) == n + 2 or x.shape[0] != dy.shape[0]:
            rule = f"x and dy must hold the same samples, with {n} spatial axes"
            raise refuse(self, rule, operands, "x is N,*space,C and dy is N,*out,K.")
        return Spec((*dy.shape[1:-1], *self.window, x.shape[-1], dy.shape[-1]), dy.dtype)

    def index(self, x: Spec, dy: Spec) -> str:
        out, filters = self.axes()
        return f"n {' '.join(reading(*self.sliding))} c, n {out} k -> {filters}"

    def local(self, ins: Sequence[Block], outs: Sequence[Block]) -> Op:
        dw = outs[0]
        return replace(self, padding=self.local_pairs(ins[0], ins[1], dw), window=self.window_of(dw))

    def reference(self, x: Array, dy: Array) -> Array:
        n = len(self.stride)
        h, r = OUT[n], TAPS[n]
        view = windows(x, dy.shape[1:-1], self.window, *self.sliding)
        return np.ascontiguousarray(np.einsum(f"n{h}{r}c,n{h}k->{h}{r}ck", view, dy))

    def vjp(self, dy: Any, y: Any, *inputs: Any) -> tuple[Any, ...]:
        x, g = inputs
        return LocalConvInputGrad(size=tuple(x.shape[1:-1]), **self.geometry)(g, dy), LocalConv(**self.geometry)(x, dy)

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return tuple(
            Sample(cls(window=op.window_of(w), **g), (x, op.infer(x, w)))
            for op, g, (x, w) in ((LocalConv(**g), g, ins) for g, ins in _cases())
        )

    @classmethod
    def rejects(cls) -> tuple[Reject, ...]:
        op = cls(window=(3,), stride=(1,), padding=((0, 0),))
        x, dy, name = Spec((2, 6, 3)), Spec((2, 4, 8)), "local_conv_filter_grad"
        return (
            Reject(op, (x, Spec((2, 4, 8), "int64")), f"{name}: operands need one floating dtype"),
            Reject(op, (x, Spec((3, 4, 8))), f"{name}: x and dy must hold the same samples, with 1 spatial axes"),
            Reject(op, (Spec((2, 6, 6, 3)), dy), f"{name}: x and dy must hold the same samples, with 1 spatial axes"),
        )


def _cases() -> tuple[tuple[dict[str, Any], tuple[Spec, Spec]], ...]:
    """Geometries and specs of x and w: 2, 1 and 3 axes, strides, odd and asymmetric padding."""
    return (
        ({"stride": (2, 1), "padding": ((1, 0), (0, 2))}, (Spec((2, 6, 4, 2)), Spec((3, 4, 2, 3, 2, 5)))),
        ({"stride": (1,), "padding": ((-1, 2),)}, (Spec((9, 5, 3)), Spec((4, 3, 3, 17)))),  # as on a rank
        (
            {"stride": (1, 2, 1), "padding": ((0, 0), (0, 1), (1, 0))},
            (Spec((2, 3, 4, 2, 17)), Spec((2, 2, 3, 2, 3, 1, 17, 1))),
        ),
    )
