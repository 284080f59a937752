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
from .copies import countable
from .grid import Grid, blocks_of
from .pair import held
from .pool_geometry import channels_fit, enough, first_of, three
from .ptx import cuda, hold, int32, load, store, take, unroll
from .tail import tail

SPACE = {"threads": (128, 256, 512), "vector": (4, 2, 1, 8)}
RULES: dict[str, Rule] = {"channels in vectors": channels_fit, "32-bit indices": countable}
Step = Callable[..., None]  # a procedure of kernels
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
    lanes: int
    total: int  # threads

    @classmethod
    def of(cls, source: Spec, out: Spec, vector: int) -> Pooled:
        axes = zip(three(out.shape[1:-1], 1), three(source.shape[1:-1], 1), strict=True)
        d, h, w = (Axis(*axis) for axis in axes)
        return cls(d, h, w, out.shape[-1], vector, out.size // vector)

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


def _gathering(p: Pooled, threads: int, kind: Any, begin: Step, visit: Step, finish: Step) -> Grid:
    """The kernel of anything that gathers intervals: a thread has ``best`` and, for each, a whole number ``which``.

    ``begin(best, which, gathered)``; ``visit(ins, best, which, active, gathered, i, j, k, channel)`` for each element
    of the interval, by its number along each axis; then ``finish(on, outs, best, which, gathered, thread, channel,
    extras, at)``.
    """
    lanes, panels, find, inner = p.lanes, p.channels // p.lanes, p.find, p.inner
    longest_d, longest_h, longest_w = p.d.longest, p.h.longest, p.w.longest

    def kernel(ins: Any, outs: Any, work: Any, extras: Any, at: Any) -> None:
        thread = cuda.blockIdx.x * threads + cuda.threadIdx.x
        on = thread < p.total
        channel = thread % panels * lanes
        gathered = cuda.local.array(8, int32)
        find(thread // panels, gathered)
        best = cuda.local.array(lanes, kind)
        which = cuda.local.array(lanes, int32)
        begin(best, which, gathered)
        for i in range(longest_d):
            for j in range(longest_h):
                in_row = on & (gathered[1] + i < gathered[4]) & (gathered[2] + j < gathered[5])
                for k in inner(longest_w):
                    active = in_row & (gathered[3] + k < gathered[6])
                    visit(ins, best, which, active, gathered, i, j, k, channel)
        finish(on, outs, best, which, gathered, thread, channel, extras, at)

    return Grid(kernel, blocks_of(p.total, threads), threads)


def _averages(source: Spec, out: Spec, epilogue: Epilogue, *, back: bool, threads: int, vector: int) -> Grid:
    """Averages of bins; ``back``: their gradient, to which each bin gives its share."""
    p, kind = Pooled.of(source, out, vector), np.dtype(held(out.dtype)).type
    read, end = load(source.dtype, vector, constant=True), tail(epilogue, vector)
    start, add, add_share, result = spread(vector, 0.0), plus(vector), plus_times(vector), take(vector)
    share, scaled = one_over(out.dtype), times(vector)
    d, h, w = p.d, p.h, p.w

    def begin(acc: Any, which: Any, gathered: Any) -> None:
        start(acc)

    def visit(ins: Any, acc: Any, which: Any, active: Any, gathered: Any, i: Any, j: Any, k: Any, channel: Any) -> None:
        row = ((gathered[0] * d.length + gathered[1] + i) * h.length + gathered[2] + j) * w.length
        if back:
            q = gathered[1] + i
            r = gathered[2] + j
            deep = (q * d.count + (d.count + d.length - 1)) // d.length - q * d.count // d.length
            high = (r * h.count + (h.count + h.length - 1)) // h.length - r * h.count // h.length
        values = read(active, ins[0], (row + gathered[3] + k) * p.channels + channel)
        if back:
            s = gathered[3] + k
            wide = (s * w.count + (w.count + w.length - 1)) // w.length - s * w.count // w.length
            add_share(acc, 0, values, share(deep * high * wide))
        else:
            add(acc, 0, values)

    def finish(
        on: Any, outs: Any, acc: Any, which: Any, gathered: Any, thread: Any, channel: Any, extras: Any, at: Any
    ) -> None:
        element = thread * vector
        if back:
            end.finish(on, outs[0], result(acc, 0), element, channel, extras, at)
        else:
            size = (gathered[4] - gathered[1]) * (gathered[5] - gathered[2]) * (gathered[6] - gathered[3])
            end.finish(on, outs[0], scaled(result(acc, 0), share(size)), element, channel, extras, at)

    return _gathering(p, threads, kind, begin, visit, finish)


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
    p, kind = Pooled.of(ins[0], out, vector), np.dtype(held(out.dtype)).type
    read, mark, end = load(out.dtype, vector, constant=True), store("int32", vector), tail(epilogue, vector)
    start, more, result = spread(vector, -np.inf), larger(vector), take(vector)
    keep, same = hold(vector), repeated(vector)
    d, h, w = p.d, p.h, p.w

    def begin(best: Any, which: Any, gathered: Any) -> None:
        start(best)
        keep(which, 0, same((gathered[1] * h.length + gathered[2]) * w.length + gathered[3]))

    def visit(
        ins: Any, best: Any, which: Any, active: Any, gathered: Any, i: Any, j: Any, k: Any, channel: Any
    ) -> None:
        inside = ((gathered[1] + i) * h.length + gathered[2] + j) * w.length + gathered[3] + k
        source = (gathered[0] * (d.length * h.length * w.length) + inside) * p.channels + channel
        more(best, which, 0, read(active, ins[0], source), active, inside)

    def finish(
        on: Any, outs: Any, best: Any, which: Any, gathered: Any, thread: Any, channel: Any, extras: Any, at: Any
    ) -> None:
        end.finish(on, outs[0], result(best, 0), thread * vector, channel, extras, at)
        mark(on, outs[1], thread * vector, result(which, 0))

    return _gathering(p, threads, kind, begin, visit, finish)


@template("adaptive_max_pool_grad", "cuda", space=SPACE, fits=RULES, prefer=prefer)
def winners(
    op: Any, ins: Sequence[Spec], outs: Sequence[Spec], epilogue: Epilogue, *, threads: int, vector: int
) -> Grid:
    """Each element of dx by one thread: the dy of the bins that chose it."""
    out = outs[0]
    p, kind = Pooled.of(ins[0], out, vector), np.dtype(held(out.dtype)).type
    read, marked = load(out.dtype, vector, constant=True), load(ins[1].dtype, vector, constant=True)
    start, add, result, end = spread(vector, 0.0), plus_chosen(vector), take(vector), tail(epilogue, vector)
    d, h, w = p.d, p.h, p.w

    def begin(acc: Any, which: Any, gathered: Any) -> None:
        start(acc)

    def visit(ins: Any, acc: Any, which: Any, active: Any, gathered: Any, i: Any, j: Any, k: Any, channel: Any) -> None:
        row = ((gathered[0] * d.length + gathered[1] + i) * h.length + gathered[2] + j) * w.length
        source = (row + gathered[3] + k) * p.channels + channel
        add(acc, 0, read(active, ins[0], source), marked(active, ins[1], source), gathered[7])

    def finish(
        on: Any, outs: Any, acc: Any, which: Any, gathered: Any, thread: Any, channel: Any, extras: Any, at: Any
    ) -> None:
        end.finish(on, outs[0], result(acc, 0), thread * vector, channel, extras, at)

    return _gathering(p, threads, kind, begin, visit, finish)
