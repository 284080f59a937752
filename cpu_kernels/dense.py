"""Matrix products on register tiles, with either operand transposed.

    y[m, k] = sum over i of a[m, i] * b[i, k]       a[M,I] or, with `ta`, [I,M]; b[I,K] or, with `tb`, [K,I]

A `batch_matmul` is many such products, each with tasks of its own.

A task computes a block of rows by a band of panels, `vectors * lanes` columns each:

    for each DEPTH of i:                            b     K               rows of b are read along the band;
        pack the band's panels of b  -----------> i |  |panel|  |         transposed in registers for `tb`
        copy the block's rows of a
        for each panel, each tile of rows:                                the panel stays in the first-level
            acc  = partial sums of the tile                               cache, the rows in the second
            acc += a[rows, i] x panel[i, columns]   (`outer`, broadcast a)
            partial sums = acc
    write the sums through the epilogue

Panels, rows and sums live on the stack of the task, so there is no workspace. Where one DEPTH is all there
is, tiles are written as they come, row by row, without sums. Few columns do not repay copying rows, and
few rows not packing: with ``pack=False`` tiles read b where it lies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Any

import numpy as np

from rapydli_flow.spec import Spec
from rapydli_flow.template import Device, Epilogue, Loop, broken, template

from .buffer import local
from .tile import balanced, load, outer, step_cost, store, transpose, waiting, zeros
from .tile_rules import tile_rules

DEPTH, DEPTH_UNPACKED = 256, 8  # length of a panel: 256 x 16 floats are 16 KiB; of b read where it lies, row by row
BAND_BYTES, BLOCK_BYTES, SUMS_BYTES = 1 << 17, 1 << 17, 1 << 16  # most bytes of a task's panels, rows of a, and sums
TASKS = 16  # enough to share out evenly among the cores of a rank
ALIAS_BYTES = 2048  # rows this far apart fall into the same set of a first-level cache
# Half-cycles, measured: for a vector of a that is copied, a piece of a row of the transposed a, a vector of b that is
# packed, and the next row of b, which lies elsewhere in memory, packed or not.
COPYING, CUTTING, PACKING, JUMP, JUMP_UNPACKED = 1.0, 10.0, 2.0, 16.0, 160.0
SPACE: dict[str, tuple[Any, ...]] = {
    "rows": (14, 12, 8, 6, 4),
    "vectors": (2, 1, 3, 4),
    "lanes": (16, 8, 4, 2),
    "pack": (True, False),
}


@dataclass(frozen=True)
class Blocking:
    """How m x k sums of ``inner`` products are cut: tiles are ``rows`` by ``width``, tasks ``tiles`` by ``band``."""

    m: int
    k: int
    inner: int
    ta: bool
    pack: bool
    products: int
    rows: int
    width: int
    lanes: int
    depth: int
    tiles: int
    band: int

    @classmethod
    def of(cls, y: Spec, inner: int, ta: bool, *, rows: int, vectors: int, lanes: int, pack: bool) -> Blocking:
        """The blocking of least cost for tiles of ``vectors * lanes`` columns."""
        (m, k), products = y.shape[-2:], prod(y.shape[:-2])
        rows, width, itemsize = balanced(m, rows), vectors * lanes, np.dtype(y.dtype).itemsize
        depth = max(1, min(DEPTH if pack else DEPTH_UNPACKED, inner))
        row_tiles, panels = -(-m // rows), -(-k // width)

        def candidates() -> Iterator[Blocking]:
            most_panels = min(panels, max(1, BAND_BYTES // (depth * width * itemsize)))
            most_tiles = min(row_tiles, max(1, BLOCK_BYTES // (depth * rows * itemsize)))
            for band in {balanced(panels, most) for most in (most_panels, *_powers(most_panels))}:
                held = SUMS_BYTES // (rows * band * width * itemsize) if inner > depth else most_tiles
                for tiles in {balanced(row_tiles, most) for most in _powers(min(most_tiles, max(1, held)))}:
                    yield cls(m, k, inner, ta, pack, products, rows, width, lanes, depth, tiles, band)

        return min(candidates(), key=lambda one: (one.each * one.products < TASKS, one.cost, one.band))

    @property
    def row_tiles(self) -> int:
        return -(-self.m // self.rows)

    @property
    def panels(self) -> int:
        return -(-self.k // self.width)

    @property
    def bands(self) -> int:
        return -(-self.panels // self.band)

    @property
    def each(self) -> int:
        """Tasks of one product."""
        return -(-self.row_tiles // self.tiles) * self.bands

    @property
    def cost(self) -> float:
        """Half-cycles of a core for each of the ``inner`` products, in shares of TASKS cores."""
        vectors, tasks = self.width // self.lanes, self.each * self.products
        tiles = self.tiles * self.band * step_cost(self.rows, vectors)
        copies = self.tiles * (CUTTING if self.ta else COPYING * self.rows / self.lanes)
        copies += PACKING * self.band * vectors + JUMP if self.pack else JUMP_UNPACKED
        return tasks * (tiles + copies) * waiting(tasks, TASKS // 4)

    @property
    def single(self) -> bool:
        """One panel is as long as all of ``inner``."""
        return self.inner <= self.depth


def _powers(most: int) -> list[int]:
    """Powers of two that are not above ``most``, and ``most``."""
    return [*(1 << n for n in range(most.bit_length())), most]


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
    (m, inner), lanes = _sizes(op, ins[0]), device.vector_bytes // np.dtype(outs[0].dtype).itemsize

    def candidates() -> Iterator[dict[str, Any]]:
        for rows, vectors in product(SPACE["rows"], SPACE["vectors"]):
            pack = op.tb or -(-m // rows) > 2
            config = {"rows": rows, "vectors": vectors, "lanes": lanes, "pack": pack}
            if broken(RULES, op, ins, outs, device, config) is None:
                yield config

    def cost(config: dict[str, Any]) -> float:
        return Blocking.of(outs[0], inner, op.ta, **config).cost

    return min(candidates(), key=cost, default={"rows": 4, "vectors": 1, "lanes": lanes, "pack": True})


def _cost(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device, config: Mapping[str, Any]) -> float:
    """Half-cycles of all cores, about."""
    inner = _sizes(op, ins[0])[1]
    return inner * Blocking.of(outs[0], inner, op.ta, **config).cost


@template("batch_matmul", "cpu", space=SPACE, fits=RULES, prefer=_prefer, cost=_cost)
@template("matmul", "cpu", space=SPACE, fits=RULES, prefer=_prefer, cost=_cost)
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
    b = Blocking.of(outs[0], inner, op.ta, rows=rows, vectors=vectors, lanes=lanes, pack=pack)
    rows, width, block, band, depth, k = b.rows, b.width, b.tiles, b.band, b.depth, b.k
    row_tiles, panels, bands, each, single = b.row_tiles, b.panels, b.bands, b.each, b.single
    # columns of a panel that exist; where k is wider than a panel, the last one moves back to end at k
    columns = min(k, width)
    tail, last, even = columns % lanes, k - columns, panels * columns == k
    written = single and epilogue.identity  # what panels share is written twice, and is the same
    aliased = (m if op.ta else inner) * np.dtype(outs[0].dtype).itemsize % ALIAS_BYTES == 0
    copy = inner > 1 and (op.ta or aliased or band > 2)
    block_rows = block * rows
    # in a, and in the copy of a block's part of it: distance of rows, distance of i
    row_step, inner_step = (1, m) if op.ta else (inner, 1)
    # rows of a lie one behind the other in the copy; transposed, tile behind tile
    x_row, x_step = (row_step, inner_step) if not copy else (1, rows) if op.ta else (depth + 16, 1)
    x_tile = depth + 16 if op.ta else x_row
    panel_size, b_step = (depth * width, width) if pack else (0, k)
    w_tail, tiled = 0 if pack else tail, copy and op.ta
    band_size, copy_size = max(1, panel_size * band), block_rows * (depth + 16) if copy else 1
    tile_size = rows * width
    sums_size = tile_size if single else block * band * tile_size
    by_rows = single or not pack
    a_size, b_size, y_size = (m * inner, inner * k, m * k) if b.products > 1 else (0, 0, 0)
    pack_band = _pack_columns(b, inner, vectors) if op.tb else _pack_rows(b, vectors)

    def copy_rows(a, source, part, height, count):  # type: ignore[no-untyped-def]
        for r in range(height):
            line, into = source + r * inner, r * x_row
            for i in range(count):
                part[into + i] = a[line + i]

    def copy_columns(a, source, part, height, count):  # type: ignore[no-untyped-def]
        for i in range(count):
            line, into = source + i * m, i * rows
            for t in range(-(-height // rows)):
                row = min(t * rows, height - rows)
                for r in range(rows):
                    part[into + t * part_tile + r] = a[line + row + r]

    copy_part, part_tile = copy_columns if op.ta else copy_rows, rows * x_tile

    def multiply(acc, x, at_x, w, at_w, count):  # type: ignore[no-untyped-def]
        for i in range(count):
            acc = outer(acc, x, at_x + i * x_step, x_row, 0, w, at_w + i * b_step, w_tail)
        return acc

    def write(y, at_y, sums, slot, tile, panel, extras, at):  # type: ignore[no-untyped-def]
        row, column = min(tile * rows, m - rows), min(panel * width, last)
        skip = 0 if even else panel * width - column
        for r in range(tile * rows - row, rows):
            o, s = at_y + (row + r) * k + column, slot + r * width
            for j in range(skip, columns):
                y[o + j] = epilogue(sums[s + j], extras, o + j, column + j, at)

    def body(task, a, b, y, extras, at):  # type: ignore[no-untyped-def]
        packed, part, sums = local(band_size, y), local(copy_size, y), local(sums_size, y)
        which, piece = task // each, task % each
        at_a, at_b, at_y = which * a_size, which * b_size, which * y_size
        first_tile, first_panel = piece // bands * block, piece % bands * band
        tile_count, panel_count = min(block, row_tiles - first_tile), min(band, panels - first_panel)
        top = min(first_tile * rows, m - rows)
        height = min((first_tile + tile_count) * rows, m) - top
        outer_count, inner_count = (tile_count, panel_count) if by_rows else (panel_count, tile_count)
        for start in range(0, max(inner, 1), depth):
            count = min(depth, inner - start)
            if pack:
                pack_band(b, at_b, packed, start, count, first_panel, panel_count)
            source = at_a + top * row_step + start * inner_step
            if copy:
                copy_part(a, source, part, height, count)
            x, at_x = (part, 0) if copy else (a, source)
            for u in range(outer_count):
                for v in range(inner_count):
                    t, p = (u, v) if by_rows else (v, u)
                    row, column = min((first_tile + t) * rows, m - rows), min((first_panel + p) * width, last)
                    slot = 0 if single else (t * band + p) * tile_size
                    acc = zeros(1, rows, vectors, lanes, y)
                    if start > 0:
                        acc = load(acc, sums, slot, width, 0)
                    w, at_w = (packed, p * panel_size) if pack else (b, at_b + start * k + column)
                    of_tile = t * part_tile if tiled else (row - top) * x_row
                    acc = multiply(acc, x, at_x + of_tile, w, at_w, count)
                    if written:
                        store(acc, y, at_y + row * k + column, k, tail)
                    else:
                        store(acc, sums, slot, width, 0)
                        if single:
                            write(y, at_y, sums, slot, first_tile + t, first_panel + p, extras, at)
        if not single:
            for t in range(tile_count):
                for p in range(panel_count):
                    slot = (t * band + p) * tile_size
                    write(y, at_y, sums, slot, first_tile + t, first_panel + p, extras, at)

    return Loop(body, each * b.products)


def _pack_rows(b: Blocking, vectors: int) -> Callable[..., None]:
    """Copies `count` rows of b along a band into its panels."""
    k, width, lanes, panel_size = b.k, b.width, b.lanes, b.depth * b.width
    columns = min(k, width)
    tail, last = columns % lanes, k - columns

    def pack(b, at_b, packed, start, count, first, panels):  # type: ignore[no-untyped-def]
        for i in range(count):
            line = at_b + (start + i) * k
            for p in range(panels):
                row = zeros(1, 1, vectors, lanes, packed)
                row = load(row, b, line + min((first + p) * width, last), 0, tail)
                store(row, packed, p * panel_size + i * width, 0, 0)

    return pack


def _pack_columns(b: Blocking, inner: int, vectors: int) -> Callable[..., None]:
    """Transposes `count` columns of b along a band into its panels."""
    k, width, lanes, panel_size = b.k, b.width, b.lanes, b.depth * b.width
    columns = min(k, width)
    last, squares = k - columns, columns // lanes

    def pack(b, at_b, packed, start, count, first, panels):  # type: ignore[no-untyped-def]
        whole = count - count % lanes
        for p in range(panels):
            into, column = p * panel_size, min((first + p) * width, last)
            for v in range(squares):
                source = at_b + (column + v * lanes) * inner + start
                for i in range(0, whole, lanes):
                    square = zeros(1, lanes, 1, lanes, packed)
                    square = load(square, b, source + i, inner, 0)
                    store(transpose(square), packed, into + i * width + v * lanes, width, 0)
                for i in range(whole, count):
                    for j in range(lanes):
                        packed[into + i * width + v * lanes + j] = b[source + j * inner + i]
            for j in range(squares * lanes, width):
                for i in range(count):
                    value = b[at_b + (column + j) * inner + start + i] if j < columns else 0
                    packed[into + i * width + j] = value

    return pack
