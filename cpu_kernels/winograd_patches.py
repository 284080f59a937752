"""What the Winograd templates share: how an image is cut into tiles, and how the patch behind a tile is transformed.

A tile has m x m pixels; the patch that it is computed from has n x n, n = m + taps - 1, and overlaps with its
neighbours'.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rapydli_flow.spec import Spec
from rapydli_flow.winograd import SQUARES, input_lines

from .conv_geometry import Axis
from .winograd_transform import along

LOCAL_BYTES = 3 << 18  # most of a block's transformed patches, and of its sums, on the stack of a task
LEAST = 1e5  # half-cycles that it should save: less is not worth a kernel that takes longer to compile
GAP = 16  # elements between rows of a matrix, which would evict each other from a cache if a power of two apart


@dataclass(frozen=True)
class Tiles:
    """Records cut into tiles of m x m pixels."""

    records: int
    h: Axis
    w: Axis
    m: int
    taps: int  # of a window, along each axis

    @property
    def n(self) -> int:
        return self.m + self.taps - 1

    @property
    def grid(self) -> tuple[int, int]:
        """Tiles of a record."""
        return -(-self.h.out // self.m), -(-self.w.out // self.m)

    @property
    def tiles(self) -> int:
        return self.records * self.grid[0] * self.grid[1]


def served(op: Any, window: Sequence[int], specs: Sequence[Spec], sizes: Sequence[int]) -> bool:
    """Square windows with points for a tile of one of these sizes, that move by one pixel; something to compute."""
    plain = op.stride == op.dilation == (1, 1) and op.groups == 1 and len(set(window)) == 1 < window[0]
    points = any(m + window[0] - 1 in SQUARES for m in sizes)
    return plain and points and not op.exact and all(spec.size for spec in specs)


def rows_of(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], rows: int) -> tuple[int, ...]:
    """Register tiles have as many rows as they may."""
    return (rows,)


def columns_of(op: Any, ins: Sequence[Spec], outs: Sequence[Spec]) -> int:
    return outs[0].shape[-1]


def window(x, record_at, top, left, height, breadth, size, source_h, source_w, raw):  # type: ignore[no-untyped-def]
    """Copies height x breadth pixels of ``size`` channels to ``raw``, zeros where they leave the source."""
    for i in range(height):
        for j in range(breadth):
            to = (i * breadth + j) * size
            if 0 <= top + i < source_h and 0 <= left + j < source_w:
                there = record_at + ((top + i) * source_w + left + j) * size
                for c in range(size):
                    raw[to + c] = x[there + c]
            else:
                for c in range(size):
                    raw[to + c] = 0


def patches(tiles: Tiles, channels: int, matrix: int, dtype: str) -> Callable[..., None]:
    """A kernel function that transforms the patch of a tile: element ``into`` of each matrix of v, which lie ``matrix``
    elements apart, is its first channel."""
    m, n, (grid_h, grid_w) = tiles.m, tiles.n, tiles.grid
    grid_size = grid_h * grid_w
    low_h, low_w = tiles.h.first[0] - tiles.h.low, tiles.w.first[0] - tiles.w.low
    high, wide = tiles.h.size, tiles.w.size
    record = high * wide * channels
    to_points = along(input_lines(n), n, n, dtype)

    def patch_of(tile, x, raw, turned, v, into):  # type: ignore[no-untyped-def]
        top, left = tile % grid_size // grid_w * m + low_h, tile % grid_w * m + low_w
        start = tile // grid_size * record
        source, at, line = x, start + (top * wide + left) * channels, wide * channels
        if top < 0 or left < 0 or top + n > high or left + n > wide:
            window(x, start, top, left, n, n, channels, high, wide, raw)
            source, at, line = raw, 0, n * channels
        for j in range(n):
            to_points(source, at + j * channels, line, turned, j * channels, n * channels, channels)
        for i in range(n):
            to_points(turned, i * n * channels, channels, v, into + i * n * matrix, matrix, channels)

    return patch_of
