"""Pooling over 1 to 3 spatial axes; sizes are a number or one for each axis."""

from __future__ import annotations

from typing import Any

from ..graph import Tensor
from ..ops import Fill, MaxPool, SumPool
from .layer import Padding, Sizes, pairs, sizes


def max_pool(x: Tensor, window: Sizes, *, stride: Sizes | None = None, padding: Padding = 0) -> Any:
    """The maximum of each window; the stride is the window unless given."""
    return MaxPool(**_pooling("max_pool", x, window, stride, padding))(x)[0]


def avg_pool(x: Tensor, window: Sizes, *, stride: Sizes | None = None, padding: Padding = 0) -> Any:
    """The mean of each window; padding does not count."""
    pool = SumPool(**_pooling("avg_pool", x, window, stride, padding))
    ones = x.graph.add(Fill(value=1.0, shape=(1, *x.shape[1:-1], 1), dtype=x.dtype))
    return pool(x) / pool(ones)


def _pooling(name: str, x: Tensor, window: Sizes, stride: Sizes | None, padding: Padding) -> dict[str, Any]:
    space = len(x.shape) - 2
    extents = sizes(name, "window", window, space)
    return {
        "window": extents,
        "stride": extents if stride is None else sizes(name, "stride", stride, space),
        "padding": pairs(name, padding, space),
    }
