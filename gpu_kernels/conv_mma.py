"""Convolution on tensor cores as a matrix product that is never laid out (implicit GEMM), channels last.

    y[pixel, k] = sum over (tap, c) of x[pixel * stride + tap * dilation - padding, c] * w[tap, c, k]

Rows are pixels, columns filters; groups are products of a batch, each with its part of the channels and filters.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

from rapydli_flow.spec import Spec
from rapydli_flow.template import Device, Epilogue, template

from .grid import INDEX_LIMIT, Grid
from .mma import Part, Problem, Tile, cut, multiply, vector_of
from .mma_loaders import Loader, lines_loader
from .mma_rules import settings
from .mma_window import Slide, pixels_loader, reach, slide
from .tensor_core import kind_of


def problems(op: Any, ins: Sequence[Spec], outs: Sequence[Spec]) -> tuple[Problem]:
    """Pixels by filters of a group, over taps and channels."""
    x, w = ins
    c, k = w.shape[-2], w.shape[-1] // op.groups
    vector_a, vector_b = vector_of(x.dtype, c, x.shape[-1]), vector_of(x.dtype, k, w.shape[-1])
    lie: dict[str, Any] = {"rows_a": True, "rows_b": False, "state": 2, "vector_a": vector_a, "vector_b": vector_b}
    group: dict[str, Any] = {"batch": op.groups, "base": (c, k, k), "pitch": w.shape[-1]}
    kind = kind_of(op, x.dtype)
    return (Problem(x.dtype, kind, outs[0].size // w.shape[-1], k, prod(w.shape[:-1]), **lie, **group),)


def taps_in_bits(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device) -> bool:
    x, w = ins
    return slide(op, x, w, outs[0]).bits <= 31


def in_reach(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device) -> bool:
    x, w = ins
    return reach(slide(op, x, w, outs[0]), x.shape[0], x.shape[-1]) < INDEX_LIMIT


RULES = {"taps in 31 bits": taps_in_bits, "taps in 32-bit indices": in_reach}


def loaders(t: Tile, s: Slide, channels: int) -> tuple[Loader, Loader]:
    """Of pixels and of filters."""
    a, b = t.shares()
    assert a is not None, "copies of pixels are not shared out evenly"
    assert b is not None, "copies of filters are not shared out evenly"
    p = t.p
    pixels = pixels_loader(p.dtype, t.a.layout, a, s, pixels=p.m, channels=channels, inner=p.k // prod(s.window))
    return pixels, lines_loader(p.dtype, t.b.layout, b, p.n, p.k, p.row_pitch)


@template("conv", "cuda", **settings(problems, RULES))
def tensor_cores(
    op: Any, ins: Sequence[Spec], outs: Sequence[Spec], epilogue: Epilogue, **config: Any
) -> tuple[Grid, ...]:
    """Tiles of mma.sync over pixels and filters, filled by asynchronous copies."""
    x, w = ins
    (p,) = problems(op, ins, outs)
    t = cut(p, config)
    return multiply([Part(t, *loaders(t, slide(op, x, w, outs[0]), x.shape[-1]))], epilogue)
