"""Formulas over operands that broadcast to the outputs: one thread computes a few neighbours.

    element     operands of the output's shape: vectors, where the element lies
    row         operands that have the output's last axis: vectors, where the element projects to
    one         any other: once for all lanes
    steady      operands of `row` and `one` that are the same for all items of a thread: loaded once

An item is a vector of neighbours. A thread first loads the operands of all of its items, those of the epilogue too,
so that many loads are under way at once; then it computes and stores. A result may therefore lie on an operand of its
shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np

from rapydli_flow.spec import HALVES, Spec
from rapydli_flow.template import Config, Device, Epilogue, Scalar

from .grid import INDEX_LIMIT, Grid, blocks_of
from .pair import held
from .ptx import append, cuda, load, load_one, store, unroll
from .scalar import counted, formula, itself, nowhere, place, project

SPACE = {"threads": (256, 128, 512), "vector": (4, 2, 1, 8), "items": (1, 2, 4)}


def _reach(spec: Spec, out: Spec) -> str:
    """How an operand is read: 'element', 'row' (it has the last axis of ``out``) or 'one'."""
    if spec.shape == out.shape:
        return "element"
    if spec.size == 1 or spec.shape[-1] != out.shape[-1] or out.shape[-1] == 1:
        return "one"
    return "row"


def _period(spec: Spec, out: Spec) -> int:
    """After so many elements of ``out`` an operand is read at the same place again; 0: not at all."""
    own = spec.shape
    while own and own[0] == 1:
        own = own[1:]
    size = prod(own)
    return size if own == out.shape[len(out.shape) - len(own) :] and size < out.size else 0


def _row(ins: Sequence[Spec], out: Spec, indexed: bool) -> int:
    """Vectors lie within so many elements: all, unless there are operands, or an index, of the last axis."""
    simple = not indexed and all(spec.size == 1 or spec.shape == out.shape for spec in ins)
    return out.size if simple else (out.shape or (1,))[-1]


def fits(
    op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device, *, threads: int, vector: int, items: int
) -> bool:
    return _fits(ins, outs, vector, bool(getattr(op, "indexed", False)))


def _fits(ins: Sequence[Spec], outs: Sequence[Spec], vector: int, indexed: bool) -> bool:
    out = outs[0]
    if not all(0 < spec.size < INDEX_LIMIT - 2**20 for spec in (*ins, *outs)):
        return False
    if len({held(spec.dtype) for spec in outs}) > 1:
        return False
    wide = [spec.dtype for spec in ins if _reach(spec, out) != "one"] + [spec.dtype for spec in outs]
    if any(np.dtype(dtype).itemsize * vector > 16 for dtype in wide):
        return False
    return _row(ins, out, indexed) % vector == 0


def _vectors(ins: Sequence[Spec], outs: Sequence[Spec]) -> tuple[int, ...]:
    """Widths to try: 16 bytes of the narrowest floats first."""
    halves = any(spec.dtype in HALVES for spec in (*ins, *outs))
    return (8, 4, 2, 1) if halves else (4, 2, 1)


def prefer(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device) -> Config:
    """One vector a thread, the widest; more for formulas that take long, so that what they share is computed once."""
    return prefer_of(ins, outs, device, indexed=bool(getattr(op, "indexed", False)))


def prefer_of(ins: Sequence[Spec], outs: Sequence[Spec], device: Device, *, indexed: bool) -> Config:
    """The same for any formula over operands that broadcast."""
    out, cores = outs[0], device.cores if device.cores > 1 else 132
    vector = next((v for v in _vectors(ins, outs) if _fits(ins, outs, v, indexed)), 1)
    many = indexed and out.size >= 256 * vector * 4 * cores * 8
    return {"threads": 256, "vector": vector, "items": 4 if many else 1}


class _Operands:
    """How each of several operands is read: by which load, where, and whether once for all items ``step`` apart."""

    def __init__(self, specs: Sequence[Spec], out: Spec, lanes: int, step: int) -> None:
        reach = tuple(_reach(spec, out) for spec in specs)
        self.count = len(specs)
        self.places = tuple(
            itself if how == "element" else project(out.shape, spec.shape)
            for spec, how in zip(specs, reach, strict=True)
        )
        self.loads = tuple(
            load_one(spec.dtype, lanes) if how == "one" else load(spec.dtype, lanes, constant=how == "row")
            for spec, how in zip(specs, reach, strict=True)
        )
        periods = [_period(spec, out) for spec in specs]
        self.steady = tuple(bool(period) and step % period == 0 for period in periods)
        self.slots = tuple(sum(self.steady[:k]) for k in range(self.count))


def elements(
    scalar: Scalar,
    ins: Sequence[Spec],
    outs: Sequence[Spec],
    epilogue: Epilogue,
    *,
    threads: int,
    vector: int,
    items: int,
    own_block: bool = False,
) -> Grid:
    """The kernel of a formula over operands that broadcast to the outputs.

    ``own_block``: its index counts elements of the block, not of the whole array; then there is no epilogue with one.
    """
    out, lanes, of_block = outs[0], vector, threads * vector
    size = out.size
    extras = epilogue.extras
    if _row([*ins, *extras], out, scalar.indexed or epilogue.scalar.indexed) % lanes:
        # such a vector has elements of several rows: read what has rows element by element
        lanes, of_block, items = 1, threads, items * lanes
    own, tails = (_Operands(specs, out, lanes, of_block * (items > 1)) for specs in (ins, extras))
    apply = formula(scalar, tuple(spec.dtype for spec in ins), out.dtype, lanes)
    end = formula(epilogue.scalar, (out.dtype, *(spec.dtype for spec in extras)), out.dtype, lanes)
    where = counted() if own_block else place(out.shape) if scalar.indexed or epilogue.scalar.indexed else nowhere()
    writes = tuple(store(spec.dtype, lanes) for spec in outs)
    plain, results = epilogue.identity, len(outs)

    def kernel(ins: Any, outs: Any, work: Any, extras: Any, at: Any) -> None:
        first = cuda.blockIdx.x * (of_block * items) + cuda.threadIdx.x * lanes
        kept = ()
        for k in unroll(own.count):
            if own.steady[k]:
                kept = append(kept, own.loads[k](first < size, ins[k], own.places[k](first)))
        kept_tails = ()
        for k in unroll(tails.count):
            if tails.steady[k]:
                kept_tails = append(kept_tails, tails.loads[k](first < size, extras[k], tails.places[k](first)))
        loaded = ()
        loaded_tails = ()
        for item in unroll(items):
            element = first + item * of_block
            active = element < size
            values = ()
            for k in unroll(own.count):
                if own.steady[k]:
                    values = append(values, kept[own.slots[k]])
                else:
                    values = append(values, own.loads[k](active, ins[k], own.places[k](element)))
            loaded = append(loaded, values)
            more = ()
            for k in unroll(tails.count):
                if tails.steady[k]:
                    more = append(more, kept_tails[tails.slots[k]])
                else:
                    more = append(more, tails.loads[k](active, extras[k], tails.places[k](element)))
            loaded_tails = append(loaded_tails, more)
        for item in unroll(items):
            element = first + item * of_block
            active = element < size
            index = where(element, at)
            found = apply(loaded[item], index)
            if plain:
                writes[0](active, outs[0], element, found[0])
            else:
                operands = (found[0],)
                for k in unroll(tails.count):
                    operands = append(operands, loaded_tails[item][k])
                ended = end(operands, index)
                writes[0](active, outs[0], element, ended[0])
            for k in unroll(results - 1):
                writes[k + 1](active, outs[k + 1], element, found[k + 1])

    return Grid(kernel, blocks_of(size, of_block * items), threads)
