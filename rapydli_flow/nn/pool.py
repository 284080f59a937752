"""Pooling over 1 to 3 spatial axes: ``N, *space, C`` to fewer positions. Sizes are a number or one for each axis.

Where windows do not end at the edge, what is left over is not read. To pool it as well (what others call ceil mode)
give more padding on the high side: ``padding=((0, 1), (0, 1))``.
"""

from __future__ import annotations

from math import prod
from typing import Any

from ..errors import GraphError, SettingError
from ..graph import Tensor
from ..ops import AdaptiveAvgPool, AdaptiveMaxPool, Fill, MaxPool, Multiply, Reshape, Sqrt, SumPool
from .layer import Padding, Sizes, pairs, sizes
from .shape import mean


def max_pool(x: Tensor, window: Sizes, *, stride: Sizes | None = None, padding: Padding = 0) -> Any:
    """The maximum of each window; the stride is the window unless given. Padding never wins."""
    return MaxPool(**_pooling("max_pool", x, window, stride, padding))(x)[0]


def avg_pool(
    x: Tensor, window: Sizes, *, stride: Sizes | None = None, padding: Padding = 0, count_padding: bool = False
) -> Any:
    """The mean of each window; the stride is the window unless given.

    Padding does not count, unless ``count_padding``: then it counts as zeros (the default of PyTorch).
    """
    geometry = _pooling("avg_pool", x, window, stride, padding)
    pool = SumPool(**geometry)
    if count_padding or not any(size for pair in geometry["padding"] for size in pair):
        return pool(x) * (1.0 / prod(geometry["window"]))
    ones = x.graph.add(Fill(value=1.0, shape=(1, *x.shape[1:-1], 1), dtype=x.dtype))
    return pool(x) / pool(ones)


def l2_pool(x: Tensor, window: Sizes, *, stride: Sizes | None = None, padding: Padding = 0, eps: float = 1e-12) -> Any:
    """sqrt(eps + the sum of squares of each window); the stride is the window unless given.

    A sum, not a mean; padding adds nothing. ``eps`` keeps the gradient finite where all of a window is 0.
    Source of the method: Sermanet, Chintala and LeCun, "Convolutional neural networks applied to house numbers
    digit classification" (2012), with equal weights.
    """
    if not eps > 0:
        raise SettingError(f"l2_pool: eps={eps} is not above 0, so the gradient of a window of zeros is not finite.")
    squares = SumPool(**_pooling("l2_pool", x, window, stride, padding))(Multiply()(x, x))
    return Sqrt()(squares + eps)


def global_avg_pool(x: Tensor) -> Any:
    """The mean over all spatial axes: ``N, *space, C`` to ``N, C``."""
    return mean(x, range(1, 1 + _space("global_avg_pool", x)))


def global_max_pool(x: Tensor) -> Any:
    """The maximum over all spatial axes: ``N, *space, C`` to ``N, C``."""
    _space("global_max_pool", x)
    return Reshape(shape=(x.shape[-1],))(max_pool(x, x.shape[1:-1]))


def adaptive_avg_pool(x: Tensor, size: Sizes) -> Any:
    """The mean of each of ``size`` bins: ``N, *space, C`` to ``N, *size, C``, for any input size.

    Bin o of O over L elements is ``floor(o L / O)`` to ``ceil((o + 1) L / O)``, as in PyTorch. Where O divides L
    this is `avg_pool`; otherwise bins overlap, and the spatial axes cannot be split over ranks.
    """
    bins = sizes("adaptive_avg_pool", "size", size, _space("adaptive_avg_pool", x))
    window = _even(x, bins)
    return avg_pool(x, window) if window else AdaptiveAvgPool(size=bins)(x)


def adaptive_max_pool(x: Tensor, size: Sizes) -> Any:
    """The maximum of each of ``size`` bins: ``N, *space, C`` to ``N, *size, C``; bins as in `adaptive_avg_pool`."""
    bins = sizes("adaptive_max_pool", "size", size, _space("adaptive_max_pool", x))
    window = _even(x, bins)
    return max_pool(x, window) if window else AdaptiveMaxPool(size=bins)(x)[0]


def _space(name: str, x: Tensor) -> int:
    """The number of spatial axes of x."""
    space = len(x.shape) - 2
    if space not in (1, 2, 3):
        raise GraphError(f"{name}: x has {space} spatial axes ({x.spec}), not 1 to 3. x is N,*space,C.")
    return space


def _even(x: Tensor, bins: tuple[int, ...]) -> tuple[int, ...] | None:
    """The size of bins that are all equal and do not overlap; None if they are not."""
    axes = tuple(zip(x.shape[1:-1], bins, strict=True))
    return None if any(size % count for size, count in axes) else tuple(size // count for size, count in axes)


def _pooling(name: str, x: Tensor, window: Sizes, stride: Sizes | None, padding: Padding) -> dict[str, Any]:
    space = _space(name, x)
    extents = sizes(name, "window", window, space)
    return {
        "window": extents,
        "stride": extents if stride is None else sizes(name, "stride", stride, space),
        "padding": pairs(name, padding, space),
    }
