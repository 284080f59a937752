"""Reshape is a copy: the elements keep their order, only a fused tail can change them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rapydli_flow.spec import Spec
from rapydli_flow.template import Epilogue, Loop, Scalar, template

from .pointwise import elements

COPY = Scalar(("x0",), (), ("x0",))


@template("reshape", "cpu", space={"grain": (16384, 65536)})
def copy(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], epilogue: Epilogue, *, grain: int) -> Loop:
    """``grain``: elements of a task."""
    return elements("reshape", COPY, [outs[0].shape], outs, epilogue, grain=grain)
