"""The largest or smallest element over any axes, its gradient, and where it is; see `rows` and `slabs`.

A NaN wins over all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from rapydli_flow.spec import Spec
from rapydli_flow.template import Config, Device, Epilogue, template

from . import row_program, rows, slab_program, slabs
from .access import affine
from .cost import COPY_BYTES_S, LAUNCH_S
from .formulas import Formula, lanewise
from .grid import INDEX_LIMIT, Grid, blocks_of
from .ptx import cuda, load
from .tail import tail
from .warp import FIRST_LARGEST, FIRST_SMALLEST, LARGEST, SMALLEST, start, sums


def _axes(op: Any, x: Spec) -> Sequence[int]:
    return tuple(op.axes)


def _absorb(op: Any) -> Formula:
    sign = "<=" if op.least else ">="
    return Formula((f"(a0 if (a0 {sign} x0) | (a0 != a0) else x0)",))


def _first(op: Any) -> Formula:
    sign = "<" if op.least else ">"
    better = f"(x0 {sign} a0) | ((x0 != x0) & (a0 == a0))"
    alike = "((x0 == a0) | ((x0 != x0) & (a0 != a0))) & (j < a1)"
    lines = (f"wins = {better} | ({alike})",)
    return Formula(("(x0 if wins else a0)", "(j if wins else a1)"), dtypes=("float32", "int32"), lines=lines)


def _slabs(op: Any, ins: Sequence[Spec], outs: Sequence[Spec]) -> slab_program.Program:
    return slab_program.Program((0,), SMALLEST if op.least else LARGEST, _absorb(op), Formula(("a0",)))


def _rows(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], held: bool) -> row_program.Program:
    merge = SMALLEST if op.least else LARGEST
    phase = row_program.Phase(merge, _absorb(op), Formula(("a0",)), ("best",))
    return row_program.Program((0,), (phase,), Formula(("best",)), whole=False)


def _shares(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], held: bool) -> row_program.Program:
    merge = SMALLEST if op.least else LARGEST
    best = row_program.Phase(merge, _absorb(op), Formula(("a0",)), ("best",))
    count = Formula(("a0 + (T(1.0) if x0 == best else T(0.0))",))
    share = Formula(("e0 / (a0 if a0 >= T(1.0) else T(1.0))",))
    ties = row_program.Phase(sums(1), count, share, ("share",))
    return row_program.Program(
        (1,), (best, ties), Formula(("(share if x0 == best else T(0.0))",)), whole=True, each=(0,)
    )


def _places(op: Any, ins: Sequence[Spec], outs: Sequence[Spec]) -> slab_program.Program:
    out = Formula(("a1",), dtypes=("int64",))
    return slab_program.Program(
        (0,), FIRST_SMALLEST if op.least else FIRST_LARGEST, replace(_first(op), together=True), out
    )


def _row_places(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], held: bool) -> row_program.Program:
    merge = FIRST_SMALLEST if op.least else FIRST_LARGEST
    phase = row_program.Phase(merge, _first(op), Formula(("a1",), dtypes=("int32",)), ("where",))
    return row_program.Program((0,), (phase,), Formula(("where",), dtypes=("int64",)), whole=False)


slabs.serve("extreme", _slabs, _axes)
rows.serve("extreme", _rows, rows.trailing(_axes), rows.contiguous(_axes))
slabs.serve("arg_extreme", _places, _axes)
rows.serve("arg_extreme", _row_places, rows.trailing(_axes), rows.contiguous(_axes))
rows.serve("extreme_grad", _shares, rows.trailing(_axes, 1), rows.contiguous(_axes, 1))


def _floats(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device) -> bool:
    return all(0 < s.size < INDEX_LIMIT - slabs.SLACK and s.dtype in slabs.FLOATS for s in (*ins, *outs))


def _cost(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device, config: Config) -> float:
    cores = device.cores if device.cores > 1 else 132
    busy = min(1.0, ins[0].size / (cores * 1024))
    return LAUNCH_S + 3 * ins[1].size_bytes / (COPY_BYTES_S * cores * busy)


@template("extreme_grad", "cuda", space={"threads": (128, 64, 256)}, fits=_floats, cost=_cost)
def of_columns(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], epilogue: Epilogue, *, threads: int) -> Grid:
    """Any axes: a thread has a kept element, and passes what is reduced to it three times."""
    p, layout = _shares(op, ins, outs, True), slab_program.Layout.of(ins[1].shape, op.axes)
    sizes, steps = zip(*layout.reduced, (layout.rows, layout.inner), strict=True)
    kept_sizes, kept_steps = zip(*layout.kept, (layout.inner, 1), strict=True)
    locate, base_of = affine(sizes, steps), affine(kept_sizes, kept_steps)
    count, kept = layout.rows * layout.repeats, layout.outer * layout.inner
    best, ties = p.phases
    begin_best, begin_ties = start(best.merge, 1), start(ties.merge, 1)
    compare = lanewise(best.absorb, 1, 1, 1)
    tie = lanewise(replace(ties.absorb, row=("best",)), 1, 1, 1)
    share = lanewise(replace(ties.found, row=("e0",)), 1, 0, 1)
    result = lanewise(replace(p.out, row=("best", "share")), 0, 1, 1)
    read, of_x, end = load(ins[0].dtype, 1), load(ins[1].dtype, 1), tail(epilogue, 1)
    channels = outs[0].shape[-1] if outs[0].shape else 1

    def kernel(ins: Any, outs: Any, work: Any, extras: Any, at: Any) -> None:
        element = cuda.blockIdx.x * threads + cuda.threadIdx.x
        active = element < kept
        base = base_of(element)
        state = begin_best()
        for r in range(count):
            state = compare(state, (of_x(active, ins[1], base + locate(r)),), (), 0)
        same = begin_ties()
        for r in range(count):
            same = tie(same, (of_x(active, ins[1], base + locate(r)),), (state[0][0],), 0)
        each = share(same, (), (read(active, ins[0], element)[0],), 0)
        for r in range(count):
            place = base + locate(r)
            found = result((), (of_x(active, ins[1], place),), (state[0][0], each[0][0]), 0)
            end.finish(active, outs[0], found[0], place, place % channels, extras, at)

    return Grid(kernel, blocks_of(kept, threads), threads)
