"""Filter gradient of convolutions on register tiles.

    dw[r, c, k] = sum over n, o of x[n, o*stride + r*dilation - low, c] * dy[n, o, k]

A tile holds (tap, channel) pairs by filters and grows by one pixel at a time:

             dy: `vectors` vectors of filters        for each chunk of pixel rows:
    x  (r, s, c)    acc ...                              for each tile of the task:
       (r, s, c+1)  acc ...                                  acc  = partial sums of the tile
       ...          acc ...                                  for each pixel of the chunk:
                                                                 acc += x[pixel + (r, s, c)] * dy[pixel]
                                                             partial sums = acc

The (s, c) of a row of taps follow each other in x, and a tile may take several rows of taps. A task has ``together``
panels of filters and all tiles of a few rows of taps, so that a chunk of ``pixels`` pixels of dy and x is read from the
nearest caches. Of dy a panel is copied for all tiles; of x a few tiles for all panels, if pixels lie so far
apart that a cache cannot hold them. Chunks are short for accuracy as well: float32 sums have few terms. Where images
are large or tasks are few, ``split`` cuts the records into parts: a task takes all panels and tiles of a chunk while it
is in a cache, and the sums of the parts are added in order in the end.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np

from rapydli_flow.spec import Spec
from rapydli_flow.template import Device, Epilogue, Loop, broken, template

from .buffer import local
from .conv_geometry import Geometry, forward, padding, sizes, something
from .filter_blocking import FAR_BYTES, Blocking
from .tile import load, outer, step_cost, store, waiting, zeros
from .tile_rules import tile_rules

SUMS = 1 << 20  # most partial sums
NEAR_BYTES = 1 << 22  # operands that a last-level cache holds
COPYING = 2.0  # half-cycles of copying one element of x, measured
FAR, NEAR = 1.7, 8.0  # bytes from memory and from that cache in a half-cycle, for all cores
SPACE: dict[str, tuple[Any, ...]] = {
    "rows": (14, 12, 10, 8, 7, 6, 5, 4),
    "vectors": (2, 1, 3, 4),
    "lanes": (16, 8, 4, 2),
    "split": (1, 2, 4, 8, 16, 32),
    "pixels": (256, 1024, 512, 128),  # most between two visits of the partial sums
    "together": (1, 2, 4, 8),  # panels of filters that share what is copied of x; 1: it is not copied
}
FIRST_PIXELS = SPACE["pixels"][0]


def _geometry(op: Any, ins: Sequence[Spec], outs: Sequence[Spec]) -> Geometry:
    x, dy, dw = ins[0].shape, ins[1].shape, outs[0].shape
    d, h, w = (forward(s) for s in sizes(op, x[1:-1], dy[1:-1], dw[:-2]))
    return Geometry(x[0], (d, h, w), dw[-2], dw[-1] // op.groups, op.groups)


def _blocking(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], config: Mapping[str, Any]) -> Blocking:
    return Blocking.of(_geometry(op, ins, outs), np.dtype(outs[0].dtype).itemsize, config)


def _shape(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], rows: int) -> tuple[int, ...]:
    one = dict.fromkeys(SPACE, 1)
    b = _blocking(op, ins, outs, {**one, "rows": rows})
    return b.lines, b.rows


def _columns(op: Any, ins: Sequence[Spec], outs: Sequence[Spec]) -> int:
    return _geometry(op, ins, outs).outer


def _images(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device, *, split: int) -> bool:
    return split <= ins[0].shape[0]


def _chunk_once(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device, *, split: int, pixels: int) -> bool:
    """No smaller ``pixels`` means the same chunks of a part."""

    def chunk(pixels: int) -> int:
        return _blocking(op, ins, outs, {**dict.fromkeys(SPACE, 1), "split": split, "pixels": pixels}).chunk

    return pixels == FIRST_PIXELS or all(
        chunk(other) != chunk(pixels) for other in SPACE["pixels"] if other < pixels or other == FIRST_PIXELS
    )


def _together(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device, **config: Any) -> bool:
    """There are panels to take together, they share a copy, and no smaller ``together`` means the same."""
    b = _blocking(op, ins, outs, config)
    smaller = (_blocking(op, ins, outs, {**config, "together": t}) for t in SPACE["together"] if t < config["together"])
    return config["together"] == 1 or (b.gathered > 0 and b.copies and all(s.together < b.together for s in smaller))


RULES = {
    "something to compute": something,
    "an image for each part": _images,
    **tile_rules(_shape, _columns, SPACE["rows"]),
    "a chunk once": _chunk_once,
    "panels that share": _together,
}


def cost(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device, config: Mapping[str, Any]) -> float:
    """Half-cycles of all cores, about: multiply-adds and visits of the sums, or what is read to feed them."""
    b = _blocking(op, ins, outs, config)
    pixels = b.pixel_rows * b.g.axes[2].out
    visits = 2.0 * -(-b.pixel_rows // b.chunk) * b.lines * b.rows * config["vectors"]
    sums = b.pieces * b.tiles
    computing = sums * (pixels * step_cost(b.lines * b.rows, config["vectors"]) + visits)
    x_bytes, dy_bytes = ins[0].size_bytes, ins[1].size_bytes
    if b.split == 1:
        x_bytes, dy_bytes = x_bytes * b.tasks, dy_bytes * b.others
    speed = FAR if ins[0].size_bytes + ins[1].size_bytes > NEAR_BYTES else NEAR
    if b.gathered:
        computing += COPYING * b.rows * b.tiles * b.others * b.g.groups * b.bundles * pixels
    elif b.far >= FAR_BYTES and b.g.axes[2].taps[0] == 1:  # misses of the first-level cache, measured
        computing += (1.0 + b.far / 1024) * sums * pixels
    return max(computing, (x_bytes + dy_bytes) / speed) * waiting(b.tasks, device.cores)


def _prefer(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device) -> dict[str, Any]:
    lanes = device.vector_bytes // np.dtype(outs[0].dtype).itemsize
    first = {"rows": 6, "vectors": 1, "lanes": lanes, "split": 1, "pixels": FIRST_PIXELS, "together": 1}

    def candidates() -> Iterator[dict[str, Any]]:
        for rows, vectors in product(SPACE["rows"], SPACE["vectors"]) if something(op, ins, outs, device) else ():
            config = {**first, "rows": rows, "vectors": vectors}
            if broken(RULES, op, ins, outs, device, config) is not None:
                continue
            b = _blocking(op, ins, outs, config)
            size = b.pieces * b.tiles * b.tile_size
            for split, together in product(SPACE["split"], SPACE["together"]):
                shared = {**config, "split": split, "together": together}
                if split > 1 and (split > ins[0].shape[0] or split < device.cores or split * size > SUMS):
                    continue
                if together == 1 or _together(op, ins, outs, device, **shared):
                    yield shared

    return min(candidates(), key=lambda config: cost(op, ins, outs, device, config), default=first)


def _workspace(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], **config: Any) -> tuple[Spec, ...]:
    b = _blocking(op, ins, outs, config)
    sums, padded = b.split * b.pieces * b.tiles * b.tile_size, b.g.padded_size if b.g.pads else 1
    return Spec((sums,), outs[0].dtype), Spec((padded,), outs[0].dtype)


@template("conv_filter_grad", "cpu", space=SPACE, fits=RULES, workspace=_workspace, prefer=_prefer, cost=cost)
def tiles(
    op: Any,
    ins: Sequence[Spec],
    outs: Sequence[Spec],
    epilogue: Epilogue,
    *,
    rows: int,
    vectors: int,
    lanes: int,
    split: int,
    pixels: int,
    together: int,
) -> Loop:
    """Taps and channels by filters, pixel after pixel."""
    config = {"rows": rows, "vectors": vectors, "lanes": lanes, "split": split, "pixels": pixels, "together": together}
    b = _blocking(op, ins, outs, config)
    g = b.g
    d, h, w = g.axes
    pad, pad_tasks = padding(g)
    groups = g.groups
    pads, records, record_rows, padded_rows = g.pads, g.n, d.out * h.out, d.padded * h.padded

    lines, rows, width, tile_size = b.lines, b.rows, b.width, b.tile_size
    pieces, panels, tile_count, bands, stretches = b.pieces, b.panels, b.tiles, b.bands, b.stretches
    window_d, window_h = d.taps[0], h.taps[0]
    length, inner, outer_channels = b.length(g), g.inner, g.outer
    row_length = length * stretches
    columns = min(g.outer, width)
    tail, last, filters = columns % lanes, g.outer - columns, g.outer * g.groups
    even = panels * columns == g.outer
    last_row, last_line = length - rows, window_h - lines
    # distances in the padded x
    channels = g.inner * g.groups
    line_h, line_d = w.padded * channels, h.padded * w.padded * channels
    record = d.padded * line_d
    step_d, step_h, step_w = d.step * line_d, h.step * line_h, w.step * channels
    spread_d, spread_h, spread_w = d.spread * line_d, h.spread * line_h, w.spread * channels
    origin = d.first[0] * line_d + h.first[0] * line_h + w.first[0] * channels
    # along the second axis: where x lies in the padded one, how far a tile goes
    first_h, low_h, size_h, row_step, row_spread = h.first[0], h.low, h.size, h.step, h.spread
    reach = (b.lines - 1) * h.spread
    out_d, out_h, out_w, pixel_rows = d.out, h.out, w.out, b.pixel_rows
    chunk, part_size = b.chunk, pieces * tile_count * tile_size
    copies, others, bundles, panel_size = b.copies, b.others, b.bundles, chunk * out_w * width
    gathers, tiles_each = b.gathered > 0, b.gathered or tile_count
    # x of a tile is written in whole vectors: each pixel's spill is overwritten by the next
    row_vectors, row_tail, x_step = -(-rows // lanes), rows % lanes, rows if gathers else step_w
    x_size = chunk * out_w * rows + (row_vectors * lanes - rows)
    rows_each = b.joined
    run = rows_each * out_w
    near_size, near_x_size = together * panel_size, tiles_each * x_size if gathers else 1

    def add_pixels(sums, slot, fresh, x, start, line, dy, column, stride, begin, end):  # type: ignore[no-untyped-def]
        acc = zeros(lines, rows, vectors, lanes, sums)
        if not fresh:
            acc = load(acc, sums, slot, width, 0)
        for row in range(begin, end, rows_each):
            n, z, o = row // (out_h * out_d), row // out_h % out_d, row % out_h
            top = first_h + o * row_step + line * row_spread
            if rows_each == 1 and (top + reach < low_h or top >= low_h + size_h):
                continue  # nothing but zeros
            pixel = start + ((row - begin) * out_w * rows if gathers else n * record + z * step_d + o * step_h)
            source = (row - begin) * out_w * stride + column
            for i in range(run):
                acc = outer(acc, x, pixel + i * x_step, 1, spread_h, dy, source + i * stride, tail)
        store(acc, sums, slot, width, 0)

    def write(piece, dw, sums, extras, at):  # type: ignore[no-untyped-def]
        panel, stretch, band = piece % panels, piece // panels % stretches, piece // (panels * stretches) % bands
        q = piece // (panels * stretches * bands) % window_d
        group = piece // (panels * stretches * bands * window_d)
        column, line = min(panel * width, last), min(band * lines, last_line)
        skip = 0 if even else panel * width - column
        k = group * outer_channels + column
        for tile in range(tile_count):
            first = min(tile * rows, last_row)
            for m in range(band * lines - line, lines):
                for i in range(tile * rows - first, rows):
                    position = (q * window_h + line + m) * row_length + stretch * inner + first + i
                    o = position * filters + k
                    s = (piece * tile_count + tile) * tile_size + (m * rows + i) * width
                    for j in range(skip, columns):
                        v = sums[s + j]
                        for part in range(1, split):
                            v += sums[s + part * part_size + j]
                        dw[o + j] = epilogue(v, extras, o + j, k + j, at)

    def gather(x, start, first_tile, last_tile, begin, end, near_x):  # type: ignore[no-untyped-def]
        row_of_tile = zeros(1, 1, row_vectors, lanes, x)
        for row in range(begin, end):
            n, z, o = row // (out_h * out_d), row // out_h % out_d, row % out_h
            pixel, into = start + n * record + z * step_d + o * step_h, (row - begin) * out_w * rows
            for i in range(out_w):
                for tile in range(first_tile, last_tile):
                    found = load(row_of_tile, x, pixel + i * step_w + min(tile * rows, last_row), 0, row_tail)
                    store(found, near_x, into + i * rows + (tile - first_tile) * x_size, 0, 0)

    def add_pieces(part, group, bundle, first_other, last_other, x, dy, sums, fresh, low, high):  # type: ignore[no-untyped-def]
        first_panel, last_panel = bundle * together, min(bundle * together + together, panels)
        if copies:
            near_dy = local(near_size, dy)
            for panel in range(first_panel, last_panel):
                first = low * out_w * filters + min(panel * width, last) + group * outer_channels
                into = (panel - first_panel) * panel_size
                for i in range((high - low) * out_w):
                    row = zeros(1, 1, vectors, lanes, dy)
                    store(load(row, dy, first + i * filters, 0, tail), near_dy, into + i * width, 0, 0)
        near_x = local(near_x_size, x)
        for other in range(first_other, last_other):
            stretch, band, q = other % stretches, other // stretches % bands, other // (stretches * bands)
            line = min(band * lines, last_line)
            start = origin + q * spread_d + line * spread_h + stretch * spread_w + group * inner
            for first_tile in range(0, tile_count, tiles_each):
                last_tile = min(first_tile + tiles_each, tile_count)
                if gathers:
                    gather(x, start, first_tile, last_tile, low, high, near_x)
                for panel in range(first_panel, last_panel):
                    piece = (group * others + other) * panels + panel
                    for tile in range(first_tile, last_tile):
                        slot = part * part_size + (piece * tile_count + tile) * tile_size
                        from_x, source = (tile - first_tile) * x_size, near_x
                        if not gathers:
                            from_x, source = start + min(tile * rows, last_row), x
                        if copies:
                            at_dy = (panel - first_panel) * panel_size
                            add_pixels(sums, slot, fresh, source, from_x, line, near_dy, at_dy, width, low, high)
                        else:
                            at_dy = low * out_w * filters + min(panel * width, last) + group * outer_channels
                            add_pixels(sums, slot, fresh, source, from_x, line, dy, at_dy, filters, low, high)

    def before_whole(task, x, dy, dw, sums, padded, extras, at):  # type: ignore[no-untyped-def]
        pad(task, x, padded)

    def whole(task, x, dy, dw, sums, padded, extras, at):  # type: ignore[no-untyped-def]
        source = padded if pads else x
        bundle, other, group = task % bundles, task // bundles % others, task // (bundles * others)
        for low in range(0, pixel_rows, chunk):
            high = min(low + chunk, pixel_rows)
            add_pieces(0, group, bundle, other, other + 1, source, dy, sums, low == 0, low, high)
        for panel in range(bundle * together, min(bundle * together + together, panels)):
            write((group * others + other) * panels + panel, dw, sums, extras, at)

    def before_parts(task, x, dy, dw, sums, padded, extras, at):  # type: ignore[no-untyped-def]
        begin, end = records * task // split, records * (task + 1) // split
        source, ready = padded if pads else x, begin
        for low in range(begin * record_rows, end * record_rows, chunk):
            high = min(low + chunk, end * record_rows)
            if pads:  # a record when it is needed
                until = (high - 1) // record_rows + 1
                for row in range(ready * padded_rows, until * padded_rows):
                    pad(row, x, padded)
                ready = until
            for bundle in range(bundles * groups):
                fresh = low == begin * record_rows
                add_pieces(task, bundle // bundles, bundle % bundles, 0, others, source, dy, sums, fresh, low, high)

    def parts(task, x, dy, dw, sums, padded, extras, at):  # type: ignore[no-untyped-def]
        write(task, dw, sums, extras, at)

    if split == 1:
        return Loop(whole, b.tasks, before=before_whole if pads else None, before_tasks=pad_tasks)
    return Loop(parts, pieces, before=before_parts, before_tasks=split)
