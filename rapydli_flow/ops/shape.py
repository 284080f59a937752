"""Ops that only change the shape of an array."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod
from typing import Any

from ..spec import Array, Block, Spec
from .base import Op, Reject, Sample, refuse


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
