"""Pooling that rounds sizes up, as Caffe does: the last window may reach over the edge."""

from __future__ import annotations

from ..graph import Tensor


def up(x: Tensor, window: int, stride: int) -> tuple[tuple[int, int], ...]:
    """Padding of each spatial axis of ``x: N, *space, C`` with which pooling gives ceil((size - window) / stride) + 1.

    It is on the high side and only as large as needed, so that it is never counted in a mean, nor pooled alone while
    the stride is not larger than the window.
    """
    return tuple((0, (window - size) % stride if size > window else window - size) for size in x.shape[1:-1])
