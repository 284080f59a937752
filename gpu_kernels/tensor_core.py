"""Intrinsics for tensor cores from sm_80 on: products of a warp's tiles.

A warp multiplies ``m x k`` by ``k x n`` from shared memory (`product`): fragments are loaded (ldmatrix, or 16 bytes of
a line), rounded or split, and multiplied by ``mma.sync``; sums stay in registers. Which element a register of a
fragment holds is fixed by the hardware; which row or column of the tile that is, is ours to choose (`Operand`).

float32 has three ways: its three products are as good as fp32's (`SPLIT`), one product rounds operands to TF32's 10
bits of mantissa. Halves have one. Sums are float32.

    x = hi + lo, hi = x rounded to TF32, lo = the rest, exactly       x y ~ lo hi' + hi lo' + hi hi'

What is left out, lo lo', is at most 2^-22 of x y. Infinities and numbers that round to them become NaN. Tensor cores
truncate where they add, so errors of long sums would grow with their length: sums of 32 products begin at zero, and
are added to the others by the ordinary float32 units, which round to nearest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product as every
from typing import Any

import numpy as np

from rapydli_flow.spec import HALVES, Array

from .arithmetic import indexing
from .async_tiles import Layout, shared_window
from .pair import Pair
from .ptx import _array, _at, _number

SPLIT = "3xtf32"
CHAIN = 4  # inner steps of three products whose sums tensor cores add up
_BITS = 0xFFFFE000  # sign, exponent and mantissa of TF32 in the bits of float32
_HALF = 0x1000  # of the last place of TF32


# ---- products of a warp's tiles


@dataclass(frozen=True)
class Operand:
    """One side of a warp's product: ``extent`` rows of a, or columns of b, over the inner sum.

    ``rows``: the inner sum runs along lines of shared memory, else across them. ``left``: it is a, else b.
    How rows or columns of the tile are numbered is such that a thread's registers come from one load and its sums are
    neighbours in memory:

        rows of a                    natural: fragment i has rows 16 i to 16 i + 15
        rows of b; lines of float32  spread: of 32, fragment (or eight rows of one) i has those with number i modulo 4
        lines of halves              natural
    """

    dtype: str
    extent: int
    rows: bool
    left: bool
    layout: Layout

    @property
    def spread(self) -> bool:
        return not self.left if self.rows else self.dtype not in HALVES

    @property
    def depth(self) -> int:
        """Of one instruction: m16n8k8 or m16n8k16."""
        return 16 if self.dtype in HALVES else 8

    @property
    def matrices(self) -> bool:
        """Is it read by ldmatrix, eight lines of 16 bytes at a time?"""
        return self.rows or self.dtype in HALVES

    def own(self, lane: Any, first: Any) -> Any:
        """The place of what a thread of the warp whose rows or columns start at ``first`` reads in its first load, or
        tells ldmatrix the address of."""
        chunk, low, middle, high = self.layout.chunk, lane % 8, lane // 8 % 2, lane // 16
        if not self.matrices:
            return self.layout.place(lane % 4, first + lane // 4 * 4)
        if self.rows and self.left:
            return self.layout.place(first + lane % 16, high * chunk)
        if self.rows:
            return self.layout.place(first + low * 4 + high, middle * chunk)
        inner, outer = (high, middle) if self.left else (middle, high)
        return self.layout.place(low + inner * 8, first + outer * 8)

    def loads(self, step: int) -> list[tuple[int, int, tuple[int, ...]]]:
        """How the fragments of an inner step are loaded: how far from the first, and where four registers go."""
        per = 4 if self.left else 2  # registers of a fragment
        out = []
        for part in range(self.extent // 16 if self.left or self.matrices else self.extent // 32):
            if self.matrices:
                if not self.rows:
                    line, column = step * 16, part * 16
                elif self.left:
                    line, column = part * 16, step * 2 * self.layout.chunk
                else:
                    line, column = part // 2 * 32 + part % 2 * 2, step * 2 * self.layout.chunk
                out.append((*self.layout.move(line, column), tuple(range(4 * part, 4 * part + 4))))
            elif self.left:
                half, group = part % 2, part // 2  # of the inner step; of 32 rows, which are two fragments
                registers: tuple[int, ...] = (8 * group + 2 * half, 8 * group + 2 * half + 1)
                move = self.layout.move(step * 8 + 4 * half, 32 * group)
                out.append((*move, (*registers, *(r + per for r in registers))))
            else:
                for half in (0, 1):
                    registers = tuple(per * (4 * part + i) + half for i in range(4))
                    out.append((*self.layout.move(step * 8 + 4 * half, 32 * part), registers))
        return out

    @property
    def fragments(self) -> int:
        return self.extent // (16 if self.left else 8)

    @property
    def registers(self) -> int:
        return self.fragments * (4 if self.left else 2)


@cache
def own_place(of: Operand) -> Pair:
    """``(lane, first) -> place``: see `Operand.own`."""
    return indexing(f"own_{_told(of)}", of.own)


def rounded(x: Array) -> Array:
    """float32 to the nearest TF32, halves away from zero."""
    bits = np.asarray(x, np.float32).view(np.uint32)
    return np.where(np.isfinite(x), ((bits + np.uint32(_HALF)) & np.uint32(_BITS)).view(np.float32), x)


def nearest(x: Array) -> Array:
    """float32 to the nearest TF32 by two float32 instructions; infinite from 2^115 on.

    8193 x is rounded where 8192 x, subtracted from it, leaves the 11 first bits of x. The conversion that
    tensor cores' operands are meant for takes four instructions, which are what limits kernels of one product.
    """
    x = np.asarray(x, np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        near: Array = (x * np.float32(8193)).astype(np.float64) - x.astype(np.float64) * 8192
        return near.astype(np.float32)


def truncated(x: Array) -> Array:
    """What tensor cores see of a float32."""
    return (np.asarray(x, np.float32).view(np.uint32) & np.uint32(_BITS)).view(np.float32)


def toward_zero(x: Array) -> Array:
    """float64 to 24 bits of mantissa: how tensor cores round what they add up."""
    return (np.asarray(x, np.float64).view(np.int64) & ~((1 << 29) - 1)).view(np.float64)


def _added(kind: str, part: Array, a: Array, b: Array) -> Array:
    """``part`` and the products of an instruction, or of three: small ones first."""
    if kind != SPLIT:
        total: Array = part + (nearest(a) @ nearest(b) if kind == "tf32" else a @ b)
        return total
    high_a, high_b = rounded(a), rounded(b)
    low_a, low_b = truncated(a - high_a), truncated(b - high_b)
    for x, y in ((low_a, high_b), (high_a, low_b), (high_a, high_b)):
        part = toward_zero(part + x.astype(np.float64) @ y)
    return part


_MMA = {"bfloat16": "m16n8k16.row.col.f32.bf16.bf16.f32", "float16": "m16n8k16.row.col.f32.f16.f16.f32"}
_MMA["float32"] = "m16n8k8.row.col.f32.tf32.tf32.f32"


def place_of_sum(b: Operand, row: int, column: int, j: int) -> int:
    """The register of a sum: of a fragment's eight rows (counted through all fragments), and of b's fragment
    ``column`` the j-th of the two columns that a thread has."""
    if b.spread:
        return (row * (b.fragments // 4) + column // 4) * 8 + 4 * j + column % 4
    return (row * b.fragments + column) * 2 + j


def _ends(step: int, steps: int) -> bool:
    """Is a chain of sums added to the others after this inner step?"""
    return (step + 1) % CHAIN == 0 or step + 1 == steps


def _fragments(shared: Any, of: Operand, at: Array, step: int) -> Array:
    """Fragments as ``[register, warp, lane // 4, lane % 4, element]``."""
    loads = of.loads(step)
    places = np.stack([(at ^ x) + p for x, p, _ in loads])
    if np.any(places % of.layout.chunk):
        raise ValueError("a warp's tile is read from what is not 16 bytes aligned.")
    found = np.asarray(shared.read(places[..., None] + np.arange(of.layout.chunk)))
    if of.dtype in HALVES:
        found = found.view(of.dtype).astype(np.float32)
    if not of.matrices:
        found = np.moveaxis(found, -1, 1).reshape(len(loads), 4, -1, 8, 4, 1)
    else:
        found = found.reshape(len(loads), -1, 4, 8, of.layout.chunk)  # load, warp, matrix, line, element
        found = found if of.rows else found.swapaxes(-1, -2)
        found = np.moveaxis(found, 2, 1).reshape(len(loads), 4, -1, 8, 4, of.layout.chunk // 4)
    out = np.empty((of.registers, *found.shape[2:]), np.float32)
    for (_, _, registers), values in zip(loads, found, strict=True):
        out[list(registers)] = values
    return out


def _load(builder: Any, window: Any, of: Operand, at: Any, step: int) -> list[Any]:
    """The registers of a step's fragments, as 32 bits."""
    from llvmlite import ir

    i32, f32 = ir.IntType(32), ir.FloatType()
    four = ir.LiteralStructType([i32] * 4)
    itemsize, out = of.layout.itemsize, [None] * of.registers
    trans = "" if of.rows else ".trans"
    asm = f"ldmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 {{$0,$1,$2,$3}}, [$4];"
    call = ir.InlineAsm(ir.FunctionType(four, [i32]), asm, "=r,=r,=r,=r,r,~{memory}", side_effect=True)
    for x, p, registers in of.loads(step):
        place = builder.xor(at, _number(x)) if x else at
        if of.matrices:
            address = builder.add(builder.ptrtoint(window, i32), builder.mul(place, _number(itemsize)))
            found = builder.call(call, [builder.add(address, _number(p * itemsize))])
            values = [builder.extract_value(found, i) for i in range(4)]
        else:
            pointer = _at(builder, window, place, p)
            vector = ir.PointerType(ir.VectorType(f32, 4), addrspace=3)
            found = builder.load(builder.bitcast(pointer, vector), align=16)
            values = [builder.bitcast(builder.extract_element(found, _number(i)), i32) for i in range(4)]
        for register, value in zip(registers, values, strict=True):
            out[register] = value
    return out


def _split(builder: Any, value: Any) -> tuple[Any, Any]:
    """hi and lo; of lo the hardware takes the bits that TF32 has."""
    from llvmlite import ir

    i32, f32 = ir.IntType(32), ir.FloatType()
    high = builder.and_(builder.add(value, _number(_HALF)), _number(_BITS))
    low = builder.fsub(builder.bitcast(value, f32), builder.bitcast(high, f32))
    return high, builder.bitcast(low, i32)


def _to_nearest(builder: Any, x: Any) -> Any:
    """See `nearest`."""
    from llvmlite import ir

    i32, f32 = ir.IntType(32), ir.FloatType()
    fma = builder.module.declare_intrinsic("llvm.fma", [f32], ir.FunctionType(f32, [f32] * 3))
    much = builder.fmul(x, ir.Constant(f32, 8193.0))
    return builder.bitcast(builder.call(fma, [x, ir.Constant(f32, -8192.0), much]), i32)


def _terms(kind: str, builder: Any, values: Sequence[Any]) -> tuple[list[Any], ...]:
    """What is multiplied for these registers: themselves, rounded, or their parts."""
    from llvmlite import ir

    if kind == SPLIT:
        pairs = [_split(builder, value) for value in values]
        return [high for high, _ in pairs], [low for _, low in pairs]
    if kind == "tf32":
        values = [_to_nearest(builder, builder.bitcast(value, ir.FloatType())) for value in values]
    return (list(values),)


@cache
def product(kind: str, depth: int, a: Operand, b: Operand) -> Pair:
    """``(acc, shared, at_a, at_b)``: acc += a b over ``depth``, for each warp; ``at``: where a thread's `own` lies.

    ``kind``: '3xtf32' or 'tf32' of float32, 'half' else. A thread has, of each eight rows of a (`place_of_sum`),
    neighbouring columns of the tile: eight of 32 if b is spread, two of eight else.
    """
    steps = range(depth // a.depth)
    rule = _product_rule(kind, steps, a, b)
    return Pair(f"product_{kind}_{depth}_{_told(a)}_{_told(b)}", _product_twin(kind, steps, a, b), rule)


def _product_twin(kind: str, steps: range, a: Operand, b: Operand) -> Callable[..., None]:
    def twin(acc: Array, shared: Any, at_a: Array, at_b: Array) -> None:
        part: Any = 0.0
        for step in steps:
            x, y = _fragments(shared, a, at_a, step), _fragments(shared, b, at_b, step)
            x = x.reshape(a.fragments, 2, 2, *x.shape[1:])  # fragment, half of k, half of rows, warp, row, k, element
            y = y.reshape(b.fragments, 2, *y.shape[1:])  # fragment, half of k, warp, column, k, element
            x = x.transpose(3, 0, 2, 4, 1, 5, 6).reshape(x.shape[3], a.extent, a.depth)
            y = y.transpose(2, 1, 4, 5, 0, 3).reshape(y.shape[2], a.depth, b.extent)
            part = _added(kind, part, x, y)
            if not _ends(step, len(steps)):
                continue
            z = part.astype(np.float32).reshape(-1, a.extent // 8, 8, b.fragments, 4, 2)
            z, part = z.transpose(1, 3, 5, 0, 2, 4).reshape(a.extent // 8, b.fragments, 2, -1), 0.0
            for row, column, j in every(range(a.extent // 8), range(b.fragments), (0, 1)):
                acc[place_of_sum(b, row, column, j)] += z[row, column, j]  # of a thread

    return twin


def _product_rule(kind: str, steps: range, a: Operand, b: Operand) -> Callable[..., Any]:
    def rule(acc: Any, shared: Any, at_a: Any, at_b: Any) -> Any:
        from llvmlite import ir
        from numba.cuda import types

        i32, f32 = ir.IntType(32), ir.FloatType()

        def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            data = _array(context, builder, sig.args[0], args[0])
            window = shared_window(context, builder, sig.args[1], args[1])
            asm = f"mma.sync.aligned.{_MMA[a.dtype]} {{$0,$1,$2,$3}},{{$4,$5,$6,$7}},{{$8,$9}},{{$10,$11,$12,$13}};"
            signature = ir.FunctionType(ir.LiteralStructType([f32] * 4), [i32] * 6 + [f32] * 4)
            mma = ir.InlineAsm(signature, asm, "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f")
            places = [_at(builder, data, i) for i in range(a.extent * b.extent // 32)]
            sums = [builder.load(place) for place in places]
            # of the next step, loads are under way while this one's products are computed
            loaded = _load(builder, window, a, args[2], 0), _load(builder, window, b, args[3], 0)
            zero = ir.Constant(f32, 0.0)

            def multiply(into: list[Any], i: int, j: int, left: list[Any], right: list[Any]) -> None:
                own = [place_of_sum(b, 2 * i + half, j, e) for half in (0, 1) for e in (0, 1)]
                operands = left[4 * i : 4 * i + 4] + right[2 * j : 2 * j + 2] + [into[p] for p in own]
                found = builder.call(mma, operands)
                for k, p in enumerate(own):
                    into[p] = builder.extract_value(found, k)

            part = [zero] * len(sums) if kind == SPLIT else sums
            for step in steps:
                x, y = (_terms(kind, builder, values) for values in loaded)
                if step + 1 < len(steps):
                    loaded = _load(builder, window, a, args[2], step + 1), _load(builder, window, b, args[3], step + 1)
                order = ((x[-1], y[0]), (x[0], y[-1]), (x[0], y[0])) if kind == SPLIT else ((x[0], y[0]),)
                for left, right in order:  # all fragments between two products of one: they wait for each other
                    for i, j in every(range(a.fragments), range(b.fragments)):
                        multiply(part, i, j, left, right)
                if kind == SPLIT and _ends(step, len(steps)):
                    sums = [builder.fadd(one, other) for one, other in zip(sums, part, strict=True)]
                    part = [zero] * len(sums)
            for place, value in zip(places, sums, strict=True):
                builder.store(value, place)
            return context.get_dummy_value()

        return types.void, (acc, shared, types.int32, types.int32), emit

    return rule


@cache
def exchange() -> Pair:
    """``(acc, first)``: of eight registers, two of each of four fragments, a thread of four gets those of one fragment.

    Before, thread t has columns 2 t and 2 t + 1 of fragments 0 to 3; after, columns 0 to 7 of fragment t: 16 bytes or
    more that can be stored at once.
    """

    def twin(acc: Array, first: int) -> None:
        pairs = acc[first : first + 8].reshape(4, 2, -1, 4)  # fragment, column, four threads, thread
        acc[first : first + 8] = pairs.transpose(3, 1, 2, 0).reshape(8, -1)

    def rule(acc: Any, first: Any) -> Any:
        from llvmlite import ir
        from numba.cuda import types

        i32, f32 = ir.IntType(32), ir.FloatType()

        def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            data = _array(context, builder, acc, args[0])
            places = [_at(builder, data, args[1], i) for i in range(8)]
            values = [builder.bitcast(builder.load(place), i32) for place in places]
            lane = builder.call(ir.InlineAsm(ir.FunctionType(i32, []), "mov.u32 $0, %laneid;", "=r"), [])
            for bit in (1, 2):
                asm = f"shfl.sync.bfly.b32 $0, $1, {bit}, 0x1f, 0xffffffff;"
                swap = ir.InlineAsm(ir.FunctionType(i32, [i32]), asm, "=r,r", side_effect=True)
                upper = builder.icmp_unsigned("!=", builder.and_(lane, _number(bit)), _number(0))
                for fragment in (f for f in range(4) if not f & bit):
                    for j in (0, 1):
                        low, high = 2 * fragment + j, 2 * (fragment + bit) + j
                        given = builder.select(upper, values[low], values[high])
                        taken = builder.call(swap, [given])
                        values[low], values[high] = (
                            builder.select(upper, taken, values[low]),
                            builder.select(upper, values[high], taken),
                        )
            for place, value in zip(places, values, strict=True):
                builder.store(builder.bitcast(value, f32), place)
            return context.get_dummy_value()

        return types.void, (acc, types.int32), emit

    return Pair("exchange", twin, rule)


def _told(of: Operand) -> str:
    return f"{'a' if of.left else 'b'}{of.extent}{'rows' if of.rows else 'lines'}{of.layout.pitch}_{of.dtype}"


def kind_of(op: Any, dtype: str) -> str:
    """What is multiplied: three products of TF32 for one of float32, one, or halves."""
    if dtype in HALVES:
        return "half"
    return "tf32" if op.tf32 else SPLIT
