"""Which configs of Winograd templates fit, which are good untuned, and what they take: for all three of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import product as every
from typing import Any

from rapydli_flow.spec import Spec
from rapydli_flow.template import Config, Device, broken
from rapydli_flow.winograd import SQUARES

from . import cost as costs
from . import mma_rules
from .grid import INDEX_LIMIT, blocks_of, widest
from .mma import Problem, Tile, cut
from .mma_rules import SHAPES
from .winograd_transform import THREADS, Tiles, resident_of

PRODUCT = ("bm", "bn", "bk", "wm", "wn", "stages", "group", "resident")
SPACE: Mapping[str, tuple[Any, ...]] = {
    "m": (4, 2),  # pixels of a tile along each axis
    "slab_mb": (512, 256, 128, 64, 32, 16),  # of matrices of tiles that exist at once
    "vector": (4, 2, 1),  # elements that a thread transforms at once
    **{name: mma_rules.SPACE[name] for name in PRODUCT},
    "splits": (1,),  # of the inner sum of products
}
MOST_LAUNCHES = 64  # of a call
MARGIN = 1.15  # of foretold times; with it an H200 needed 0.85 of them here and 0.8 in `wgmma`: their order was right
_WARPS = "whole warps, few enough threads"

Rules = Mapping[str, str | Callable[..., bool]]
Cut = Callable[[Any, Sequence[Spec], Sequence[Spec], int, int], Tiles]  # op, ins, outs, m, slab_mb
Make = Callable[[Any, Sequence[Spec], Sequence[Spec], Tiles], Problem]
Foretell = Callable[[Any, Sequence[Spec], Sequence[Spec], Device, Config], float]


def taps_of(op: Any, ins: Sequence[Spec]) -> tuple[int, ...]:
    """The window."""
    return tuple(op.window if op.family == "conv_filter_grad" else ins[1].shape[:-2])


def in_slabs(t: Tiles, channels: int, slab_mb: int) -> Tiles:
    """As many images together as have so much in their matrices of ``channels``; slabs are alike, if possible."""
    together = max(1, min(t.images, (slab_mb << 20) // (4 * t.area * t.of_image * channels)))
    return replace(t, together=blocks_of(t.images, blocks_of(t.images, together)))


def tile_of(p: Problem, config: Config) -> Tile:
    """How products are cut."""
    return cut(p, {**{name: config[name] for name in (*PRODUCT, "splits")}, "exchange": False})


def served(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device) -> bool:
    """Square windows with points for a tile, that move by one pixel, over float32."""
    window = taps_of(op, ins)
    plain = op.stride == op.dilation == (1, 1) and op.groups == 1 and len(set(window)) == 1 < window[0]
    points = any(m + window[0] - 1 in SQUARES for m in SPACE["m"])
    return plain and points and all(spec.dtype == "float32" for spec in (*ins, *outs))


def points(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device, *, m: int) -> bool:
    """There are points for tiles of this size."""
    return m + taps_of(op, ins)[0] - 1 in SQUARES


OF_OP: Rules = {
    "operands": mma_rules.operands,
    "square windows of 3 or 5, one pixel apart": served,
}


def in_indices(t: Tiles, *channels: int) -> bool:
    """Are matrices, and images with what patches reach around them, in 32-bit indices?"""
    high, wide = (size + abs(low) + out + 4 * t.n for size, low, out in zip(t.size, t.low, t.out, strict=True))
    images = (t.images + t.together + 1) * high * wide
    return max(t.area * (t.rows + 256), images) * max(channels) < INDEX_LIMIT


def rules(tiles: Cut, problem: Make, launches: int) -> Rules:
    """The hard constraints; ``launches``: of a slab."""

    def slabs(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device, *, m: int, slab_mb: int) -> bool:
        t = tiles(op, ins, outs, m, slab_mb)
        new = slab_mb == max(SPACE["slab_mb"]) or t.together < tiles(op, ins, outs, m, 2 * slab_mb).together
        return 2 + t.slabs * launches <= MOST_LAUNCHES and new

    def vectors(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device, *, vector: int) -> bool:
        p = problem(op, ins, outs, tiles(op, ins, outs, SPACE["m"][-1], SPACE["slab_mb"][0]))
        return vector <= max(p.vector_a, p.vector_b, widest(p.n))

    def indices(
        op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device, *, m: int, slab_mb: int, splits: int
    ) -> bool:
        t = tiles(op, ins, outs, m, slab_mb)
        p = problem(op, ins, outs, t)
        matrices = t.area * max((p.m + 256) * (p.n + 256) * splits, (p.k + 256) * (p.n + 256), (p.k + 256) * p.m)
        return matrices < INDEX_LIMIT and in_indices(t, ins[0].shape[-1], outs[0].shape[-1])

    def deep(
        op: Any,
        ins: Sequence[Spec],
        outs: Sequence[Spec],
        device: Device,
        *,
        m: int,
        slab_mb: int,
        bk: int,
        splits: int,
    ) -> bool:
        return splits == 1 or problem(op, ins, outs, tiles(op, ins, outs, m, slab_mb)).k >= 2 * bk * splits

    def whole(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device, **config: Any) -> bool:
        p = problem(op, ins, outs, tiles(op, ins, outs, config["m"], config["slab_mb"]))
        return mma_rules._whole(tile_of(p, config), device)

    return {
        **OF_OP,
        "points for the tile": points,
        "vectors divide channels": vectors,
        "slabs": slabs,
        "32-bit indices": indices,
        "splits have steps": deep,
        _WARPS: mma_rules.rules(lambda op, ins, outs: ())[_WARPS],
        "tiles in shared memory and registers, copies shared out evenly": whole,
    }


# ---- what is good, and what it takes


def moved(device: Device, size_bytes: float, squares: int, n: int, lanes: int) -> float:
    """Time of a grid that transforms."""
    resident = resident_of(n, lanes)
    blocks = blocks_of(squares, THREADS * lanes)
    return costs.seconds(device, flops=0, size_bytes=size_bytes, unit="fp32", blocks=blocks, resident=resident)


def prefer(rules: Rules, cost: Foretell, space: Mapping[str, tuple[Any, ...]] = SPACE) -> Callable[..., Config]:
    """A template's function that finds the config that is foretold to be fastest, in large slabs."""

    @lru_cache(maxsize=512)
    def best(op: Any, ins: tuple[Spec, ...], outs: tuple[Spec, ...], device: Device) -> Config:
        first = {name: values[0] for name, values in space.items()}
        if broken(OF_OP, op, ins, outs, device, first):
            return first
        tried: list[tuple[float, int, Config]] = []
        for m, (bm, bn, wm, wn, resident), splits in every(space["m"], SHAPES, space["splits"]):
            for bk, stages, vector in every((32, 16), (4, 3, 2), space["vector"]):
                config = {**first, "m": m, "vector": vector, "bm": bm, "bn": bn, "bk": bk, "wm": wm, "wn": wn}
                config |= {"stages": stages, "resident": resident, "splits": splits}
                if broken(rules, op, ins, outs, device, config) is None:
                    tried.append((cost(op, ins, outs, device, config), len(tried), config))
                    break
        return min(tried)[-1] if tried else first

    return lambda op, ins, outs, device: best(op, tuple(ins), tuple(outs), device)
