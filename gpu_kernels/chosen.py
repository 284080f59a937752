"""Intrinsics of what numbers in memory choose: elements and rows by ids, arrays by addresses in a table."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

from rapydli_flow.spec import Array

from .emulate import memory
from .pair import Pair, device_type, stored_type
from .ptx import _array, _at, _number, load


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
