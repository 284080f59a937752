"""Normalisation within a sample: layer norm, group norm, instance norm and RMS norm are one op.

`Standardize` takes mean and variance over the last axes of x, with the channels in groups; a gain and a
bias are pointwise ops behind it, so that their gradients are sums over samples and the tail can be fused.

    layer norm      axes=1, groups=1             Ba, Kiros, Hinton, "Layer Normalization", 2016
    group norm      space and channels, groups   Wu, He, "Group Normalization", 2018
    instance norm   the same, groups=channels    Ulyanov, Vedaldi, Lempitsky, "Instance Normalization", 2016
    RMS norm        axes=1, centered=False       Zhang, Sennrich, "Root Mean Square Layer Normalization", 2019

Nothing is kept for the gradient but x: it takes mean and variance again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ..errors import DTypeError
from ..spec import Array, Block, Spec
from .base import LETTERS, Op, Reject, Sample, refuse


class _Standardizing(Op, abstract=True):
    """The attributes that `Standardize` shares with its gradient."""

    axes: int = 1
    groups: int = 1
    eps: float = 1e-5
    centered: bool = True

    def check(self, x: Spec) -> None:
        if not x.floating:
            raise DTypeError(f"{self.name}: x needs a floating dtype (x {x}). Cast it first.")
        if not 1 <= self.axes < len(x.shape):
            rule = f"axes={self.axes} is not 1 to {len(x.shape) - 1}, the axes behind the samples"
            raise refuse(self, rule, {"x": x}, "x is N,...; its last axes are normalised.")
        if self.groups < 1 or x.shape[-1] % self.groups:
            rule = f"{x.shape[-1]} channels are not divisible by {self.groups} groups"
            raise refuse(self, rule, {"x": x}, "Change channels or groups; channels are the last axis.")

    def operand(self, x: Spec) -> str:
        """Axes of x in the index formula; channels that are normalised each by itself can be split."""
        last = "z" if self.groups == x.shape[-1] else "."
        return " ".join([*LETTERS[: len(x.shape) - self.axes], *["."] * (self.axes - 1), last])

    def local(self, ins: Sequence[Block], outs: Sequence[Block]) -> Op:
        alone = self.groups == outs[0].whole[-1]
        return replace(self, groups=outs[0].shape[-1]) if alone else self

    def grouped(self, x: Array) -> Array:
        """x as [samples, elements of space, groups, channels of a group], in float64."""
        lead = x.shape[: x.ndim - self.axes]
        rows = int(np.prod(lead, dtype=np.int64))
        return x.reshape(rows, -1, self.groups, x.shape[-1] // self.groups).astype(np.float64)

    def standard(self, x: Array) -> tuple[Array, Array]:
        """(x - mean) / sqrt(var + eps), grouped, and 1 / sqrt(var + eps)."""
        wide = self.grouped(x)
        if self.centered:
            wide = wide - wide.mean((1, 3), keepdims=True)
        scale = 1.0 / np.sqrt((wide * wide).mean((1, 3), keepdims=True) + self.eps)
        return wide * scale, scale


class Standardize(_Standardizing):
    """y = (x - mean) / sqrt(var + eps) over the last ``axes`` axes and the channels of a group.

    Without ``centered`` the mean is taken as 0, so that var is the mean square.
    """

    def infer(self, x: Spec) -> Spec:
        self.check(x)
        return x

    def index(self, x: Spec) -> str:
        return f"{self.operand(x)} -> {self.operand(x)}"

    def reference(self, x: Array) -> Array:
        return np.asarray(self.standard(x)[0].reshape(x.shape), x.dtype)

    def vjp(self, dy: Any, y: Any, *inputs: Any) -> tuple[Any, ...]:
        grad = StandardizeGrad(axes=self.axes, groups=self.groups, eps=self.eps, centered=self.centered)
        return (grad(dy, inputs[0]),)

    def flops(self, *inputs: Spec) -> int:
        return 7 * inputs[0].size

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return tuple(Sample(cls(**attributes), (x,)) for attributes, x in _cases())

    @classmethod
    def rejects(cls) -> tuple[Reject, ...]:
        return (
            Reject(cls(groups=4), (Spec((2, 3, 6)),), "standardize: 6 channels are not divisible by 4 groups"),
            Reject(cls(axes=3), (Spec((2, 3, 6)),), "standardize: axes=3 is not 1 to 2"),
            Reject(cls(), (Spec((2, 6), "uint8"),), "standardize: x needs a floating dtype"),
        )


class StandardizeGrad(_Standardizing):
    """dx = (dy - mean(dy) - y mean(dy y)) / sqrt(var + eps), where y is the output; the means are as those of x.

    Without ``centered`` there is no mean(dy).
    """

    def infer(self, dy: Spec, x: Spec) -> Spec:
        self.check(x)
        if dy != x:
            raise refuse(self, "dy must be like x", {"dy": dy, "x": x}, "Both have the shape of the output.")
        return x

    def index(self, dy: Spec, x: Spec) -> str:
        return f"{self.operand(x)}, {self.operand(x)} -> {self.operand(x)}"

    def reference(self, dy: Array, x: Array) -> Array:
        y, scale = self.standard(x)
        g = self.grouped(dy)
        dx = g - y * (g * y).mean((1, 3), keepdims=True)
        if self.centered:
            dx -= g.mean((1, 3), keepdims=True)
        return np.asarray((dx * scale).reshape(x.shape), x.dtype)

    def flops(self, *inputs: Spec) -> int:
        return 15 * inputs[0].size

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return tuple(Sample(cls(**attributes), (x, x)) for attributes, x in _cases())

    @classmethod
    def rejects(cls) -> tuple[Reject, ...]:
        x = Spec((2, 3, 6))
        return (
            Reject(cls(), (Spec((2, 6)), x), "standardize_grad: dy must be like x"),
            Reject(cls(groups=4), (x, x), "standardize_grad: 6 channels are not divisible by 4 groups"),
        )


def _cases() -> tuple[tuple[dict[str, Any], Spec], ...]:
    return (
        ({}, Spec((3, 2, 37))),
        ({"axes": 3, "groups": 4, "centered": False, "eps": 1e-3}, Spec((2, 3, 2, 40))),
        ({"axes": 2, "groups": 5, "eps": 0.1}, Spec((2, 35, 5))),
    )
