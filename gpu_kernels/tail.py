"""The tail of a kernel: a fused op's epilogue applied to elements in registers, and the store.

Operands of the epilogue are read where the element lies ('element'), where the op read it ('source'), by its channel,
or once ('scalar'); `finish` is a procedure that templates call for every few neighbouring elements.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from rapydli_flow.template import Epilogue

from .ptx import append, load, load_one, store, unroll
from .scalar import formula, nowhere, place


@dataclass(frozen=True)
class Tail:
    """``finish(active, y, values, element, channel, extras, at)`` stores ``lanes`` neighbours of one row.

    ``finish_part`` is for ops that take a part of an operand: after the element it takes where that was read.
    ``finish_given(active, y, operands, element, at)`` is for kernels that have read the epilogue's operands before, by
    ``loads``, as ``reach`` says; the first of ``operands`` are the values.
    """

    finish: Callable[..., None]
    finish_part: Callable[..., None]
    finish_given: Callable[..., None]
    lanes: int
    reach: tuple[str, ...] = ()
    loads: tuple[Any, ...] = ()


def itemsize_of(epilogue: Epilogue) -> int:
    """Of the widest of the output and what is read along with its elements."""
    read = [extra for extra in epilogue.extras if epilogue.reach(extra) != "scalar"]
    return max(int(np.dtype(spec.dtype).itemsize) for spec in (epilogue.out, *read))


def tail(epilogue: Epilogue, lanes: int) -> Tail:
    """The epilogue for vectors of ``lanes`` elements, all in one row of the last axis."""
    out = epilogue.out
    reach = tuple(epilogue.reach(extra) for extra in epilogue.extras)
    loads = tuple(
        load_one(extra.dtype, lanes) if kind == "scalar" else load(extra.dtype, lanes, constant=kind == "channel")
        for extra, kind in zip(epilogue.extras, reach, strict=True)
    )
    count = len(reach)
    apply = formula(epilogue.scalar, (out.dtype, *(extra.dtype for extra in epilogue.extras)), out.dtype, lanes)
    where = place(out.shape) if epilogue.scalar.indexed else nowhere()
    write = store(out.dtype, lanes)
    identity = epilogue.identity

    def plain(active: Any, y: Any, values: Any, element: Any, channel: Any, extras: Any, at: Any) -> None:
        write(active, y, element, values)

    def plain_part(
        active: Any, y: Any, values: Any, element: Any, source: Any, channel: Any, extras: Any, at: Any
    ) -> None:
        write(active, y, element, values)

    def plain_given(active: Any, y: Any, operands: Any, element: Any, at: Any) -> None:
        write(active, y, element, operands[0])

    def finish(active: Any, y: Any, values: Any, element: Any, channel: Any, extras: Any, at: Any) -> None:
        finish_part(active, y, values, element, element, channel, extras, at)

    def finish_part(
        active: Any, y: Any, values: Any, element: Any, source: Any, channel: Any, extras: Any, at: Any
    ) -> None:
        operands = (values,)
        for k in unroll(count):
            if reach[k] == "element":
                operands = append(operands, loads[k](active, extras[k], element))
            elif reach[k] == "source":
                operands = append(operands, loads[k](active, extras[k], source))
            elif reach[k] == "channel":
                operands = append(operands, loads[k](active, extras[k], channel))
            else:
                operands = append(operands, loads[k](active, extras[k], 0))
        finish_given(active, y, operands, element, at)

    def finish_given(active: Any, y: Any, operands: Any, element: Any, at: Any) -> None:
        results = apply(operands, where(element, at))
        write(active, y, element, results[0])

    if identity:
        return Tail(plain, plain_part, plain_given, lanes)
    return Tail(finish, finish_part, finish_given, lanes, reach, loads)
