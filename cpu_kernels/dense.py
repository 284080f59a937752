"""Matrix products on register tiles, with either operand transposed.

    y[m, k] = sum over i of a[m, i] * b[i, k]       a[M,I] or, with `ta`, [I,M]; b[I,K] or, with `tb`, [K,I]

A `batch_matmul` is many such products, each with tasks of its own.

A task computes a block of rows by a band of panels, `vectors * lanes` columns each:

    for each DEPTH of i:                            b     K               a panel is packed once per task,
        pack the panels of b  ------------------> i |  |panel|  |         transposed in registers for `tb`,
        for each tile of rows, each panel:                                and stays in the nearest caches
            acc  = partial sums of the tile
            acc += a[rows, i] x panel[i, columns]   (`outer`, broadcast a)
            partial sums = acc
    write the sums through the epilogue

Panels and sums live on the stack of the task, so there is no workspace. Few rows do not repay
packing: with ``pack=False`` tiles read b where it lies. Rows of a that would evict each other from the
first-level cache (their distance is a large power of two) are copied apart.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Any

import numpy as np

from rapydli_flow.spec import Spec
from rapydli_flow.template import Device, Epilogue, Loop, broken, template

from .tile import balanced, load, local, natural, outer, step_cost, store, transpose, zeros
from .tile_rules import tile_rules

DEPTH = 256  # length of a panel: 256 x 32 floats are 32 KiB
BAND_BYTES, SUMS_BYTES = 1 << 17, 1 << 16  # most bytes of a task's panels, and of its sums
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
    """How m x k sums are cut: tiles of ``rows`` by ``width``; ``tiles`` by ``band`` of them for each task."""

    rows: int
    width: int
    row_tiles: int
    panels: int
    tiles: int
    band: int

    @classmethod
    def of(cls, y: Spec, *, rows: int, vectors: int, lanes: int) -> Blocking:
        (m, k), dtype = y.shape[-2:], y.dtype
        goal = -(-TASKS // prod(y.shape[:-2]))  # tasks of one of several products
        rows, width, itemsize = balanced(m, rows), vectors * lanes, np.dtype(dtype).itemsize
        row_tiles, panels = -(-m // rows), -(-k // width)

        def cut(band: int) -> Blocking:
            most = max(1, SUMS_BYTES // (rows * band * width * itemsize))
            tiles = min(row_tiles, most, max(1, row_tiles * -(-panels // band) // goal))
            return cls(rows, width, row_tiles, panels, tiles, band)

        # a wide band reads longer pieces of the rows of b, and what it reads of a serves more columns; but
        # packing must serve many rows
        for band in (4, 2):
            blocking = cut(band)
            enough = blocking.tasks >= goal and blocking.tiles >= min(row_tiles, 8)
            if enough and band * width * DEPTH * itemsize <= BAND_BYTES:
                return blocking
        return cut(1)

    @property
    def bands(self) -> int:
        return -(-self.panels // self.band)

    @property
    def tasks(self) -> int:
        return -(-self.row_tiles // self.tiles) * self.bands


def _sizes(op: Any, a: Spec) -> tuple[int, int]:
    """m and i."""
    return (a.shape[-1], a.shape[-2]) if op.ta else (a.shape[-2], a.shape[-1])


def _elements(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device) -> bool:
    return outs[0].size > 0


def _shape(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], rows: int) -> tuple[int, ...]:
    return (balanced(outs[0].shape[-2], rows),)


def _columns(op: Any, ins: Sequence[Spec], outs: Sequence[Spec]) -> int:
    return outs[0].shape[-1]


def _packs(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device, *, pack: bool) -> bool:
    return bool(pack or not op.tb)


RULES = {
    "something to compute": _elements,
    "packed where transposed": _packs,
    **tile_rules(_shape, _columns, SPACE["rows"]),
}


def _prefer(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device) -> dict[str, Any]:
    m, lanes = outs[0].shape[-2], device.vector_bytes // np.dtype(outs[0].dtype).itemsize

    def candidates() -> Iterator[dict[str, Any]]:
        for rows, vectors in product(SPACE["rows"], SPACE["vectors"]):
            pack = op.tb or -(-m // rows) > 2
            config = {"rows": rows, "vectors": vectors, "lanes": lanes, "pack": pack}
            if broken(RULES, op, ins, outs, device, config) is None:
                yield config

    def cost(config: dict[str, Any]) -> float:
        blocking = Blocking.of(outs[0], **{name: config[name] for name in ("rows", "vectors", "lanes")})
        return blocking.row_tiles * blocking.panels * step_cost(blocking.rows, config["vectors"])

    return min(candidates(), key=cost, default={"rows": 4, "vectors": 1, "lanes": lanes, "pack": True})


@template("batch_matmul", "cpu", space=SPACE, fits=RULES, prefer=_prefer)
@template("matmul", "cpu", space=SPACE, fits=RULES, prefer=_prefer)
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
    k, products = outs[0].shape[-1], prod(outs[0].shape[:-2])
    blocking = Blocking.of(outs[0], rows=rows, vectors=vectors, lanes=lanes)
    rows, width, block, row_tiles = blocking.rows, blocking.width, blocking.tiles, blocking.row_tiles
    panels, band, bands = blocking.panels, blocking.band, blocking.bands
    # columns of a panel that exist; where k is wider than a panel, the last one moves back to end at k
    columns = min(k, width)
    tail = columns % lanes
    last, even = k - columns, panels * columns == k
    squares = columns // lanes
    itemsize = np.dtype(outs[0].dtype).itemsize
    copy = (m if op.ta else inner) * itemsize % ALIAS_BYTES == 0 and inner > 1
    depth = min(DEPTH, inner) if pack or copy else max(inner, 1)
    # in the copy of a tile's part of a: distance of rows, distance of i
    copy_row, copy_step = (1, rows) if op.ta else (depth + 16, 1)
    row_step, inner_step = (1, m) if op.ta else (inner, 1)
    panel_size = depth * width if pack else 0
    band_size = max(1, panel_size * band)
    copy_size = rows * (depth + 16) if copy else 1
    tile_size = rows * width
    sums_size = block * band * tile_size
    each = blocking.tasks
    a_size, b_size, y_size = (m * inner, inner * k, m * k) if products > 1 else (0, 0, 0)

    def pack_rows(b, at_b, panel, into, start, count, column):  # type: ignore[no-untyped-def]
        for i in range(count):
            row = zeros(1, 1, vectors, lanes, panel)
            row = load(row, b, at_b + (start + i) * k + column, 0, tail)
            store(row, panel, into + i * width, 0, 0)

    def pack_columns(b, at_b, panel, into, start, count, column):  # type: ignore[no-untyped-def]
        whole = count - count % lanes
        for v in range(squares):
            source = at_b + (column + v * lanes) * inner + start
            for i in range(0, whole, lanes):
                square = zeros(1, lanes, 1, lanes, panel)
                square = load(square, b, source + i, inner, 0)
                store(transpose(square), panel, into + i * width + v * lanes, width, 0)
            for i in range(whole, count):
                for j in range(lanes):
                    panel[into + i * width + v * lanes + j] = b[source + j * inner + i]
        for j in range(squares * lanes, width):
            for i in range(count):
                value = b[at_b + (column + j) * inner + start + i] if j < columns else 0
                panel[into + i * width + j] = value

    def copy_rows(a, part, source, count):  # type: ignore[no-untyped-def]
        for r in range(rows):
            row = natural(source + r * inner)
            for i in range(count):
                part[r * copy_row + i] = a[row + i]

    def copy_columns(a, part, source, count):  # type: ignore[no-untyped-def]
        for i in range(count):
            row = natural(source + i * m)
            for r in range(rows):
                part[i * rows + r] = a[row + r]

    def multiply(sums, slot, fresh, x, at_x, x_step, x_row, w, at_w, w_step, count):  # type: ignore[no-untyped-def]
        acc = zeros(1, rows, vectors, lanes, sums)
        if not fresh:
            acc = load(acc, sums, slot, width, 0)
        for i in range(count):
            acc = outer(acc, x, at_x + i * x_step, x_row, 0, w, at_w + i * w_step, w_tail)
        store(acc, sums, slot, width, 0)

    pack_panel = pack_columns if op.tb else pack_rows
    copy_part = copy_columns if op.ta else copy_rows
    w_tail = 0 if pack else tail

    def write(y, at_y, sums, first_tile, tile_count, first_panel, panel_count, extras, at):  # type: ignore[no-untyped-def]
        for t in range(tile_count):
            row = min((first_tile + t) * rows, m - rows)
            for r in range((first_tile + t) * rows - row, rows):
                for p in range(panel_count):
                    column = natural(min((first_panel + p) * width, last))
                    skip = 0 if even else natural((first_panel + p) * width - column)
                    o, s = natural(at_y + (row + r) * k + column), natural((t * band + p) * tile_size + r * width)
                    for j in range(skip, columns):
                        y[o + j] = epilogue(sums[s + j], extras, o + j, column + j, at)

    def body(task, a, b, y, extras, at):  # type: ignore[no-untyped-def]
        panel, part, sums = local(band_size, y), local(copy_size, y), local(sums_size, y)
        which, piece = task // each, task % each
        at_a, at_b, at_y = which * a_size, which * b_size, which * y_size
        first_tile, first_panel = piece // bands * block, piece % bands * band
        tile_count, panel_count = min(block, row_tiles - first_tile), min(band, panels - first_panel)
        for start in range(0, max(inner, 1), depth):
            count = min(depth, inner - start)
            if pack:
                for p in range(panel_count):
                    pack_panel(b, at_b, panel, p * panel_size, start, count, min((first_panel + p) * width, last))
            for t in range(tile_count):
                source = at_a + min((first_tile + t) * rows, m - rows) * row_step + start * inner_step
                if copy:
                    copy_part(a, part, source, count)
                    x, at_x, x_step, x_row = part, 0, copy_step, copy_row
                else:
                    x, at_x, x_step, x_row = a, source, inner_step, row_step
                for p in range(panel_count):
                    slot, column = (t * band + p) * tile_size, min((first_panel + p) * width, last)
                    if pack:
                        multiply(sums, slot, start == 0, x, at_x, x_step, x_row, panel, p * panel_size, width, count)
                    else:
                        at_w = at_b + start * k + column
                        multiply(sums, slot, start == 0, x, at_x, x_step, x_row, b, at_w, k, count)
        write(y, at_y, sums, first_tile, tile_count, first_panel, panel_count, extras, at)

    return Loop(body, each * products)
