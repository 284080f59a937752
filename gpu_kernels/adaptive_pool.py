"""Pooling to a given size over 1 to 3 spatial axes, and its gradients: a thread has a few channels of one place.

Both ways an element of the result gathers an interval of each axis of the source, by one formula: a bin its elements,
and an element of the gradient the bins that hold it. Interval i of ``count`` over ``length`` elements goes from
``i * length // count`` to before ``((i + 1) * length + count - 1) // count``; loops are as long as the longest, what
lies behind the end is a load that is switched off. Fewer axes are taken as 3 by putting axes of size 1 in front.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rapydli_flow.spec import Spec
from rapydli_flow.template import Config, Device, Epilogue, Rule, template

from .access import larger, one_over, plus, plus_chosen, plus_times, repeated, spread, times
from .grid import Grid, blocks_of
from .pair import held
from .pool_geometry import channels_fit, countable, enough, first_of, three
from .ptx import cuda, hold, int32, load, store, take, unroll
from .tail import tail

SPACE = {"threads": (128, 256, 512), "vector": (4, 2, 1, 8)}
RULES: dict[str, Rule] = {"channels in vectors": channels_fit, "32-bit indices": countable}
WRITTEN_OUT = 16  # elements of an interval of the last axis that are written out


def prefer(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device) -> Config:
    """The widest vectors of which there are enough."""
    size = outs[0].size
    many: list[Config] = [{"threads": 128, "vector": v} for v in (8, 4, 2) if size // v >= enough(device)]
    return first_of(RULES, op, ins, outs, device, [*many, {"threads": 128, "vector": 1}])


@dataclass(frozen=True)
class Axis:
    """The intervals of one axis."""

    count: int
    length: int

    @property
    def longest(self) -> int:
        ends = ((-(-(i + 1) * self.length // self.count), i * self.length // self.count) for i in range(self.count))
        return max(end - begin for end, begin in ends)


@dataclass(frozen=True)
class Pooled:
    """Three axes of intervals, channels, and which threads there are."""

    d: Axis
    h: Axis
    w: Axis
    channels: int
    panels: int
    total: int

    @classmethod
    def of(cls, source: Spec, out: Spec, vector: int) -> Pooled:
        axes = zip(three(out.shape[1:-1], 1), three(source.shape[1:-1], 1), strict=True)
        d, h, w = (Axis(*axis) for axis in axes)
        channels = out.shape[-1]
        return cls(d, h, w, channels, channels // vector, out.size // vector)

    @property
    def find(self) -> Callable[..., None]:
        """``(place, gathered)``: of a place of the result its image, the first of its interval along each axis, what is
        behind the last, and its number in the image."""
        d, h, w = self.d, self.h, self.w

        def find(place: Any, gathered: Any) -> None:
            at_d = place // (w.count * h.count) % d.count
            at_h = place // w.count % h.count
            at_w = place % w.count
            gathered[0] = place // (w.count * h.count * d.count)
            gathered[1] = at_d * d.length // d.count
            gathered[2] = at_h * h.length // h.count
            gathered[3] = at_w * w.length // w.count
            gathered[4] = (at_d * d.length + (d.length + d.count - 1)) // d.count
            gathered[5] = (at_h * h.length + (h.length + h.count - 1)) // h.count
            gathered[6] = (at_w * w.length + (w.length + w.count - 1)) // w.count
            gathered[7] = place % (w.count * h.count * d.count)

        return find

    @property
    def inner(self) -> Any:
        """The loop over the last axis."""
        return unroll if self.w.longest <= WRITTEN_OUT else range


def _averages(source: Spec, out: Spec, epilogue: Epilogue, *, back: bool, threads: int, vector: int) -> Grid:
    """Averages of bins; ``back``: their gradient, to which each bin gives its share."""
    p, lanes, kind = Pooled.of(source, out, vector), vector, np.dtype(held(out.dtype)).type
    read, end = load(source.dtype, lanes, constant=True), tail(epilogue, lanes)
    start, add, add_share, result = spread(lanes, 0.0), plus(lanes), plus_times(lanes), take(lanes)
    share, scaled = one_over(out.dtype), times(lanes)
    d, h, w, find, inner = p.d, p.h, p.w, p.find, p.inner
    longest_d, longest_h, longest_w = d.longest, h.longest, w.longest

    def kernel(ins: Any, outs: Any, work: Any, extras: Any, at: Any) -> None:
        thread = cuda.blockIdx.x * threads + cuda.threadIdx.x
        on = thread < p.total
        channel = thread % p.panels * lanes
        gathered = cuda.local.array(8, int32)
        find(thread // p.panels, gathered)
        d_0 = gathered[1]
        h_0 = gathered[2]
        w_0 = gathered[3]
        acc = cuda.local.array(lanes, kind)
        start(acc)
        for i in range(longest_d):
            for j in range(longest_h):
                in_row = on & (d_0 + i < gathered[4]) & (h_0 + j < gathered[5])
                row = ((gathered[0] * d.length + d_0 + i) * h.length + h_0 + j) * w.length
                if back:
                    q = d_0 + i
                    r = h_0 + j
                    deep = (q * d.count + (d.count + d.length - 1)) // d.length - q * d.count // d.length
                    high = (r * h.count + (h.count + h.length - 1)) // h.length - r * h.count // h.length
                for k in inner(longest_w):
                    active = in_row & (w_0 + k < gathered[6])
                    values = read(active, ins[0], (row + w_0 + k) * p.channels + channel)
                    if back:
                        s = w_0 + k
                        wide = (s * w.count + (w.count + w.length - 1)) // w.length - s * w.count // w.length
                        add_share(acc, 0, values, share(deep * high * wide))
                    else:
                        add(acc, 0, values)
        element = thread * lanes
        if back:
            end.finish(on, outs[0], result(acc, 0), element, channel, extras, at)
        else:
            mean = scaled(result(acc, 0), share((gathered[4] - d_0) * (gathered[5] - h_0) * (gathered[6] - w_0)))
            end.finish(on, outs[0], mean, element, channel, extras, at)

    return Grid(kernel, blocks_of(p.total, threads), threads)


@template("adaptive_avg_pool", "cuda", space=SPACE, fits=RULES, prefer=prefer)
def averages(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], epilogue: Epilogue, **config: int) -> Grid:
    """Each bin by one thread."""
    return _averages(ins[0], outs[0], epilogue, back=False, **config)


@template("adaptive_avg_pool_grad", "cuda", space=SPACE, fits=RULES, prefer=prefer)
def shares(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], epilogue: Epilogue, **config: int) -> Grid:
    """Each element of dx by one thread."""
    return _averages(ins[0], outs[0], epilogue, back=True, **config)


@template("adaptive_max_pool", "cuda", space=SPACE, fits=RULES, prefer=prefer)
def maxima(
    op: Any, ins: Sequence[Spec], outs: Sequence[Spec], epilogue: Epilogue, *, threads: int, vector: int
) -> Grid:
    """Each bin by one thread; of equal values the first wins, a NaN wins over all others."""
    out = outs[0]
    p, lanes, kind = Pooled.of(ins[0], out, vector), vector, np.dtype(held(out.dtype)).type
    read, end = load(out.dtype, lanes, constant=True), tail(epilogue, lanes)
    start, more, result, keep, same = spread(lanes, -np.inf), larger(lanes), take(lanes), hold(lanes), repeated(lanes)
    mark = store("int32", lanes)
    d, h, w, find, inner = p.d, p.h, p.w, p.find, p.inner
    longest_d, longest_h, longest_w = d.longest, h.longest, w.longest

    def kernel(ins: Any, outs: Any, work: Any, extras: Any, at: Any) -> None:
        thread = cuda.blockIdx.x * threads + cuda.threadIdx.x
        on = thread < p.total
        channel = thread % p.panels * lanes
        gathered = cuda.local.array(8, int32)
        find(thread // p.panels, gathered)
        d_0 = gathered[1]
        h_0 = gathered[2]
        w_0 = gathered[3]
        best = cuda.local.array(lanes, kind)
        which = cuda.local.array(lanes, int32)
        start(best)
        keep(which, 0, same((d_0 * h.length + h_0) * w.length + w_0))
        for i in range(longest_d):
            for j in range(longest_h):
                in_row = on & (d_0 + i < gathered[4]) & (h_0 + j < gathered[5])
                row = ((d_0 + i) * h.length + h_0 + j) * w.length
                for k in inner(longest_w):
                    active = in_row & (w_0 + k < gathered[6])
                    inside = row + w_0 + k
                    source = (gathered[0] * (d.length * h.length * w.length) + inside) * p.channels + channel
                    more(best, which, 0, read(active, ins[0], source), active, inside)
        end.finish(on, outs[0], result(best, 0), thread * lanes, channel, extras, at)
        mark(on, outs[1], thread * lanes, result(which, 0))

    return Grid(kernel, blocks_of(p.total, threads), threads)


@template("adaptive_max_pool_grad", "cuda", space=SPACE, fits=RULES, prefer=prefer)
def winners(
    op: Any, ins: Sequence[Spec], outs: Sequence[Spec], epilogue: Epilogue, *, threads: int, vector: int
) -> Grid:
    """Each element of dx by one thread: the dy of the bins that chose it."""
    out = outs[0]
    p, lanes, kind = Pooled.of(ins[0], out, vector), vector, np.dtype(held(out.dtype)).type
    read, end = load(out.dtype, lanes, constant=True), tail(epilogue, lanes)
    marked, start, add, result = (
        load(ins[1].dtype, lanes, constant=True),
        spread(lanes, 0.0),
        plus_chosen(lanes),
        take(lanes),
    )
    d, h, w, find, inner = p.d, p.h, p.w, p.find, p.inner
    longest_d, longest_h, longest_w = d.longest, h.longest, w.longest

    def kernel(ins: Any, outs: Any, work: Any, extras: Any, at: Any) -> None:
        thread = cuda.blockIdx.x * threads + cuda.threadIdx.x
        on = thread < p.total
        channel = thread % p.panels * lanes
        gathered = cuda.local.array(8, int32)
        find(thread // p.panels, gathered)
        d_0 = gathered[1]
        h_0 = gathered[2]
        w_0 = gathered[3]
        own = gathered[7]
        acc = cuda.local.array(lanes, kind)
        start(acc)
        for i in range(longest_d):
            for j in range(longest_h):
                in_row = on & (d_0 + i < gathered[4]) & (h_0 + j < gathered[5])
                row = ((gathered[0] * d.length + d_0 + i) * h.length + h_0 + j) * w.length
                for k in inner(longest_w):
                    active = in_row & (w_0 + k < gathered[6])
                    source = (row + w_0 + k) * p.channels + channel
                    add(acc, 0, read(active, ins[0], source), marked(active, ins[1], source), own)
        end.finish(on, outs[0], result(acc, 0), thread * lanes, channel, extras, at)

    return Grid(kernel, blocks_of(p.total, threads), threads)
