"""Matrix product on register tiles, with either operand transposed.

    y[m, k] = sum over i of a[m, i] * b[i, k]       a[M,I] or, with `ta`, [I,M]; b[I,K] or, with `tb`, [K,I]

A task computes a block of rows by `vectors * lanes` columns:

    for each DEPTH of i:                            b     K               a panel is packed once per task,
        pack a panel of b  ---------------------> i |  |panel|  |         transposed in registers for `tb`,
        for each tile of rows:                                            and stays in the first-level cache
            acc  = partial sums of the tile
            acc += a[rows, i] x panel[i, columns]   (`outer`, broadcast a)
            partial sums = acc
    write the sums through the epilogue

Panels and sums live on the stack of the task, so there is no workspace. Few rows do not repay
packing: with ``pack=False`` tiles read b where it lies.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

from rapydli_flow.spec import Spec
from rapydli_flow.template import Device, Epilogue, Loop, template

from .tile import balanced, holds, load, local, outer, step_cost, store, transpose, zeros

DEPTH = 256  # length of a panel: 256 x 32 floats are 32 KiB
BLOCK = 128  # most rows of a task: 128 x 32 sums are 16 KiB
TASKS = 16  # enough to share out evenly among the cores of a rank
ALIAS_BYTES = 2048  # rows this far apart fall into the same set of a first-level cache
SPACE: dict[str, tuple[Any, ...]] = {
    "rows": (14, 12, 8, 6, 4),
    "vectors": (2, 1, 3, 4),
    "lanes": (16, 8, 4, 2),
    "pack": (True, False),
}


@dataclass(frozen=True)
class Blocking:
    """How a product of m x i by i x k is cut: ``rows`` of a tile, ``width`` of a panel, ``tiles`` per task."""

    rows: int
    width: int
    tiles: int
    row_tiles: int
    panels: int

    @classmethod
    def of(cls, m: int, k: int, *, rows: int, vectors: int, lanes: int) -> Blocking:
        rows, width = balanced(m, rows), vectors * lanes
        row_tiles, panels = -(-m // rows), -(-k // width)
        tiles = min(row_tiles, max(1, BLOCK // rows), max(1, row_tiles * panels // TASKS))
        return cls(rows, width, tiles, row_tiles, panels)

    @property
    def tasks(self) -> int:
        return -(-self.row_tiles // self.tiles) * self.panels


def _sizes(op: Any, a: Spec) -> tuple[int, int]:
    """m and i."""
    return (a.shape[1], a.shape[0]) if op.ta else (a.shape[0], a.shape[1])


def _fits(
    op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device, *, rows: int, vectors: int, lanes: int, pack: bool
) -> bool:
    (m, k), itemsize = outs[0].shape, np.dtype(outs[0].dtype).itemsize
    used = balanced(m, rows) if m else rows
    same = (r for r in SPACE["rows"] if r < rows and m and balanced(m, r) == used)
    return (
        min(m, k) > 0
        and holds(used, vectors, lanes, itemsize, device.vector_bytes)
        and (vectors - 1) * lanes < k
        and (pack or not op.tb)
        and not any(same)  # a smaller `rows` means the same tile
    )


def _prefer(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device) -> dict[str, Any]:
    (m, k), lanes = outs[0].shape, device.vector_bytes // np.dtype(outs[0].dtype).itemsize

    def candidates() -> Iterator[dict[str, Any]]:
        for rows, vectors in product(SPACE["rows"], SPACE["vectors"]):
            pack = op.tb or -(-m // rows) > 2
            config = {"rows": rows, "vectors": vectors, "lanes": lanes, "pack": pack}
            if _fits(op, ins, outs, device, **config):
                yield config

    def cost(config: dict[str, Any]) -> float:
        blocking = Blocking.of(m, k, **{name: config[name] for name in ("rows", "vectors", "lanes")})
        return blocking.row_tiles * blocking.panels * step_cost(blocking.rows, config["vectors"])

    return min(candidates(), key=cost, default={"rows": 4, "vectors": 1, "lanes": lanes, "pack": True})


@template("matmul", "cpu", space=SPACE, fits=_fits, prefer=_prefer)
def tiles(
    op: Any,
    ins: Sequence[Spec],
    outs: Sequence[Spec],
    epilogue: Epilogue,
    *,
    rows: int,
    vectors: int,
    lanes: int,
    pack: bool,
) -> Loop:
    """Register tiles over rows and columns, panels of b packed by each task."""
    m, inner = _sizes(op, ins[0])
    k = outs[0].shape[1]
    transposed_a, transposed_b = bool(op.ta), bool(op.tb)
    blocking = Blocking.of(m, k, rows=rows, vectors=vectors, lanes=lanes)
    rows, width, block, row_tiles = blocking.rows, blocking.width, blocking.tiles, blocking.row_tiles
    panels = blocking.panels
    # columns of a panel that exist; where k is wider than a panel, the last one moves back to end at k
    columns = min(k, width)
    tail = columns % lanes
    last = k - columns
    squares = columns // lanes
    itemsize = np.dtype(outs[0].dtype).itemsize
    copy = (m if op.ta else inner) * itemsize % ALIAS_BYTES == 0 and inner > 1
    depth = min(DEPTH, inner) if pack or copy else max(inner, 1)
    # in the copy of a tile's part of a: distance of rows, distance of i
    copy_row, copy_step = (1, rows) if op.ta else (depth + 16, 1)
    row_step, inner_step = (1, m) if op.ta else (inner, 1)
    panel_size = depth * width if pack else 1
    copy_size = rows * (depth + 16) if copy else 1
    sums_size = block * rows * width

    def pack_rows(b, panel, start, count, column):  # type: ignore[no-untyped-def]
        for i in range(count):
            row = zeros(1, 1, vectors, lanes, panel)
            row = load(row, b, (start + i) * k + column, 0, tail)
            store(row, panel, i * width, 0, 0)

    def pack_columns(b, panel, start, count, column):  # type: ignore[no-untyped-def]
        whole = count - count % lanes
        for v in range(squares):
            source = (column + v * lanes) * inner + start
            for i in range(0, whole, lanes):
                square = zeros(1, lanes, 1, lanes, panel)
                square = load(square, b, source + i, inner, 0)
                store(transpose(square), panel, i * width + v * lanes, width, 0)
            for i in range(whole, count):
                for j in range(lanes):
                    panel[i * width + v * lanes + j] = b[source + j * inner + i]
        for j in range(squares * lanes, width):
            for i in range(count):
                panel[i * width + j] = b[(column + j) * inner + start + i] if j < columns else 0

    def copy_a(a, part, source, count):  # type: ignore[no-untyped-def]
        if transposed_a:
            for i in range(count):
                for r in range(rows):
                    part[i * rows + r] = a[source + i * m + r]
        else:
            for r in range(rows):
                for i in range(count):
                    part[r * copy_row + i] = a[source + r * inner + i]

    def multiply(sums, at_sums, first, a, source, b, panel, part, start, count, column):  # type: ignore[no-untyped-def]
        acc = zeros(1, rows, vectors, lanes, sums)
        if not first:
            acc = load(acc, sums, at_sums, width, 0)
        if copy:
            copy_a(a, part, source, count)
        for i in range(count):
            if copy and pack:
                acc = outer(acc, part, i * copy_step, copy_row, 0, panel, i * width, 0)
            elif copy:
                acc = outer(acc, part, i * copy_step, copy_row, 0, b, (start + i) * k + column, tail)
            elif pack:
                acc = outer(acc, a, source + i * inner_step, row_step, 0, panel, i * width, 0)
            else:
                acc = outer(acc, a, source + i * inner_step, row_step, 0, b, (start + i) * k + column, tail)
        store(acc, sums, at_sums, width, 0)

    def body(task, a, b, y, extras, at):  # type: ignore[no-untyped-def]
        panel, part, sums = local(panel_size, y), local(copy_size, y), local(sums_size, y)
        first_tile = task // panels * block
        column = min(task % panels * width, last)
        skip = task % panels * width - column
        count_tiles = min(block, row_tiles - first_tile)
        for start in range(0, max(inner, 1), depth):
            count = min(depth, inner - start)
            if pack:
                if transposed_b:
                    pack_columns(b, panel, start, count, column)
                else:
                    pack_rows(b, panel, start, count, column)
            for t in range(count_tiles):
                row = min((first_tile + t) * rows, m - rows)
                source = row * row_step + start * inner_step
                multiply(sums, t * rows * width, start == 0, a, source, b, panel, part, start, count, column)
        for t in range(count_tiles):
            row = min((first_tile + t) * rows, m - rows)
            for r in range((first_tile + t) * rows - row, rows):
                o, s = (row + r) * k + column, (t * rows + r) * width
                for j in range(skip, columns):
                    y[o + j] = epilogue(sums[s + j], extras, o + j, column + j, at)

    return Loop(body, blocking.tasks)
