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

from .pair import Pair, device_type, held
from .ptx import _array, _at, _number

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
def affine(sizes: tuple[int, ...], steps: tuple[int, ...], base: int = 0) -> Pair:
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
