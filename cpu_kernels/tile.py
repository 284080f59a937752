"""Register tiles: a Numba type that holds a small matrix of SIMD vectors, and what can be done with it.

    Tile(lines, rows, vectors, lanes): lines * rows rows, each of `vectors` vectors of `lanes` floats

            w[o : o+lanes]  w[o+lanes : ...]            outer: acc[l, i, j] += x[l, i] * w[j]
    x[0,0]     acc[0,0,0]      acc[0,0,1]               x[l, i] is a scalar at
    x[0,1]     acc[0,1,0]      acc[0,1,1]                   x_offset + l * x_jump + i * x_stride
    x[1,0]     acc[1,0,0]      acc[1,0,1]

LLVM keeps a tile in registers as long as its vectors, one row of `w` and one broadcast scalar fit. A
loop nest of plain Numba around `outer` then runs at the speed of the multiply-add units, which plain
loops do not reach. Convolution, its gradients and matrix products are all such nests.

Extents are compile-time constants. `tail` is the number of valid lanes of the last vector (0: all);
the others are neither read nor written. Vectors of any length compile on every processor (LLVM
splits those that are too long), memory needs the alignment of one element only, and multiply-adds
are fused where the processor can.

Source of the method: Goto and van de Geijn, "Anatomy of high-performance matrix multiplication" (2008).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.errors import TypingError
from numba.extending import intrinsic, models, register_model

from .buffer import constant, data

FULL_REGISTERS, FEW_REGISTERS = 32, 16


def registers(size_bytes: int) -> int:
    """How many vector registers of this size to count on: 64-byte vectors come in 32, others in 16."""
    return FULL_REGISTERS if size_bytes >= 64 else FEW_REGISTERS


class Tile(types.Type):
    """Numba type of a register tile; ``dtype`` is float32 or float64."""

    def __init__(self, extents: tuple[int, ...], dtype: Any) -> None:
        self.lines, self.rows, self.vectors, self.lanes = extents
        self.dtype = dtype
        super().__init__(name=f"Tile({', '.join(map(str, extents))}, {dtype})")

    @property
    def vector(self) -> ir.VectorType:
        element = ir.FloatType() if self.dtype is types.float32 else ir.DoubleType()
        return ir.VectorType(element, self.lanes)

    @property
    def align(self) -> int:
        return int(self.dtype.bitwidth) // 8

    def slots(self) -> list[tuple[int, int, int]]:
        """(line, row, number of the row's first vector), in memory order."""
        return [(n, i, (n * self.rows + i) * self.vectors) for n in range(self.lines) for i in range(self.rows)]


@register_model(Tile)
class _TileModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, tile: Tile) -> None:
        values = [tile.vector] * (tile.lines * tile.rows * tile.vectors)
        super().__init__(manager, tile, ir.LiteralStructType(values))


class _Emit:
    """The LLVM instructions that tiles are made of, at one call of an intrinsic."""

    def __init__(self, context: Any, builder: ir.IRBuilder, tile: Tile, tail: int = 0) -> None:
        self.context, self.builder, self.tile = context, builder, tile
        self.tail = tail % tile.lanes
        self.int = ir.IntType(32)

    def data(self, kind: Any, array: ir.Value) -> ir.Value:
        return data(self.context, self.builder, kind, array)

    def at(self, data: ir.Value, *steps: tuple[ir.Value, int]) -> ir.Value:
        """Address of element ``sum of value * factor``; factor 0 adds nothing."""
        total = None
        for value, factor in steps:
            if factor:
                part = self.builder.mul(value, ir.Constant(value.type, factor)) if factor != 1 else value
                total = part if total is None else self.builder.add(total, part)
        assert total is not None
        return self.builder.gep(data, [total])

    def vector_at(self, data: ir.Value, start: ir.Value, j: int) -> ir.Value:
        """Address of the j-th vector behind element ``start``."""
        return self.builder.gep(data, [self.builder.add(start, ir.Constant(start.type, j * self.tile.lanes))])

    def places(self, data: ir.Value, start: ir.Value, stride: ir.Value) -> Iterator[tuple[int, int, ir.Value]]:
        """(number in the tile, number in its row, address) of every vector, for rows ``stride`` elements apart."""
        for n, (_, _, first) in enumerate(self.tile.slots()):
            row = self.builder.add(start, self.builder.mul(stride, ir.Constant(stride.type, n)))
            for j in range(self.tile.vectors):
                yield first + j, j, self.vector_at(data, row, j)

    def masked(self, j: int) -> bool:
        return bool(self.tail) and j == self.tile.vectors - 1

    @property
    def mask(self) -> ir.Constant:
        one = ir.IntType(1)
        bits = [ir.Constant(one, int(i < self.tail)) for i in range(self.tile.lanes)]
        return ir.Constant(ir.VectorType(one, self.tile.lanes), bits)

    def function(self, name: str, result: ir.Type, operands: list[ir.Type]) -> ir.Function:
        return cgutils.get_or_insert_function(self.builder.module, ir.FunctionType(result, operands), name)

    def suffix(self, vector: ir.VectorType) -> str:
        """How names of LLVM's intrinsics end."""
        element = vector.element
        kind = f"i{element.width}" if isinstance(element, ir.IntType) else f"f{self.tile.align * 8}"
        return f"v{self.tile.lanes}{kind}"

    def load(self, pointer: ir.Value, j: int) -> ir.Value:
        """The j-th vector of a row, of the elements that the pointer is to; invalid lanes are 0."""
        vector = ir.VectorType(pointer.type.pointee, self.tile.lanes)
        pointer = self.builder.bitcast(pointer, vector.as_pointer())
        align = self.align(vector)
        if not self.masked(j):
            return self.builder.load(pointer, align=align)
        operands = [pointer.type, self.int, self.mask.type, vector]
        load = self.function(f"llvm.masked.load.{self.suffix(vector)}.p0", vector, operands)
        return self.builder.call(load, [pointer, self.int(align), self.mask, ir.Constant(vector, None)])

    def store(self, value: ir.Value, pointer: ir.Value, j: int) -> None:
        """Write the j-th vector of a row, as whole numbers where the pointer is to such."""
        vector = ir.VectorType(pointer.type.pointee, self.tile.lanes)
        if isinstance(vector.element, ir.IntType):
            value = self.builder.fptoui(value, vector)
        pointer = self.builder.bitcast(pointer, vector.as_pointer())
        align = self.align(vector)
        if not self.masked(j):
            self.builder.store(value, pointer, align=align)
            return
        operands = [vector, pointer.type, self.int, self.mask.type]
        store = self.function(f"llvm.masked.store.{self.suffix(vector)}.p0", ir.VoidType(), operands)
        self.builder.call(store, [value, pointer, self.int(align), self.mask])

    def align(self, vector: ir.VectorType) -> int:
        """Bytes of an element."""
        element = vector.element
        return element.width // 8 if isinstance(element, ir.IntType) else self.tile.align

    def broadcast(self, scalar: ir.Value) -> ir.Value:
        nothing = ir.Constant(ir.VectorType(scalar.type, self.tile.lanes), ir.Undefined)
        first = self.builder.insert_element(nothing, scalar, self.int(0))
        everywhere = ir.Constant(ir.VectorType(self.int, self.tile.lanes), [0] * self.tile.lanes)
        return self.builder.shuffle_vector(first, nothing, everywhere)

    def fused(self, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
        # fmuladd, not fma: without such an instruction fma becomes a library call for each lane
        vector = self.tile.vector
        return self.builder.call(self.function(f"llvm.fmuladd.{self.suffix(vector)}", vector, [vector] * 3), [a, b, c])


def _extents(*given: Any) -> tuple[int, ...]:
    names = ("lines", "rows", "vectors", "lanes")
    return tuple(constant(f"zeros: {name}", extent) for name, extent in zip(names, given, strict=True))


@intrinsic(prefer_literal=True)
def zeros(typingctx, lines, rows, vectors, lanes, like):  # type: ignore[no-untyped-def]
    """A tile of zeros with the dtype of array ``like``; the extents are constants."""
    tile = Tile(_extents(lines, rows, vectors, lanes), like.dtype)

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        count = tile.lines * tile.rows * tile.vectors
        zero = ir.Constant(tile.vector, [0.0] * tile.lanes)
        return ir.Constant(context.get_value_type(tile), [zero] * count)

    return tile(lines, rows, vectors, lanes, like), codegen


@intrinsic(prefer_literal=True)
def outer(typingctx, tile, x, x_offset, x_stride, x_jump, w, w_offset, tail):  # type: ignore[no-untyped-def]
    """tile[l, i, j] + x[x_offset + l*x_jump + i*x_stride] * w[w_offset + j*lanes : ... + lanes]."""
    valid = constant("outer: tail", tail)

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        value, x_array, start, stride, jump, w_array, w_start, _ = args
        emit = _Emit(context, builder, tile, valid)
        x_data, w_data = emit.data(x, x_array), emit.data(w, w_array)
        row = [emit.load(emit.vector_at(w_data, w_start, j), j) for j in range(tile.vectors)]
        for line, i, first in tile.slots():
            scalar = builder.load(emit.at(x_data, (start, 1), (jump, line), (stride, i)))
            scalar = emit.broadcast(scalar)
            for j in range(tile.vectors):
                total = emit.fused(scalar, row[j], builder.extract_value(value, first + j))
                value = builder.insert_value(value, total, first + j)
        return value

    size = types.intp
    return tile(tile, x, size, size, size, w, size, tail), codegen


@intrinsic(prefer_literal=True)
def columns(typingctx, tile, x, x_offset, x_stride, w, w_offset, tail):  # type: ignore[no-untyped-def]
    """tile[i, j] + x[x_offset + i*x_stride + j*lanes : ... + lanes] * w[w_offset + j*lanes : ... + lanes], 1 line."""
    valid = constant("columns: tail", tail)

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        value, x_array, start, stride, w_array, w_start, _ = args
        emit = _Emit(context, builder, tile, valid)
        x_data, w_data = emit.data(x, x_array), emit.data(w, w_array)
        factors = [emit.load(emit.vector_at(w_data, w_start, j), j) for j in range(tile.vectors)]
        for slot, j, pointer in emit.places(x_data, start, stride):
            total = emit.fused(emit.load(pointer, j), factors[j], builder.extract_value(value, slot))
            value = builder.insert_value(value, total, slot)
        return value

    size = types.intp
    return tile(tile, x, size, size, w, size, tail), codegen


def _rows(tile: Tile, y: Any, valid: int, combine: Callable[..., ir.Value]) -> Callable[..., ir.Value]:
    """Code that takes rows of y into a tile: ``combine(builder, vector of the tile, vector of y)``."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        value, y_array, start, stride, _ = args
        emit = _Emit(context, builder, tile, valid)
        for slot, j, pointer in emit.places(emit.data(y, y_array), start, stride):
            total = combine(builder, builder.extract_value(value, slot), emit.load(pointer, j))
            value = builder.insert_value(value, total, slot)
        return value

    return codegen


@intrinsic(prefer_literal=True)
def load(typingctx, tile, y, y_offset, y_stride, tail):  # type: ignore[no-untyped-def]
    """A tile like ``tile`` whose rows are read from y, ``y_stride`` elements apart; invalid lanes are 0."""
    codegen = _rows(tile, y, constant("load: tail", tail), lambda builder, old, new: new)
    return tile(tile, y, types.intp, types.intp, tail), codegen


@intrinsic(prefer_literal=True)
def plus(typingctx, tile, y, y_offset, y_stride, tail):  # type: ignore[no-untyped-def]
    """The tile + the rows of y, ``y_stride`` elements apart."""
    codegen = _rows(tile, y, constant("plus: tail", tail), lambda builder, old, new: builder.fadd(old, new))
    return tile(tile, y, types.intp, types.intp, tail), codegen


@intrinsic
def fill(typingctx, tile, value):  # type: ignore[no-untyped-def]
    """A tile like ``tile`` with ``value`` everywhere."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        made, vector = args[0], _Emit(context, builder, tile).broadcast(args[1])
        for slot in range(tile.lines * tile.rows * tile.vectors):
            made = builder.insert_value(made, vector, slot)
        return made

    return tile(tile, tile.dtype), codegen


@intrinsic(prefer_literal=True)
def larger(typingctx, best, which, x, x_offset, tap, tail):  # type: ignore[no-untyped-def]
    """(best, which), tiles of one row, where x[x_offset + ...] is larger than ``best``: that, and ``tap``.

    Of equal values the first one stays; a NaN is larger than any number, and the first NaN stays.
    """
    valid = constant("larger: tail", tail)
    both = types.UniTuple(best, 2)

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        value, winner, x_array, start, number, _ = args
        emit = _Emit(context, builder, best, valid)
        data, number = emit.data(x, x_array), emit.broadcast(number)
        for slot, j, pointer in emit.places(data, start, start):
            new, old = emit.load(pointer, j), builder.extract_value(value, slot)
            take = builder.and_(builder.fcmp_unordered(">", new, old), builder.fcmp_ordered("ord", old, old))
            value = builder.insert_value(value, builder.select(take, new, old), slot)
            kept = builder.extract_value(winner, slot)
            winner = builder.insert_value(winner, builder.select(take, number, kept), slot)
        return context.make_tuple(builder, both, [value, winner])

    return both(best, which, x, types.intp, best.dtype, tail), codegen


@intrinsic(prefer_literal=True)
def chosen(typingctx, tile, y, which, offset, tap, tail):  # type: ignore[no-untyped-def]
    """A tile of one row + y[offset + ...] where which[offset + ...], whole numbers, is ``tap``."""
    valid = constant("chosen: tail", tail)

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        value, y_array, which_array, start, number, _ = args
        emit = _Emit(context, builder, tile, valid)
        data, numbers = emit.data(y, y_array), emit.data(which, which_array)
        wanted = emit.broadcast(number)
        zero = ir.Constant(tile.vector, None)
        places = zip(emit.places(data, start, start), emit.places(numbers, start, start), strict=True)
        for (slot, j, pointer), (_, _, at_number) in places:
            same = builder.icmp_signed("==", emit.load(at_number, j), wanted)
            total = builder.select(same, emit.load(pointer, j), zero)
            value = builder.insert_value(value, builder.fadd(builder.extract_value(value, slot), total), slot)
        return value

    return tile(tile, y, which, types.intp, which.dtype, tail), codegen


@intrinsic(prefer_literal=True)
def store(typingctx, tile, y, y_offset, y_stride, tail):  # type: ignore[no-untyped-def]
    """Write the rows of the tile to y, ``y_stride`` elements apart; to whole numbers they are converted."""
    valid = constant("store: tail", tail)

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        value, y_array, start, stride, _ = args
        emit = _Emit(context, builder, tile, valid)
        data = emit.data(y, y_array)
        for slot, j, pointer in emit.places(data, start, stride):
            emit.store(builder.extract_value(value, slot), pointer, j)
        return context.get_dummy_value()

    return types.void(tile, y, types.intp, types.intp, tail), codegen


@intrinsic(prefer_literal=True)
def add(typingctx, tile, y, y_offset, y_stride, tail):  # type: ignore[no-untyped-def]
    """Add the rows of the tile to y, ``y_stride`` elements apart, one after the other: they may overlap."""
    valid = constant("add: tail", tail)

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        value, y_array, start, stride, _ = args
        emit = _Emit(context, builder, tile, valid)
        data = emit.data(y, y_array)
        for slot, j, pointer in emit.places(data, start, stride):
            emit.store(builder.fadd(emit.load(pointer, j), builder.extract_value(value, slot)), pointer, j)
        return context.get_dummy_value()

    return types.void(tile, y, types.intp, types.intp, tail), codegen


@intrinsic(prefer_literal=True)
def transpose(typingctx, tile):  # type: ignore[no-untyped-def]
    """The transpose of a tile of 1 line, `lanes` rows and 1 vector, in registers."""
    if (tile.lines, tile.rows, tile.vectors) != (1, tile.lanes, 1):
        raise TypingError(f"transpose: {tile} is not square. Give 1 line, {tile.lanes} rows and 1 vector.")

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        value, lanes = args[0], tile.lanes
        rows = [builder.extract_value(value, i) for i in range(lanes)]
        which = ir.VectorType(ir.IntType(32), lanes)
        # swap off-diagonal blocks of 1, 2, 4, ... elements: log2(lanes) rounds
        block = 1
        while block < lanes:
            low = [n if not n & block else n - block + lanes for n in range(lanes)]
            high = [n + block if not n & block else n + lanes for n in range(lanes)]
            for i in (i for i in range(lanes) if not i & block):
                a, b = rows[i], rows[i + block]
                rows[i] = builder.shuffle_vector(a, b, ir.Constant(which, low))
                rows[i + block] = builder.shuffle_vector(a, b, ir.Constant(which, high))
            block *= 2
        for i, row in enumerate(rows):
            value = builder.insert_value(value, row, i)
        return value

    return tile(tile), codegen


def balanced(extent: int, most: int) -> int:
    """The size of the pieces when ``extent`` is cut into as few equal pieces of at most ``most`` as possible.

    The last piece is moved back to end where the extent ends; what it shares with its neighbour is
    computed twice and written once. So one tile serves all pieces, and nothing outside is read.
    """
    pieces = -(-extent // most)
    return -(-extent // pieces)


def holds(rows: int, vectors: int, lanes: int, itemsize: int, vector_bytes: int) -> bool:
    """Does the processor have such vectors, and registers for the tile, a row of `w` and a scalar?"""
    size_bytes = lanes * itemsize
    return 16 <= size_bytes <= vector_bytes and rows * vectors + vectors + 1 <= registers(size_bytes)


def step_cost(rows: int, vectors: int) -> float:
    """Half-cycles of one `outer`: multiply-adds, loads, or the latency of a chain of multiply-adds.

    The rest was measured: vectors of w come from the second-level cache, and loads of scalars that
    serve one vector only keep the units waiting.
    """
    return max(rows * vectors, rows + vectors, 8) + 0.5 * vectors + (1.5 if vectors == 1 else 0.0)


def waiting(tasks: int, cores: int) -> float:
    """How much longer tasks take than if cores shared them evenly: the last round may not be full, and cores are not
    equally fast, which costs a fifth of a task."""
    return (-(-tasks // cores) + 0.2) * cores / tasks
