"""Functions that change the shape of a tensor, and reductions over its axes."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

from ..graph import Tensor
from ..ops import Reshape, Sum


def flatten(x: Tensor) -> Any:
    """``N, ...`` as ``N, features``."""
    return Reshape(shape=(prod(x.shape[1:]),))(x)


def mean(x: Tensor, axes: int | Sequence[int]) -> Any:
    """The mean over axes (negative ones count from the last): a sum times a constant of the global shape."""
    n = len(x.shape)
    given = (axes,) if isinstance(axes, int) else tuple(axes)
    over = Sum(axes=tuple(a + n if -n <= a < 0 else a for a in given))
    return over(x) * (1.0 / prod(x.shape[a] for a in over.axes if 0 <= a < n))
