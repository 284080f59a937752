"""Sums in parts: the second kernel of a split sum, which adds what blocks left in the workspace, in a fixed order.

A block adds neighbouring elements. Where there are few of them its threads share the parts out among themselves, and
add the shares through shared memory.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from rapydli_flow.template import Epilogue

from .grid import Grid, blocks_of, widest
from .pair import Pair, held
from .ptx import clear, cuda, hold, load, put, take, unroll
from .tail import tail

THREADS = 256
AT_ONCE = 8  # loads under way


@cache
def add_up(lanes: int) -> Pair:
    """``(sums, at, registers, first)``: adds neighbouring registers to as many sums."""

    def twin(sums: Any, at: int, registers: Any, first: int) -> None:
        sums[at : at + lanes] += registers[first : first + lanes]

    def rule(sums: Any, at: Any, registers: Any, first: Any) -> Any:
        from numba.cuda import types

        def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            target, source = (context.make_array(sig.args[i])(context, builder, args[i]).data for i in (0, 2))
            for j in range(lanes):
                number = context.get_constant(types.int32, j)
                place = builder.gep(target, [builder.add(args[1], number)], inbounds=True)
                other = builder.gep(source, [builder.add(args[3], number)], inbounds=True)
                builder.store(builder.fadd(builder.load(place), builder.load(other)), place)
            return context.get_dummy_value()

        return types.void, (sums, types.int32, registers, types.int32), emit

    return Pair(f"add_up{lanes}", twin, rule)


def _get_rule(shared: Any, at: Any, registers: Any, first: Any) -> Any:
    from numba.cuda import types

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        source, target = (context.make_array(sig.args[i])(context, builder, args[i]).data for i in (0, 2))
        value = builder.load(builder.gep(source, [args[1]], inbounds=True))
        builder.store(value, builder.gep(target, [args[3]], inbounds=True))
        return context.get_dummy_value()

    return types.void, (shared, types.int32, registers, types.int32), emit


def _get_twin(shared: Any, at: Any, registers: Any, first: int) -> None:
    registers[first] = shared.read(np.asarray(at))


get = Pair("get", _get_twin, _get_rule)  # ``(shared, at, registers, first)``: an element of shared memory to a register


def add_parts(epilogue: Epilogue, parts: int, size: int) -> Grid:
    """outs[0] = epilogue(sum of the parts in work[0]); each part has ``size`` elements."""
    channels, number = epilogue.out.shape[-1], held(epilogue.out.dtype)
    wide = size >= 2**19
    lanes = widest(channels, itemsize=np.dtype(number).itemsize) if wide else 1
    slices = 1 if wide else next(s for s in (1, 2, 4, 8) if s * AT_ONCE >= parts or s == 8)
    across = THREADS // slices
    own = blocks_of(parts, slices)
    end, read, keep, gather = tail(epilogue, lanes), load(number, lanes), hold(lanes), take(lanes)
    more, sums, write, one = add_up(lanes), clear(lanes), put(1), add_up(1)
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
                more(total, 0, ahead, j * lanes)
        if slices > 1:
            shared = cuda.shared.array(THREADS, kind, alignment=16)
            write(shared, thread, total, 0)
            cuda.syncthreads()
            for j in unroll(slices - 1):
                get(shared, thread % across + (j + 1) * across, ahead, 0)
                one(total, 0, ahead, 0)
        active = (element < size) & (which < 1)
        end.finish(active, outs[0], gather(total, 0), element, element % channels, extras, at)

    return Grid(kernel, blocks_of(size, across * lanes), THREADS)
