"""The filter gradient of a depthwise convolution: a sum over all pixels for each tap and channel.

    dw[r, c] = sum over n, h of x[n, h * stride + r * dilation - padding, c] * dy[n, h, c]

Threads walk over the tiles of `depthwise`, those of dy, with a sum for each tap of a few channels in registers. Blocks
add up their threads tap by tap, and a second kernel adds up the blocks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import numpy as np

from rapydli_flow.spec import Spec
from rapydli_flow.template import Config, Device, Epilogue, template

from . import cost as guess
from .access import pick, plus
from .depthwise import (
    RULES,
    cost,
    lines,
    multiply_add,
    one_each,
    pixels_of,
    preferring,
    reader,
    rows_of,
    together,
)
from .grid import Grid, blocks_of
from .pair import held
from .parts import add_parts
from .ptx import clear, cuda, hold, load, put, store, take, unroll

SPACE: Mapping[str, tuple[Any, ...]] = {
    "threads": (128, 256, 64),
    "vector": (4, 2, 1),
    "rows": (2, 1, 4, 7),
    "run": (4, 2, 1, 7),
    "parts": (264, 528, 132, 1056, 66, 32, 16, 8, 4, 1),  # blocks that share the pixels of some channels
}


def _whole(
    op: Any,
    ins: Sequence[Spec],
    outs: Sequence[Spec],
    device: Device,
    *,
    threads: int,
    vector: int,
    rows: int,
    run: int,
    parts: int,
) -> bool:
    """Every part has tiles, and the parts have room."""
    tiles = ins[0].shape[0] * prod(line.tiles for line in lines(op, ins, outs, rows, run))
    lanes, _ = _shape(op.groups, vector, threads)
    return (parts - 1) * lanes < tiles and parts * outs[0].size < 2**26


FITS = {**RULES, "parts of the sum": _whole}


def prefer(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device) -> Config:
    """As many blocks as fill the card twice, if there are tiles for all their threads."""
    config = preferring({**SPACE, "parts": (1,)}, FITS)(op, ins, outs, device)
    if not one_each(op, ins, outs, device) or op.groups % config["vector"]:
        return config
    lanes, blocks = _shape(op.groups, config["vector"], config["threads"])
    tiles = ins[0].shape[0] * prod(line.tiles for line in lines(op, ins, outs, config["rows"], config["run"]))
    fitting = [parts for parts in sorted(SPACE["parts"]) if parts * lanes <= tiles and parts * blocks <= 600]
    return {**config, "parts": max(fitting, default=1)}


def _shape(channels: int, vector: int, threads: int) -> tuple[int, int]:
    """Tiles that a block computes at a time, and blocks for all channels."""
    vectors = channels // vector
    across = max(a for a in range(1, min(vectors, 32) + 1) if vectors % a == 0)
    return threads // across, vectors // across


def _workspace(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], *, parts: int, **config: Any) -> tuple[Spec, ...]:
    return (Spec((parts * outs[0].size,), held(outs[0].dtype)),)


def _filter_cost(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device, config: Config) -> float:
    parts_bytes: int = 2 * config["parts"] * outs[0].size_bytes
    return cost(op, ins, outs, device, config) + guess.LAUNCH_S * 2 + parts_bytes / 4e12


@template(
    "conv_filter_grad",
    "cuda",
    space=SPACE,
    fits=FITS,
    prefer=prefer,
    workspace=_workspace,
    cost=_filter_cost,
)
def depthwise(
    op: Any,
    ins: Sequence[Spec],
    outs: Sequence[Spec],
    epilogue: Epilogue,
    *,
    threads: int,
    vector: int,
    rows: int,
    run: int,
    parts: int,
) -> tuple[Grid, ...]:
    """Each thread walks over tiles with a sum for every tap of a few channels."""
    x = ins[0]
    dtype, channels, size = x.dtype, op.groups, outs[0].size
    d, h, w = of = lines(op, ins, outs, rows, run)
    window = (1, 1, *op.window)[-3:]
    taps, source, places = prod(window), rows_of(of, window), len(w.offsets)
    lanes, across_blocks = _shape(channels, vector, threads)
    across = channels // vector // across_blocks
    tiles = x.shape[0] * d.tiles * h.tiles * w.tiles
    walkers = parts * lanes
    steps = blocks_of(tiles, walkers)
    pixels = d.pixels * h.pixels * w.pixels
    read, keep = load(dtype, vector, constant=True), hold(vector)
    sums, store_sum = clear(taps * vector), store(held(dtype), 1)
    write, fetch, add, first_of, gather = put(1), pick(1, 1), plus(1), hold(1), take(1)
    of_rows = len(source)
    all_taps = tuple(multiply_add(vector, tuple((t, x, y) for y, x, t in row.sums(vector))) for row in source)
    begin, row = reader(of, source, dtype, channels, vector)
    kind, pixel = getattr(np, held(dtype)), pixels_of(of, channels)
    wide = across * vector  # channels of a block
    room, columns = blocks_of(threads, across) * wide, blocks_of(wide, threads)

    def kernel(ins: Any, outs: Any, work: Any, extras: Any, at: Any) -> None:
        acc = cuda.local.array(taps * vector, kind)
        line = cuda.local.array(places * vector, kind)
        near = cuda.local.array(pixels * vector, kind)
        one = cuda.local.array(1, kind)
        shared = cuda.shared.array(room, kind, alignment=16)
        thread = cuda.threadIdx.x
        part = cuda.blockIdx.x // across_blocks
        channel = (cuda.blockIdx.x % across_blocks * across + thread % across) * vector
        walker = part * lanes + thread // across
        sums(acc)
        for step in range(steps):
            item = step * walkers + walker
            there = (thread < lanes * across) & (item < tiles)
            tile_w = item % w.tiles
            tile_h = item // w.tiles % h.tiles
            tile_d = item // (w.tiles * h.tiles) % d.tiles
            image = item // (w.tiles * h.tiles * d.tiles)
            for a in unroll(d.pixels):
                for b in unroll(h.pixels):
                    for c in unroll(w.pixels):
                        spot = pixel(there, image, tile_d, tile_h, tile_w, a, b, c, channel)
                        values = read(spot[0], ins[1], spot[1])
                        keep(near, ((a * h.pixels + b) * w.pixels + c) * vector, values)
            first = begin(image, tile_d, tile_h, tile_w, channel)
            for i in unroll(of_rows):
                row(line, ins, i, there, tile_d, tile_h, tile_w, first)
                all_taps[i](acc, line, near)
        own = thread // across * wide + thread % across * vector
        for tap in unroll(taps):
            for j in unroll(vector):
                write(shared, own + j, acc, tap * vector + j)
            cuda.syncthreads()
            for j in unroll(columns):
                column = thread + j * threads
                first_of(one, 0, fetch(shared, column % wide))
                for lane in unroll(lanes - 1):
                    add(one, 0, fetch(shared, column % wide + (lane + 1) * wide))
                place = part * size + tap * channels + cuda.blockIdx.x % across_blocks * wide + column
                store_sum(column < wide, work[0], place, gather(one, 0))
            cuda.syncthreads()

    return Grid(kernel, parts * across_blocks, threads, resident=together(threads, bound=256)), add_parts(
        epilogue, parts, size
    )
