"""Sums in parts: the second kernel of a split sum, which adds what blocks left in the workspace, in a fixed order.

`add_in_order` is for sums of many elements: a thread adds all parts of a few neighbours. `add_parts` has several loads
under way, and where there are few elements the threads of a block share the parts out among themselves, and add the
shares through shared memory.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from rapydli_flow.template import Epilogue

from .access import pick, plus
from .grid import Grid, blocks_of, widest
from .pair import held
from .ptx import clear, cuda, float32, hold, load, put, take, unroll
from .tail import tail

THREADS = 256
AT_ONCE = 8  # loads under way


def add_in_order(epilogue: Epilogue, parts: int, lanes: int, *, source: int = 0, from_zero: bool = False) -> Grid:
    """outs[0] = epilogue(sum of the parts in ``work[source]``, float32), by threads of ``lanes`` neighbours.

    ``from_zero``: the first part is added to zero, else it is what the others are added to.
    """
    size, channels, wide = epilogue.out.size, epilogue.out.shape[-1], min(lanes, 4)
    read, more, keep, zero = load("float32", wide), plus(wide), hold(wide), clear(lanes)
    gather, end = take(lanes), tail(epilogue, lanes)
    begun, pieces = 0 if from_zero else 1, lanes // wide

    def kernel(ins: Any, outs: Any, work: Any, extras: Any, at: Any) -> None:
        total = cuda.local.array(lanes, float32)
        element = (cuda.blockIdx.x * THREADS + cuda.threadIdx.x) * lanes
        active = element < size
        if from_zero:
            zero(total)
        else:
            for i in unroll(pieces):
                keep(total, i * wide, read(active, work[source], element + i * wide))
        for part in range(parts - begun):
            for i in unroll(pieces):
                place = part * size + (begun * size + element) + i * wide
                more(total, i * wide, read(active, work[source], place))
        end.finish(active, outs[0], gather(total, 0), element, element % channels, extras, at)

    return Grid(kernel, blocks_of(size, THREADS * lanes), THREADS)


def add_parts(epilogue: Epilogue, parts: int, size: int) -> Grid:
    """outs[0] = epilogue(sum of the parts in work[0]); each part has ``size`` elements."""
    channels, number = epilogue.out.shape[-1], held(epilogue.out.dtype)
    wide = size >= 2**19
    lanes = widest(channels, itemsize=np.dtype(number).itemsize) if wide else 1
    slices = 1 if wide else next(s for s in (1, 2, 4, 8) if s * AT_ONCE >= parts or s == 8)
    across = THREADS // slices
    own = blocks_of(parts, slices)
    end, read, keep, gather = tail(epilogue, lanes), load(number, lanes), hold(lanes), take(lanes)
    more, sums, write, fetch, add = plus(lanes), clear(lanes), put(1), pick(1, 1), plus(1)
    at_once = min(own, AT_ONCE)
    rounds = blocks_of(own, at_once)
    kind = getattr(np, number)

    def kernel(ins: Any, outs: Any, work: Any, extras: Any, at: Any) -> None:
        total = cuda.local.array(lanes, kind)
        ahead = cuda.local.array(lanes * at_once, kind)
        thread = cuda.threadIdx.x
        which = thread // across
        element = (cuda.blockIdx.x * across + thread % across) * lanes
        sums(total)
        for some in range(rounds):
            for j in unroll(at_once):
                step = some * at_once + j
                part = which * own + step
                active = (element < size) & (step < own) & (part < parts)
                keep(ahead, j * lanes, read(active, work[0], part * size + element))
            for j in unroll(at_once):
                more(total, 0, gather(ahead, j * lanes))
        if slices > 1:
            shared = cuda.shared.array(THREADS, kind, alignment=16)
            write(shared, thread, total, 0)
            cuda.syncthreads()
            for j in unroll(slices - 1):
                add(total, 0, fetch(shared, thread % across + (j + 1) * across))
        active = (element < size) & (which < 1)
        end.finish(active, outs[0], gather(total, 0), element, element % channels, extras, at)

    return Grid(kernel, blocks_of(size, across * lanes), THREADS)
