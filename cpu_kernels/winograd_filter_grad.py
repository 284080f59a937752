"""Filter gradient of convolutions by Winograd's algorithm: F(3x3, 4x4), F(3x3, 2x2) and F(5x5, 2x2).

    dw = sum over tiles of  (n x n patch of x)  correlated with  (m x m tile of dy)

    patches of x   --B-->  v   n*n matrices, tiles by channels
    tiles of dy    --G-->  d   n*n matrices, tiles by filters
    sums = transposed v times d, n*n matrix products over all tiles
    sums           --A-->  dw  the taps of each channel and filter

Either each of ``split`` parts of the tiles is transformed, block by block, and added to sums of its own, which are
added in order in the end; or, ``staged``, everything is transformed beforehand, and a task has a rectangle of channels
and filters. The first keeps what is transformed in a core's cache, the second keeps the sums there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Any

import numpy as np

from rapydli_flow.spec import Spec
from rapydli_flow.template import Device, Epilogue, Loop, broken, template
from rapydli_flow.winograd import SQUARES, filter_lines, output_lines

from .buffer import local
from .conv_geometry import forward, sizes
from .tile import load, outer, step_cost, store, waiting, zeros
from .tile_rules import tile_rules
from .winograd import best_tiles, instructions
from .winograd_patches import GAP, LEAST, LOCAL_BYTES, Tiles, columns_of, patches, rows_of, served, window
from .winograd_transform import along

DEPTH = 128  # most tiles between two visits of the sums: their vectors stay in the nearest cache
SUMS = 1 << 23  # most partial sums
SPACE: dict[str, tuple[Any, ...]] = {
    "m": (4, 2),  # pixels of a tile of dy along each axis
    "rows": (14, 12, 8, 6, 4),
    "vectors": (2, 1, 3, 4),
    "lanes": (16, 8, 4, 2),
    "block": (32, 16, 64, 8),  # tiles
    "split": (4, 2, 8, 16, 32),
    "staged": (False, True),
    "tall": (4, 8, 16),  # tiles of sums along the channels that a task has, where all is staged
}
BLOCK, SPLIT, TALL = (SPACE[name][0] for name in ("block", "split", "tall"))
WIDE = 2  # of them along the filters
# Half-cycles for a vector, measured: to a near cache and back, from a far one, and of sums that a far one has
NEAR, FAR, PARTS = 6, 34, 20
NEAR_BYTES = 1 << 21


@dataclass(frozen=True)
class Blocking(Tiles):
    """What is summed, and how it is cut."""

    channels: int
    filters: int
    rows: int
    width: int
    block: int
    split: int
    tall: int

    @classmethod
    def of(cls, op: Any, ins: Sequence[Spec], outs: Sequence[Spec], config: Mapping[str, Any]) -> Blocking:
        x, dy, dw = ins[0].shape, ins[1].shape, outs[0].shape
        _, h, w = (forward(s) for s in sizes(op, x[1:-1], dy[1:-1], dw[:-2]))
        m, width = config["m"], config["vectors"] * config["lanes"]
        cut = (config[name] for name in ("block", "split", "tall"))
        return cls(x[0], h, w, m, dw[0], x[-1], dy[-1], config["rows"], width, *cut)

    @property
    def row_tiles(self) -> int:
        """Tiles of sums along the channels."""
        return -(-self.channels // self.rows)

    @property
    def panels(self) -> int:
        """Tiles of sums along the filters."""
        return -(-self.filters // self.width)

    @property
    def pitches(self) -> tuple[int, int]:
        """Distance of the rows of v and of d."""
        return self.channels + GAP, self.filters + GAP

    @property
    def sums_size(self) -> int:
        """Sums of a part."""
        return self.n * self.n * self.row_tiles * self.panels * self.rows * self.width

    @property
    def kept(self) -> int:
        """Elements of a block's transformed patches and tiles."""
        return self.n * self.n * self.block * sum(self.pitches)

    @property
    def grid_of_sums(self) -> tuple[int, int]:
        """Tasks of the second phase along channels and filters, where all is staged."""
        return -(-self.row_tiles // self.tall), -(-self.panels // WIDE)

    @property
    def rectangle_size(self) -> int:
        """Sums of such a task."""
        return self.n * self.n * self.tall * WIDE * self.rows * self.width


def _allowed(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device) -> bool:
    """What the algorithm is for."""
    return served(op, op.window, (*ins, *outs), SPACE["m"])


def _points(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device, *, m: int) -> bool:
    """There are points for tiles of this size."""
    return m + op.window[0] - 1 in SQUARES


def _rows(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device, *, rows: int) -> bool:
    """As many channels as a tile has rows."""
    return rows <= outs[0].shape[-2]


def _small(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device, **config: Any) -> bool:
    """What a task keeps fits on its stack; partial sums are not too many."""
    b, itemsize = Blocking.of(op, ins, outs, config), np.dtype(outs[0].dtype).itemsize
    raw = b.n * b.n * max(b.channels, b.filters)
    kept = b.rectangle_size if config["staged"] else b.kept
    return max(raw, kept) * itemsize <= LOCAL_BYTES and (config["staged"] or b.split * b.sums_size <= SUMS)


def _parts(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device, **config: Any) -> bool:
    """A block for each part; what is staged is neither split nor cut otherwise, and tasks are no taller than all."""
    b = Blocking.of(op, ins, outs, config)
    if config["staged"]:
        return (b.block, b.split) == (BLOCK, SPLIT) and (b.tall == TALL or b.tall // 2 < b.row_tiles)
    return b.tall == TALL and (b.split * b.block <= b.tiles or (b.block, b.split) == (8, 2))


RULES = {
    "square windows of 3 or 5, one pixel apart": _allowed,
    "points for the tile": _points,
    **tile_rules(rows_of, columns_of, SPACE["rows"]),
    "channels for a tile": _rows,
    "a block for each part": _parts,
    "blocks on the stack": _small,
}


def _workspace(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], **config: Any) -> tuple[Spec, ...]:
    b, dtype = Blocking.of(op, ins, outs, config), outs[0].dtype
    if config["staged"]:
        return tuple(Spec((b.n * b.n * b.tiles * pitch,), dtype) for pitch in b.pitches)
    return Spec((b.split * b.sums_size,), dtype), Spec((1,), dtype)


def cost(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device, config: Mapping[str, Any]) -> float:
    """Half-cycles of all cores, about."""
    b, lanes, vectors = Blocking.of(op, ins, outs, config), config["lanes"], config["vectors"]
    area = b.n * b.n
    sums, itemsize = area * b.row_tiles * b.panels, np.dtype(outs[0].dtype).itemsize
    products = sums * b.tiles * step_cost(b.rows, vectors)
    channels, filters = instructions(b.channels, lanes), instructions(b.filters, lanes)
    moved = 12.0 * area * b.tiles * (channels + filters)
    if config["staged"]:
        tall, broad = b.grid_of_sums
        moved += 16.0 * area * b.tiles * (channels + filters) + FAR * area * b.tiles * (
            channels * broad + filters * tall
        )
        if b.rectangle_size * itemsize > NEAR_BYTES // 4:
            moved += 2.0 * NEAR * sums * b.rows * vectors * -(-b.tiles // DEPTH)
        tasks = tall * broad
    else:
        near = b.split * b.sums_size * itemsize <= NEAR_BYTES
        moved += sums * b.rows * vectors * (NEAR * b.tiles / b.block + 2 * b.split * (NEAR if near else PARTS))
        moved += 4.0 * area * b.tiles * (channels + filters) if b.kept * itemsize > NEAR_BYTES // 4 else 0.0
        tasks = b.split
    return (products + moved) * waiting(tasks, device.cores) + LEAST


@lru_cache(maxsize=512)
def _preferred(op: Any, ins: tuple[Spec, ...], outs: tuple[Spec, ...], device: Device) -> dict[str, Any]:
    itemsize = np.dtype(outs[0].dtype).itemsize
    lanes = device.vector_bytes // itemsize
    first = {name: values[0] for name, values in SPACE.items()}
    if not _allowed(op, ins, outs, device):
        return first
    tiles = best_tiles(lanes, outs[0].shape[-1], itemsize, device.vector_bytes)
    names = ("m", "block", "split", "staged", "tall")
    configs = (
        {"rows": rows, "vectors": vectors, "lanes": lanes, **dict(zip(names, values, strict=True))}
        for rows, vectors in tiles
        for values in product(*(SPACE[name] for name in names))
    )
    fitting = (config for config in configs if broken(RULES, op, ins, outs, device, config) is None)
    return min(fitting, key=lambda config: cost(op, ins, outs, device, config), default=first)


def _prefer(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device) -> dict[str, Any]:
    return _preferred(op, tuple(ins), tuple(outs), device)


@template("conv_filter_grad", "cpu", space=SPACE, fits=RULES, workspace=_workspace, prefer=_prefer, cost=cost)
def winograd(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], epilogue: Epilogue, **config: Any) -> Loop:
    """Winograd, with tiles of dy as filters."""
    b, lanes, vectors, dtype = Blocking.of(op, ins, outs, config), config["lanes"], config["vectors"], outs[0].dtype
    m, n, rows, width, area = b.m, b.n, b.rows, b.width, b.n * b.n
    channels, filters, total = b.channels, b.filters, b.tiles
    row_tiles, panels = b.row_tiles, b.panels
    grid_w, grid_size = b.grid[1], b.grid[0] * b.grid[1]
    pitch, pitch_d = b.pitches
    out_h, out_w = b.h.out, b.w.out
    last_row, last_column = max(0, channels - rows), max(0, filters - width)
    columns = min(filters, width)
    tail, even = columns % lanes, panels * columns == filters
    dy_record = out_h * out_w * filters
    raw_size = max(n * n * channels, n * n * filters)
    tile_size = rows * width
    tap_rows = b.taps
    back_size, taps_size = tap_rows * n * width, tap_rows * tap_rows * width
    block, split, sums_size = b.block, b.split, b.sums_size
    size_v, size_d = area * block * pitch, area * block * pitch_d
    matrix = total if config["staged"] else block  # rows of each matrix of v and d
    depth, whole_size = min(DEPTH, total), area * tile_size
    (down, across), rectangle_size, most = b.grid_of_sums, b.rectangle_size, b.tall

    patch_of = patches(b, channels, matrix * pitch, dtype)
    dy_to_points = along(filter_lines(n, m), m, n, dtype)
    to_taps = along(output_lines(n, tap_rows), n, tap_rows, dtype)

    def tile_of(tile, dy, raw, turned, d, row):  # type: ignore[no-untyped-def]
        top, left = tile % grid_size // grid_w * m, tile % grid_w * m
        start = tile // grid_size * dy_record
        source, at, line = dy, start + (top * out_w + left) * filters, out_w * filters
        if top + m > out_h or left + m > out_w:
            window(dy, start, top, left, m, m, filters, out_h, out_w, raw)
            source, at, line = raw, 0, m * filters
        for j in range(m):
            dy_to_points(source, at + j * filters, line, turned, j * filters, m * filters, filters)
        for i in range(n):
            into = (i * n * matrix + row) * pitch_d
            dy_to_points(turned, i * m * filters, filters, d, into, matrix * pitch_d, filters)

    def add(sums, slot, fresh, v, at_v, d, at_d, count):  # type: ignore[no-untyped-def]
        acc = zeros(1, rows, vectors, lanes, sums)
        if not fresh:
            acc = load(acc, sums, slot, width, 0)
        for t in range(count):
            acc = outer(acc, v, at_v + t * pitch, 1, 0, d, at_d + t * pitch_d, tail)
        store(acc, sums, slot, width, 0)

    def write(row_tile, panel, sums, slot, back, taps, dw, extras, at):  # type: ignore[no-untyped-def]
        first, column = min(row_tile * rows, last_row), min(panel * width, last_column)
        skip, k = 0 if even else panel * width - column, column
        for r in range(row_tile * rows - first, rows):
            for j in range(n):
                source = slot + j * tile_size + r * width
                to_taps(sums, source, n * tile_size, back, j * width, n * width, width)
            for i in range(tap_rows):
                to_taps(back, i * n * width, width, taps, i * tap_rows * width, width, width)
            for tap in range(tap_rows * tap_rows):
                o, s = (tap * channels + first + r) * filters + column, tap * width
                for e in range(skip, columns):
                    dw[o + e] = epilogue(taps[s + e], extras, o + e, k + e, at)

    def before_parts(task, x, dy, dw, sums, unused, extras, at):  # type: ignore[no-untyped-def]
        raw, turned, v, d = local(raw_size, x), local(raw_size, x), local(size_v, x), local(size_d, x)
        begin, end = total * task // split, total * (task + 1) // split
        for low in range(begin, end, block):
            count = min(block, end - low)
            for t in range(count):
                patch_of(low + t, x, raw, turned, v, t * pitch)
                tile_of(low + t, dy, raw, turned, d, t)
            for p in range(area):
                for row_tile in range(row_tiles):
                    at_v = p * block * pitch + min(row_tile * rows, last_row)
                    for panel in range(panels):
                        slot = task * sums_size + ((row_tile * panels + panel) * area + p) * tile_size
                        at_d = p * block * pitch_d + min(panel * width, last_column)
                        add(sums, slot, low == begin, v, at_v, d, at_d, count)

    def parts(task, x, dy, dw, sums, unused, extras, at):  # type: ignore[no-untyped-def]
        back, taps, whole = local(back_size, x), local(taps_size, x), local(whole_size, x)
        first = task * whole_size
        for i in range(whole_size):
            total_of = sums[first + i]
            for part in range(1, split):
                total_of += sums[first + part * sums_size + i]
            whole[i] = total_of
        write(task // panels, task % panels, whole, 0, back, taps, dw, extras, at)

    def before_staged(task, x, dy, dw, v, d, extras, at):  # type: ignore[no-untyped-def]
        raw, turned = local(raw_size, x), local(raw_size, x)
        for tile in range(task * block, min((task + 1) * block, total)):
            patch_of(tile, x, raw, turned, v, tile * pitch)
            tile_of(tile, dy, raw, turned, d, tile)

    def staged(task, x, dy, dw, v, d, extras, at):  # type: ignore[no-untyped-def]
        back, taps, sums = local(back_size, x), local(taps_size, x), local(rectangle_size, x)
        first_row, first_panel = task // across * most, task % across * WIDE
        tall, broad = min(most, row_tiles - first_row), min(WIDE, panels - first_panel)
        for p in range(area):
            for low in range(0, total, depth):
                count = min(depth, total - low)
                for i in range(tall):
                    at_v = (p * total + low) * pitch + min((first_row + i) * rows, last_row)
                    for j in range(broad):
                        at_d = (p * total + low) * pitch_d + min((first_panel + j) * width, last_column)
                        slot = ((i * WIDE + j) * area + p) * tile_size
                        add(sums, slot, low == 0, v, at_v, d, at_d, count)
        for i in range(tall):
            for j in range(broad):
                slot = (i * WIDE + j) * area * tile_size
                write(first_row + i, first_panel + j, sums, slot, back, taps, dw, extras, at)

    if config["staged"]:
        return Loop(staged, down * across, before=before_staged, before_tasks=-(-total // block))
    return Loop(parts, row_tiles * panels, before=before_parts, before_tasks=split)
