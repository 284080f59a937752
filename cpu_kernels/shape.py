"""Copies that keep the order of elements: reshape, which only a fused tail can change, and concatenation.

Joined operands are rows of different lengths: each row of the output is one row of every operand. Transposes, which
read with steps, are in `slice`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from math import prod
from typing import Any

from rapydli_flow.spec import Spec
from rapydli_flow.template import Epilogue, Loop, Scalar, template

from .pointwise import Walk, elements
from .text import written

COPY = Scalar(("x0",), (), ("x0",))


@template("reshape", "cpu", space={"grain": (16384, 65536)})
def copy(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], epilogue: Epilogue, *, grain: int) -> Loop:
    """``grain``: elements of a task."""
    return elements("reshape", COPY, [outs[0].shape], outs, epilogue, grain=grain)


@template("concatenate", "cpu", space={"grain": (16384, 4096, 65536)})
def joined(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], epilogue: Epilogue, *, grain: int) -> Loop:
    """``grain``: elements of a task."""
    shape = outs[0].shape
    widths = [prod(spec.shape[op.axis :]) for spec in ins]
    ends = list(accumulate(widths))
    walk = Walk((prod(shape[: op.axis]), ends[-1]), grain)

    def lines() -> Iterator[str]:
        yield from (f"    {line}" for line in walk.lines())
        yield "    for row in range(first, last):"
        for i, (width, end) in enumerate(zip(widths, ends, strict=True)):
            left = end - width
            yield f"        a, o = row * {width}, row * {walk.inner} + {left}"
            yield f"        for j in range(max(low - {left}, 0), min(high - {left}, {width})):"
            yield "            p = o + j"
            yield f"            out_0[p] = epilogue(in_{i}[a + j], extras, p, p % {shape[-1]}, at)"

    arrays = ", ".join(f"in_{i}" for i in range(len(ins)))
    text = "\n".join([f"def joined(task, {arrays}, out_0, extras, at):", *lines()]) + "\n"
    return Loop(written(text, epilogue=epilogue), walk.tasks)
