"""Filter gradient of convolutions by Winograd's algorithm on tensor cores: F(3x3, 4x4), F(3x3, 2x2) and F(5x5, 2x2).

    dw = sum over tiles of  (n x n patch of x)  correlated with  (m x m tile of dy)

    patches of x   --B-->  v   n*n matrices, tiles by channels    for each slab of images
    tiles of dy    --G-->  d   n*n matrices, tiles by filters
    sums = transposed v times d, n*n matrix products over the tiles of the slab, split over blocks
    sums           --A-->  dw  the taps of each channel and filter, and the epilogue

What blocks found is added up in a fixed order: by the last grid, or, where there are several slabs, after each of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rapydli_flow.spec import Spec
from rapydli_flow.template import Config, Device, Epilogue, template

from .grid import Grid, widest
from .mma import Part, Problem, loader, multiply
from .mma_rules import estimate
from .tensor_core import SPLIT
from .winograd_rules import MARGIN, SPACE, in_slabs, moved, prefer, rules, tile_of
from .winograd_transform import Tiles, add_slab, gradients, lanes_of, patches, routed, start

V, D, PARTS, TOTAL, COUNTER = range(5)  # arrays of the workspace; the last two where there are several slabs
SPLITS: Mapping[str, tuple[Any, ...]] = {**SPACE, "splits": (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)}
FEW = 1 << 18  # sums: fewer are transformed one by one, by more threads


def tiles_of(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], m: int, slab_mb: int) -> Tiles:
    """How x and dy are cut."""
    (x, dy), (images, h, w) = ins, ins[0].shape[:-1]
    low_h, low_w = (low for low, _ in op.padding)
    t = Tiles(images, (h, w), (dy.shape[1], dy.shape[2]), (low_h, low_w), m, op.window[0], images)
    return in_slabs(t, x.shape[-1] + dy.shape[-1], slab_mb)


def problem(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], t: Tiles) -> Problem:
    """The products of a slab: channels by filters over tiles."""
    c, k = outs[0].shape[-2:]
    base = (t.rows * c, t.rows * k, c * k)
    lie: dict[str, Any] = {"rows_a": False, "rows_b": False, "batch": t.area, "base": base}
    return Problem("float32", SPLIT, c, k, t.rows, **lie, vector_a=widest(c), vector_b=widest(k))


def workspace(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], **config: Any) -> tuple[Spec, ...]:
    """Matrices of patches, of tiles of dy, of sums in parts; of all slabs' sums, and whose turn it is."""
    t, (c, k) = tiles_of(op, ins, outs, config["m"], config["slab_mb"]), outs[0].shape[-2:]
    sizes = (t.rows * c, t.rows * k, config["splits"] * c * k, *((c * k,) if t.slabs > 1 else ()))
    return (*(Spec((t.area * size,)) for size in sizes), *t.counter)


def sum_lanes(vector: int, c: int, k: int) -> int:
    """How many sums a thread transforms at once."""
    return 1 if c * k < FEW else lanes_of(vector, k)


def cost(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device, config: Config) -> float:
    """Seconds: products, as direct gradients foretell theirs, and all bytes that transforms read and write."""
    t, vector = tiles_of(op, ins, outs, config["m"], config["slab_mb"]), config["vector"]
    (x, dy), (c, k), part = ins, outs[0].shape[-2:], t.together / t.images
    v, d, sums = (4 * t.area * size for size in (t.rows * c, t.rows * k, c * k))
    slab = moved(device, x.size_bytes * part + v, t.rows * c, t.n, lanes_of(vector, c))
    slab += moved(device, dy.size_bytes * part + d, t.rows * k, t.n, lanes_of(vector, k))
    slab += estimate(tile_of(problem(op, ins, outs, t), config), device, v + d)  # adding up parts, too
    last = moved(device, outs[0].size_bytes + sums, c * k, t.n, sum_lanes(vector, c, k))
    return MARGIN * (t.slabs * slab + last)


RULES = rules(tiles_of, problem, launches=4)


@template(
    "conv_filter_grad",
    "cuda",
    space=SPLITS,
    fits=RULES,
    workspace=workspace,
    prefer=prefer(RULES, cost, SPLITS),
    cost=cost,
)
def winograd(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], epilogue: Epilogue, **config: Any) -> tuple[Grid, ...]:
    """Winograd, with tiles of dy as filters."""
    t, vector, splits = tiles_of(op, ins, outs, config["m"], config["slab_mb"]), config["vector"], config["splits"]
    c, k = outs[0].shape[-2:]
    size, several = t.area * c * k, t.slabs > 1
    cut_up = tile_of(problem(op, ins, outs, t), config)
    plain = Epilogue.none(Spec((t.area * c, k)))
    product = multiply([Part(cut_up, loader(cut_up, True), loader(cut_up, False))], plain)[0]
    slab = (
        patches(t, c, vector, source=0, into=V, counter=COUNTER),
        patches(t, k, vector, source=1, into=D, counter=COUNTER, of_results=True),
        routed(product, V, D, PARTS),
        *((add_slab(size, splits, source=PARTS, total=TOTAL),) if several else ()),
    )
    source, parts = (TOTAL, 1) if several else (PARTS, splits)
    last = gradients(t, (c, k), parts, sum_lanes(vector, c, k), epilogue, source=source)
    return (*start(t, COUNTER, total=TOTAL, size=size), *(slab * t.slabs), last)
