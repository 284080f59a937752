"""Products of a warpgroup on sm_90a (wgmma): 64 rows by up to 256 columns, over one line of the inner sum.

A chunk of an operand is 64 of its rows (or columns) by a line's worth of the inner sum; halves in either order:

    k-major     line = row, the inner sum runs along it          [row][k]
    mn-major    line = step of the inner sum, rows along it      [k][row]

float32 is multiplied as TF32 (`multiply`), or each factor as the sum of two of those (`multiply_split`). Products are
asynchronous: sums may be read when `settle` has returned. Descriptors and fences are as the PTX ISA has them (wgmma
matrix descriptors, canonical layouts with 128-byte swizzle, register fragments).
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from rapydli_flow.spec import Array

from .emulate import KernelFault, Shared
from .grid import WARPGROUP
from .hopper import CHUNK_BYTES, LINE_BYTES, LINES, STORED, current, depth_of, emit_ptx, lines_of, numbers
from .pair import Pair
from .ptx import _array, _at, _number
from .tensor_core import rounded, truncated

STEPS = 4  # products of a line: wgmma multiplies 32 bytes of the inner sum at a time
_PTX_NAMES = {"bfloat16": "bf16", "float16": "f16", "float32": "tf32"}
TF32_BITS, TF32_HALF = 0xFFFFE000, 0x1000  # what TF32 keeps of float32, and half of its last place


class _Group:
    """Products of a warpgroup that were issued together."""

    def __init__(self, acc: Array, sums: Array, used: list[tuple[Array, slice]]) -> None:
        self.acc, self.sums, self.used = acc, sums, used

    def finish(self) -> None:
        self.acc += self.sums
        for readers, lines in self.used:
            readers[lines] -= 1


def _under_way() -> list[_Group]:
    found: list[_Group] = current().products
    return found


def _finish(left: int) -> None:
    groups = _under_way()
    while len(groups) > left:
        groups.pop(0).finish()


def _operand(tiles: Shared, line: int, rows: int, dtype: str, *, mn_major: bool) -> tuple[Array, tuple[Array, slice]]:
    """``rows`` by a line of the inner sum: 64 halves, or 32 of float32."""
    known, where = lines_of(tiles), slice(int(line), int(line) + rows)
    if known["flight"][where].any() or not (known["known to"][where] >> current().number & 1).all():
        raise KernelFault("a product reads shared memory before the copy to it was waited for.")
    known["readers"][where] += 1
    words = tiles.data.reshape(-1, LINE_BYTES // tiles.data.itemsize)[where]
    values = words.view(STORED[dtype]).astype(np.float32)
    if mn_major:
        values = values.reshape(rows // LINES, LINES, LINES).swapaxes(1, 2).reshape(rows, LINES)
    return values, (known["readers"], where)


def _spread(product: Array) -> Array:
    """A 64 x n product as the registers of a warpgroup: [register, thread]."""
    n = product.shape[1]
    # row = 16 warp + 8 half + lane / 4; column = 8 j + 2 (lane % 4) + e; register = 4 j + 2 half + e
    parts = product.reshape(4, 2, 8, n // 8, 4, 2)  # warp, half, lane / 4, j, lane % 4, e
    return parts.transpose(3, 1, 5, 0, 2, 4).reshape(n // 2, WARPGROUP)


@cache
def multiply(dtype: str, parts: int, n: int, *, mn_major: tuple[bool, bool], left: int = 0) -> Pair:
    """``(acc, tiles, line of a, line of b)``: acc += a b over one chunk of the inner sum, by a whole warpgroup.

    a has ``parts`` chunks of 64 rows and b ``n`` columns. When this returns, ``left`` of these products at most are
    under way; `settle` before sums are used.
    """
    held = n // 2

    def twin(acc: Array, tiles: Shared, line_a: int, line_b: int) -> None:
        a, used_a = _operand(tiles, line_a, parts * LINES, dtype, mn_major=mn_major[0])
        b, used_b = _operand(tiles, line_b, n, dtype, mn_major=mn_major[1])
        if dtype == "float32":
            a, b = truncated(a), truncated(b)
        sums = np.concatenate([_spread(part) for part in np.split(a @ b.T, parts)])
        _under_way().append(_Group(acc, sums, [used_a, used_b]))
        _finish(left)

    regs = ", ".join(f"${i}" for i in range(held))
    kind = _PTX_NAMES[dtype]
    deep = depth_of(dtype) // STEPS
    asm = f"wgmma.mma_async.sync.aligned.m64n{n}k{deep}.f32.{kind}.{kind} {{{regs}}}, "
    asm += f"${2 * held}, ${2 * held + 1}, 1, 1, 1"
    asm += ";" if dtype == "float32" else f", {int(mn_major[0])}, {int(mn_major[1])};"
    tied = [*["=f"] * held, *map(str, range(held))]

    def rule(acc: Any, tiles: Any, line_a: Any, line_b: Any) -> Any:
        from llvmlite import ir
        from numba.cuda import types

        def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            data = _array(context, builder, sig.args[0], args[0])
            places = [_at(builder, data, i) for i in range(parts * held)]
            sums = [builder.load(place) for place in places]
            a, b = (_descriptor(builder, args[1], line, major) for line, major in zip(args[2:], mn_major, strict=True))
            result = ir.LiteralStructType([ir.FloatType()] * held)
            constraints = ",".join([*tied, "l", "l"])
            emit_ptx(builder, "wgmma.fence.sync.aligned;", "~{memory}", ())
            for step in range(STEPS):
                for part in range(parts):
                    own = slice(part * held, (part + 1) * held)
                    at_a = _ahead(builder, a, step * _step_bytes(mn_major[0]) + part * CHUNK_BYTES)
                    at_b = _ahead(builder, b, step * _step_bytes(mn_major[1]))
                    found = emit_ptx(builder, asm, constraints, [*sums[own], at_a, at_b], result)
                    sums[own] = [builder.extract_value(found, i) for i in range(held)]
            rest = f"wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned {left};"
            emit_ptx(builder, rest, "~{memory}", ())
            for place, value in zip(places, sums, strict=True):
                builder.store(value, place)
            return context.get_dummy_value()

        return types.void, (acc, *numbers(3, "int32")), emit

    majors = "".join("mn" if major else "k" for major in mn_major)
    return Pair(f"multiply_{dtype}_{parts}x64x{n}_{majors}_{left}", twin, rule)


def _step_bytes(mn_major: bool) -> int:
    """How far 16 of the inner sum are: 32 bytes of a line, or 16 lines."""
    return 16 * LINE_BYTES if mn_major else 32


def _descriptor(builder: Any, tiles: Any, line: Any, mn_major: bool) -> Any:
    """128-byte swizzle; 8 lines are 1024 bytes apart, and chunks along mn follow each other."""
    from llvmlite import ir

    leading = CHUNK_BYTES >> 4 if mn_major else 1
    fixed = 1 << 62 | (8 * LINE_BYTES >> 4) << 32 | leading << 16
    place = builder.add(tiles, builder.mul(line, _number(LINE_BYTES)))
    field = builder.and_(builder.lshr(place, _number(4)), _number(0x3FFF))
    return builder.or_(builder.zext(field, ir.IntType(64)), ir.Constant(ir.IntType(64), fixed))


def _ahead(builder: Any, descriptor: Any, size_bytes: int) -> Any:
    from llvmlite import ir

    return builder.add(descriptor, ir.Constant(ir.IntType(64), size_bytes >> 4))


def place_in_line(k: int) -> int:
    """Where `multiply_split` wants b's value k of a line: a thread reads four neighbours of a, one for each step."""
    return k % 4 * 8 + k // 16 * 4 + k % 16 // 4


PLACES = tuple(place_in_line(k) for k in range(32))


@cache
def multiply_split(n: int, pieces: int = 2, *, mn_major: bool = False) -> Pair:
    """``(acc, tiles, line of a, line of b)``: acc += a b over 32 of the inner sum in float32, in products of TF32.

    a is 64 rows, which may have either order, since threads read it themselves; of mn-major ones `ROWS` tells which row
    is where. b is ``n`` columns, its values at `PLACES`. With two ``pieces`` each thread splits what it reads of a, and
    b is split already: n columns, then n of their rests. Three products are added up by the hardware, which cuts off,
    and to acc in float32. With one piece a is rounded, and sums are the hardware's.
    """
    held = n // 2

    def twin(acc: Array, tiles: Shared, line_a: int, line_b: int) -> None:
        a, used_a = _operand(tiles, line_a, LINES, "float32", mn_major=False)
        b, used_b = _operand(tiles, line_b, pieces * n, "float32", mn_major=False)
        if mn_major:
            a = a.reshape(2, 32, 32).swapaxes(1, 2).reshape(LINES, 32)[list(ROWS)]
        high, b = rounded(a), truncated(b)[:, PLACES]
        sums = high @ b[:n].T
        if pieces == 2:
            sums = truncated(a - high) @ b[:n].T + high @ b[n:].T + sums
        _Group(acc, _spread(sums), [used_a, used_b]).finish()

    def asm(fresh: bool) -> tuple[str, str]:
        regs = ", ".join(f"${i}" for i in range(held))
        base = held if fresh else 2 * held
        own = ", ".join(f"${base + i}" for i in range(4))
        kind = f"wgmma.mma_async.sync.aligned.m64n{n}k8.f32.tf32.tf32"
        text = f"{kind} {{{regs}}}, {{{own}}}, ${base + 4}, {int(not fresh)}, 1, 1;"
        tied = [] if fresh else [str(i) for i in range(held)]
        return text, ",".join([*["=f"] * held, *tied, *["r"] * 4, "l"])

    def rule(acc: Any, tiles: Any, line_a: Any, line_b: Any) -> Any:
        from llvmlite import ir
        from numba.cuda import types

        result = ir.LiteralStructType([ir.FloatType()] * held)
        read = _values_across if mn_major else _values_along

        def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            data = _array(context, builder, sig.args[0], args[0])
            places = [_at(builder, data, i) for i in range(held)]
            values = read(builder, args[1], args[2])
            high = [[_near(builder, value) for value in step] for step in values]
            b = _descriptor(builder, args[1], args[3], False)
            factors, sums = [(high, b)], [builder.load(place) for place in places]
            if pieces == 2:
                low = [
                    [_rest(builder, *both) for both in zip(*steps, strict=True)]
                    for steps in zip(values, high, strict=True)
                ]
                factors, sums = [(low, b), (high, _ahead(builder, b, n * LINE_BYTES)), *factors], []
            emit_ptx(builder, "wgmma.fence.sync.aligned;", "~{memory}", ())
            for own, other in factors:
                for step in range(STEPS):
                    text, constraints = asm(not sums)
                    operands = [*sums, *own[step], _ahead(builder, other, 32 * step)]
                    found = emit_ptx(builder, text, constraints, operands, result)
                    sums = [builder.extract_value(found, i) for i in range(held)]
            tied = ",".join([*["=f"] * held, *map(str, range(held)), "~{memory}"])
            text = "wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;"
            found = emit_ptx(builder, text, tied, sums, result)
            for i, place in enumerate(places):
                value = builder.extract_value(found, i)
                builder.store(builder.fadd(builder.load(place), value) if pieces == 2 else value, place)
            return context.get_dummy_value()

        return types.void, (acc, *numbers(3, "int32")), emit

    return Pair(f"multiply_split_64x{n}_{pieces}{'_mn' if mn_major else ''}", twin, rule)


# Which row of mn-major a a row of the product is: a thread reads two neighbours, for its rows g and g + 8 of a warp
ROWS = tuple(row // 16 * 16 + row % 8 * 2 + row % 16 // 8 for row in range(LINES))


def _lane(builder: Any) -> tuple[Any, Any, Any]:
    """Of this thread: its warp in the warpgroup, lane / 4, and lane % 4."""
    from llvmlite import ir

    thread = builder.and_(emit_ptx(builder, "mov.u32 $0, %tid.x;", "=r", (), ir.IntType(32)), _number(WARPGROUP - 1))
    group = builder.and_(builder.lshr(thread, _number(2)), _number(7))
    return builder.lshr(thread, _number(5)), group, builder.and_(thread, _number(3))


def _read(builder: Any, place: Any, count: int, offset: int = 0) -> list[Any]:
    """Neighbours in shared memory."""
    from llvmlite import ir

    regs = ", ".join(f"${i}" for i in range(count))
    asm = f"ld.shared.v{count}.f32 {{{regs}}}, [${count}+{offset}];"
    result = ir.LiteralStructType([ir.FloatType()] * count)
    found = emit_ptx(builder, asm, ",".join([*["=f"] * count, "r", "~{memory}"]), [place], result)
    return [builder.extract_value(found, i) for i in range(count)]


def _values_along(builder: Any, tiles: Any, line: Any) -> list[list[Any]]:
    """For each step the four values of a k-major a that this thread gives to wgmma: rows g, g + 8; then 16 further."""
    warp, group, own = _lane(builder)
    row = builder.add(builder.add(line, builder.mul(warp, _number(16))), group)
    first = builder.add(tiles, builder.mul(row, _number(LINE_BYTES)))
    values = []
    for half in range(2):
        piece = builder.xor(builder.add(own, _number(4 * half)), group)  # the swizzle
        place = builder.add(first, builder.mul(piece, _number(16)))
        values += [_read(builder, place, 4), _read(builder, place, 4, 8 * LINE_BYTES)]
    return [[value[step] for value in values] for step in range(STEPS)]


def _values_across(builder: Any, tiles: Any, line: Any) -> list[list[Any]]:
    """The same of an mn-major a: 32 lines of 32 rows, then the other 32 rows; two rows lie side by side (`ROWS`)."""
    warp, group, own = _lane(builder)
    box = builder.mul(builder.lshr(warp, _number(1)), _number(32))
    column = builder.add(builder.mul(builder.and_(warp, _number(1)), _number(4)), builder.lshr(group, _number(1)))
    odd = builder.mul(builder.and_(group, _number(1)), _number(8))
    steps = []
    for step in range(STEPS):
        values = []
        for half in range(2):
            k = builder.add(builder.mul(own, _number(4)), _number(16 * half + step))
            place = builder.add(tiles, builder.mul(builder.add(builder.add(line, box), k), _number(LINE_BYTES)))
            piece = builder.xor(column, builder.and_(k, _number(7)))
            place = builder.add(builder.add(place, builder.mul(piece, _number(16))), odd)
            values += _read(builder, place, 2)
        steps.append(values)
    return steps


def _near(builder: Any, value: Any) -> Any:
    """Rounded to TF32 in two steps; of a NaN whose bits this turns over, the rest is still NaN."""
    from llvmlite import ir

    asm = f"{{ .reg .b32 t; mov.b32 t, $1; add.u32 t, t, {TF32_HALF}; and.b32 $0, t, {TF32_BITS}; }}"
    return emit_ptx(builder, asm, "=r,f", [value], ir.IntType(32))


def _rest(builder: Any, value: Any, near: Any) -> Any:
    """What the hardware cuts off of this is below 2^-21 of the value."""
    from llvmlite import ir

    asm = "{ .reg .f32 t; mov.b32 t, $2; sub.rn.f32 t, $1, t; mov.b32 $0, t; }"
    return emit_ptx(builder, asm, "=r,f,r", [value, near], ir.IntType(32))


@cache
def settle(count: int) -> Pair:
    """``(acc)``: until all products are done; only now sums may be read."""

    def rule(acc: Any) -> Any:
        from llvmlite import ir
        from numba.cuda import types

        def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            data = _array(context, builder, sig.args[0], args[0])
            places = [_at(builder, data, i) for i in range(count)]
            constraints = ",".join([*["=f"] * count, *map(str, range(count)), "~{memory}"])
            result = ir.LiteralStructType([ir.FloatType()] * count)
            sums = [builder.load(place) for place in places]
            found = emit_ptx(builder, "wgmma.wait_group.sync.aligned 0;", constraints, sums, result)
            for i, place in enumerate(places):
                builder.store(builder.extract_value(found, i), place)
            return context.get_dummy_value()

        return types.void, (acc,), emit

    return Pair(f"settle{count}", lambda acc: _finish(0), rule)


def _columns_twin(acc: Array, first: int) -> tuple[Array, ...]:
    thread = np.arange(WARPGROUP)
    own = thread % 4
    return tuple(acc[first + 4 * own + k % 2, thread - own + k // 2] for k in range(8))


def _columns_rule(acc: Any, first: Any) -> Any:
    from llvmlite import ir
    from numba.cuda import types

    def exchange(builder: Any, value: Any, distance: int) -> Any:
        asm = f"shfl.sync.bfly.b32 $0, $1, {distance}, 0x1f, 0xffffffff;"
        return emit_ptx(builder, asm, "=f,f", [value], ir.FloatType())

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        data = _array(context, builder, sig.args[0], args[0])
        lane = emit_ptx(builder, "mov.u32 $0, %laneid;", "=r", (), ir.IntType(32))
        bits = [builder.icmp_unsigned("!=", builder.and_(lane, _number(bit)), _number(0)) for bit in (1, 2)]
        held = [[builder.load(_at(builder, data, args[1], 4 * j + e)) for e in range(2)] for j in range(4)]
        for bit, on in zip((1, 2), bits, strict=True):  # a transposition among four threads
            for low in (j for j in range(4) if not j & bit):
                for e in range(2):
                    a, b = held[low][e], held[low | bit][e]
                    got = exchange(builder, builder.select(on, a, b), bit)
                    held[low][e], held[low | bit][e] = builder.select(on, got, a), builder.select(on, b, got)
        return context.make_tuple(builder, sig.return_type, [held[k // 2][k % 2] for k in range(8)])

    return types.UniTuple(types.float32, 8), (acc, types.int32), emit


# (acc, first) -> 8 sums: register first + 4 j + e, j < 4, e < 2, holds column 8 j + 2 (lane % 4) + e of a row; after
# an exchange with its neighbours a thread has columns 8 (lane % 4) + 0..7
columns = Pair("columns", _columns_twin, _columns_rule)
