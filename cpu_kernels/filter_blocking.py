"""How the tiles of a filter gradient cut dw into groups, and the pixels into parts and chunks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import gcd, lcm
from typing import Any

from .conv_geometry import Geometry
from .tile import balanced

COPY_BYTES = 1 << 17  # most of dy, and of x, that may lie on a stack
RUN = 50  # pixels, most that a loop takes as one row, measured
LINE_BYTES, FAR_BYTES = 64, 512  # of a cache; pixels that are so many bytes apart fall into few of its sets


@dataclass(frozen=True)
class Blocking:
    """All that follows from a geometry and a config of the template."""

    g: Geometry
    lines: int
    rows: int
    width: int
    split: int
    chunk: int  # rows of pixels
    together: int
    itemsize: int

    @classmethod
    def of(cls, g: Geometry, itemsize: int, config: Mapping[str, Any]) -> Blocking:
        rows, window, length = config["rows"], g.axes[1].taps[0], cls.length(g)
        tile_lines = balanced(window, rows // length) if length < rows else 1
        width, split, d, h, w = config["vectors"] * config["lanes"], config["split"], *g.axes
        chunk = balanced(-(-g.n // split) * d.out * h.out, max(1, config["pixels"] // w.out))
        together = balanced(-(-g.outer // width), config["together"])
        return cls(g, tile_lines, balanced(length, rows), width, split, chunk, together, itemsize)

    @staticmethod
    def length(g: Geometry) -> int:
        """(tap, channel) pairs that follow each other in x."""
        return g.inner * (g.axes[2].taps[0] if g.contiguous else 1)

    @property
    def stretches(self) -> int:
        """Stretches of such pairs in a row of taps."""
        return 1 if self.g.contiguous else self.g.axes[2].taps[0]

    @property
    def tiles(self) -> int:
        return -(-self.length(self.g) // self.rows)

    @property
    def bands(self) -> int:
        """Pieces of the window's second axis."""
        return -(-self.g.axes[1].taps[0] // self.lines)

    @property
    def panels(self) -> int:
        return -(-self.g.outer // self.width)

    @property
    def bundles(self) -> int:
        """Panels that are taken together."""
        return -(-self.panels // self.together)

    @property
    def others(self) -> int:
        """Pieces of dw that a panel of a group has."""
        return self.g.axes[0].taps[0] * self.bands * self.stretches

    @property
    def pieces(self) -> int:
        return self.panels * self.g.groups * self.others

    @property
    def pixel_rows(self) -> int:
        return self.g.n * self.g.axes[0].out * self.g.axes[1].out

    @property
    def tile_size(self) -> int:
        return self.lines * self.rows * self.width

    @property
    def tasks(self) -> int:
        return self.bundles * self.g.groups * self.others if self.split == 1 else self.split

    @property
    def copies(self) -> bool:
        """Is dy copied? Its vectors of one panel lie far apart: many tiles repay it."""
        tiles = self.tiles * (1 if self.split == 1 else self.others)
        size = self.together * self.chunk * self.g.axes[2].out * self.width * self.itemsize
        return self.g.outer * self.g.groups > 2 * self.width and tiles >= 4 and size <= COPY_BYTES

    @property
    def far(self) -> int:
        """Bytes from one pixel to the next along the last axis."""
        return self.g.axes[2].step * self.g.inner * self.g.groups * self.itemsize

    @property
    def gathered(self) -> int:
        """Tiles whose x is copied together: they take whole lines of a cache. 0 if x is read where it lies."""
        w = self.g.axes[2]
        tiles = min(lcm(self.rows, LINE_BYTES // self.itemsize) // self.rows, self.tiles)
        large = tiles * self.rows * self.chunk * w.out * self.itemsize > COPY_BYTES
        return 0 if self.together == 1 or self.lines > 1 or w.taps[0] > 1 or self.far < FAR_BYTES or large else tiles

    @property
    def joined(self) -> int:
        """Rows of pixels that follow each other in x and are taken as one, where they are short."""
        if not (self.gathered or all(axis.plain for axis in self.g.axes)):
            return 1
        d, h, w = self.g.axes
        common = gcd(self.chunk, d.out * h.out)
        return max(n for n in range(1, common + 1) if common % n == 0 and (n == 1 or n * w.out <= RUN))
