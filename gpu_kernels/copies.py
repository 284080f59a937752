"""Copies between an array and parts of it: a thread moves a few vectors, all loaded before the first is stored.

    strided    slice, transpose      y[o] = x[base + the sum of coordinate * step]
    spread     slice_grad, pad       y[o] = x[...] where the output lies on x, else a constant

Neighbouring axes that a step or a place describes together are merged: fewer divisions, longer vectors.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from operator import mul
from typing import Any

import numpy as np

from rapydli_flow.spec import HALVES, Spec
from rapydli_flow.template import Config, Device, Epilogue, Rule, broken

from .access import Line, affine, lies_on, otherwise
from .grid import INDEX_LIMIT, Grid, blocks_of
from .ptx import append, cuda, load, unroll
from .tail import tail

SPACE = {"threads": (256, 128, 512), "vector": (4, 2, 1, 8), "items": (1, 2, 4)}


def steps_of(shape: Sequence[int]) -> tuple[int, ...]:
    """Elements from one position to the next along each axis of a contiguous array."""
    return tuple(accumulate(reversed((*shape[1:], 1)), mul))[::-1] if shape else ()


def merged(sizes: Sequence[int], steps: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Sizes and steps of as few axes as walk over the same elements in the same order."""
    runs: list[tuple[int, int]] = []
    for size, step in zip(sizes, steps, strict=True):
        if size == 1:
            continue
        if runs and runs[-1][1] == step * size:
            runs[-1] = runs[-1][0] * size, step
        else:
            runs.append((size, step))
    runs = runs or [(1, 1)]
    return tuple(size for size, _ in runs), tuple(step for _, step in runs)


def merged_lines(lines: Sequence[Line]) -> tuple[Line, ...]:
    """As few axes as say the same: those that x fills wholly go into the axis before them, where that has no step."""
    out: list[Line] = []
    for big, small, start, step in reversed(lines):
        if out and step == 1 and out[-1][:2] == (out[-1][1], out[-1][1]):
            run = out[-1][0]
            out[-1] = (big * run, small * run, start * run, 1)
        else:
            out.append((big, small, start, step))
    return tuple(out[::-1]) or ((1, 1, 0, 1),)


def countable(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device) -> bool:
    """Are these arrays of elements that 32 bits can count, and more than none?"""
    return all(0 < spec.size < INDEX_LIMIT - 2**20 for spec in (*ins, *outs))


def narrow(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device, *, vector: int) -> bool:
    """No access is wider than 16 bytes."""
    return np.dtype(outs[0].dtype).itemsize * vector <= 16


def preferred(rules: dict[str, Rule], op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device) -> Config:
    """The widest vectors, one in a thread: other warps keep the memory busy."""
    vectors = (8, 4, 2, 1) if outs[0].dtype in (*HALVES, "uint8") else (4, 2, 1)

    def tried(vector: int) -> Config:
        return {"threads": 256, "vector": vector, "items": 1}

    return next((c for c in map(tried, vectors) if broken(rules, op, ins, outs, device, c) is None), tried(1))


def _lanes(epilogue: Epilogue, vector: int, items: int) -> tuple[int, int]:
    """Vectors of a tail lie in one row of the last axis: else single elements, and as many more items."""
    fits = epilogue.identity or epilogue.out.shape[-1:] == () or epilogue.out.shape[-1] % vector == 0
    return (vector, items) if fits else (1, items * vector)


def strided(
    out: Spec, epilogue: Epilogue, *, steps: Sequence[int], base: int, threads: int, vector: int, items: int
) -> Grid:
    """y = x, read from ``base`` on with a step for each axis of y."""
    sizes, moves = merged(out.shape, steps)
    lanes, items = _lanes(epilogue, vector, items)
    size, channels, of_block = out.size, out.shape[-1] if out.shape else 1, threads * lanes
    source_of, read, end = affine(sizes, moves, base), load(out.dtype, lanes), tail(epilogue, lanes)

    def kernel(ins: Any, outs: Any, work: Any, extras: Any, at: Any) -> None:
        first = cuda.blockIdx.x * (of_block * items) + cuda.threadIdx.x * lanes
        loaded = ()
        for item in unroll(items):
            element = first + item * of_block
            loaded = append(loaded, read(element < size, ins[0], source_of(element)))
        for item in unroll(items):
            element = first + item * of_block
            channel = element % channels
            source = source_of(element)
            end.finish_part(element < size, outs[0], loaded[item], element, source, channel, extras, at)

    return Grid(kernel, blocks_of(size, of_block * items), threads)


def spread(
    lines: Sequence[Line], out: Spec, epilogue: Epilogue, *, value: float, threads: int, vector: int, items: int
) -> Grid:
    """y[start + step * i] = x[i] along every axis, ``value`` elsewhere."""
    lanes, items = _lanes(epilogue, vector, items)
    size, channels, of_block = out.size, out.shape[-1] if out.shape else 1, threads * lanes
    source_of, read, end = lies_on(merged_lines(lines)), load(out.dtype, lanes, constant=True), tail(epilogue, lanes)
    filled = otherwise(out.dtype, lanes, value)

    def kernel(ins: Any, outs: Any, work: Any, extras: Any, at: Any) -> None:
        first = cuda.blockIdx.x * (of_block * items) + cuda.threadIdx.x * lanes
        loaded = ()
        for item in unroll(items):
            element = first + item * of_block
            source = source_of(element)
            there = (element < size) & (source >= 0)
            loaded = append(loaded, filled(there, read(there, ins[0], source)))
        for item in unroll(items):
            element = first + item * of_block
            end.finish(element < size, outs[0], loaded[item], element, element % channels, extras, at)

    return Grid(kernel, blocks_of(size, of_block * items), threads)


def walks(out: Spec, steps: Sequence[int], base: int, vector: int) -> bool:
    """Do vectors lie side by side in what is read with these steps, too?"""
    if vector == 1:
        return True
    sizes, moves = merged(out.shape, steps)
    return moves[-1] == 1 and not any(v % vector for v in (sizes[-1], base, *moves[:-1]))
