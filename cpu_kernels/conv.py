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

from collections.abc import Callable, Sequence
from typing import Any

from rapydli_flow.spec import Spec
from rapydli_flow.template import Epilogue, Loop, template

from .buffer import local
from .conv_geometry import backward, forward, padding
from .conv_overlap import Overlap, overlapping
from .conv_tiling import (
    GRAD_RULES,
    GRAD_SPACE,
    RULES,
    SPACE,
    Blocking,
    cost,
    cost_grad,
    prefer,
    prefer_grad,
    tiling,
    workspace,
    workspace_grad,
)
from .tile import load, outer, store, transpose, zeros


@template("conv", "cpu", space=SPACE, fits=RULES, workspace=workspace, prefer=prefer, cost=cost, joins=True)
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
    b = tiling(op, ins, outs, config, forward)
    return _loop(b, ins[1].shape, epilogue, vectors=vectors, lanes=lanes, reverse=False)


@template(
    "conv_input_grad",
    "cpu",
    space=GRAD_SPACE,
    fits=GRAD_RULES,
    workspace=workspace_grad,
    prefer=prefer_grad,
    cost=cost_grad,
)
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
    b = tiling(op, ins, outs, config, backward)
    return _loop(b, ins[1].shape, epilogue, vectors=vectors, lanes=lanes, reverse=True)


def _packing(b: Blocking, w: Sequence[int]) -> Callable[..., None]:
    """Copies the filters of one panel to where tiles read them."""
    width, panels, columns = b.width, b.panels, min(b.g.outer, b.width)
    last, outer_channels, filters_each = b.g.outer - columns, b.g.outer, w[-1]
    length = b.g.weights(0)
    size = length * width

    def pack(task, w, filters):  # type: ignore[no-untyped-def]
        k, into = task // panels * outer_channels + min(task % panels * width, last), task * size
        for i in range(length):
            for j in range(width):
                filters[into + i * width + j] = w[i * filters_each + k + j] if j < columns else 0

    return pack


def _reverse_packing(b: Blocking, w: Sequence[int], lanes: int) -> Callable[..., None]:
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
    squares, whole, panel_tap = columns // lanes * lanes, inner - inner % lanes, inner * width

    def tap_of(t, taps, stride, phase, hole):  # type: ignore[no-untyped-def]
        dense = phase + stride * (taps - 1 - t)
        return dense // hole if dense % hole == 0 else -1

    def exchange(w, origin, filters, into):  # type: ignore[no-untyped-def]
        for v in range(0, squares, lanes):
            for i in range(0, whole, lanes):
                square = load(zeros(1, lanes, 1, lanes, w), w, origin + v * filters_each + i, filters_each, 0)
                store(transpose(square), filters, into + i * width + v, width, 0)
            for i in range(whole, inner):
                for j in range(lanes):
                    filters[into + i * width + v + j] = w[origin + (v + j) * filters_each + i]
        for i in range(inner):
            for j in range(squares, width):
                filters[into + i * width + j] = w[origin + j * filters_each + i] if j < columns else 0

    def pack(task, w, filters):  # type: ignore[no-untyped-def]
        phase, panel = task // everything, task % everything
        p_d, p_h, p_w = phase // (phases_h * phases_w), phase // phases_w % phases_h, phase % phases_w
        n_d, n_h, n_w = taps_d[p_d], taps_h[p_h], taps_w[p_w]
        into = starts[phase] + panel * n_d * n_h * n_w * panel_tap
        column = panel // panels * inner + min(panel % panels * width, last) * filters_each
        for tap in range(n_d * n_h * n_w):
            q = tap_of(tap // (n_h * n_w), n_d, stride_d, p_d, hole_d)
            r = tap_of(tap // n_w % n_h, n_h, stride_h, p_h, hole_h)
            s = tap_of(tap % n_w, n_w, stride_w, p_w, hole_w)
            if q >= 0 and r >= 0 and s >= 0:
                exchange(w, ((q * w_h + r) * w_w + s) * tap_size + column, filters, into + tap * panel_tap)
            else:
                for i in range(panel_tap):
                    filters[into + tap * panel_tap + i] = 0

    return pack


def _loop(b: Blocking, w: Sequence[int], epilogue: Epilogue, *, vectors: int, lanes: int, reverse: bool) -> Loop:
    g, (d, h, w_axis) = b.g, b.g.axes
    packs, pads = b.packs or reverse, g.pads
    pack = _reverse_packing(b, w, lanes) if reverse else _packing(b, w)
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
    plain = epilogue.identity and b.lines == 1 and panels * width == g.outer
    runs = -(-total // run)
    inner, outer_channels = g.inner, g.outer
    # distances in the padded source
    channels = g.inner * g.groups
    line_d, line_h = h.padded * w_axis.padded * channels, w_axis.padded * channels
    step_d, step_h, step_w = d.step * line_d, h.step * line_h, w_axis.step * channels
    spread_d, spread_h, spread_w = d.spread * line_d, h.spread * line_h, w_axis.spread * channels
    record = d.padded * line_d
    # distances in the result, in pixels; what a pixel has, and where it lies in memory
    into_w = w_axis.into_step
    into_h, into_d = w_axis.out * h.into_step, w_axis.out * h.out * d.into_step
    result_record = d.out * h.out * w_axis.out
    filters_each = g.outer * g.groups
    first_column, row_size = epilogue.rows
    # a whole row of taps at once, or tap by tap
    contiguous = g.contiguous
    # by phase: taps and outputs along each axis, where the first output reads and where it lies
    each = [(d, h, w_axis, g.phase(p)) for p in range(g.phases)]
    taps_d, taps_h, taps_w = (tuple(a[axis].taps[a[3][axis]] for a in each) for axis in range(3))
    count_d, count_h, count_w = (tuple(a[axis].count[a[3][axis]] for a in each) for axis in range(3))
    reads = tuple(d.first[i] * line_d + h.first[j] * line_h + w_axis.first[k] * channels for *_, (i, j, k) in each)
    writes = tuple((d.into[i] * h.out + h.into[j]) * w_axis.out + w_axis.into[k] for *_, (i, j, k) in each)
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

    def slide(x, start, top, w, weights, n_d, n_h, n_w, sums, into, into_row):  # type: ignore[no-untyped-def]
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
        store(acc, sums, into, into_row, 0)

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
        skip = 0 if even else panel % panels * width - column
        k = panel // panels * outer_channels + column
        read += panel // panels * inner
        source = padded if pads else x
        for tile in range(begin, min(begin + run, total)):
            n, z = tile // (grid_plane * grid_d), tile // grid_plane % grid_d
            top, left = tile // grid_w % grid_h * lines, tile % grid_w * rows
            if z >= c_d or top >= c_h or left >= c_w:
                continue
            o_h, o_w = min(top, c_h - lines), min(left, c_w - rows)
            start = read + n * record + z * step_d + o_h * step_h + o_w * step_w
            corner = write + n * result_record + z * into_d + o_h * into_h + o_w * into_w
            # written at once, what pieces share twice; or into sums, and through the epilogue
            target, into, into_row = sums, 0, width
            if plain:
                target, into, into_row = y, corner * row_size + first_column + k, into_w * row_size
            weights_of, from_h = filters if packs else w, first + o_h * step
            slide(source, start, from_h, weights_of, weights, n_d, n_h, n_w, target, into, into_row)
            if plain:
                continue
            for line in range(top - o_h, lines):
                for i in range(left - o_w, rows):
                    pixel, s = corner + line * into_h + i * into_w, (line * rows + i) * width
                    o, into = pixel * filters_each + k, pixel * row_size + first_column + k
                    for j in range(skip, columns):
                        y[into + j] = epilogue(sums[s + j], extras, o + j, k + j, at)

    tasks = everything * runs * g.phases
    return Loop(body, tasks, before=before if before_tasks else None, before_tasks=before_tasks)
