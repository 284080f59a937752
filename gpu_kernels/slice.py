"""Parts of arrays, and arrays around parts: slices, their gradient, and padding with a constant; see `copies`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rapydli_flow.spec import Spec
from rapydli_flow.template import Config, Device, Epilogue, Rule, template

from .access import Line
from .copies import SPACE, countable, merged_lines, narrow, preferred, spread, steps_of, strided, walks
from .grid import Grid


def _part(op: Any, x: Spec) -> tuple[list[int], int]:
    own = steps_of(x.shape)
    steps = [step * by for step, by in zip(own, op.steps, strict=True)]
    return steps, sum(step * start for step, start in zip(own, op.starts, strict=True))


def _reads(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device, *, vector: int) -> bool:
    return walks(outs[0], *_part(op, ins[0]), vector)


RULES: dict[str, Rule] = {"32-bit indices": countable, "16 bytes at once": narrow, "vectors side by side": _reads}


def prefer(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device) -> Config:
    return preferred(RULES, op, ins, outs, device)


@template("slice", "cuda", space=SPACE, fits=RULES, prefer=prefer)
def part(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], epilogue: Epilogue, **config: int) -> Grid:
    """Each element of y once."""
    steps, base = _part(op, ins[0])
    return strided(outs[0], epilogue, steps=steps, base=base, **config)


def _lines(op: Any, x: Spec, y: Spec) -> list[Line]:
    """How y lies on x, for slice_grad and pad."""
    starts, steps = (op.starts, op.steps) if hasattr(op, "starts") else (op.low, (1,) * len(op.low))
    return list(zip(y.shape, x.shape, starts, steps, strict=True))


def _lies(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device, *, vector: int) -> bool:
    big, small, start, step = merged_lines(_lines(op, ins[0], outs[0]))[-1]
    return vector == 1 or (step == 1 and not any(v % vector for v in (big, small, start)))


SPREAD_RULES: dict[str, Rule] = {"32-bit indices": countable, "16 bytes at once": narrow, "vectors side by side": _lies}


def _prefer_spread(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device) -> Config:
    return preferred(SPREAD_RULES, op, ins, outs, device)


@template("slice_grad", "cuda", space=SPACE, fits=SPREAD_RULES, prefer=_prefer_spread)
def with_holes(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], epilogue: Epilogue, **config: int) -> Grid:
    """Each element of dx once, zeros where nothing was read."""
    return spread(_lines(op, ins[0], outs[0]), outs[0], epilogue, value=0.0, **config)


@template("pad", "cuda", space=SPACE, fits=SPREAD_RULES, prefer=_prefer_spread)
def margins(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], epilogue: Epilogue, **config: int) -> Grid:
    """Each element of y once."""
    return spread(_lines(op, ins[0], outs[0]), outs[0], epilogue, value=op.value, **config)
