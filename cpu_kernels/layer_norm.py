"""Normalisation within a sample, in two passes over it for mean and variance, and one that writes.

    standardize        y  = (x - mean) r,                            r = 1 / sqrt(var + eps)
    standardize_grad   dx = r (dy - mean(dy) - y mean(dy y)),        y from x as above

A line of work is one sample and a band of its channels that holds whole groups; sums are vectors of
channels. A sample of one group is cut into pieces as wide as a band instead, the last one shorter:

    groups > 1    spot 0   [ band 0: group 0, group 1 | band 1: group 2, group 3 ]
                  spot 1   [          ...             |          ...             ]
    groups = 1    x[0 .. width), x[width .. 2 width), ..., the rest

First the mean, from sums of x - (first x of the group), then all others, from e = x - mean: neither cancels
where the mean is large. BLOCK vectors are added in the dtype of x, and those sums in float64. The mean is
kept as a sum of two numbers of that dtype, which makes e as exact as in float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from rapydli_flow.spec import Spec
from rapydli_flow.template import Device, Epilogue, Loop, template

from .buffer import local

BLOCK = 32  # vectors that are added before they enter the float64 sums
MOST_BAND = 1 << 14  # channels whose sums fit on a thread's stack
SPACE = {"tasks": (16, 8, 32, 4), "band": (64, 128, 32)}


@dataclass(frozen=True)
class Layout:
    """How samples are cut: ``bands`` a sample, of ``width`` channels in groups of ``size``, ``step`` apart.

    There are ``spots`` whole vectors of ``width`` in a band, and one of ``rest``.
    """

    samples: int
    space: int
    channels: int
    groups: int
    bands: int
    width: int
    size: int
    step: int
    spots: int
    rest: int

    @classmethod
    def of(cls, op: Any, x: Spec, band: int) -> Layout:
        lead = len(x.shape) - op.axes
        samples, space, channels = prod(x.shape[:lead]), prod(x.shape[lead:-1]), x.shape[-1]
        if op.groups == 1:
            row = space * channels
            width = max(1, min(band, row))
            return cls(samples, space, channels, 1, 1, width, width, width, row // width, row % width)
        size = channels // op.groups
        # bands of equal width: the largest number of groups that divides all of them and is not too wide
        together = max(n for n in range(1, op.groups + 1) if op.groups % n == 0 and (n == 1 or n * size <= band))
        width = together * size
        return cls(samples, space, channels, op.groups, op.groups // together, width, size, channels, space, 0)

    @property
    def lines(self) -> int:
        return self.samples * self.bands

    @property
    def per_sample(self) -> int:
        return self.space * self.channels

    @property
    def members(self) -> int:
        """Elements of a mean."""
        return self.per_sample // self.groups

    @property
    def one(self) -> bool:
        return self.groups == 1

    @property
    def written(self) -> int:
        """Channels of a line, at each element of space."""
        return self.channels if self.one else self.width

    @property
    def sums(self) -> tuple[int, ...]:
        """width, size, groups of a band, step, spots, rest"""
        return self.width, self.size, self.width // self.size, self.step, self.spots, self.rest


def _tasks(layout: Layout, tasks: int) -> int:
    return max(1, min(tasks, layout.lines))


def _fits(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device, *, tasks: int, band: int) -> bool:
    x = outs[0]
    if not x.size or (op.groups > 1 and x.shape[-1] // op.groups > MOST_BAND):
        return False
    width = Layout.of(op, x, band).width
    return not any(b < band and Layout.of(op, x, b).width == width for b in SPACE["band"])  # means the same


def _workspace(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], *, tasks: int, band: int) -> tuple[Spec, ...]:
    layout = Layout.of(op, outs[0], band)
    return (Spec((_tasks(layout, tasks), 3, layout.width), "float64"),)


@template("standardize", "cpu", space=SPACE, fits=_fits, workspace=_workspace)
def standard(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], epilogue: Epilogue, *, tasks: int, band: int) -> Loop:
    """``tasks``: how many; ``band``: the most channels whose sums are taken together."""
    layout = Layout.of(op, outs[0], band)
    width, size, groups, step, spots, rest = layout.sums
    space, channels, written, per_sample = layout.space, layout.channels, layout.written, layout.per_sample
    bands, lines, members, one = layout.bands, layout.lines, layout.members, layout.one
    count, eps = _tasks(layout, tasks), float(op.eps)
    find_means = _means(layout, bool(op.centered), np.dtype(outs[0].dtype).type)

    def squares(a, x, o, n, high, low):  # type: ignore[no-untyped-def]
        for c in range(n):
            e = (x[o + c] - high[c]) - low[c]
            a[c] += e * e

    def body(task, x, y, work, extras, at):  # type: ignore[no-untyped-def]
        a, high, low, scale = local(width, x), local(width, x), local(width, x), local(width, x)
        w = task * 3 * width
        for line in range(task * lines // count, (task + 1) * lines // count):
            left = line % bands * width
            base = line // bands * per_sample + left
            find_means(work, w, a, x, base, high, low)
            for c in range(width):
                work[w + c] = 0
            for top in range(0, spots, BLOCK):
                for c in range(width):
                    a[c] = 0
                for s in range(top, min(top + BLOCK, spots)):
                    squares(a, x, base + s * step, width, high, low)
                if top + BLOCK >= spots:
                    squares(a, x, base + spots * step, rest, high, low)
                for c in range(width):
                    work[w + c] += a[c]
            for g in range(groups):
                total = 0.0
                for c in range(g * size, (g + 1) * size):
                    total += work[w + c]
                for c in range(g * size, (g + 1) * size):
                    scale[c] = 1.0 / math.sqrt(total / members + eps)
            for s in range(space):
                for c in range(written):
                    o, k = base + s * channels + c, 0 if one else c
                    y[o] = epilogue(((x[o] - high[k]) - low[k]) * scale[k], extras, o, left + c, at)

    return Loop(body, count)


@template("standardize_grad", "cpu", space=SPACE, fits=_fits, workspace=_workspace)
def gradient(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], epilogue: Epilogue, *, tasks: int, band: int) -> Loop:
    """``tasks``: how many; ``band``: the most channels whose sums are taken together."""
    layout = Layout.of(op, outs[0], band)
    width, size, groups, step, spots, rest = layout.sums
    space, channels, written, per_sample = layout.space, layout.channels, layout.written, layout.per_sample
    bands, lines, members, one = layout.bands, layout.lines, layout.members, layout.one
    count, eps, centered = _tasks(layout, tasks), float(op.eps), bool(op.centered)
    find_means = _means(layout, centered, np.dtype(outs[0].dtype).type)

    def products(a, b, d, dy, x, o, n, high, low):  # type: ignore[no-untyped-def]
        for c in range(n):
            e, g = (x[o + c] - high[c]) - low[c], dy[o + c]
            a[c] += e * e
            b[c] += g
            d[c] += g * e

    def body(task, dy, x, dx, work, extras, at):  # type: ignore[no-untyped-def]
        a, b, d, high, low = local(width, x), local(width, x), local(width, x), local(width, x), local(width, x)
        scale, mean, slope = local(width, x), local(width, x), local(width, x)
        w = task * 3 * width
        for line in range(task * lines // count, (task + 1) * lines // count):
            left = line % bands * width
            base = line // bands * per_sample + left
            find_means(work, w, a, x, base, high, low)
            for c in range(3 * width):
                work[w + c] = 0
            for top in range(0, spots, BLOCK):
                for c in range(width):
                    a[c] = 0
                    b[c] = 0
                    d[c] = 0
                for s in range(top, min(top + BLOCK, spots)):
                    products(a, b, d, dy, x, base + s * step, width, high, low)
                if top + BLOCK >= spots:
                    products(a, b, d, dy, x, base + spots * step, rest, high, low)
                for c in range(width):
                    work[w + c] += a[c]
                    work[w + width + c] += b[c]
                    work[w + 2 * width + c] += d[c]
            for g in range(groups):
                squares = total = along = 0.0
                for c in range(g * size, (g + 1) * size):
                    squares += work[w + c]
                    total += work[w + width + c]
                    along += work[w + 2 * width + c]
                variance = squares / members + eps
                for c in range(g * size, (g + 1) * size):
                    scale[c] = 1.0 / math.sqrt(variance)
                    mean[c] = total / members if centered else 0.0
                    slope[c] = along / members / variance
            for s in range(space):
                for c in range(written):
                    o, k = base + s * channels + c, 0 if one else c
                    e = (x[o] - high[k]) - low[k]
                    dx[o] = epilogue((dy[o] - mean[k] - e * slope[k]) * scale[k], extras, o, left + c, at)

    return Loop(body, count)


def _means(layout: Layout, centered: bool, T: Any) -> Any:
    """The function that finds the mean of each group, as high + low in all of its channels."""
    width, size, groups, step, spots, rest = layout.sums
    members = layout.members

    def deviations(a, x, o, n, shift):  # type: ignore[no-untyped-def]
        for c in range(n):
            a[c] += x[o + c] - shift[c]

    def means(work, w, a, x, base, high, low):  # type: ignore[no-untyped-def]
        for c in range(width):
            work[w + c] = 0
            high[c] = x[base + c // size * size] if centered else T(0)
            low[c] = 0
        if centered:
            for top in range(0, spots, BLOCK):
                for c in range(width):
                    a[c] = 0
                for s in range(top, min(top + BLOCK, spots)):
                    deviations(a, x, base + s * step, width, high)
                if top + BLOCK >= spots:
                    deviations(a, x, base + spots * step, rest, high)
                for c in range(width):
                    work[w + c] += a[c]
            for g in range(groups):
                total = 0.0
                for c in range(g * size, (g + 1) * size):
                    total += work[w + c]
                mean = high[g * size] + total / members
                for c in range(g * size, (g + 1) * size):
                    high[c] = mean
                    low[c] = mean - high[c]

    return means
