"""Pointwise operators with any broadcasting, from their formula; see `elements`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rapydli_flow.spec import Spec
from rapydli_flow.template import Epilogue, template

from .elements import SPACE, elements, fits, prefer
from .grid import Grid


@template("pointwise", "cuda", space=SPACE, fits=fits, prefer=prefer)
def elementwise(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], epilogue: Epilogue, **config: Any) -> Grid:
    """Each element once, in one pass over all operands."""
    return elements(op.scalar(tuple(f"x{i}" for i in range(len(ins)))), ins, outs, epilogue, **config)
