"""How a convolution and its input gradient are cut into register tiles, and which cuts there are to choose from.

Both slide filters over a source, see `conv_geometry`; the input gradient may also add up rows that overlap, see
`conv_overlap`. Rules leave out what does not fit the processor, and every tile and run of tiles but its first name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import accumulate, product
from typing import Any

import numpy as np

from rapydli_flow.spec import Spec
from rapydli_flow.template import Device, broken

from .conv_geometry import Axis, Geometry, Sizes, backward, forward, geometry, something
from .conv_overlap import BUFFER_BYTES, Overlap, overlaps
from .tile import balanced, step_cost
from .tile_rules import tile_rules

SPACE: dict[str, tuple[Any, ...]] = {
    "rows": (14, 12, 10, 8, 7, 6, 5, 4),
    "vectors": (2, 1, 3, 4),
    "lanes": (16, 8, 4, 2),
    "tasks": (64, 16, 256, 1024),  # at least, if there are tiles: enough to share out evenly among the cores of a rank
    "chunk": (256, 64, 1024),  # KiB of the source that a task reads: they stay in a cache from panel to panel
}
FIRST_RUN = {"tasks": SPACE["tasks"][0], "chunk": SPACE["chunk"][0]}
RUNS = [*product(SPACE["tasks"], SPACE["chunk"])]
GRAD_SPACE: dict[str, tuple[Any, ...]] = {**SPACE, "overlap": (False, True)}
Slide = Callable[[Sizes], Axis]


def tile_shape(g: Geometry, rows: int) -> tuple[int, int]:
    """Lines of pixels, and pixels of each, for a tile of at most ``rows`` pixels."""
    _, h, w = g.axes
    if w.fewest >= rows:
        return 1, balanced(w.fewest, rows)
    return balanced(h.fewest, rows // w.fewest), w.fewest


@dataclass(frozen=True)
class Blocking:
    """How the result is cut into tiles, tiles into tasks."""

    g: Geometry
    lines: int
    rows: int
    width: int
    tasks: int
    chunk: int
    itemsize: int

    @classmethod
    def of(cls, g: Geometry, dtype: str, config: Mapping[str, Any]) -> Blocking:
        width, itemsize = config["vectors"] * config["lanes"], np.dtype(dtype).itemsize
        return cls(g, *tile_shape(g, config["rows"]), width, config["tasks"], config["chunk"], itemsize)

    @property
    def panels(self) -> int:
        """Panels of a group."""
        return -(-self.g.outer // self.width)

    @property
    def grid(self) -> tuple[int, int, int]:
        """Tiles along the three axes, in the phase that has most."""
        d, h, w = self.g.axes
        return max(d.count), -(-max(h.count) // self.lines), -(-max(w.count) // self.rows)

    @property
    def tiles(self) -> int:
        return self.g.n * self.grid[0] * self.grid[1] * self.grid[2]

    @property
    def run(self) -> int:
        """Tiles of a task."""
        columns = self.panels * self.g.groups * self.g.phases
        pixel_bytes = self.g.inner * self.g.groups * self.itemsize * self.g.axes[1].step * self.g.axes[2].step
        fitting = (self.chunk << 10) // max(1, self.lines * self.rows * pixel_bytes)
        return max(1, min(self.tiles * columns // self.tasks, fitting, self.tiles))

    @property
    def starts(self) -> tuple[int, ...]:
        """Where the packed filters of each phase begin, and their whole size."""
        each = self.panels * self.g.groups * self.width
        return (0, *accumulate(self.g.weights(p) * each for p in range(self.g.phases)))

    @property
    def packs(self) -> bool:
        """Do the packed filters differ from the given ones? Never for the input gradient's."""
        return self.g.groups > 1 or self.panels > 1 or self.width != self.g.outer


@lru_cache(maxsize=512)  # rules ask again and again
def _geometry(op: Any, ins: tuple[Spec, ...], outs: tuple[Spec, ...], slide: Slide) -> Geometry:
    return geometry(op, ins, outs, slide=slide).flat()


def tiling(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], config: Mapping[str, Any], slide: Slide) -> Blocking:
    return Blocking.of(_geometry(op, tuple(ins), tuple(outs), slide), outs[0].dtype, config)


def _shape(slide: Slide, op: Any, ins: Sequence[Spec], outs: Sequence[Spec], rows: int) -> tuple[int, ...]:
    return tile_shape(_geometry(op, tuple(ins), tuple(outs), slide), rows)


def _columns(slide: Slide, op: Any, ins: Sequence[Spec], outs: Sequence[Spec]) -> int:
    return _geometry(op, tuple(ins), tuple(outs), slide).outer


@lru_cache(maxsize=512)
def _runs(
    op: Any, ins: tuple[Spec, ...], outs: tuple[Spec, ...], slide: Slide, rows: int, vectors: int, lanes: int
) -> dict[tuple[int, int], int]:
    """How many tiles a task has, for each pair of ``tasks`` and ``chunk``."""
    tile = {"rows": rows, "vectors": vectors, "lanes": lanes}
    return {(t, c): tiling(op, ins, outs, {**tile, "tasks": t, "chunk": c}, slide).run for t, c in RUNS}


def _run_once(
    slide: Slide,
    op: Any,
    ins: Sequence[Spec],
    outs: Sequence[Spec],
    device: Device,
    *,
    rows: int,
    vectors: int,
    lanes: int,
    tasks: int,
    chunk: int,
) -> bool:
    """No earlier pair of ``tasks`` and ``chunk`` means the same run of tiles."""
    if (tasks, chunk) == RUNS[0]:
        return True
    runs = _runs(op, tuple(ins), tuple(outs), slide, rows, vectors, lanes)
    return all(runs[earlier] != runs[tasks, chunk] for earlier in RUNS[: RUNS.index((tasks, chunk))])


RULES = {
    "something to compute": something,
    **tile_rules(partial(_shape, forward), partial(_columns, forward), SPACE["rows"]),
    "a run once": partial(_run_once, forward),
}


def _workspace_tiles(
    op: Any, ins: Sequence[Spec], outs: Sequence[Spec], config: Mapping[str, Any], slide: Slide
) -> tuple[Spec, ...]:
    b = tiling(op, ins, outs, config, slide)
    sizes = (b.starts[-1] if b.packs or slide is backward else 1, b.g.padded_size if b.g.pads else 1)
    return tuple(Spec((size,), outs[0].dtype) for size in sizes)


def _tile_cost(b: Blocking, vectors: int) -> float:
    """Half-cycles, about."""
    weights = sum(b.g.weights(p) for p in range(b.g.phases))
    return b.tiles * b.panels * b.g.groups * weights * step_cost(b.lines * b.rows, vectors)


def workspace(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], **config: Any) -> tuple[Spec, ...]:
    return _workspace_tiles(op, ins, outs, config, forward)


def cost(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device, config: Mapping[str, Any]) -> float:
    """Half-cycles of all cores, about."""
    return _tile_cost(tiling(op, ins, outs, config, forward), config["vectors"])


def prefer(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device) -> dict[str, Any]:
    lanes = device.vector_bytes // np.dtype(outs[0].dtype).itemsize
    first = {"lanes": lanes, **FIRST_RUN}
    configs = [{"rows": r, "vectors": v, **first} for r, v in product(SPACE["rows"], SPACE["vectors"])]
    return min(
        (config for config in configs if broken(RULES, op, ins, outs, device, config) is None),
        key=lambda config: cost(op, ins, outs, device, config),
        default=configs[0],
    )


def _overlap(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], config: Mapping[str, Any]) -> Overlap:
    return Overlap.of(op, ins, outs, rows=config["rows"], width=config["vectors"] * config["lanes"])


def _can_overlap(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device, *, overlap: bool) -> bool:
    return not overlap or overlaps(op)


def _overlap_shape(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], rows: int) -> tuple[int, ...]:
    return (balanced(Overlap.of(op, ins, outs, rows=rows, width=1).axes[2].y, rows),)


def _overlap_columns(op: Any, ins: Sequence[Spec], outs: Sequence[Spec]) -> int:
    return Overlap.of(op, ins, outs, rows=1, width=1).length


SLIDING = tile_rules(partial(_shape, backward), partial(_columns, backward), SPACE["rows"])
OVERLAPPING = tile_rules(_overlap_shape, _overlap_columns, SPACE["rows"])


def _tile_once_grad(
    op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device, *, overlap: bool, rows: int
) -> bool:
    return (OVERLAPPING if overlap else SLIDING)["a tile once"](op, ins, outs, device, rows=rows)


def _filled_grad(
    op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device, *, overlap: bool, vectors: int, lanes: int
) -> bool:
    return (OVERLAPPING if overlap else SLIDING)["no empty vector"](op, ins, outs, device, vectors=vectors, lanes=lanes)


def _registers_grad(
    op: Any,
    ins: Sequence[Spec],
    outs: Sequence[Spec],
    device: Device,
    *,
    overlap: bool,
    rows: int,
    vectors: int,
    lanes: int,
) -> bool:
    rule = (OVERLAPPING if overlap else SLIDING)["tile in registers"]
    return rule(op, ins, outs, device, rows=rows, vectors=vectors, lanes=lanes)


def _buffer(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device, **config: Any) -> bool:
    itemsize = np.dtype(outs[0].dtype).itemsize
    return not config["overlap"] or _overlap(op, ins, outs, config).buffer_size * itemsize <= BUFFER_BYTES


def _run_once_grad(
    op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device, *, overlap: bool, **config: Any
) -> bool:
    if not overlap:
        return _run_once(backward, op, ins, outs, device, **config)
    g, tasks = _overlap(op, ins, outs, config), SPACE["tasks"]
    earlier = tasks[: tasks.index(config["tasks"])]
    return config["chunk"] == SPACE["chunk"][0] and all(g.run(t) != g.run(config["tasks"]) for t in earlier)


GRAD_RULES = {
    "something to compute": something,
    "filters overlap": _can_overlap,
    "a tile once": _tile_once_grad,
    "no empty vector": _filled_grad,
    "tile in registers": _registers_grad,
    "buffer in cache": _buffer,
    "a run once": _run_once_grad,
}


def workspace_grad(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], **config: Any) -> tuple[Spec, ...]:
    if not config["overlap"]:
        return _workspace_tiles(op, ins, outs, config, backward)
    size = _overlap(op, ins, outs, config).packed_size
    return Spec((size,), outs[0].dtype), Spec((1,), outs[0].dtype)


def cost_grad(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device, config: Mapping[str, Any]) -> float:
    """Half-cycles of all cores, about."""
    if not config["overlap"]:
        return _tile_cost(tiling(op, ins, outs, config, backward), config["vectors"])
    g = _overlap(op, ins, outs, config)
    # each pixel of dy is added to a row of dx, after each row of taps it stands for
    adding = 0.5 * outs[0].size * g.axes[2].window / config["lanes"]
    return g.multiplies * step_cost(g.rows, config["vectors"]) + adding


def prefer_grad(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device) -> dict[str, Any]:
    lanes = device.vector_bytes // np.dtype(outs[0].dtype).itemsize
    configs = [
        {"rows": rows, "vectors": vectors, "lanes": lanes, **FIRST_RUN, "overlap": overlap}
        for overlap, rows, vectors in product(GRAD_SPACE["overlap"], SPACE["rows"], SPACE["vectors"])
    ]
    fitting = (config for config in configs if broken(GRAD_RULES, op, ins, outs, device, config) is None)
    return min(fitting, key=lambda config: cost_grad(op, ins, outs, device, config), default=configs[0])
