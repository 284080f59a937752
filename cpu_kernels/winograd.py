"""Winograd convolution and its input gradient: F(4x4, 3x3), F(2x2, 3x3), F(2x2, 5x5), transforms fused to the products.

    patches of x (n x n, overlapping, m apart) --B--> v   n*n matrices, tiles by channels
    filters (3 x 3 or 5 x 5)                   --G--> u   n*n matrices, channels by filters
    sums = v times u, n*n matrix products on register tiles
    sums                                       --A--> y   m x m pixels of each tile

The input gradient is the same over dy, with the filters' taps in reverse order and their last axes exchanged. A task
has a block of tiles. It transforms their patches, then takes ``panels`` column panels of filters at a time through
all products, transforms back and writes, so that what passes between the steps stays in its caches. Filters are
transformed ``beforehand``: they are different in every training step. Where channels are many, patches are, too, and
tasks share out the panels; where tiles are few besides, filters are most of what there is to move, and each task
transforms its own, some channels at a time. Transforms and their accuracy: `rapydli_flow.winograd`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Any

import numpy as np

from rapydli_flow.spec import Spec
from rapydli_flow.template import Device, Epilogue, Loop, broken, template
from rapydli_flow.winograd import SQUARES, filter_lines, output_lines

from .buffer import local
from .conv_geometry import backward, forward, sizes
from .tile import holds, load, outer, step_cost, store, transpose, waiting, zeros
from .tile_rules import tile_rules
from .winograd_patches import GAP, LEAST, LOCAL_BYTES, Tiles, columns_of, patches, rows_of, served
from .winograd_transform import along

SPACE: dict[str, tuple[Any, ...]] = {
    "m": (4, 2),  # pixels of a tile along each axis
    "rows": (14, 12, 8, 6, 4),
    "vectors": (2, 1, 3, 4),
    "lanes": (16, 8, 4, 2),
    "block": (4, 2, 8, 1, 16),  # of ``rows`` tiles
    "panels": (2, 1, 4, 8),
    "beforehand": ("filters", "both", "patches"),  # what is transformed before tasks begin
}
DEPTH = 128  # channels of filters that a task transforms at a time


@dataclass(frozen=True)
class Blocking(Tiles):
    """What slides over a source [n, height, width, inner] to a result [n, out_h, out_w, outer], and how it is cut."""

    inner: int
    outer: int
    rows: int
    width: int
    block: int
    panels: int

    @classmethod
    def of(cls, op: Any, ins: Sequence[Spec], outs: Sequence[Spec], slide: Any, config: Mapping[str, Any]) -> Blocking:
        source, result = ins[0].shape, outs[0].shape
        x, y = (source, result) if slide is forward else (result, source)
        _, h, w = (slide(s) for s in sizes(op, x[1:-1], y[1:-1], ins[1].shape[:-2]))
        rows, width = config["rows"], config["vectors"] * config["lanes"]
        block, panels = config["block"] * rows, config["panels"]
        return cls(source[0], h, w, config["m"], ins[1].shape[0], source[-1], result[-1], rows, width, block, panels)

    @property
    def blocks(self) -> int:
        return -(-self.tiles // self.block)

    @property
    def all_panels(self) -> int:
        return -(-self.outer // self.width)

    @property
    def groups(self) -> int:
        """Groups of panels."""
        return -(-self.all_panels // self.panels)

    @property
    def pitch(self) -> int:
        """Distance of the rows of v."""
        return self.inner + GAP

    @property
    def patch_size(self) -> int:
        """Elements of a block's transformed patches."""
        return self.n * self.n * self.block * self.pitch

    @property
    def sums_size(self) -> int:
        return self.n * self.n * self.block * self.panels * self.width

    @property
    def filters_size(self) -> int:
        return self.n * self.n * self.all_panels * self.inner * self.width

    @property
    def depth(self) -> int:
        """Channels that a task transforms filters of at a time."""
        return min(self.inner, DEPTH)

    @property
    def own_filters_size(self) -> int:
        """Elements of those filters of a panel."""
        return self.n * self.n * self.depth * self.width


def _slides(op: Any) -> Any:
    return backward if op.family == "conv_input_grad" else forward


def _allowed(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device) -> bool:
    """What the algorithm is for."""
    return served(op, ins[1].shape[:-2], (*ins, *outs), SPACE["m"])


def _points(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device, *, m: int) -> bool:
    """There are points for tiles of this size."""
    return m + ins[1].shape[0] - 1 in SQUARES


def _small(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device, **config: Any) -> bool:
    """What a task keeps fits on its stack."""
    b, itemsize = Blocking.of(op, ins, outs, _slides(op), config), np.dtype(outs[0].dtype).itemsize
    own = {"filters": b.patch_size, "both": 0, "patches": b.own_filters_size}[config["beforehand"]]
    raw = b.n * b.n * b.inner
    return max(own, b.sums_size, raw) * itemsize <= LOCAL_BYTES


def _filled(
    op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device, *, m: int, rows: int, block: int
) -> bool:
    """No smaller block holds all tiles."""
    config = {"m": m, "rows": rows, "vectors": 1, "lanes": 1, "block": 1, "panels": 1}
    tiles = Blocking.of(op, ins, outs, _slides(op), config).tiles
    return block == 1 or (block // 2) * rows < tiles


def _once(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device, **config: Any) -> bool:
    """Filters that are not transformed beforehand are by one task only: that which has all tiles."""
    return config["beforehand"] != "patches" or Blocking.of(op, ins, outs, _slides(op), config).blocks == 1


def _panels(
    op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device, *, vectors: int, lanes: int, panels: int
) -> bool:
    """No group with panels that no filter fills."""
    return panels == 1 or (panels - 1) * vectors * lanes < outs[0].shape[-1]


RULES = {
    "square windows of 3 or 5, one pixel apart": _allowed,
    "points for the tile": _points,
    **tile_rules(rows_of, columns_of, SPACE["rows"]),
    "tiles for a block": _filled,
    "filters for a group of panels": _panels,
    "filters are transformed once": _once,
    "patches and sums on the stack": _small,
}


def _workspace(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], **config: Any) -> tuple[Spec, ...]:
    b, dtype, beforehand = Blocking.of(op, ins, outs, _slides(op), config), outs[0].dtype, config["beforehand"]
    filters = 1 if beforehand == "patches" else b.filters_size
    return Spec((filters,), dtype), Spec((1 if beforehand == "filters" else b.blocks * b.patch_size,), dtype)


def cost(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device, config: Mapping[str, Any]) -> float:
    """Half-cycles of all cores, about: products, and transforms as loads and stores of vectors."""
    b, lanes, vectors = Blocking.of(op, ins, outs, _slides(op), config), config["lanes"], config["vectors"]
    area = b.n * b.n
    products = area * b.blocks * (b.block // b.rows) * b.all_panels * b.inner * step_cost(b.rows, vectors)
    outputs = b.all_panels * vectors
    moved = 3.0 * area * b.tiles * instructions(b.inner, lanes) + 3.5 * area * b.tiles * outputs
    moved += 3.0 * area * b.inner * outputs
    if config["beforehand"] != "patches":  # u comes from a far cache once a block
        moved += area * b.inner * outputs * b.blocks
    if config["beforehand"] != "filters":
        moved += 4.0 * area * b.tiles * instructions(b.inner, lanes)
    tasks = b.blocks * (1 if config["beforehand"] == "filters" else b.groups)
    idle = waiting(tasks, device.cores)
    return (products + 4 * moved) * idle + LEAST


def instructions(length: int, lanes: int) -> int:
    """For one operation on so many elements: vectors, and what is left singly."""
    return length // lanes + length % lanes


def best_tiles(lanes: int, filters: int, itemsize: int, vector_bytes: int) -> list[tuple[int, int]]:
    """Rows and vectors of the tiles that come near to what the multiply-add units can do."""
    found = {
        (rows, vectors): step_cost(rows, vectors) / (rows * min(vectors, filters / lanes))
        for rows, vectors in product(SPACE["rows"], SPACE["vectors"])
        if holds(rows, vectors, lanes, itemsize, vector_bytes) and (vectors - 1) * lanes < filters
    }
    return [pair for pair, cost in found.items() if cost <= 1.1 * min(found.values())]


@lru_cache(maxsize=512)
def _preferred(op: Any, ins: tuple[Spec, ...], outs: tuple[Spec, ...], device: Device) -> dict[str, Any]:
    itemsize = np.dtype(outs[0].dtype).itemsize
    lanes = device.vector_bytes // itemsize
    first = {name: values[0] for name, values in SPACE.items()}
    if not _allowed(op, ins, outs, device):
        return first
    tiles = best_tiles(lanes, outs[0].shape[-1], itemsize, device.vector_bytes)
    names = ("m", "block", "panels", "beforehand")
    configs = (
        {"rows": rows, "vectors": vectors, "lanes": lanes, **dict(zip(names, values, strict=True))}
        for rows, vectors in tiles
        for values in product(*(SPACE[name] for name in names))
    )
    fitting = (config for config in configs if broken(RULES, op, ins, outs, device, config) is None)
    return min(fitting, key=lambda config: cost(op, ins, outs, device, config), default=first)


def _prefer(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device) -> dict[str, Any]:
    return _preferred(op, tuple(ins), tuple(outs), device)


@template("conv", "cpu", space=SPACE, fits=RULES, workspace=_workspace, prefer=_prefer, cost=cost, joins=True)
def winograd(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], epilogue: Epilogue, **config: Any) -> Loop:
    """Winograd convolution."""
    b = Blocking.of(op, ins, outs, forward, config)
    gather = _rows_of_filters(b, config["lanes"])
    return _loop(b, gather, epilogue, outs[0].dtype, config["vectors"], config["lanes"], config["beforehand"])


@template("conv_input_grad", "cpu", space=SPACE, fits=RULES, workspace=_workspace, prefer=_prefer, cost=cost)
def reversed_winograd(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], epilogue: Epilogue, **config: Any) -> Loop:
    """Winograd convolution of dy with reversed filters."""
    b = Blocking.of(op, ins, outs, backward, config)
    gather = _columns_of_filters(b, config["lanes"])
    return _loop(b, gather, epilogue, outs[0].dtype, config["vectors"], config["lanes"], config["beforehand"])


def _rows_of_filters(b: Blocking, lanes: int) -> Callable[..., None]:
    """Copies the taps of ``count`` channels and one panel of filters to lines [tap, channel, column]."""
    width, columns, inner, filters = b.width, min(b.outer, b.width), b.inner, b.outer
    tap_count = b.taps * b.taps

    def gather(w, lines, start, count, column):  # type: ignore[no-untyped-def]
        for tap in range(tap_count):
            for i in range(count):
                source, into = (tap * inner + start + i) * filters + column, (tap * lanes + i) * width
                for j in range(columns):
                    lines[into + j] = w[source + j]

    return gather


def _columns_of_filters(b: Blocking, lanes: int) -> Callable[..., None]:
    """The same of filters in reverse order, whose channels are the columns here: transposed in registers."""
    width, columns, inner, channels = b.width, min(b.outer, b.width), b.inner, b.outer
    squares, tap_count = columns // lanes, b.taps * b.taps

    def gather(w, lines, start, count, column):  # type: ignore[no-untyped-def]
        for tap in range(tap_count):
            source, into = ((tap_count - 1 - tap) * channels + column) * inner + start, tap * lanes * width
            whole = squares if count == lanes else 0
            for v in range(whole):
                square = zeros(1, lanes, 1, lanes, lines)
                square = load(square, w, source + v * lanes * inner, inner, 0)
                store(transpose(square), lines, into + v * lanes, width, 0)
            for j in range(whole * lanes, columns):
                for i in range(count):
                    lines[into + i * width + j] = w[source + j * inner + i]

    return gather


def _loop(
    b: Blocking, gather: Callable[..., None], epilogue: Epilogue, dtype: str, vectors: int, lanes: int, beforehand: str
) -> Loop:
    m, n, rows, width, block, panels = b.m, b.n, b.rows, b.width, b.block, b.panels
    inner, pitch, area = b.inner, b.pitch, b.n * b.n
    total, groups, all_panels = b.tiles, b.groups, b.all_panels
    grid_h, grid_w = b.grid
    grid_size = grid_h * grid_w
    columns = min(b.outer, width)
    last, channels, even = b.outer - columns, b.outer, all_panels * columns == b.outer
    out_h, out_w = b.h.out, b.w.out
    first_column, row_size = epilogue.rows
    patch_size, raw_size, turned_size = b.patch_size, n * n * inner, n * n * inner
    sums_width, sums_size = panels * width, b.sums_size
    taps = b.taps
    matrix, lines_size, tap_rows = block * pitch, taps * taps * lanes * width, taps * width
    square_size, back_size, pixels_size = n * taps * width, m * n * width, m * m * width
    panel_size = area * inner * width
    tap_line, sum_line = lanes * width, block * sums_width
    depth, slab, own_filters_size = b.depth, b.depth * width, b.own_filters_size

    patch_of = patches(b, inner, matrix, dtype)
    filter_to_points = along(filter_lines(n, taps), taps, n, dtype)
    to_pixels = along(output_lines(n, m), n, m, dtype)

    def filters_of(panel, begin, end, w, u, at_u, matrix_u):  # type: ignore[no-untyped-def]
        lines, half = local(lines_size, w), local(square_size, w)
        for i in range(lines_size):
            lines[i] = 0
        for start in range(begin, end, lanes):
            count = min(lanes, end - start)
            gather(w, lines, start, count, min(panel * width, last))
            for i in range(count):
                for s in range(taps):
                    at = s * tap_line + i * width
                    filter_to_points(lines, at, taps * tap_line, half, s * width, tap_rows, width)
                for p in range(n):
                    into = at_u + p * n * matrix_u + (start - begin + i) * width
                    filter_to_points(half, p * tap_rows, width, u, into, matrix_u, width)

    def multiply(v, at_v, u, at_u, channels, fresh, sums, at_sums):  # type: ignore[no-untyped-def]
        acc = zeros(1, rows, vectors, lanes, sums)
        if not fresh:
            acc = load(acc, sums, at_sums, sums_width, 0)
        for c in range(channels):
            acc = outer(acc, v, at_v + c, pitch, 0, u, at_u + c * width, 0)
        store(acc, sums, at_sums, sums_width, 0)

    def products(v, at_v, count, first_panel, panel_count, u, sums):  # type: ignore[no-untyped-def]
        for p in range(area):
            for panel in range(panel_count):
                at_u = (first_panel + panel) * panel_size + p * inner * width
                for t in range(0, count, rows):
                    at_sums = p * sum_line + t * sums_width + panel * width
                    multiply(v, at_v + p * matrix + t * pitch, u, at_u, inner, True, sums, at_sums)

    def own_products(v, count, first_panel, panel_count, w, sums):  # type: ignore[no-untyped-def]
        u = local(own_filters_size, w)
        for start in range(0, inner, depth):
            end = min(start + depth, inner)
            for panel in range(panel_count):
                filters_of(first_panel + panel, start, end, w, u, 0, slab)
                for p in range(area):
                    for t in range(0, count, rows):
                        at_v, at_sums = p * matrix + t * pitch + start, p * sum_line + t * sums_width + panel * width
                        multiply(v, at_v, u, p * slab, end - start, start == 0, sums, at_sums)

    def write(tile, t, panel, column, skip, sums, back, pixels, y, extras, at):  # type: ignore[no-untyped-def]
        for j in range(n):
            source = j * sum_line + t * sums_width + panel * width
            to_pixels(sums, source, n * sum_line, back, j * width, n * width, width)
        for i in range(m):
            to_pixels(back, i * n * width, width, pixels, i * m * width, width, width)
        top, left = tile % grid_size // grid_w * m, tile % grid_w * m
        corner = (tile // grid_size * out_h + top) * out_w + left
        for i in range(min(m, out_h - top)):
            for j in range(min(m, out_w - left)):
                pixel, s, k = corner + i * out_w + j, (i * m + j) * width, column
                o, into = pixel * channels + column, pixel * row_size + first_column + column
                for e in range(skip, columns):
                    y[into + e] = epilogue(pixels[s + e], extras, o + e, k + e, at)

    def write_panels(first, count, first_panel, panel_count, sums, back, pixels, y, extras, at):  # type: ignore[no-untyped-def]
        for t in range(count):
            for panel in range(panel_count):
                column = min((first_panel + panel) * width, last)
                skip = 0 if even else (first_panel + panel) * width - column
                write(first + t, t, panel, column, skip, sums, back, pixels, y, extras, at)

    def panels_of(first, count, group, v, at_v, u, sums, back, pixels, y, extras, at):  # type: ignore[no-untyped-def]
        first_panel = group * panels
        panel_count = min(panels, all_panels - first_panel)
        products(v, at_v, count, first_panel, panel_count, u, sums)
        write_panels(first, count, first_panel, panel_count, sums, back, pixels, y, extras, at)

    def all_filters_of(panel, w, u):  # type: ignore[no-untyped-def]
        filters_of(panel, 0, inner, w, u, panel * panel_size, inner * width)

    def patches_of(task, x, y, v):  # type: ignore[no-untyped-def]
        raw, turned = local(raw_size, y), local(turned_size, y)
        first = task * block
        for t in range(min(block, total - first)):
            patch_of(first + t, x, raw, turned, v, task * patch_size + t * pitch)

    def before_filters(task, x, w, y, u, unused, extras, at):  # type: ignore[no-untyped-def]
        all_filters_of(task, w, u)

    def before_both(task, x, w, y, u, v, extras, at):  # type: ignore[no-untyped-def]
        if task < all_panels:
            all_filters_of(task, w, u)
        else:
            patches_of(task - all_panels, x, y, v)

    def before_patches(task, x, w, y, unused, v, extras, at):  # type: ignore[no-untyped-def]
        raw, turned = local(raw_size, y), local(turned_size, y)
        patch_of(task, x, raw, turned, v, task * pitch)

    def given_filters(task, x, w, y, u, unused, extras, at):  # type: ignore[no-untyped-def]
        raw, turned, v = local(raw_size, y), local(turned_size, y), local(patch_size, y)
        sums, back, pixels = local(sums_size, y), local(back_size, y), local(pixels_size, y)
        first = task * block
        count = min(block, total - first)
        for t in range(count):
            patch_of(first + t, x, raw, turned, v, t * pitch)
        for group in range(groups):
            panels_of(first, count, group, v, 0, u, sums, back, pixels, y, extras, at)

    def given_both(task, x, w, y, u, v, extras, at):  # type: ignore[no-untyped-def]
        sums, back, pixels = local(sums_size, y), local(back_size, y), local(pixels_size, y)
        first = task // groups * block
        count = min(block, total - first)
        at_v = task // groups * patch_size
        panels_of(first, count, task % groups, v, at_v, u, sums, back, pixels, y, extras, at)

    def given_patches(task, x, w, y, unused, v, extras, at):  # type: ignore[no-untyped-def]
        sums, back, pixels = local(sums_size, y), local(back_size, y), local(pixels_size, y)
        first_panel = task * panels
        panel_count = min(panels, all_panels - first_panel)
        own_products(v, total, first_panel, panel_count, w, sums)
        write_panels(0, total, first_panel, panel_count, sums, back, pixels, y, extras, at)

    if beforehand == "filters":
        return Loop(given_filters, b.blocks, before=before_filters, before_tasks=all_panels)
    if beforehand == "both":
        return Loop(given_both, b.blocks * groups, before=before_both, before_tasks=all_panels + b.blocks)
    return Loop(given_patches, groups, before=before_patches, before_tasks=total)
