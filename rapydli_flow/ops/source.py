"""Ops without inputs: leaves of a graph, constants, and the random numbers that parameters start from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from .. import random
from ..errors import SettingError
from ..spec import Array, Block, Spec
from .base import LETTERS, Op, Sample

KINDS = ("param", "state", "batch", "clock")


def _source_index(shape: tuple[int, ...]) -> str:
    return "-> " + (" ".join(LETTERS[: len(shape)]) or "()")


class Leaf(Op):
    """An input of the graph. ``kind``: param (trained), state (carried), batch (fed), clock (seed, step).

    ``init`` is the source op that a param or a state starts from; it is evaluated for each block.
    """

    kind: str
    label: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    init: Op | None = None

    def infer(self) -> Spec:
        if self.kind not in KINDS:
            raise SettingError(f"leaf: kind {self.kind!r} is not one of {', '.join(KINDS)}.")
        return Spec(self.shape, self.dtype)

    def index(self) -> str:
        return _source_index(self.shape)

    def local(self, ins: Sequence[Block], outs: Sequence[Block]) -> Op:
        return replace(self, shape=outs[0].shape)

    def reference(self) -> Array:
        raise SettingError(f"leaf: {self.label} has no value of its own; feed it. Its init is {self.init}.")

    def start(self, seed: int, at: Block) -> Array:
        """The first value of a block of this leaf."""
        spec = Spec(at.shape, self.dtype)
        if self.init is None:
            return np.zeros(spec.shape, spec.dtype)
        if self.init.indexed:
            return np.asarray(self.init.run(np.asarray(seed, np.int64), at=at)[0], spec.dtype)
        return np.asarray(self.init.local((), (at,)).run()[0], spec.dtype)


class Fill(Op):
    """An array of one constant."""

    value: float
    shape: tuple[int, ...] = ()
    dtype: str = "float32"

    def infer(self) -> Spec:
        return Spec(self.shape, self.dtype)

    def index(self) -> str:
        return _source_index(self.shape)

    def local(self, ins: Sequence[Block], outs: Sequence[Block]) -> Op:
        return replace(self, shape=outs[0].shape)

    def reference(self) -> Array:
        return np.full(self.shape, self.value, self.dtype)

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (Sample(cls(value=1.5, shape=(3, 4)), ()), Sample(cls(value=-2.0, dtype="float64"), ()))


class Normal(Op):
    """Normal random numbers of mean 0, keyed by (seed, stream, element): any block can be made alone."""

    std: float
    stream: int
    shape: tuple[int, ...]
    dtype: str = "float32"
    indexed = True

    def infer(self, seed: Spec) -> Spec:
        return Spec(self.shape, self.dtype)

    def index(self, seed: Spec) -> str:
        return "() " + _source_index(self.shape)

    def local(self, ins: Sequence[Block], outs: Sequence[Block]) -> Op:
        return replace(self, shape=outs[0].shape)

    def reference(self, seed: Array, *, at: Block) -> Array:
        return (self.std * random.normal(int(seed), self.stream, at)).astype(self.dtype)

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (Sample(cls(std=0.1, stream=7, shape=(3, 4)), (Spec((), "int64"),)),)


class Phase(Op):
    """The first input while training, the second while predicting; resolved by the passes of those names."""

    linear = True

    def infer(self, training: Spec, predicting: Spec) -> Spec:
        return training

    def index(self, training: Spec, predicting: Spec) -> str:
        letters = " ".join(LETTERS[: len(training.shape)])
        return f"{letters}, {letters} -> {letters}"

    def reference(self, training: Array, predicting: Array) -> Any:
        return training
