"""Convolution and its input gradient on register tiles.

    y[n, o, k] = sum over t, c of x[n, o*stride + t*dilation - low, c] * w[t, c, k]

The input gradient is the same sum over dy, for each phase of the stride (see `conv_geometry`), with the
filters' taps in reverse order and their last axes exchanged. A tile holds pixels by filters:

            w: `vectors` vectors of filters          for each tap row, for each (tap, channel) of it,
    x  pixel 0   acc ...                             which lie one behind the other in x:
       pixel 1   acc ...                                 acc += x[pixels, tap, channel] * w[tap, channel, filters]
       ...       acc ...

`before` packs the filters, column panel by column panel, [phase][panel][tap][channel][column], and
copies x into zeros where taps leave it; neither is done where it would copy what is there already. A
tile takes pixels of one row, or several short rows. A task is a run of tiles for one panel. With
``overlap`` the input gradient is computed by `conv_overlap` instead.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import accumulate, product
from math import prod
from typing import Any

import numpy as np

from rapydli_flow.spec import Spec
from rapydli_flow.template import Device, Epilogue, Loop, broken, template

from .conv_geometry import Axis, Geometry, Sizes, backward, forward, geometry, padding, something
from .conv_overlap import BUFFER_BYTES, Overlap, overlapping, overlaps
from .tile import balanced, holds, local, natural, outer, step_cost, store, zeros

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


def _tiling(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], config: Mapping[str, Any], slide: Slide) -> Blocking:
    return Blocking.of(_geometry(op, tuple(ins), tuple(outs), slide), outs[0].dtype, config)


def _registers(
    slide: Slide,
    op: Any,
    ins: Sequence[Spec],
    outs: Sequence[Spec],
    device: Device,
    *,
    rows: int,
    vectors: int,
    lanes: int,
) -> bool:
    shape = tile_shape(_geometry(op, tuple(ins), tuple(outs), slide), rows)
    return holds(prod(shape), vectors, lanes, np.dtype(outs[0].dtype).itemsize, device.vector_bytes)


def _columns(
    slide: Slide, op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device, *, vectors: int, lanes: int
) -> bool:
    return (vectors - 1) * lanes < _geometry(op, tuple(ins), tuple(outs), slide).outer


def _tile_once(slide: Slide, op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device, *, rows: int) -> bool:
    """No smaller ``rows`` means the same tile."""
    g = _geometry(op, tuple(ins), tuple(outs), slide)
    return not any(r < rows and tile_shape(g, r) == tile_shape(g, rows) for r in SPACE["rows"])


@lru_cache(maxsize=512)
def _runs(
    op: Any, ins: tuple[Spec, ...], outs: tuple[Spec, ...], slide: Slide, rows: int, vectors: int, lanes: int
) -> dict[tuple[int, int], int]:
    """How many tiles a task has, for each pair of ``tasks`` and ``chunk``."""
    tile = {"rows": rows, "vectors": vectors, "lanes": lanes}
    return {(t, c): _tiling(op, ins, outs, {**tile, "tasks": t, "chunk": c}, slide).run for t, c in RUNS}


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
    "a tile once": partial(_tile_once, forward),
    "no vector without a filter": partial(_columns, forward),
    "tile in registers": partial(_registers, forward),
    "a run once": partial(_run_once, forward),
}


def _workspace_tiles(
    op: Any, ins: Sequence[Spec], outs: Sequence[Spec], config: Mapping[str, Any], slide: Slide
) -> tuple[Spec, ...]:
    b = _tiling(op, ins, outs, config, slide)
    sizes = (b.starts[-1] if b.packs or slide is backward else 1, b.g.padded_size if b.g.pads else 1)
    return tuple(Spec((size,), outs[0].dtype) for size in sizes)


def _tile_cost(b: Blocking, vectors: int) -> float:
    """Half-cycles, about."""
    weights = sum(b.g.weights(p) for p in range(b.g.phases))
    return b.tiles * b.panels * b.g.groups * weights * step_cost(b.lines * b.rows, vectors)


def _workspace(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], **config: Any) -> tuple[Spec, ...]:
    return _workspace_tiles(op, ins, outs, config, forward)


def _prefer(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device) -> dict[str, Any]:
    lanes = device.vector_bytes // np.dtype(outs[0].dtype).itemsize
    first = {"lanes": lanes, **FIRST_RUN}
    configs = [{"rows": r, "vectors": v, **first} for r, v in product(SPACE["rows"], SPACE["vectors"])]
    return min(
        (config for config in configs if broken(RULES, op, ins, outs, device, config) is None),
        key=lambda config: _tile_cost(_tiling(op, ins, outs, config, forward), config["vectors"]),
        default=configs[0],
    )


@template("conv", "cpu", space=SPACE, fits=RULES, workspace=_workspace, prefer=_prefer)
def tiles(
    op: Any,
    ins: Sequence[Spec],
    outs: Sequence[Spec],
    epilogue: Epilogue,
    *,
    rows: int,
    vectors: int,
    lanes: int,
    tasks: int,
    chunk: int,
) -> Loop:
    """Direct convolution: pixels by filters."""
    config = {"rows": rows, "vectors": vectors, "lanes": lanes, "tasks": tasks, "chunk": chunk}
    b = _tiling(op, ins, outs, config, forward)
    return _loop(b, ins[1].shape, epilogue, vectors=vectors, lanes=lanes, reverse=False)


def _overlap(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], config: Mapping[str, Any]) -> Overlap:
    return Overlap.of(op, ins, outs, rows=config["rows"], width=config["vectors"] * config["lanes"])


def _can_overlap(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device, *, overlap: bool) -> bool:
    return not overlap or overlaps(op)


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
    if not overlap:
        return _registers(backward, op, ins, outs, device, rows=rows, vectors=vectors, lanes=lanes)
    used = balanced(_overlap(op, ins, outs, {"rows": rows, "vectors": vectors, "lanes": lanes}).axes[2].y, rows)
    return holds(used, vectors, lanes, np.dtype(outs[0].dtype).itemsize, device.vector_bytes)


def _columns_grad(
    op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device, *, overlap: bool, vectors: int, lanes: int
) -> bool:
    if not overlap:
        return _columns(backward, op, ins, outs, device, vectors=vectors, lanes=lanes)
    return (vectors - 1) * lanes < _overlap(op, ins, outs, {"rows": 1, "vectors": vectors, "lanes": lanes}).length


def _tile_once_grad(
    op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device, *, overlap: bool, rows: int
) -> bool:
    if not overlap:
        return _tile_once(backward, op, ins, outs, device, rows=rows)
    across = _overlap(op, ins, outs, {"rows": rows, "vectors": 1, "lanes": 1}).axes[2].y
    return not any(r < rows and balanced(across, r) == balanced(across, rows) for r in SPACE["rows"])


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
    "no vector without a filter": _columns_grad,
    "tile in registers": _registers_grad,
    "buffer in cache": _buffer,
    "a run once": _run_once_grad,
}


def _workspace_grad(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], **config: Any) -> tuple[Spec, ...]:
    if not config["overlap"]:
        return _workspace_tiles(op, ins, outs, config, backward)
    size = _overlap(op, ins, outs, config).packed_size
    return Spec((size,), outs[0].dtype), Spec((1,), outs[0].dtype)


def _prefer_grad(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device) -> dict[str, Any]:
    lanes = device.vector_bytes // np.dtype(outs[0].dtype).itemsize
    configs = [
        {"rows": rows, "vectors": vectors, "lanes": lanes, **FIRST_RUN, "overlap": overlap}
        for overlap, rows, vectors in product(GRAD_SPACE["overlap"], SPACE["rows"], SPACE["vectors"])
    ]

    def cost(config: dict[str, Any]) -> float:
        if not config["overlap"]:
            return _tile_cost(_tiling(op, ins, outs, config, backward), config["vectors"])
        g = _overlap(op, ins, outs, config)
        # each pixel of dy is added to a row of dx, after each row of taps it stands for
        adding = 0.5 * outs[0].size * g.axes[2].window / lanes
        return g.multiplies * step_cost(g.rows, config["vectors"]) + adding

    fitting = (config for config in configs if broken(GRAD_RULES, op, ins, outs, device, config) is None)
    return min(fitting, key=cost, default=configs[0])


@template("conv_input_grad", "cpu", space=GRAD_SPACE, fits=GRAD_RULES, workspace=_workspace_grad, prefer=_prefer_grad)
def reversed_tiles(
    op: Any,
    ins: Sequence[Spec],
    outs: Sequence[Spec],
    epilogue: Epilogue,
    *,
    rows: int,
    vectors: int,
    lanes: int,
    tasks: int,
    chunk: int,
    overlap: bool,
) -> Loop:
    """The convolution of dy with reversed filters, phase by phase; or overlapping rows (`conv_overlap`)."""
    if overlap:
        rows_of_dx = Overlap.of(op, ins, outs, rows=rows, width=vectors * lanes)
        return overlapping(rows_of_dx, epilogue, vectors=vectors, lanes=lanes, tasks=tasks)
    config = {"rows": rows, "vectors": vectors, "lanes": lanes, "tasks": tasks, "chunk": chunk}
    b = _tiling(op, ins, outs, config, backward)
    return _loop(b, ins[1].shape, epilogue, vectors=vectors, lanes=lanes, reverse=True)


def _packing(b: Blocking, w: Sequence[int]) -> Callable[..., None]:
    """Copies the filters of one panel to where tiles read them."""
    width, panels, columns = b.width, b.panels, min(b.g.outer, b.width)
    last, outer_channels, filters_each = b.g.outer - columns, b.g.outer, w[-1]
    length = b.g.weights(0)
    size = length * width

    def pack(task, w, filters):  # type: ignore[no-untyped-def]
        k, into = natural(task // panels * outer_channels + min(task % panels * width, last)), natural(task * size)
        for i in range(length):
            for j in range(width):
                filters[into + i * width + j] = w[i * filters_each + k + j] if j < columns else 0

    return pack


def _reverse_packing(b: Blocking, w: Sequence[int]) -> Callable[..., None]:
    """Copies the filters of one phase and panel, taps in reverse order, channels and filters exchanged."""
    d, h, width_axis = b.g.axes
    w_h, w_w = (1, 1, *w[:-2])[-2:]
    phases_h, phases_w = h.phases, width_axis.phases
    taps_d, taps_h, taps_w = d.taps, h.taps, width_axis.taps
    stride_d, stride_h, stride_w = d.phases, h.phases, width_axis.phases
    hole_d, hole_h, hole_w = d.hole, h.hole, width_axis.hole
    starts, width, inner, panels = b.starts, b.width, b.g.inner, b.panels
    columns = min(b.g.outer, width)
    last, everything, filters_each, tap_size = b.g.outer - columns, b.g.groups * panels, w[-1], w[-2] * w[-1]

    def tap_of(t, taps, stride, phase, hole):  # type: ignore[no-untyped-def]
        dense = phase + stride * (taps - 1 - t)
        return dense // hole if dense % hole == 0 else -1

    def pack(task, w, filters):  # type: ignore[no-untyped-def]
        phase, panel = task // everything, task % everything
        p_d, p_h, p_w = phase // (phases_h * phases_w), phase // phases_w % phases_h, phase % phases_w
        n_d, n_h, n_w = taps_d[p_d], taps_h[p_h], taps_w[p_w]
        into = starts[phase] + panel * n_d * n_h * n_w * inner * width
        column = panel // panels * inner + min(panel % panels * width, last) * filters_each
        for tap in range(n_d * n_h * n_w):
            q = tap_of(tap // (n_h * n_w), n_d, stride_d, p_d, hole_d)
            r = tap_of(tap // n_w % n_h, n_h, stride_h, p_h, hole_h)
            s = tap_of(tap % n_w, n_w, stride_w, p_w, hole_w)
            exists = q >= 0 and r >= 0 and s >= 0
            origin = ((q * w_h + r) * w_w + s) * tap_size + column if exists else 0
            into_tap = natural(into + tap * inner * width)
            for j in range(width):
                line = natural(origin + j * filters_each)
                for i in range(inner):
                    value = w[line + i] if exists and j < columns else 0
                    filters[into_tap + i * width + j] = value

    return pack


def _loop(b: Blocking, w: Sequence[int], epilogue: Epilogue, *, vectors: int, lanes: int, reverse: bool) -> Loop:
    g, (d, h, w_axis) = b.g, b.g.axes
    packs, pads = b.packs or reverse, g.pads
    pack = _reverse_packing(b, w) if reverse else _packing(b, w)
    pad, pad_tasks = padding(g)
    everything = g.groups * b.panels
    pack_tasks = everything * g.phases if packs else 0
    before_tasks = pack_tasks + pad_tasks

    sums_size = b.lines * b.rows * b.width
    lines, rows, width, run, total = b.lines, b.rows, b.width, b.run, b.tiles
    grid_d, grid_h, grid_w = b.grid
    grid_plane = grid_h * grid_w
    panels, columns = b.panels, min(g.outer, b.width)
    last, even = g.outer - columns, b.panels * columns == g.outer
    runs = -(-total // run)
    inner, outer_channels = g.inner, g.outer
    # distances in the padded source
    channels = g.inner * g.groups
    line_d, line_h = h.padded * w_axis.padded * channels, w_axis.padded * channels
    step_d, step_h, step_w = d.step * line_d, h.step * line_h, w_axis.step * channels
    spread_d, spread_h, spread_w = d.spread * line_d, h.spread * line_h, w_axis.spread * channels
    record = d.padded * line_d
    # distances in the result
    into_w = w_axis.into_step * g.outer * g.groups
    into_h, into_d = (w_axis.out * g.outer * g.groups * step for step in (h.into_step, h.out * d.into_step))
    result_record = d.out * h.out * w_axis.out * g.outer * g.groups
    # a whole row of taps at once, or tap by tap
    contiguous = g.contiguous
    # by phase: taps and outputs along each axis, where the first output reads and where it lies
    each = [(d, h, w_axis, g.phase(p)) for p in range(g.phases)]
    taps_d, taps_h, taps_w = (tuple(a[axis].taps[a[3][axis]] for a in each) for axis in range(3))
    count_d, count_h, count_w = (tuple(a[axis].count[a[3][axis]] for a in each) for axis in range(3))
    reads = tuple(d.first[i] * line_d + h.first[j] * line_h + w_axis.first[k] * channels for *_, (i, j, k) in each)
    writes = tuple(
        ((d.into[i] * h.out + h.into[j]) * w_axis.out + w_axis.into[k]) * g.outer * g.groups for *_, (i, j, k) in each
    )
    starts, firsts = b.starts, tuple(h.first[j] for *_, (_, j, _) in each)
    single = g.phases == 1
    # along the second axis: where x lies in the padded source, how far a tile goes
    low_h, size_h, step, spread, reach = h.low, h.size, h.step, h.spread, (b.lines - 1) * h.step
    taps_d_0, taps_h_0, taps_w_0, count_d_0, count_h_0, count_w_0, reads_0, writes_0, first_0 = (
        table[0] for table in (taps_d, taps_h, taps_w, count_d, count_h, count_w, reads, writes, firsts)
    )

    def before(task, x, w, y, filters, padded, extras, at):  # type: ignore[no-untyped-def]
        if packs and pads:
            if task < pack_tasks:
                pack(task, w, filters)
            else:
                pad(task - pack_tasks, x, padded)
        elif packs:
            pack(task, w, filters)
        else:
            pad(task, x, padded)

    def slide(x, start, top, w, weights, n_d, n_h, n_w, sums):  # type: ignore[no-untyped-def]
        acc = zeros(lines, rows, vectors, lanes, sums)
        parts, count = (1, n_w * inner) if contiguous else (n_w, inner)
        # rows of taps that see nothing but zeros are left out
        lowest = max(0, -((top + reach - low_h) // spread))
        highest = min(n_h, (low_h + size_h - 1 - top) // spread + 1)
        for q in range(n_d):
            for r in range(lowest, highest):
                at_w = weights + (q * n_h + r) * n_w * inner * width
                for s in range(parts):
                    origin = start + q * spread_d + r * spread_h + s * spread_w
                    for i in range(count):
                        acc = outer(acc, x, origin + i, step_w, step_h, w, at_w, 0)
                        at_w += width
        store(acc, sums, 0, width, 0)

    def body(task, x, w, y, filters, padded, extras, at):  # type: ignore[no-untyped-def]
        sums = local(sums_size, y)
        panel, begin, phase = task % everything, task // everything % runs * run, task // (everything * runs)
        if single:
            n_d, n_h, n_w, c_d, c_h, c_w = taps_d_0, taps_h_0, taps_w_0, count_d_0, count_h_0, count_w_0
            read, write, weights, first = reads_0, writes_0, 0, first_0
        else:
            n_d, n_h, n_w = taps_d[phase], taps_h[phase], taps_w[phase]
            c_d, c_h, c_w = count_d[phase], count_h[phase], count_w[phase]
            read, write, weights, first = reads[phase], writes[phase], starts[phase], firsts[phase]
        weights += panel * n_d * n_h * n_w * inner * width
        column = min(panel % panels * width, last)
        skip = 0 if even else natural(panel % panels * width - column)
        k = natural(panel // panels * outer_channels + column)
        read += panel // panels * inner
        source = padded if pads else x
        for tile in range(begin, min(begin + run, total)):
            n, z = tile // (grid_plane * grid_d), tile // grid_plane % grid_d
            top, left = tile // grid_w % grid_h * lines, tile % grid_w * rows
            if z >= c_d or top >= c_h or left >= c_w:
                continue
            o_h, o_w = min(top, c_h - lines), min(left, c_w - rows)
            start = read + n * record + z * step_d + o_h * step_h + o_w * step_w
            slide(source, start, first + o_h * step, filters if packs else w, weights, n_d, n_h, n_w, sums)
            corner = write + n * result_record + z * into_d + o_h * into_h + o_w * into_w + k
            for line in range(top - o_h, lines):
                for i in range(left - o_w, rows):
                    o, s = natural(corner + line * into_h + i * into_w), natural((line * rows + i) * width)
                    for j in range(skip, columns):
                        y[o + j] = epilogue(sums[s + j], extras, o + j, k + j, at)

    tasks = everything * runs * g.phases
    return Loop(body, tasks, before=before if before_tasks else None, before_tasks=before_tasks)
