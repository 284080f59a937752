"""Intrinsics of templates that move data and slide windows: running maxima, masks, and where elements lie.

Registers are local arrays (`cuda.local.array`); ``first`` is a constant there, so that all of them are promoted to
registers. Compiled index arithmetic wraps at 32 bits, and what is switched off may lie anywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np

from rapydli_flow.spec import Array

from .emulate import memory
from .pair import Pair, device_type, held, stored_type
from .ptx import _address, _array, _at, _number, _widened, load

# ---- registers


@cache
def spread(count: int, value: float) -> Pair:
    """``(registers)``: all of them become ``value``."""

    def twin(registers: Array) -> None:
        registers[:] = value

    def rule(registers: Any) -> Any:
        from llvmlite import ir
        from numba.cuda import types

        def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            data = _array(context, builder, registers, args[0])
            kind = data.type.pointee
            constant = ir.Constant(kind, int(value) if isinstance(kind, ir.IntType) else float(value))
            for i in range(count):
                builder.store(constant, _at(builder, data, i))
            return context.get_dummy_value()

        return types.void, (registers,), emit

    return Pair(f"spread{count}", twin, rule)


@cache
def plus(width: int) -> Pair:
    """``(registers, first, values)``: add to them."""

    def twin(registers: Array, first: int, values: Sequence[Any]) -> None:
        for j in range(width):
            registers[first + j] += values[j]

    def rule(registers: Any, first: Any, values: Any) -> Any:
        from numba.cuda import types

        def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            data = _array(context, builder, registers, args[0])
            for j in range(width):
                place = _at(builder, data, args[1], j)
                builder.store(builder.fadd(builder.load(place), builder.extract_value(args[2], j)), place)
            return context.get_dummy_value()

        return types.void, (registers, types.int32, values), emit

    return Pair(f"plus{width}", twin, rule)


@cache
def plus_times(width: int) -> Pair:
    """``(registers, first, values, factor)``: add so many times the values; a factor of 0 adds nothing, not 0 * inf."""

    def twin(registers: Array, first: int, values: Sequence[Any], factor: Any) -> None:
        for j in range(width):
            registers[first + j] += np.where(factor == 0, 0, values[j] * factor)

    def rule(registers: Any, first: Any, values: Any, factor: Any) -> Any:
        from llvmlite import ir
        from numba.cuda import types

        def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            data = _array(context, builder, registers, args[0])
            zero = ir.Constant(args[3].type, 0.0)
            none = builder.fcmp_ordered("==", args[3], zero)
            for j in range(width):
                place = _at(builder, data, args[1], j)
                product = builder.fmul(builder.extract_value(args[2], j), args[3])
                builder.store(builder.fadd(builder.load(place), builder.select(none, zero, product)), place)
            return context.get_dummy_value()

        return types.void, (registers, types.int32, values, registers.dtype), emit

    return Pair(f"plus_times{width}", twin, rule)


@cache
def larger(width: int) -> Pair:
    """``(best, which, first, values, active, tap)``: where active values are larger they and ``tap`` are kept.

    Of equal values the first stays; a NaN is larger than any number, and the first NaN stays.
    """

    def twin(best: Array, which: Array, first: int, values: Sequence[Any], active: Any, tap: Any) -> None:
        for j in range(width):
            old = best[first + j].copy()
            take = np.asarray(active) & ~(values[j] <= old) & (old == old)
            best[first + j] = np.where(take, values[j], old)
            which[first + j] = np.where(take, tap, which[first + j])

    def rule(best: Any, which: Any, first: Any, values: Any, active: Any, tap: Any) -> Any:
        from numba.cuda import types

        def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            data, taps = (_array(context, builder, kind, args[i]) for i, kind in enumerate((best, which)))
            for j in range(width):
                place, place_of = _at(builder, data, args[2], j), _at(builder, taps, args[2], j)
                new, old = builder.extract_value(args[3], j), builder.load(place)
                more = builder.and_(builder.fcmp_unordered(">", new, old), builder.fcmp_ordered("ord", old, old))
                take = builder.and_(more, args[4])
                builder.store(builder.select(take, new, old), place)
                builder.store(builder.select(take, args[5], builder.load(place_of)), place_of)
            return context.get_dummy_value()

        return types.void, (best, which, types.int32, values, types.boolean, types.int32), emit

    return Pair(f"larger{width}", twin, rule)


@cache
def plus_chosen(width: int) -> Pair:
    """``(registers, first, values, marks, mark)``: add the values whose mark it is."""

    def twin(registers: Array, first: int, values: Sequence[Any], marks: Sequence[Any], mark: Any) -> None:
        for j in range(width):
            registers[first + j] += np.where(marks[j] == mark, values[j], 0)

    def rule(registers: Any, first: Any, values: Any, marks: Any, mark: Any) -> Any:
        from llvmlite import ir
        from numba.cuda import types

        def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            data = _array(context, builder, registers, args[0])
            kind, wide = data.type.pointee, ir.IntType(32)
            letter, suffix = ("f", "f32") if isinstance(kind, ir.FloatType) else ("d", "f64")
            # an addition that is switched off: LLVM would select a zero, and add that
            asm = f"{{ .reg .pred p; setp.eq.s32 p, $2, $3; @p add.{suffix} $0, $0, $1; }}"
            signature = ir.FunctionType(kind, [kind, wide, wide, kind])
            add = ir.InlineAsm(signature, asm, f"={letter},{letter},r,r,0")
            for j in range(width):
                place = _at(builder, data, args[1], j)
                mark = _to_int32(builder, marks.dtype, builder.extract_value(args[3], j))
                operands = [builder.extract_value(args[2], j), mark, args[4], builder.load(place)]
                builder.store(builder.call(add, operands), place)
            return context.get_dummy_value()

        return types.void, (registers, types.int32, values, marks, types.int32), emit

    return Pair(f"plus_chosen{width}", twin, rule)


def _to_int32(builder: Any, kind: Any, value: Any) -> Any:
    from llvmlite import ir

    wide = ir.IntType(32)
    if kind.bitwidth > 32:
        return builder.trunc(value, wide)
    if kind.bitwidth < 32:
        return builder.sext(value, wide) if kind.signed else builder.zext(value, wide)
    return value


@cache
def whole(dtype: str, width: int) -> Pair:
    """``(int32 values) -> the same as dtype``, which must be able to hold them."""

    def rule(values: Any) -> Any:
        from llvmlite import ir
        from numba.cuda import types

        result = types.UniTuple(device_type(dtype), width)

        def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            kind = ir.IntType(result.dtype.bitwidth)
            change = builder.sext if kind.width > 32 else builder.trunc if kind.width < 32 else builder.bitcast
            each = [change(builder.extract_value(args[0], j), kind) for j in range(width)]
            return context.make_tuple(builder, result, each)

        return result, (types.UniTuple(types.int32, width),), emit

    return Pair(f"whole{width}_{dtype}", lambda values: tuple(np.asarray(v).astype(dtype) for v in values), rule)


@cache
def otherwise(dtype: str, width: int, value: float) -> Pair:
    """``(active, values) -> values``, and the constant where not active."""
    dtype = held(dtype)

    def twin(active: Any, values: Sequence[Any]) -> tuple[Array, ...]:
        other = np.dtype(dtype).type(value)
        return tuple(np.where(active, v, other) for v in values)

    def rule(active: Any, values: Any) -> Any:
        from llvmlite import ir
        from numba.cuda import types

        def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            each = [builder.extract_value(args[1], j) for j in range(width)]
            number = int(value) if isinstance(each[0].type, ir.IntType) else float(np.dtype(dtype).type(value))
            other = ir.Constant(each[0].type, number)
            return context.make_tuple(builder, sig.return_type, [builder.select(args[0], v, other) for v in each])

        return values, (types.boolean, values), emit

    return Pair(f"otherwise{width}_{dtype}", twin, rule)


# ---- whole numbers in 32 bits


def _integers(name: str, twin: Callable[..., Any], emit: Callable[..., Any]) -> Pair:
    """An intrinsic that makes an int32 of one; ``emit(builder, value)``."""

    def rule(value: Any) -> Any:
        integer = device_type("int32")
        return integer, (integer,), lambda context, builder, sig, args: emit(builder, *args)

    return Pair(name, twin, rule)


@cache
def affine(sizes: tuple[int, ...], steps: tuple[int, ...], base: int) -> Pair:
    """``(element) -> base + the sum of coordinate * step`` over the axes of an array of ``sizes``."""

    def twin(element: Any) -> Any:
        total, rest = base, element
        for axis in reversed(range(len(sizes))):
            total = total + (rest if axis == 0 else rest % sizes[axis]) * steps[axis]
            rest = rest // sizes[axis]
        return total

    def emit(builder: Any, element: Any) -> Any:
        total, rest = _number(base), element
        for axis in reversed(range(len(sizes))):
            at = rest if axis == 0 else builder.urem(rest, _number(sizes[axis]))
            rest = rest if axis == 0 else builder.udiv(rest, _number(sizes[axis]))
            if steps[axis]:
                total = builder.add(total, builder.mul(at, _number(steps[axis])))
        return total

    name = f"affine_{'_'.join(map(str, sizes))}_by_{'_'.join(map(str, steps))}_from_{base}"
    return _integers(name, twin, emit)


Line = tuple[int, int, int, int]  # of an axis: size of y, size of x, position of x's first element in y, step


@cache
def lies_on(lines: tuple[Line, ...]) -> Pair:
    """``(element of y) -> element of x`` that lies there, along every axis; -1 where none does."""

    def twin(element: Any) -> Any:
        total, rest, inside, jump = np.zeros_like(element), element, np.ones(np.shape(element), bool), 1
        for big, small, start, step in reversed(lines):
            at, rest = rest % big - start, rest // big
            inside &= (at >= 0) & (at < (small - 1) * step + 1) & (at % step == 0)
            total, jump = total + at // step * jump, jump * small
        return np.where(inside, total, -1)

    def emit(builder: Any, element: Any) -> Any:
        total, rest, inside, jump = _number(0), element, None, 1
        for axis in reversed(range(len(lines))):
            big, small, start, step = lines[axis]
            at = rest if axis == 0 else builder.urem(rest, _number(big))
            rest = rest if axis == 0 else builder.udiv(rest, _number(big))
            at = builder.sub(at, _number(start))
            tests = []
            if small * step != big or start:
                tests.append(builder.icmp_unsigned("<", at, _number((small - 1) * step + 1)))
            if step > 1:
                tests.append(builder.icmp_unsigned("==", builder.urem(at, _number(step)), _number(0)))
                at = builder.udiv(at, _number(step))
            for test in tests:
                inside = test if inside is None else builder.and_(inside, test)
            total, jump = builder.add(total, builder.mul(at, _number(jump))), jump * small
        return total if inside is None else builder.select(inside, total, _number(-1))

    return _integers("lies_on_" + "_by_".join(str(big) for big, *_ in lines), twin, emit)


# ---- tiles that are turned in shared memory


@cache
def put_each(width: int, step: int) -> Pair:
    """``(shared, at, values)``: element j to ``at + j * step``."""

    def twin(shared: Any, at: Array, values: Sequence[Any]) -> None:
        for j in range(width):
            shared.write(at + j * step, values[j])

    def rule(shared: Any, at: Any, values: Any) -> Any:
        from numba.cuda import types

        def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            data = _array(context, builder, shared, args[0])
            for j in range(width):
                builder.store(builder.extract_value(args[2], j), _at(builder, data, args[1], j * step))
            return context.get_dummy_value()

        return types.void, (shared, types.int32, values), emit

    return Pair(f"put_each{width}_{step}", twin, rule)


@cache
def pick(width: int, step: int) -> Pair:
    """``(shared, at) -> elements at + j * step``"""

    def twin(shared: Any, at: Array) -> tuple[Array, ...]:
        return tuple(shared.read(at + j * step) for j in range(width))

    def rule(shared: Any, at: Any) -> Any:
        from numba.cuda import types

        def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            data = _array(context, builder, shared, args[0])
            values = [builder.load(_at(builder, data, args[1], j * step)) for j in range(width)]
            return context.make_tuple(builder, sig.return_type, values)

        return types.UniTuple(shared.dtype, width), (shared, types.int32), emit

    return Pair(f"pick{width}_{step}", twin, rule)


# ---- numbers made of indices


@cache
def ratio(dtype: str, divisor: int) -> Pair:
    """``(int32) -> that / divisor``, in the dtype that registers have."""
    name = held(dtype)
    kind = np.dtype(name).type

    def rule(number: Any) -> Any:
        from llvmlite import ir
        from numba.cuda import types

        result = device_type(name)

        def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            wide = context.get_value_type(result)
            return builder.fdiv(builder.sitofp(args[0], wide), ir.Constant(wide, float(divisor)))

        return result, (types.int32,), emit

    return Pair(f"over_{divisor}_{name}", lambda number: kind(number) / kind(divisor), rule)


@cache
def one_over(dtype: str) -> Pair:
    """``(int32) -> 1 / that``, in the dtype that registers have."""
    name = held(dtype)
    kind = np.dtype(name).type

    def rule(number: Any) -> Any:
        from llvmlite import ir
        from numba.cuda import types

        result = device_type(name)

        def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            wide = context.get_value_type(result)
            return builder.fdiv(ir.Constant(wide, 1.0), builder.sitofp(args[0], wide))

        return result, (types.int32,), emit

    return Pair(f"one_over_{name}", lambda number: kind(1) / kind(number), rule)


def _product_rule(a: Any, b: Any) -> Any:
    return a, (a, a), lambda context, builder, sig, args: builder.fmul(*args)


product_of = Pair("product_of", lambda a, b: a * b, _product_rule)


@cache
def times(width: int) -> Pair:
    """``(values, factor) -> each of them times the factor``"""

    def rule(values: Any, factor: Any) -> Any:
        def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            each = [builder.fmul(builder.extract_value(args[0], j), args[1]) for j in range(width)]
            return context.make_tuple(builder, sig.return_type, each)

        return values, (values, values.dtype), emit

    return Pair(f"times{width}", lambda values, factor: tuple(v * factor for v in values), rule)


@cache
def repeated(width: int) -> Pair:
    """``(int32) -> the same width times``"""

    def rule(value: Any) -> Any:
        from numba.cuda import types

        def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            return context.make_tuple(builder, sig.return_type, [args[0]] * width)

        return types.UniTuple(types.int32, width), (types.int32,), emit

    return Pair(f"repeated{width}", lambda value: (value,) * width, rule)


@cache
def chosen_of(dtype: str, size: int, otherwise: int) -> Pair:
    """``(one whole number of this dtype) -> int32``: itself if 0 <= it < size."""

    def twin(values: Sequence[Any]) -> Array:
        at = np.asarray(values[0]).astype(np.int64)
        return np.where((at >= 0) & (at < size), at, otherwise).astype(np.int32)

    def rule(values: Any) -> Any:
        from llvmlite import ir
        from numba.cuda import types

        def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            one = builder.extract_value(args[0], 0)
            if one.type.width < 32:
                one = builder.zext(one, ir.IntType(32))  # uint8
            known = builder.icmp_unsigned("<", one, ir.Constant(one.type, size))
            small = builder.trunc(one, ir.IntType(32)) if one.type.width > 32 else one
            return builder.select(known, small, _number(otherwise))

        return types.int32, (types.UniTuple(device_type(dtype), 1),), emit

    return Pair(f"chosen_of_{size}_{dtype}", twin, rule)


def _before_rule(total: Any, keys: Any, key: Any, first: Any, place: Any) -> Any:
    from llvmlite import ir
    from numba.cuda import types

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        total, wide = args[0], ir.IntType(32)
        for j in range(keys.count):
            earlier = builder.icmp_signed("<", builder.add(args[3], _number(j)), args[4])
            bound = builder.add(args[2], builder.zext(earlier, wide))
            smaller = builder.icmp_signed("<", builder.extract_value(args[1], j), bound)
            total = builder.add(total, builder.zext(smaller, wide))
        return total

    return types.int32, (types.int32, keys, types.int32, types.int32, types.int32), emit


def _before_twin(total: Any, keys: Sequence[Any], key: Any, first: Any, place: Any) -> Any:
    return total + sum((k < key + (first + j < place)).astype(np.int32) for j, k in enumerate(keys))


# ``(total, keys, key, first, place)``: total, and one for each of the keys of places first, first + 1, ... that comes
# before ``key`` of ``place`` in a stable order
before = Pair("before", _before_twin, _before_rule)


@cache
def plus_rows(dtype: str, width: int, length: int) -> Pair:
    """``(registers, x, order, first, last, column)``: add ``width`` elements of rows order[first] ... order[last - 1].

    Rows are ``length`` long and added in their order, four loads at a time.
    """
    read, number, together = load(dtype, width, constant=True), load("int32", 1, constant=True), 4

    def twin(registers: Array, x: Any, order: Any, first: Array, last: Array, column: Array) -> None:
        for step in range(int(np.max(last - first, initial=0))):
            active = first + step < last
            (row,) = number(active, order, first + step)
            for j, value in enumerate(read(active, x, row * length + column)):
                registers[j] += value

    def rule(registers: Any, x: Any, order: Any, first: Any, last: Any, column: Any) -> Any:
        from llvmlite import ir
        from numba.cuda import types
        from numba.cuda.cgutils import alloca_once_value

        _, _, emit_read = read.rule(types.boolean, x, types.int32)
        _, _, emit_number = number.rule(types.boolean, order, types.int32)
        rows_type = types.UniTuple(device_type(dtype), width)
        number_type = types.UniTuple(types.int32, 1)

        def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            data = _array(context, builder, registers, args[0])
            place = alloca_once_value(builder, args[3])
            test, body, end = (builder.append_basic_block(f"rows_{name}") for name in ("test", "body", "end"))
            builder.branch(test)
            builder.position_at_end(test)
            builder.cbranch(builder.icmp_signed("<", builder.load(place), args[4]), body, end)
            builder.position_at_end(body)
            own = builder.load(place)
            places = [builder.add(own, _number(j)) for j in range(together)]
            active = [builder.zext(builder.icmp_signed("<", at, args[4]), ir.IntType(8)) for at in places]
            rows = []
            for on, at in zip(active, places, strict=True):
                found = emit_number(context, builder, sig.replace(return_type=number_type), [on, args[2], at])
                start = builder.mul(builder.extract_value(found, 0), _number(length))
                rows.append(builder.add(start, args[5]))
            values = [
                emit_read(context, builder, sig.replace(return_type=rows_type), [on, args[1], row])
                for on, row in zip(active, rows, strict=True)
            ]
            for value in values:
                for j in range(width):
                    target = _at(builder, data, j)
                    builder.store(builder.fadd(builder.load(target), builder.extract_value(value, j)), target)
            builder.store(builder.add(own, _number(together)), place)
            builder.branch(test)
            builder.position_at_end(end)
            return context.get_dummy_value()

        return types.void, (registers, x, order, types.int32, types.int32, types.int32), emit

    return Pair(f"plus_rows{width}_{dtype}_{length}", twin, rule)


# ---- tables


def _number_rule(table: Any, at: Any) -> Any:
    from llvmlite import ir
    from numba.cuda import types

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        low = builder.bitcast(args[0], ir.PointerType(ir.IntType(32)))  # the lower half of an int64
        return builder.load(builder.gep(low, [builder.mul(args[1], _number(2))]))

    return types.int32, (types.CPointer(types.int64), types.int32), emit


number_of = Pair("number_of", lambda table, at: int(table.data[at]), _number_rule)  # (table, at) -> int32, of a block


@cache
def address_of(dtype: str) -> Pair:
    """``(table, at) -> the array`` whose address is there, the same for all threads of a block."""

    def rule(table: Any, at: Any) -> Any:
        from numba.cuda import types

        result = types.CPointer(stored_type(dtype))

        def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            address = builder.load(builder.gep(args[0], [args[1]]))
            return builder.inttoptr(address, context.get_value_type(result))

        return result, (types.CPointer(types.int64), types.int32), emit

    return Pair(f"address_of_{dtype}", lambda table, at: memory.at(int(table.data[at])), rule)


# ---- halves that stay two to a word: comparisons of both at once

_LEAST = {"bfloat16": 0xFF80, "float16": 0xFC00}  # minus infinity
_PAIRED = {"bfloat16": "bf16x2", "float16": "f16x2"}


def least_words(dtype: str) -> int:
    """A word of two halves that are minus infinity, as int32."""
    return (_LEAST[dtype] << 16 | _LEAST[dtype]) - (1 << 32)


def _joined(dtype: str, values: Sequence[Any]) -> tuple[Array, ...]:
    """Words of floats, two to each."""
    bits = [np.asarray(value).astype(dtype).view(np.uint16).astype(np.uint32) for value in values]
    return tuple((low | high << np.uint32(16)).view(np.int32) for low, high in zip(bits[::2], bits[1::2], strict=True))


def _parted(dtype: str, word: Array) -> tuple[Array, Array]:
    """The reverse of `_joined`, for one word."""
    bits = np.asarray(word).view(np.uint32)
    low, high = (
        (half & np.uint32(0xFFFF)).astype(np.uint16).view(dtype).astype(np.float32) for half in (bits, bits >> 16)
    )
    return low, high


@cache
def load_words(dtype: str, width: int) -> Pair:
    """``(active, pointer, at) -> words`` of ``width`` halves, minus infinity where not active."""
    count, least = width // 2, _LEAST[dtype] << 16 | _LEAST[dtype]

    def twin(active: Any, pointer: Any, at: Any) -> tuple[Array, ...]:
        values = pointer.read(active, at, width)
        return _joined(dtype, [np.where(active, value, np.float32(-np.inf)) for value in values])

    def rule(active: Any, pointer: Any, at: Any) -> Any:
        from llvmlite import ir
        from numba.cuda import types

        word = ir.IntType(32)
        regs = ", ".join(f"${j}" for j in range(count))
        vector, held_in = (f".v{count}", f"{{{regs}}}") if count > 1 else ("", regs)
        asm = "{ .reg .pred p; setp.ne.b32 p, $" + f"{count + 1}, 0; "
        asm += " ".join(f"mov.b32 ${j}, {least:#x};" for j in range(count))
        asm += f" @p ld.global.nc{vector}.b32 {held_in}, [${count}]; }}"
        result = ir.LiteralStructType([word] * count) if count > 1 else word
        constraints = ",".join(["=&r"] * count + ["l", "r"])

        def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            signature = ir.FunctionType(result, [ir.IntType(64), word])
            call = ir.InlineAsm(signature, asm, constraints, side_effect=True)
            out = builder.call(call, [_address(builder, args[1], args[2]), builder.zext(args[0], word)])
            words = [builder.extract_value(out, j) for j in range(count)] if count > 1 else [out]
            return context.make_tuple(builder, sig.return_type, words)

        parameters = (types.boolean, types.CPointer(stored_type(dtype)), types.int32)
        return types.UniTuple(types.int32, count), parameters, emit

    return Pair(f"load_words{width}_{dtype}", twin, rule)


@cache
def larger_words(dtype: str, count: int) -> Pair:
    """``(best, which, first, words, tap)``: `larger` for halves; ``which`` has 16 bits for each of them."""

    def twin(best: Array, which: Array, first: int, words: Sequence[Any], tap: Any) -> None:
        both = np.asarray(tap << 16 | tap, np.uint32).view(np.int32)
        for j in range(count):
            new, old = _parted(dtype, words[j]), _parted(dtype, best[first + j])
            takes = [~(v <= o) & (o == o) for v, o in zip(new, old, strict=True)]
            mask = np.uint32(0xFFFF) * takes[0] | (np.uint32(0xFFFF0000) * takes[1])
            mask = np.asarray(mask, np.uint32).view(np.int32)
            best[first + j] = (words[j] & mask) | (best[first + j] & ~mask)
            which[first + j] = (both & mask) | (which[first + j] & ~mask)

    def rule(best: Any, which: Any, first: Any, words: Any, tap: Any) -> Any:
        from llvmlite import ir
        from numba.cuda import types

        word = ir.IntType(32)

        def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            def compared(how: str, a: Any, b: Any) -> Any:
                text = f"set.{how}.u32.{_PAIRED[dtype]} $0, $1, $2;"
                return builder.call(ir.InlineAsm(ir.FunctionType(word, [word, word]), text, "=r,r,r"), [a, b])

            def chosen(mask: Any, new: Any, old: Any) -> Any:
                return builder.xor(old, builder.and_(mask, builder.xor(old, new)))

            data, taps = (_array(context, builder, kind, args[i]) for i, kind in enumerate((best, which)))
            both = builder.or_(args[4], builder.shl(args[4], _number(16)))
            for j in range(count):
                place, place_of = _at(builder, data, args[2], j), _at(builder, taps, args[2], j)
                new, old = builder.extract_value(args[3], j), builder.load(place)
                mask = builder.and_(compared("gtu", new, old), compared("num", old, old))
                builder.store(chosen(mask, new, old), place)
                builder.store(chosen(mask, both, builder.load(place_of)), place_of)
            return context.get_dummy_value()

        return types.void, (best, which, types.int32, words, types.int32), emit

    return Pair(f"larger_words{count}_{dtype}", twin, rule)


@cache
def halves_of(dtype: str, width: int) -> Pair:
    """``(words, first) -> float32`` of ``width`` halves."""

    def twin(words: Array, first: int) -> tuple[Array, ...]:
        return tuple(half for j in range(width // 2) for half in _parted(dtype, words[first + j]))

    def rule(words: Any, first: Any) -> Any:
        from numba.cuda import types

        def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            data = _array(context, builder, words, args[0])
            loaded = [builder.load(_at(builder, data, args[1], j)) for j in range(width // 2)]
            return context.make_tuple(builder, sig.return_type, _widened(builder, dtype, width, loaded))

        return types.UniTuple(types.float32, width), (words, types.int32), emit

    return Pair(f"halves_of{width}_{dtype}", twin, rule)


@cache
def parts_of(width: int) -> Pair:
    """``(words, first) -> int32``, of ``width`` numbers of 16 bits."""

    def twin(words: Array, first: int) -> tuple[Array, ...]:
        return tuple(words[first + j // 2] >> (16 * (j % 2)) & 0xFFFF for j in range(width))

    def rule(words: Any, first: Any) -> Any:
        from numba.cuda import types

        def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            data = _array(context, builder, words, args[0])
            loaded = [builder.load(_at(builder, data, args[1], j)) for j in range(width // 2)]
            each = [
                part
                for word in loaded
                for part in (builder.and_(word, _number(0xFFFF)), builder.lshr(word, _number(16)))
            ]
            return context.make_tuple(builder, sig.return_type, each)

        return types.UniTuple(types.int32, width), (words, types.int32), emit

    return Pair(f"parts_of{width}", twin, rule)
