"""Where the convolutions read and write along each spatial axis, and the padding of their source.

All of them slide over a source (x, or dy for the input gradient) that is surrounded by zeros where taps
leave it. Along one axis, for phase p (always 0 but for gradients of strided convolutions):

    output o, tap t reads position    first[p] + o * step + t * spread    of the padded source
    output o is element               into[p] + o * into_step             of the result

A window of 3 with stride 2, and the two phases of its input gradient (even and odd elements of dx):

    x   0 1 2 3 4 5 6       dx[0] = dy[0] w[0]
    y   `-0-'               dx[1] = dy[0] w[1]                 phase 1: the 1 tap w[1]
            `-1-'           dx[2] = dy[0] w[2] + dy[1] w[0]    phase 0: the 2 taps w[2], w[0]
                `-2-'       dx[3] = dy[1] w[1]

So each phase is a plain convolution of dy with some taps in reverse order, and nothing is multiplied by
zeros. 1-D and 2-D get leading axes of size 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from rapydli_flow.spec import Spec
from rapydli_flow.template import Device


@dataclass(frozen=True)
class Axis:
    """One spatial axis; tuples have a value for each phase. ``low`` and ``high`` zeros surround the source."""

    size: int
    out: int
    step: int
    spread: int
    taps: tuple[int, ...]
    count: tuple[int, ...]
    first: tuple[int, ...]
    into: tuple[int, ...]
    into_step: int = 1
    low: int = 0
    high: int = 0
    hole: int = 1  # only every hole-th tap exists

    @property
    def phases(self) -> int:
        return len(self.taps)

    @property
    def padded(self) -> int:
        return self.low + self.size + self.high

    @property
    def pads(self) -> bool:
        return self.padded != self.size

    @property
    def fewest(self) -> int:
        """The least number of outputs of a phase that has any."""
        return min(n for n in self.count if n)

    @property
    def plain(self) -> bool:
        """Does output o read position o and nothing else?"""
        same = self.padded == self.size == self.out
        return same and (self.taps, self.step, self.first) == ((1,), 1, (0,))


@dataclass(frozen=True)
class Sizes:
    """The attributes of a convolution along one axis, and its extents."""

    x: int
    y: int
    window: int
    stride: int
    low: int
    dilation: int


def forward(s: Sizes) -> Axis:
    """Read x, write y."""
    low = max(0, s.low)
    high = max(0, (s.y - 1) * s.stride + (s.window - 1) * s.dilation - s.low - (s.x - 1))
    return Axis(s.x, s.y, s.stride, s.dilation, (s.window,), (s.y,), (low - s.low,), (0,), low=low, high=high)


def backward(s: Sizes) -> Axis:
    """Read dy, write dx."""
    # with a stride, a dilated window is a dense one with holes
    dense = s.stride > 1
    spread, hole = (1, s.dilation) if dense else (s.dilation, 1)
    window = (s.window - 1) * hole + 1
    phases = range(s.stride)
    taps = tuple(max(0, -(-(window - p) // s.stride)) for p in phases)
    start = tuple(-(-(s.low - p) // s.stride) for p in phases)
    count = tuple(max(0, -(-(s.low + s.x - p) // s.stride) - a) for p, a in zip(phases, start, strict=True))
    used = [(a, a + n - 1, a - (t - 1) * spread) for a, n, t in zip(start, count, taps, strict=True) if n and t]
    low = max([0, *(-lowest for _, _, lowest in used)])
    high = max([0, *(last - (s.y - 1) for _, last, _ in used)])
    first = tuple(a - (t - 1) * spread + low if t else 0 for a, t in zip(start, taps, strict=True))
    into = tuple(s.stride * a + p - s.low for p, a in zip(phases, start, strict=True))
    return Axis(s.y, s.x, 1, spread, taps, count, first, into, s.stride, low, high, hole)


_NONE = Sizes(1, 1, 1, 1, 0, 1)


def sizes(op: Any, x: Sequence[int], y: Sequence[int], window: Sequence[int]) -> tuple[Sizes, Sizes, Sizes]:
    """Three axes of a convolution from x[N,*x,C] to y[N,*y,K]."""
    given = [
        Sizes(*extents, stride, low, dilation)
        for *extents, stride, (low, _), dilation in zip(x, y, window, op.stride, op.padding, op.dilation, strict=True)
    ]
    d, h, w = [_NONE] * (3 - len(given)) + given
    return d, h, w


@dataclass(frozen=True)
class Geometry:
    """A sliding product: source[n, *, inner per group] by filters to result[n, *, outer per group]."""

    n: int
    axes: tuple[Axis, Axis, Axis]
    inner: int
    outer: int
    groups: int

    @property
    def pads(self) -> bool:
        return any(axis.pads for axis in self.axes)

    @property
    def phases(self) -> int:
        return prod(axis.phases for axis in self.axes)

    @property
    def padded_size(self) -> int:
        return self.n * prod(axis.padded for axis in self.axes) * self.inner * self.groups

    @property
    def contiguous(self) -> bool:
        """Do the taps of a row follow each other in memory?"""
        return self.groups == 1 and self.axes[2].spread == 1

    def phase(self, number: int) -> tuple[int, int, int]:
        """The phase of every axis."""
        _, h, w = self.axes
        return number // (h.phases * w.phases), number // w.phases % h.phases, number % w.phases

    def weights(self, number: int) -> int:
        """Weights that a phase has for each column: taps times inner channels."""
        return prod(axis.taps[p] for axis, p in zip(self.axes, self.phase(number), strict=True)) * self.inner

    def flat(self) -> Geometry:
        """With records and pixels in one axis where pixels do not see each other (windows of 1)."""
        if not all(axis.plain for axis in self.axes):
            return self
        d, _, w = self.axes
        size = self.n * prod(axis.size for axis in self.axes)
        one = replace(d, size=1, out=1, count=(1,))
        return replace(self, n=1, axes=(one, one, replace(w, size=size, out=size, count=(size,))))


def geometry(
    op: Any, ins: Sequence[Spec], outs: Sequence[Spec], *, slide: Callable[[Sizes], Axis] = forward
) -> Geometry:
    """Of a convolution, or of its input gradient if ``slide`` is `backward`."""
    source, w, result = ins[0].shape, ins[1].shape, outs[0].shape
    x, y = (source, result) if slide is forward else (result, source)
    axes = tuple(slide(s) for s in sizes(op, x[1:-1], y[1:-1], w[:-2]))
    return Geometry(source[0], axes, source[-1] // op.groups, result[-1] // op.groups, op.groups)  # type: ignore[arg-type]


def padding(g: Geometry) -> tuple[Callable[..., None], int]:
    """Copies source into padded, a row of pixels for each task, with zeros around; and the number of tasks."""
    d, h, w = g.axes
    depth, height = d.padded, h.padded
    from_d, from_h, size_d, size_h = d.low, h.low, d.size, h.size
    channels = g.inner * g.groups
    row, low, inside = w.padded * channels, w.low * channels, w.size * channels

    def pad(task, source, padded):  # type: ignore[no-untyped-def]
        z, at_row = task // height % depth - from_d, task % height - from_h
        begin = task * row
        if z < 0 or z >= size_d or at_row < 0 or at_row >= size_h:
            for i in range(row):
                padded[begin + i] = 0
        else:
            origin = ((task // (height * depth) * size_d + z) * size_h + at_row) * inside
            for i in range(low):
                padded[begin + i] = 0
            for i in range(inside):
                padded[begin + low + i] = source[origin + i]
            for i in range(low + inside, row):
                padded[begin + i] = 0

    return pad, g.n * depth * height if g.pads else 0


def something(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device) -> bool:
    """There are elements to read and to write."""
    return all(spec.size for spec in (*ins, *outs))
