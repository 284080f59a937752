"""Winograd convolution and its input gradient on tensor cores: F(4x4, 3x3), F(2x2, 3x3) and F(2x2, 5x5), float32.

    filters (3 x 3 or 5 x 5)                   --G--> u   n*n matrices, channels by filters      once
    patches of x (n x n, overlapping, m apart) --B--> v   n*n matrices, tiles by channels        for each slab of images
    sums = v times u, n*n matrix products, three products of TF32 for one of float32
    sums                                       --A--> y   m x m pixels of each tile, and the epilogue

Each step is a grid of its own: what a block of products reads is a part of all patches, and is read by other blocks,
too. The input gradient is the same over dy, with taps in reverse order, and filters whose columns are read as rows. See
`docs/design/winograd.md`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import product as every
from typing import Any

from rapydli_flow.spec import Spec
from rapydli_flow.template import Config, Device, Epilogue, broken, template
from rapydli_flow.winograd import SQUARES

from . import cost as costs
from . import mma_rules
from .grid import INDEX_LIMIT, Grid, blocks_of, widest
from .mma import Part, Problem, Tile, cut, loader, multiply
from .mma_rules import SHAPES, estimate
from .tensor_core import SPLIT
from .winograd_transform import THREADS, Tiles, filters, lanes_of, patches, resident_of, results, routed

U, V, SUMS, COUNTER = 0, 1, 2, 3  # arrays of the workspace
PRODUCT = ("bm", "bn", "bk", "wm", "wn", "stages", "group", "resident")
SPACE: Mapping[str, tuple[Any, ...]] = {
    "m": (4, 2),  # pixels of a tile along each axis
    "slab_mb": (512, 256, 128, 64, 32, 16),  # of patches and sums that exist at once
    "vector": (4, 2, 1),  # elements that a thread transforms at once
    **{name: mma_rules.SPACE[name] for name in PRODUCT},
}
WARPS = "whole warps, few enough threads"
MOST_SLABS = 20  # each takes three launches


def served(op: Any, window: Sequence[int], specs: Sequence[Spec]) -> bool:
    """Square windows with points for a tile, that move by one pixel, over float32 that need not be exact."""
    plain = op.stride == op.dilation == (1, 1) and op.groups == 1 and len(set(window)) == 1 < window[0]
    points = any(m + window[0] - 1 in SQUARES for m in SPACE["m"])
    return plain and points and all(spec.dtype == "float32" for spec in specs)


def tiles_of(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], m: int, slab_mb: int) -> Tiles:
    """How the source's images are cut."""
    (source, w), (result,) = ins, outs
    low = tuple(low for low, _ in op.padding)
    taps = w.shape[0]
    if op.family == "conv_input_grad":
        low = tuple(taps - 1 - before for before in low)
    images, (h, w_), (out_h, out_w) = source.shape[0], source.shape[1:-1], result.shape[1:-1]
    t = Tiles(images, (h, w_), (out_h, out_w), (low[0], low[1]), m, taps, images)
    of_image = 4 * t.area * t.of_image * (source.shape[-1] + result.shape[-1])
    together = max(1, min(images, (slab_mb << 20) // of_image))
    return replace(t, together=blocks_of(images, blocks_of(images, together)))  # slabs of one size, if possible


def problem(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], t: Tiles) -> Problem:
    """The products of a slab: tiles by filters over channels, or by channels over filters, which run along memory."""
    inner, outer = ins[0].shape[-1], outs[0].shape[-1]
    rows_b = op.family == "conv_input_grad"
    vectors = {"vector_a": widest(inner), "vector_b": widest(inner if rows_b else outer)}
    base = (t.rows * inner, inner * outer, t.rows * outer)
    return Problem(
        "float32", SPLIT, t.rows, outer, inner, rows_a=True, rows_b=rows_b, batch=t.area, base=base, **vectors
    )


def tile_of(p: Problem, config: Config, splits: int = 1) -> Tile:
    return cut(p, {**{name: config[name] for name in PRODUCT}, "splits": splits, "exchange": False})


def _windows(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device) -> bool:
    return served(op, ins[1].shape[:-2], (*ins, *outs))


def _points(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device, *, m: int) -> bool:
    """There are points for tiles of this size."""
    return m + ins[1].shape[0] - 1 in SQUARES


def _slabs(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device, *, m: int, slab_mb: int) -> bool:
    """Few slabs, and not as many as with twice the space."""
    t = tiles_of(op, ins, outs, m, slab_mb)
    new = slab_mb == max(SPACE["slab_mb"]) or t.together < tiles_of(op, ins, outs, m, 2 * slab_mb).together
    return t.slabs <= MOST_SLABS and new


def _vector(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device, *, vector: int) -> bool:
    """No wider than anything that is transformed."""
    return vector <= max(widest(ins[0].shape[-1]), widest(outs[0].shape[-1]))


def _indices(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device, *, m: int, slab_mb: int) -> bool:
    return in_indices(tiles_of(op, ins, outs, m, slab_mb), ins[0].shape[-1], outs[0].shape[-1])


def in_indices(t: Tiles, *channels: int) -> bool:
    """Are matrices, and images with what patches reach around them, in 32-bit indices?"""
    high, wide = (size + abs(low) + out + 4 * t.n for size, low, out in zip(t.size, t.low, t.out, strict=True))
    widest_of = max(channels)
    filters_size = t.area * (channels[0] + 256) * (channels[1] + 256)
    images = (t.images + t.together + 1) * high * wide * widest_of
    return max(t.area * widest_of * (t.rows + 256), images, filters_size) < INDEX_LIMIT


def _tiles(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device, **config: Any) -> bool:
    p = problem(op, ins, outs, tiles_of(op, ins, outs, config["m"], config["slab_mb"]))
    return mma_rules._whole(tile_of(p, config), device)


RULES: dict[str, str | Callable[..., bool]] = {
    "operands": mma_rules.operands,
    "square windows of 3 or 5, one pixel apart": _windows,
    "points for the tile": _points,
    "vectors divide channels": _vector,
    "slabs": _slabs,
    "32-bit indices": _indices,
    WARPS: mma_rules.rules(lambda op, ins, outs: ())[WARPS],
    "tiles in shared memory and registers, copies shared out evenly": _tiles,
}


def _workspace(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], **config: Any) -> tuple[Spec, ...]:
    t, (inner, outer) = tiles_of(op, ins, outs, config["m"], config["slab_mb"]), ins[1].shape[-2:]
    sizes = (inner * outer, t.rows * ins[0].shape[-1], t.rows * outs[0].shape[-1])
    return (*(Spec((t.area * size,)) for size in sizes), *t.counter)


# ---- what it should take


def moved(device: Device, size_bytes: float, squares: int, n: int, lanes: int) -> float:
    """Time of a grid that transforms."""
    resident = resident_of(n, lanes)
    blocks = blocks_of(squares, THREADS)
    return costs.seconds(device, flops=0, size_bytes=size_bytes, unit="fp32", blocks=blocks, resident=resident)


def cost(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device, config: Config) -> float:
    """Seconds: products, as direct convolutions foretell theirs, and all bytes that transforms read and write."""
    t, vector = tiles_of(op, ins, outs, config["m"], config["slab_mb"]), config["vector"]
    (source, w), (result,), p = ins, outs, problem(op, ins, outs, t)
    inner, outer, part = source.shape[-1], result.shape[-1], t.together / t.images
    v, u, sums = (4 * t.area * size for size in (t.rows * inner, inner * outer, t.rows * outer))
    of_w, of_x, of_y = lanes_of(vector, w.shape[-1]), lanes_of(vector, inner), lanes_of(vector, outer)
    slab = moved(device, source.size_bytes * part + v, t.rows * inner // of_x, t.n, of_x)
    slab += estimate(tile_of(p, config), device, v + u + sums)
    slab += moved(device, result.size_bytes * part + sums, t.rows * outer // of_y, t.n, of_y)
    return moved(device, w.size_bytes + u, inner * outer // of_w, t.n, of_w) + t.slabs * slab


@lru_cache(maxsize=512)
def _preferred(op: Any, ins: tuple[Spec, ...], outs: tuple[Spec, ...], device: Device) -> dict[str, Any]:
    first = {name: values[0] for name, values in SPACE.items()}
    early = {name: RULES[name] for name in ("operands", "square windows of 3 or 5, one pixel apart")}
    if broken(early, op, ins, outs, device, first):
        return first
    vector, tried = max(widest(ins[0].shape[-1]), widest(outs[0].shape[-1])), []
    for m, (bm, bn, wm, wn, resident) in every(SPACE["m"], SHAPES):
        for bk, stages in every((32, 16), (4, 3, 2)):
            config = {"m": m, "slab_mb": SPACE["slab_mb"][0], "vector": vector, "bm": bm, "bn": bn, "bk": bk}
            config |= {"wm": wm, "wn": wn, "stages": stages, "group": 8, "resident": resident}
            if broken(RULES, op, ins, outs, device, config) is None:
                tried.append((cost(op, ins, outs, device, config), len(tried), config))
                break
    return min(tried)[-1] if tried else first


def _prefer(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device) -> Config:
    return _preferred(op, tuple(ins), tuple(outs), device)


# ---- the templates


def grids(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], epilogue: Epilogue, config: Config) -> tuple[Grid, ...]:
    """Filters, and for each slab patches, products and results."""
    t, vector = tiles_of(op, ins, outs, config["m"], config["slab_mb"]), config["vector"]
    inner, outer, shape = ins[0].shape[-1], outs[0].shape[-1], ins[1].shape[-2:]
    turned = op.family == "conv_input_grad"
    cut_up = tile_of(problem(op, ins, outs, t), config)
    plain = Epilogue.none(Spec((t.area * t.rows, outer)))
    (product,) = multiply([Part(cut_up, loader(cut_up, True), loader(cut_up, False))], plain)
    of_filters = filters(t, (shape[0], shape[1]), vector, turned=turned, source=1, into=U, counter=COUNTER)
    slab = (
        patches(t, inner, vector, source=0, into=V, counter=COUNTER),
        routed(product, V, U, SUMS),
        results(t, outer, vector, epilogue, source=SUMS, counter=COUNTER),
    )
    return (of_filters, *(slab * t.slabs))


SETTINGS: dict[str, Any] = {"space": SPACE, "fits": RULES, "workspace": _workspace, "prefer": _prefer, "cost": cost}


@template("conv", "cuda", **SETTINGS)
def winograd(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], epilogue: Epilogue, **config: Any) -> tuple[Grid, ...]:
    """Winograd convolution."""
    return grids(op, ins, outs, epilogue, config)


@template("conv_input_grad", "cuda", **SETTINGS)
def reversed_winograd(
    op: Any, ins: Sequence[Spec], outs: Sequence[Spec], epilogue: Epilogue, **config: Any
) -> tuple[Grid, ...]:
    """Winograd convolution of dy with reversed filters."""
    return grids(op, ins, outs, epilogue, config)
