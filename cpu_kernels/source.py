"""Arrays of one constant, and Gaussian windows. Other sources are leaves, or initialisers that run once in NumPy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np

from rapydli_flow.spec import Spec
from rapydli_flow.template import Epilogue, Loop, Scalar, template

from .pointwise import elements
from .text import literal


@template("fill", "cpu", space={"grain": (16384, 65536)})
def constant(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], epilogue: Epilogue, *, grain: int) -> Loop:
    """``grain``: elements of a task."""
    scalar = Scalar((), (f"t0 = T({literal(op.value)})",), ("t0",))
    return elements("fill", scalar, [], outs, epilogue, grain=grain)


@template("gaussian", "cpu", space={"tasks": (1, 16)})
def window(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], epilogue: Epilogue, *, tasks: int) -> Loop:
    """``tasks``: how many. Windows are small."""
    center, extents = tuple(map(float, op.center)), tuple(op.shape[: len(op.center)])
    axes, inner, size, channels = len(center), prod(op.shape[len(center) :]), outs[0].size, outs[0].shape[-1]
    falloff = -0.5 / op.sigma**2
    count = max(1, min(tasks, size))
    T = np.dtype(outs[0].dtype).type

    def body(task, y, extras, at):  # type: ignore[no-untyped-def]
        for o in range(task * size // count, (task + 1) * size // count):
            place, distance = o // inner, 0.0
            for axis in range(axes - 1, -1, -1):
                d = place % extents[axis] - center[axis]
                distance += d * d
                place //= extents[axis]
            y[o] = epilogue(T(math.exp(falloff * distance)), extras, o, o % channels, at)

    return Loop(body, count)
