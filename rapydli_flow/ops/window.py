"""What convolution and pooling share: windows that slide over spatial axes.

Position of tap r of output element h on an input axis: ``h * stride + r * dilation - low padding``.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np

from ..spec import Array, Block

Pair = tuple[int, int]
OUT = {1: "h", 2: "hw", 3: "dhw"}
TAPS = {1: "r", 2: "rs", 3: "qrs"}


def out_size(size: int, window: int, stride: int, padding: Pair, dilation: int = 1) -> int:
    """Extent of the output along one axis; 0 or less where the window does not fit."""
    return (size + sum(padding) - (window - 1) * dilation - 1) // stride + 1


def reading(stride: Sequence[int], padding: Sequence[Pair], dilation: Sequence[int]) -> list[str]:
    """Index expressions of the input's spatial axes: 'h*2+r*1-1'."""
    n = len(stride)
    return [
        f"{h}*{st}+{r}*{d}{-lo:+d}"
        for h, r, st, (lo, _), d in zip(OUT[n], TAPS[n], stride, padding, dilation, strict=True)
    ]


def writing(stride: Sequence[int], padding: Sequence[Pair], dilation: Sequence[int]) -> list[str]:
    """Index expressions of the output gradient's spatial axes, seen from the input: '(h-r*1+1)/2'."""
    n = len(stride)
    return [
        f"({h}-{r}*{d}{lo:+d})/{st}"
        for h, r, st, (lo, _), d in zip(OUT[n], TAPS[n], stride, padding, dilation, strict=True)
    ]


def local_padding(
    x: Block,
    y: Block,
    first: Sequence[int],
    window: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[Pair],
    dilation: Sequence[int],
) -> tuple[Pair, ...]:
    """The padding seen by block ``y`` of the output on block ``x`` of the input; ``first`` is the first tap."""
    out = []
    for i, (k, st, (low, _), d) in enumerate(zip(window, stride, padding, dilation, strict=True), start=1):
        lo = low - st * y.lo[i] + x.lo[i] - d * first[i - 1]
        out.append((lo, (y.shape[i] - 1) * st + (k - 1) * d + 1 - lo - x.shape[i]))
    return tuple(out)


def windows(
    x: Array,
    out: Sequence[int],
    window: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[Pair],
    dilation: Sequence[int],
    fill: float = 0.0,
) -> Array:
    """All windows of ``x[n, *spatial, c]`` as ``[n, *out, *window, c]``; ``fill`` outside."""
    need = [(o - 1) * st + (k - 1) * d + 1 for o, st, k, d in zip(out, stride, window, dilation, strict=True)]
    padded = np.full((x.shape[0], *need, x.shape[-1]), fill, x.dtype)
    inside, taken = [], []
    for (lo, _), n, size in zip(padding, need, x.shape[1:-1], strict=True):
        a, b = max(0, -lo), max(min(size, n - lo), max(0, -lo))
        inside.append(slice(a + lo, b + lo))
        taken.append(slice(a, b))
    padded[(slice(None), *inside)] = x[(slice(None), *taken)]
    axes = tuple(range(1, 1 + len(window)))
    reach = tuple((k - 1) * d + 1 for k, d in zip(window, dilation, strict=True))
    view = np.lib.stride_tricks.sliding_window_view(padded, reach, axes)
    view = view[
        (slice(None), *(slice(None, None, st) for st in stride), slice(None), *(slice(None, None, d) for d in dilation))
    ]
    return np.moveaxis(view, 1 + len(window), -1)


def scatter(
    parts: dict[tuple[int, ...], Array],
    size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[Pair],
    dilation: Sequence[int],
) -> Array:
    """Add ``parts[tap][n, *out, c]`` where each tap came from: ``[n, *size, c]``, the transpose of `windows`."""
    first = next(iter(parts.values()))
    out = first.shape[1:-1]
    window = [max(tap[i] for tap in parts) + 1 for i in range(len(out))]
    need = [(o - 1) * st + (k - 1) * d + 1 for o, st, k, d in zip(out, stride, window, dilation, strict=True)]
    buffer = np.zeros((first.shape[0], *need, first.shape[-1]), first.dtype)
    for tap, part in parts.items():
        at = tuple(
            slice(r * d, r * d + st * (o - 1) + 1, st) for r, d, st, o in zip(tap, dilation, stride, out, strict=True)
        )
        buffer[(slice(None), *at)] += part
    dx = np.zeros((first.shape[0], *size, first.shape[-1]), first.dtype)
    into, taken = [], []
    for (lo, _), n, extent in zip(padding, need, size, strict=True):
        a, b = max(0, -lo), max(min(extent, n - lo), max(0, -lo))
        into.append(slice(a, b))
        taken.append(slice(a + lo, b + lo))
    dx[(slice(None), *into)] = buffer[(slice(None), *taken)]
    return dx


def taps(window: Sequence[int]) -> list[tuple[int, ...]]:
    """All taps of a window, in memory order."""
    return list(product(*(range(k) for k in window)))
