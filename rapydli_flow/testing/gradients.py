"""Gradients against central differences, and the operands that show a wrong one.

A gradient is first tried along random directions u: the slope of ``<dy, f(x + t u)>`` at t = 0 must be
``<vjp(dy), u>``. Where it is not, single elements are moved to find the worst one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..errors import NotDifferentiable
from ..ops import Op, Sample, spec_of
from ..spec import Array
from .report import fail, seeded, shown

STEPS = (1e-5, 2.5e-6)  # where two steps give different slopes lies a kink: nothing is told about it
TOLERANCE = 1e-6
ELEMENTS = 256  # at most, of which a wrong gradient is looked at one by one


def check_vjp(sample: Sample, *, directions: int = 3) -> None:
    """`vjp` against central differences of ``<dy, f(x)>`` along random directions, one input at a time.

    An op may answer None for a floating input that is not trained. Outputs named in ``no_gradient``
    get a zero cotangent.
    """
    op, rng = sample.op, seeded(sample, "vjp")
    floating = [spec.floating for spec in sample.ins]
    if type(op).vjp is Op.vjp:
        ins = sample.draw(rng, "float64")
        try:
            op.vjp(None, None, *ins)
        except NotDifferentiable as error:
            if op.name not in str(error):
                raise AssertionError(f"{op}: the message {str(error)!r} does not name the op") from None
        return
    found = _pull(sample, rng)[2]
    if any(floating) and all(g is None for g in found) and not set(op.outputs) <= set(op.no_gradient):
        fail(sample, "vjp gives None for every input")
    for i in (i for i, is_floating in enumerate(floating) if is_floating):
        for _ in range(directions):
            for _attempt in range(10):
                ins, dys, found = _pull(sample, rng)
                if found[i] is None:
                    break
                u = np.asarray(rng.normal(size=ins[i].shape))
                slope, finer = (_slope(op, ins, dys, i, u, step) for step in STEPS)
                scale = 1.0 + abs(slope) + float(np.linalg.norm(found[i]))
                if abs(slope - finer) <= TOLERANCE * scale:  # else a kink lies between: draw again
                    told = float((found[i] * u).sum())
                    if not abs(told - slope) <= TOLERANCE * scale:
                        head = f"vjp of input {i} gives slope {told:.9g} but differences give {slope:.9g}"
                        fail(sample, "\n".join([head, *_evidence(op, ins, dys, i, found[i])]))
                    break
            else:
                fail(sample, f"input {i}: no smooth direction in 10 draws")


def _pull(sample: Sample, rng: np.random.Generator) -> tuple[list[Array], list[Array], tuple[Any, ...]]:
    """Random operands and cotangents, and what `vjp` makes of them, its shapes checked."""
    op = sample.op
    ins = sample.draw(rng, "float64")
    ys = op.run(*ins)
    dys = [
        np.asarray(rng.normal(size=y.shape), y.dtype)
        if y.dtype.kind == "f" and name not in op.no_gradient
        else np.zeros_like(y)
        for name, y in zip(op.outputs, ys, strict=True)
    ]
    one = len(ys) == 1
    found = op.vjp(dys[0] if one else tuple(dys), ys[0] if one else ys, *ins)
    if not isinstance(found, tuple | list):
        fail(sample, f"vjp gives {type(found).__name__}, not a tuple of one cotangent for each input: (dx,)")
    if len(found) != len(ins):
        fail(sample, f"vjp gives {len(found)} cotangents for {len(ins)} inputs")
    for i, (x, g) in enumerate(zip(ins, found, strict=True)):
        if x.dtype.kind != "f" and g is not None:
            fail(sample, f"vjp gives a cotangent for input {i}, which holds whole numbers")
        if g is not None and spec_of(g) != spec_of(x):
            fail(sample, f"vjp of input {i} is {spec_of(g)}, not {spec_of(x)}")
    return ins, dys, tuple(found)


def _slope(op: Op, ins: Sequence[Array], dys: Sequence[Array], i: int, u: Array, step: float) -> float:
    def value(way: float) -> float:
        moved = [x + way * u if j == i else x for j, x in enumerate(ins)]
        return sum(float((dy * y).sum()) for dy, y in zip(dys, op.run(*moved), strict=True) if dy.dtype.kind == "f")

    return (value(step) - value(-step)) / (2.0 * step)


def _evidence(op: Op, ins: Sequence[Array], dys: Sequence[Array], i: int, found: Array) -> list[str]:
    """The worst element of a gradient by differences of its own, and the operands."""
    x = ins[i]
    places = list(np.ndindex(x.shape))
    if len(places) > ELEMENTS:
        drawn = np.random.default_rng(0).choice(len(places), ELEMENTS, replace=False)
        places = [places[k] for k in sorted(drawn)]
    wrong: list[tuple[float, tuple[int, ...], float]] = []
    for place in places:
        u = np.zeros_like(x)
        u[place] = 1.0
        slope, finer = (_slope(op, ins, dys, i, u, step) for step in STEPS)
        scale = 1.0 + abs(slope) + abs(float(found[place]))
        off = abs(float(found[place]) - slope)
        if abs(slope - finer) <= TOLERANCE * scale and not off <= TOLERANCE * scale:
            wrong.append((np.inf if np.isnan(off) else off, place, slope))
    at = None
    lines = [f"  no single element of the {len(places)} tried is wrong by more than rounding"]
    if wrong:
        _, at, slope = max(wrong)
        lines = [
            f"  worst at {at} of input {i}: vjp gives {found[at]:.9g}, differences give {slope:.9g}; "
            f"{len(wrong)} of {len(places)} elements tried are wrong"
        ]
    for j, value in enumerate(ins):
        lines += shown(f"input {j}", value, at if j == i else None)
    for name, dy in zip(op.outputs, dys, strict=True):
        lines += shown(f"cotangent of {name}", dy, None)
    return [*lines, *shown(f"vjp of input {i}", found, at)]
