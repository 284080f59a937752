"""Arrays of one constant, and Gaussian windows. Other sources are leaves, or initialisers that run once in NumPy."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from math import prod
from typing import Any

from rapydli_flow.spec import Spec
from rapydli_flow.template import Config, Device, Epilogue, Scalar, template

from .elements import SPACE, elements, fits, prefer_of
from .grid import Grid


def number(value: float) -> str:
    """Source text of a constant."""
    return repr(value) if math.isfinite(value) else f"float({str(value)!r})"


def prefer(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device) -> Config:
    return prefer_of(ins, outs, device, indexed=False)


@template("fill", "cuda", space=SPACE, fits=fits, prefer=prefer)
def constant(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], epilogue: Epilogue, **config: Any) -> Grid:
    """Each element once."""
    scalar = Scalar((), (f"t0 = T({number(op.value)})",), ("t0",))
    return elements(scalar, ins, outs, epilogue, **config)


@template("gaussian", "cuda", space=SPACE, fits=fits, prefer=prefer)
def window(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], epilogue: Epilogue, **config: Any) -> Grid:
    """Each element once, from its place in the block: ``center`` counts from there."""
    axes = len(op.center)

    def lines() -> Iterator[str]:
        yield f"place = index // U({prod(op.shape[axes:])})"
        yield "distance = T(0.0)"
        for axis in reversed(range(axes)):
            size = op.shape[axis]
            yield f"d = T(place % U({size})) - T({float(op.center[axis])!r})"
            yield "distance = distance + d * d"
            yield f"place = place // U({size})"
        yield f"t0 = math.exp(T({-0.5 / op.sigma**2!r}) * distance)"

    scalar = Scalar((), tuple(lines()), ("t0",), indexed=True)
    return elements(scalar, ins, outs, epilogue, own_block=True, **config)
