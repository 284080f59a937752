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

from collections.abc import Sequence
from typing import Any

from rapydli_flow.spec import Spec
from rapydli_flow.template import Config, Device, Epilogue, template

from .grid import Grid, widest
from .mma import Part, Problem, loader, multiply
from .mma_rules import estimate
from .tensor_core import SPLIT
from .winograd_rules import MARGIN, SPACE, in_slabs, moved, prefer, rules, tile_of
from .winograd_transform import Tiles, filters, lanes_of, patches, results, routed, start

U, V, SUMS, COUNTER = 0, 1, 2, 3  # arrays of the workspace; the last where there are several slabs


def tiles_of(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], m: int, slab_mb: int) -> Tiles:
    """How the source's images are cut."""
    (source, w), (result,) = ins, outs
    taps, (images, h, w_) = w.shape[0], source.shape[:-1]
    low_h, low_w = (low for low, _ in op.padding)
    if op.family == "conv_input_grad":
        low_h, low_w = taps - 1 - low_h, taps - 1 - low_w
    t = Tiles(images, (h, w_), (result.shape[1], result.shape[2]), (low_h, low_w), m, taps, images)
    return in_slabs(t, source.shape[-1] + result.shape[-1], slab_mb)


def problem(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], t: Tiles) -> Problem:
    """The products of a slab: tiles by filters over channels, or by channels over filters, which run along memory."""
    inner, outer = ins[0].shape[-1], outs[0].shape[-1]
    turned = op.family == "conv_input_grad"
    base = (t.rows * inner, inner * outer, t.rows * outer)
    vectors = {"vector_a": widest(inner), "vector_b": widest(inner if turned else outer)}
    lie: dict[str, Any] = {"rows_a": True, "rows_b": turned, "batch": t.area, "base": base, **vectors}
    return Problem("float32", SPLIT, t.rows, outer, inner, **lie)


def workspace(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], **config: Any) -> tuple[Spec, ...]:
    """Matrices of filters, patches and sums, and whose turn it is."""
    t = tiles_of(op, ins, outs, config["m"], config["slab_mb"])
    inner, outer = ins[0].shape[-1], outs[0].shape[-1]
    sizes = (inner * outer, t.rows * inner, t.rows * outer)
    return (*(Spec((t.area * size,)) for size in sizes), *t.counter)


def cost(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device, config: Config) -> float:
    """Seconds: products, as direct convolutions foretell theirs, and all bytes that transforms read and write."""
    t, vector = tiles_of(op, ins, outs, config["m"], config["slab_mb"]), config["vector"]
    (source, w), (result,), p = ins, outs, problem(op, ins, outs, t)
    inner, outer, part = source.shape[-1], result.shape[-1], t.together / t.images
    v, u, sums = (4 * t.area * size for size in (t.rows * inner, inner * outer, t.rows * outer))
    lanes = lanes_of(vector, inner), lanes_of(vector, w.shape[-1]), lanes_of(vector, outer)
    slab = moved(device, source.size_bytes * part + v, t.rows * inner, t.n, lanes[0])
    slab += estimate(tile_of(p, config), device, v + u + sums)
    slab += moved(device, result.size_bytes * part + sums, t.rows * outer, t.n, lanes[2])
    return MARGIN * (moved(device, w.size_bytes + u, inner * outer, t.n, lanes[1]) + t.slabs * slab)


def grids(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], epilogue: Epilogue, config: Config) -> tuple[Grid, ...]:
    """Filters, and for each slab patches, products and results."""
    t, vector = tiles_of(op, ins, outs, config["m"], config["slab_mb"]), config["vector"]
    inner, outer, shape = ins[0].shape[-1], outs[0].shape[-1], ins[1].shape[-2:]
    turned = op.family == "conv_input_grad"
    cut_up = tile_of(problem(op, ins, outs, t), config)
    plain = Epilogue.none(Spec((t.area * t.rows, outer)))
    (product,) = multiply([Part(cut_up, loader(cut_up, True), loader(cut_up, False))], plain)
    slab = (
        patches(t, inner, vector, source=0, into=V, counter=COUNTER),
        routed(product, V, U, SUMS),
        results(t, outer, vector, epilogue, source=SUMS, counter=COUNTER),
    )
    of_filters = filters(t, (shape[0], shape[1]), vector, turned=turned, source=1, into=U)
    return (of_filters, *start(t, COUNTER), *(slab * t.slabs))


RULES = rules(tiles_of, problem, launches=3)
SETTINGS: dict[str, Any] = {
    "space": SPACE,
    "fits": RULES,
    "workspace": workspace,
    "prefer": prefer(RULES, cost),
    "cost": cost,
}


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
