"""Arrays of one constant. Other sources are leaves, or initialisers that run once in NumPy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rapydli_flow.spec import Spec
from rapydli_flow.template import Epilogue, Loop, Scalar, template

from .pointwise import elements
from .text import literal


@template("fill", "cpu", space={"grain": (16384, 65536)})
def constant(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], epilogue: Epilogue, *, grain: int) -> Loop:
    """``grain``: elements of a task."""
    scalar = Scalar((), (f"t0 = T({literal(op.value)})",), ("t0",))
    return elements("fill", scalar, [], outs, epilogue, grain=grain)
