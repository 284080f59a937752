"""What is reduced over any axes, and how it lies and is divided, for `slab_kernels`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import gcd, prod
from typing import Any

from rapydli_flow.spec import Spec
from rapydli_flow.template import Config

from .formulas import Formula
from .grid import blocks_of
from .warp import Merge


@dataclass(frozen=True)
class Program:
    """What is reduced, and what comes of it. Operands are numbers of inputs."""

    operands: tuple[int, ...]  # x0, ..
    merge: Merge
    absorb: Formula  # a0, .. are the state so far, j the row
    out: Formula  # of a0, ..: a result for each output
    channels: tuple[int, ...] = ()  # of size inner: x of the absorbing formula, after the operands
    ends: tuple[int, ...] = ()  # of size inner: x0, .. of ``out``


@dataclass(frozen=True)
class Layout:
    """Kept and reduced runs before the inner one: their sizes and steps. ``rows`` of ``inner`` elements come next."""

    kept: tuple[tuple[int, int], ...]
    reduced: tuple[tuple[int, int], ...]
    rows: int
    inner: int

    @classmethod
    def of(cls, shape: Sequence[int], axes: Sequence[int]) -> Layout:
        runs: list[list[int]] = []  # [size, is kept]
        for axis, size in enumerate(shape):
            kept = int(axis not in axes)
            if size == 1:
                continue
            if runs and runs[-1][1] == kept:
                runs[-1][0] *= size
            else:
                runs.append([size, kept])
        inner = runs.pop()[0] if runs and runs[-1][1] else 1
        rows = runs.pop()[0] if runs else 1
        step, groups = inner * rows, ([], [])  # type: tuple[int, tuple[list[tuple[int, int]], list[tuple[int, int]]]]
        for size, kept in reversed(runs):
            groups[kept].insert(0, (size, step))
            step *= size
        return cls(tuple(groups[1]), tuple(groups[0]), rows, inner)

    @property
    def outer(self) -> int:
        return prod(size for size, _ in self.kept)

    @property
    def repeats(self) -> int:
        return prod(size for size, _ in self.reduced)


@dataclass(frozen=True)
class Cut:
    """How a layout is divided."""

    lanes: int
    copies: int  # of the inner run in a wide row
    width: int  # of a wide row
    rows: int  # wide ones, of all reduced runs
    across: int
    down: int
    tiles: int  # of columns
    items: int
    each: int  # rows of a slab
    parts: int

    @classmethod
    def of(cls, layout: Layout, config: Config, cores: int) -> Cut:
        lanes = config["vector"]
        copies = lanes // gcd(lanes, layout.inner)
        width = copies * layout.inner
        vectors = blocks_of(width, lanes)
        tiles = blocks_of(vectors, config["across"])
        across = blocks_of(vectors, tiles)
        rows = layout.rows // copies * layout.repeats
        down = max(1, min(config["threads"] // across, 1 << max(0, rows - 1).bit_length()))
        step = down * config["items"]
        wanted = 1 if config["parts"] == 1 else max(1, config["slabs"] * cores // (tiles * layout.outer))
        each = blocks_of(blocks_of(rows, wanted), step) * step
        return cls(
            lanes, copies, width, rows, across, down, tiles, config["items"], each, max(1, blocks_of(rows, each))
        )

    @property
    def block(self) -> int:
        return self.across * self.down

    @property
    def direct(self) -> bool:
        """Has each output element one block?"""
        return self.parts == 1 and (self.copies == 1 or self.tiles == 1)


Programs = Callable[[Any, Sequence[Spec], Sequence[Spec]], Program]
