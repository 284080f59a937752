"""Dropout: keeps each element with probability 1 - rate and scales what it keeps.

What is dropped is a hash of seed, step, the node's stream and the element's place in the whole
array: nothing is stored for the gradient, and no split changes it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..arguments import is_number
from ..errors import SettingError
from ..random import indices
from ..spec import Array, Block, Spec
from . import formula as f
from .base import LETTERS, Reject, Sample
from .pointwise import Pointwise


class Dropout(Pointwise):
    """y = x / (1 - rate) where kept, else 0"""

    rate: float
    stream: int
    indexed = True

    def infer(self, x: Spec, seed: Spec, step: Spec) -> Spec:  # type: ignore[override]
        if not is_number(self.rate) or not 0.0 <= self.rate < 1.0:
            raise SettingError(f"dropout: rate {self.rate} is not in [0, 1). It is the share that is dropped.")
        return x

    def index(self, *xs: Spec) -> str:
        letters = " ".join(LETTERS[: len(xs[0].shape)])
        return f"{letters}, (), () -> {letters}"

    def formula(self, x: Any, seed: Any, step: Any, index: Any) -> Any:
        threshold = round(self.rate * 2**24)
        return f.where(f.keep(seed, step, self.stream, index, threshold), x * (1.0 / (1.0 - self.rate)), 0.0)

    def reference(self, x: Array, seed: Array, step: Array, *, at: Block) -> Array:  # type: ignore[override]
        return np.asarray(self.formula(x, seed, step, indices(at)), x.dtype)

    def vjp(self, dy: Any, y: Any, *inputs: Any) -> tuple[Any, ...]:
        _, seed, step = inputs
        return self(dy, seed, step), None, None

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        clock = (Spec((), "int64"), Spec((), "int64"))
        return (
            Sample(cls(rate=0.4, stream=77), (Spec((5, 6, 3)), *clock), {1: (0, 1 << 40), 2: (0, 1000)}),
            Sample(cls(rate=0.0, stream=1), (Spec((3,)), *clock)),
        )

    @classmethod
    def rejects(cls) -> tuple[Reject, ...]:
        clock = (Spec((), "int64"), Spec((), "int64"))
        return (Reject(cls(rate=1.0, stream=1), (Spec((3,)), *clock), r"dropout: rate 1.0 is not in \[0, 1\)"),)
