"""Many pointwise ops of one formula on arrays of any sizes, as one kernel: the updates of all parameters in one launch.

    table       a row for each block: how many elements are left, and where each operand's part begins
    kernel      reads its row, then does what `pointwise` does, on these addresses

A launch takes a few microseconds, an update of a small parameter less. The machine code knows the formula and dtypes,
but neither sizes nor addresses, so one kernel serves every model. Arrays lie at multiples of 16 bytes; what is left of
one that is no multiple of a vector is done element by element. Single numbers, as a rate, are operands of shape ().

    key = alike(op, ins, outs, epilogue)             equal for ops that may go together, None for those that may not
    many = Many(key, tuple(outs[0].size for ...))    in the order of the addresses
    cubin = many.cubin("sm_90a")
    table = many.table(addresses)                    int64, to be copied to the card once
    card.load([cubin]).bind([table's address])()
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from rapydli_flow.errors import TemplateError
from rapydli_flow.spec import Array, Spec
from rapydli_flow.template import Epilogue, Scalar

from . import compile as compiling
from .chosen import address_of, number_of
from .grid import INDEX_LIMIT, Grid, blocks_of
from .pair import held
from .ptx import append, cuda, load, load_one, store, unroll
from .scalar import formula

THREADS, ITEMS = 256, 2
ALIGNMENT = 16


@dataclass(frozen=True)
class Alike:
    """What ops have in common that one kernel can do: a formula and its tail, dtypes, and which operands are single."""

    scalar: Scalar
    tail: Scalar
    ins: tuple[str, ...]
    single: tuple[bool, ...]  # of operands of the formula, then of the tail
    extras: tuple[str, ...]
    outs: tuple[str, ...]

    @property
    def vector(self) -> int:
        """Elements that are 16 bytes of the widest operand."""
        wide = [np.dtype(d).itemsize for d, one in zip((*self.ins, *self.extras), self.single, strict=True) if not one]
        return 16 // max([*wide, *(np.dtype(dtype).itemsize for dtype in self.outs)])


def alike(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], epilogue: Epilogue | None = None) -> Alike | None:
    """What a pointwise op shares with others of its kind; None if it broadcasts, uses indices, or is too large."""
    epilogue = epilogue or Epilogue.none(outs[0])
    operands = (*ins, *epilogue.extras)
    scalar = op.scalar(tuple(f"x{i}" for i in range(len(ins)))) if getattr(op, "family", "") == "pointwise" else None
    if scalar is None or scalar.indexed or epilogue.scalar.indexed or epilogue.into:
        return None
    if any(spec.shape not in ((), outs[0].shape) for spec in operands) or not 0 < outs[0].size < INDEX_LIMIT:
        return None
    if len({held(spec.dtype) for spec in outs}) > 1:
        return None
    single = tuple(spec.shape == () for spec in operands)
    kinds = ([spec.dtype for spec in specs] for specs in (ins, epilogue.extras, outs))
    of_ins, of_extras, of_outs = map(tuple, kinds)
    return Alike(scalar, epilogue.scalar, of_ins, single, of_extras, of_outs)


@dataclass(frozen=True)
class Many:
    """Ops that are `alike`, on so many elements each."""

    key: Alike
    sizes: tuple[int, ...]
    threads: int = THREADS
    items: int = ITEMS

    @property
    def of_block(self) -> int:
        """Elements of a block."""
        return self.threads * self.key.vector * self.items

    @cached_property
    def blocks(self) -> int:
        return sum(blocks_of(size, self.of_block) for size in self.sizes)

    @property
    def width(self) -> int:
        """Numbers in a row of the table: an even one, so that each op's rows begin where a table may."""
        return blocks_of(1 + len(self.key.single) + len(self.key.outs), 2) * 2

    def rows_before(self, op: int) -> int:
        """Where the rows of an op begin: they are the table of `one` of it."""
        return sum(blocks_of(size, self.of_block) for size in self.sizes[:op])

    def one(self, op: int) -> Many:
        """The same kernel for one of the ops."""
        return replace(self, sizes=(self.sizes[op],))

    def table(self, addresses: Sequence[Sequence[int]]) -> Array:
        """A row for each block. ``addresses``: for each op of inputs, extras of the tail, and outputs."""
        k = self.key
        each = [0 if one else np.dtype(d).itemsize for d, one in zip((*k.ins, *k.extras), k.single, strict=True)]
        step = np.asarray([*each, *(np.dtype(dtype).itemsize for dtype in k.outs)], np.int64)
        rows = []
        for size, places in zip(self.sizes, addresses, strict=True):
            if wrong := [hex(place) for place, by in zip(places, step, strict=True) if by and place % ALIGNMENT]:
                raise TemplateError(f"many: addresses {wrong} are not multiples of {ALIGNMENT}. Align the arrays.")
            first = np.arange(0, size, self.of_block, dtype=np.int64)[:, None]
            row = np.hstack([size - first, np.asarray(places, np.int64) + first * step])
            rows.append(np.pad(row, ((0, 0), (0, self.width - row.shape[1]))))
        return np.vstack(rows)

    def request(self, target: str) -> compiling.Request:
        """What the compiler is asked for: the same for all sizes."""
        return _Request(self, target)  # type: ignore[return-value]

    def cubin(self, target: str, folder: Path | None = None) -> compiling.Cubin:
        """The machine code, which is the same for all sizes; from the cache if it is there."""
        (made,) = compiling.cubins(self.request(target), folder)
        return replace(made, grid=self.blocks)

    def grid(self) -> Grid:
        """The kernel: its one input is the table."""
        k, threads, items, lanes, width = self.key, self.threads, self.items, self.key.vector, self.width
        dtypes = (*k.ins, *k.extras)
        operands, own, results = len(dtypes), len(k.ins), len(k.outs)
        pointers = tuple(address_of(dtype) for dtype in (*dtypes, *k.outs))
        single, plain = k.single, not k.tail.lines

        def loads(count: int) -> tuple[Any, ...]:
            kinds = zip(dtypes, single, strict=True)
            return tuple(load_one(dtype, count) if one else load(dtype, count) for dtype, one in kinds)

        whole, rest = loads(lanes), loads(1)
        writes, write_rest = (tuple(store(dtype, count) for dtype in k.outs) for count in (lanes, 1))
        apply, apply_rest = (formula(k.scalar, k.ins, k.outs[0], count) for count in (lanes, 1))
        end, end_rest = (formula(k.tail, (k.outs[0], *k.extras), k.outs[0], count) for count in (lanes, 1))
        of_threads = threads * lanes

        def finish(active: Any, places: Any, element: Any, values: Any, apply: Any, end: Any, writes: Any) -> None:
            inputs = ()
            for j in unroll(own):
                inputs = append(inputs, values[j])
            found = apply(inputs, 0)
            if plain:
                writes[0](active, places[operands], element, found[0])
            else:
                more = (found[0],)
                for j in unroll(operands - own):
                    more = append(more, values[own + j])
                ended = end(more, 0)
                writes[0](active, places[operands], element, ended[0])
            for j in unroll(results - 1):
                writes[j + 1](active, places[operands + j + 1], element, found[j + 1])

        def kernel(ins: Any, outs: Any, work: Any, extras: Any, at: Any) -> None:
            row = cuda.blockIdx.x * width
            left = number_of(ins[0], row)
            places = ()
            for j in unroll(operands + results):
                places = append(places, pointers[j](ins[0], row + 1 + j))
            first = cuda.threadIdx.x * lanes
            loaded = ()
            for item in unroll(items):
                active = first + (item * of_threads + lanes) <= left
                values = ()
                for j in unroll(operands):
                    if single[j]:
                        values = append(values, whole[j](active, places[j], 0))
                    else:
                        values = append(values, whole[j](active, places[j], first + item * of_threads))
                loaded = append(loaded, values)
            for item in unroll(items):
                active = first + (item * of_threads + lanes) <= left
                finish(active, places, first + item * of_threads, loaded[item], apply, end, writes)
            if left % lanes > 0:  # the last block of an array may have less than a vector left
                last = left - left % lanes + cuda.threadIdx.x
                active = (last < left) & (left <= of_threads * items)
                values = ()
                for j in unroll(operands):
                    if single[j]:
                        values = append(values, rest[j](active, places[j], 0))
                    else:
                        values = append(values, rest[j](active, places[j], last))
                finish(active, places, last, values, apply_rest, end_rest, write_rest)

        return Grid(kernel, self.blocks, threads)


@dataclass(frozen=True)
class _Request:
    """What `compile.cubins` asks of a request."""

    many: Many
    target: str
    outs: tuple[Spec, ...] = ()
    work: tuple[Spec, ...] = ()

    @property
    def epilogue(self) -> Epilogue:
        return Epilogue.none(Spec(()))

    @property
    def ins(self) -> tuple[Spec, ...]:
        return (Spec((self.many.blocks, self.many.width), "int64"),)

    @property
    def key(self) -> str:
        sources = (f"{module} {text}" for module, text in compiling.sources(__name__))
        parts = (*sources, repr((self.many.key, self.many.threads, self.many.items)), self.target)
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]

    def grids(self) -> tuple[Grid, ...]:
        return (self.many.grid(),)
