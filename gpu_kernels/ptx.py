"""Intrinsics: everything that a kernel says which plain index arithmetic cannot.

Each is a `Pair`: what numba-cuda compiles (LLVM IR and PTX), and the NumPy twin that the emulator runs.
The device halves are made on first use, so that importing this module needs NumPy only. Their names tell
all their constants: a kernel's generated text and this module say everything about its machine code.

Index arithmetic is 32-bit. Guarded accesses are predicated PTX: no branch, zeros where inactive.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np

from rapydli_flow.errors import TemplateError
from rapydli_flow.spec import HALVES, Array

from .emulate import machine as cuda
from .pair import Pair, device_type, stored_type

__all__ = ["Pair", "cuda", "device_type", "float32", "int32", "unroll"]

float32, int32 = np.float32, np.int32
FAR = 1 << 28  # a coordinate that lies outside every array
_FULL = "llvm.fma"


def unroll(count: int) -> range:
    """A loop that the compiled kernel writes out; its variable is a constant there."""
    return range(count)


# ---- types


_REGISTER = {"float32": ("f", "f32"), "float64": ("d", "f64"), "int64": ("l", "s64"), "int32": ("r", "s32")}
_REGISTER["uint8"] = ("r", "u8")
_ZERO = {"f": "mov.f32 ${}, 0f00000000;", "d": "mov.f64 ${}, 0d0000000000000000;"}
_ZERO |= {"l": "mov.s64 ${}, 0;", "r": "mov.s32 ${}, 0;", "h": "mov.b16 ${}, 0;"}


def _llvm(register: str) -> Any:
    from llvmlite import ir

    made = {"f": ir.FloatType(), "d": ir.DoubleType(), "l": ir.IntType(64), "r": ir.IntType(32), "h": ir.IntType(16)}
    return made[register]


def _address(builder: Any, pointer: Any, at: Any) -> Any:
    """The address of an element in global memory, as an integer; the index is widened last."""
    from llvmlite import ir

    space = ir.PointerType(pointer.type.pointee, addrspace=1)
    return builder.ptrtoint(builder.gep(builder.addrspacecast(pointer, space), [at]), ir.IntType(64))


def _array(context: Any, builder: Any, kind: Any, value: Any) -> Any:
    """The data pointer of a local or shared array."""
    return context.make_array(kind)(context, builder, value).data


def _number(value: int) -> Any:
    from llvmlite import ir

    return ir.Constant(ir.IntType(32), value)


def _at(builder: Any, pointer: Any, *offsets: Any) -> Any:
    for offset in offsets:
        pointer = builder.gep(pointer, [_number(offset) if isinstance(offset, int) else offset], inbounds=True)
    return pointer


def _vector_pointer(builder: Any, pointer: Any, width: int) -> Any:
    from llvmlite import ir

    return builder.bitcast(pointer, ir.PointerType(ir.VectorType(pointer.type.pointee, width)))


def _at_most_16_bytes(dtype: str, width: int) -> None:
    if np.dtype(dtype).itemsize * width > 16:
        raise TemplateError(
            f"{width} elements of {dtype} are more than 16 bytes. Use narrower vectors for this kernel."
        )


# ---- index arithmetic


def _binary(name: str, twin: Callable[..., Any]) -> Pair:
    def rule(a: Any, b: Any) -> Any:
        integer = device_type("int32")
        return integer, (integer, integer), lambda context, builder, sig, args: getattr(builder, name)(*args)

    return Pair(f"i32_{name}", twin, rule)


ARITHMETIC = {
    "Add": _binary("add", lambda a, b: a + b),
    "Sub": _binary("sub", lambda a, b: a - b),
    "Mult": _binary("mul", lambda a, b: a * b),
    "FloorDiv": _binary("udiv", lambda a, b: a // b),  # operands are never negative
    "Mod": _binary("urem", lambda a, b: a % b),
    "BitXor": _binary("xor", lambda a, b: a ^ b),
}


def _inside_rule(at: Any, extent: Any) -> Any:
    integer, boolean = device_type("int32"), device_type("boolean")
    return boolean, (integer, integer), lambda context, builder, sig, args: builder.icmp_unsigned("<", *args)


def _selected(condition: Array | bool, a: Array | int, b: Array | int) -> Array:
    return np.where(condition, a, b).astype(np.int32)


def _select_rule(condition: Any, a: Any, b: Any) -> Any:
    integer, boolean = device_type("int32"), device_type("boolean")
    return integer, (boolean, integer, integer), lambda context, builder, sig, args: builder.select(*args)


inside = Pair("inside", lambda at, extent: (at >= 0) & (at < extent), _inside_rule)
select = Pair("select", _selected, _select_rule)


# ---- global memory


# How halves get into registers and out of them, two at a time: the first is the lower half of 32 bits
_NARROW = {"bfloat16": "cvt.rn.bf16x2.f32 $0, $2, $1;", "float16": "cvt.rn.f16x2.f32 $0, $2, $1;"}
_WIDEN = {
    "bfloat16": "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;",
    "float16": "{ .reg .b16 lo, hi; mov.b32 {lo, hi}, $2; cvt.f32.f16 $0, lo; cvt.f32.f16 $1, hi; }",
}


def _words(dtype: str, width: int) -> tuple[int, str, str]:
    """How an access of ``width`` elements is written: registers, their letter, and the type of one."""
    if dtype in HALVES:
        return (width // 2, "r", "b32") if width > 1 else (1, "h", "b16")
    if dtype == "uint8" and width >= 4:
        return width // 4, "r", "b32"
    register, suffix = _REGISTER[dtype]
    return width, register, suffix


def _widened(builder: Any, dtype: str, width: int, words: Sequence[Any]) -> list[Any]:
    """float32 from the words of halves."""
    from llvmlite import ir

    f, i32 = ir.FloatType(), ir.IntType(32)
    signature = ir.FunctionType(ir.LiteralStructType([f, f]), [i32])
    convert = ir.InlineAsm(signature, _WIDEN[dtype], "=f,=f,r")
    pairs = [builder.call(convert, [word if width > 1 else builder.zext(word, i32)]) for word in words]
    return [builder.extract_value(pair, j) for pair in pairs for j in (0, 1)][:width]


def _narrowed(builder: Any, dtype: str, values: Sequence[Any]) -> list[Any]:
    """The words of halves, rounded to nearest."""
    from llvmlite import ir

    f, i32 = ir.FloatType(), ir.IntType(32)
    convert = ir.InlineAsm(ir.FunctionType(i32, [f, f]), _NARROW[dtype], "=r,f,f")
    if len(values) == 1:
        return [builder.trunc(builder.call(convert, [values[0], ir.Constant(f, 0.0)]), ir.IntType(16))]
    return [builder.call(convert, list(pair)) for pair in zip(values[::2], values[1::2], strict=True)]


def _bytes(builder: Any, width: int, words: Sequence[Any]) -> list[Any]:
    """uint8 from words: four in each if there are four or more, the first one lowest."""
    from llvmlite import ir

    each = min(4, width // len(words))
    parts = [builder.lshr(word, _number(8 * j)) for word in words for j in range(each)]
    return [builder.trunc(part, ir.IntType(8)) for part in parts]


def _packed(builder: Any, values: Sequence[Any]) -> list[Any]:
    """The reverse of `_bytes`."""
    from llvmlite import ir

    wide = [builder.zext(value, ir.IntType(32)) for value in values]
    if len(wide) < 4:
        return wide
    words = []
    for first in range(0, len(wide), 4):
        word = wide[first]
        for j in range(1, 4):
            word = builder.or_(word, builder.shl(wide[first + j], _number(8 * j)))
        words.append(word)
    return words


@cache
def load(dtype: str, width: int, *, constant: bool = False) -> Pair:
    """``(active, pointer, at) -> width elements``; ``constant``: nobody writes them while the kernel runs.

    Halves are widened to float32.
    """
    _at_most_16_bytes(dtype, width)

    def rule(active: Any, pointer: Any, at: Any) -> Any:
        from llvmlite import ir
        from numba.cuda import types

        count, register, suffix = _words(dtype, width)
        kind = _llvm(register)
        regs = ", ".join(f"${j}" for j in range(count))
        what = f"ld.global{'.nc' if constant else ''}{f'.v{count}' if count > 1 else ''}.{suffix}"
        asm = "{ .reg .pred p; setp.ne.b32 p, $" + f"{count + 1}, 0; "
        asm += " ".join(_ZERO[register].format(j) for j in range(count))
        asm += f" @p {what} {'{' + regs + '}' if count > 1 else regs}, [${count}]; }}"
        result = ir.LiteralStructType([kind] * count) if count > 1 else kind
        constraints = ",".join([f"=&{register}"] * count + ["l", "r"] + ([] if constant else ["~{memory}"]))

        def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            signature = ir.FunctionType(result, [ir.IntType(64), ir.IntType(32)])
            call = ir.InlineAsm(signature, asm, constraints, side_effect=True)
            on = builder.zext(args[0], ir.IntType(32))
            out = builder.call(call, [_address(builder, args[1], args[2]), on])
            values = [builder.extract_value(out, j) for j in range(count)] if count > 1 else [out]
            if dtype in HALVES:
                values = _widened(builder, dtype, width, values)
            if dtype == "uint8":
                values = _bytes(builder, width, values)
            return context.make_tuple(builder, sig.return_type, values)

        return (
            types.UniTuple(device_type(dtype), width),
            (types.boolean, types.CPointer(stored_type(dtype)), types.int32),
            emit,
        )

    name = f"load{width}_{dtype}{'_constant' if constant else ''}"
    return Pair(name, lambda active, pointer, at: pointer.read(active, at, width), rule)


@cache
def load_one(dtype: str, width: int) -> Pair:
    """``(active, pointer, at) -> the same element width times``."""
    one = load(dtype, 1)

    def rule(active: Any, pointer: Any, at: Any) -> Any:
        from numba.cuda import types

        _, parameters, load_it = one.rule(active, pointer, at)
        single = types.UniTuple(device_type(dtype), 1)

        def emit(context: Any, builder: Any, sig: Any, values: Any) -> Any:
            loaded = load_it(context, builder, sig.replace(return_type=single), values)
            return context.make_tuple(builder, sig.return_type, [builder.extract_value(loaded, 0)] * width)

        return types.UniTuple(device_type(dtype), width), parameters, emit

    return Pair(f"load_one{width}_{dtype}", lambda *args: one.twin(*args) * width, rule)


@cache
def store(dtype: str, width: int) -> Pair:
    """``(active, pointer, at, values)``: float32 is rounded to halves on its way."""
    _at_most_16_bytes(dtype, width)

    def rule(active: Any, pointer: Any, at: Any, values: Any) -> Any:
        from llvmlite import ir
        from numba.cuda import types

        count, register, suffix = _words(dtype, width)
        kind = _llvm(register)
        regs = ", ".join(f"${j + 2}" for j in range(count))
        what = f"st.global{f'.v{count}' if count > 1 else ''}.{suffix}"
        asm = f"{{ .reg .pred p; setp.ne.b32 p, $1, 0; @p {what} [$0], {'{' + regs + '}' if count > 1 else regs}; }}"
        constraints = ",".join(["l", "r"] + [register] * count + ["~{memory}"])

        def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            signature = ir.FunctionType(ir.VoidType(), [ir.IntType(64), ir.IntType(32)] + [kind] * count)
            elements = [builder.extract_value(args[3], j) for j in range(width)]
            if dtype in HALVES:
                elements = _narrowed(builder, dtype, elements)
            if dtype == "uint8":
                elements = _packed(builder, elements)
            call = ir.InlineAsm(signature, asm, constraints, side_effect=True)
            builder.call(call, [_address(builder, args[1], args[2]), builder.zext(args[0], ir.IntType(32)), *elements])
            return context.get_dummy_value()

        return (
            types.void,
            (
                types.boolean,
                types.CPointer(stored_type(dtype)),
                types.int32,
                types.UniTuple(device_type(dtype), width),
            ),
            emit,
        )

    return Pair(f"store{width}_{dtype}", lambda active, pointer, at, v: pointer.write(active, at, v), rule)


# ---- tuples and registers


def _append_rule(values: Any, value: Any) -> Any:
    from numba.cuda import types

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        old = [builder.extract_value(args[0], i) for i in range(len(values))]
        return context.make_tuple(builder, sig.return_type, [*old, args[1]])

    return types.BaseTuple.from_types((*values, value)), (values, value), emit


append = Pair("append", lambda values, value: (*values, value), _append_rule)


@cache
def take(width: int, step: int = 1) -> Pair:
    """``(registers, first) -> width of them``, so far apart"""

    def twin(registers: Array, first: int) -> tuple[Array, ...]:
        return tuple(registers[first + j * step] for j in range(width))

    def rule(registers: Any, first: Any) -> Any:
        from numba.cuda import types

        def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            data = _array(context, builder, registers, args[0])
            values = [builder.load(_at(builder, data, args[1], j * step)) for j in range(width)]
            return context.make_tuple(builder, sig.return_type, values)

        return types.UniTuple(registers.dtype, width), (registers, types.int32), emit

    return Pair(f"take{width}" if step == 1 else f"take{width}_{step}", twin, rule)


@cache
def hold(width: int) -> Pair:
    """``(registers, first, values)``: the reverse of `take`."""

    def twin(registers: Array, first: int, values: Sequence[Any]) -> None:
        for j in range(width):
            registers[first + j] = values[j]

    def rule(registers: Any, first: Any, values: Any) -> Any:
        from numba.cuda import types

        def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            data = _array(context, builder, registers, args[0])
            for j in range(width):
                builder.store(builder.extract_value(args[2], j), _at(builder, data, args[1], j))
            return context.get_dummy_value()

        return types.void, (registers, types.int32, types.UniTuple(registers.dtype, width)), emit

    return Pair(f"hold{width}", twin, rule)


@cache
def clear(count: int) -> Pair:
    """``(registers)``: all zero."""

    def twin(registers: Array) -> None:
        registers[:] = 0

    def rule(registers: Any) -> Any:
        from llvmlite import ir
        from numba.cuda import types

        def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            data = _array(context, builder, registers, args[0])
            for i in range(count):
                builder.store(ir.Constant(data.type.pointee, 0.0), _at(builder, data, i))
            return context.get_dummy_value()

        return types.void, (registers,), emit

    return Pair(f"clear{count}", twin, rule)


# ---- shared memory


@cache
def put(width: int) -> Pair:
    """``(shared, at, registers, first)``: neighbouring registers to neighbouring elements."""

    def twin(shared: Any, at: Array, registers: Array, first: int) -> None:
        if np.any(at % width):
            raise ValueError(f"put{width} to an element that is not a multiple of {width}.")
        for j in range(width):
            shared.write(at + j, registers[first + j])

    def rule(shared: Any, at: Any, registers: Any, first: Any) -> Any:
        from llvmlite import ir
        from numba.cuda import types

        def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            source = _array(context, builder, registers, args[2])
            values = [builder.load(_at(builder, source, args[3], j)) for j in range(width)]
            target = _at(builder, _array(context, builder, shared, args[0]), args[1])
            vector = ir.Constant(ir.VectorType(values[0].type, width), ir.Undefined)
            for j, value in enumerate(values):
                vector = builder.insert_element(vector, value, _number(j))
            size = registers.dtype.bitwidth // 8
            builder.store(vector, _vector_pointer(builder, target, width), align=size * width)
            return context.get_dummy_value()

        return types.void, (shared, types.int32, registers, types.int32), emit

    return Pair(f"put{width}", twin, rule)


@cache
def multiply_tile(depth: int, a: tuple[int, int, int], b: tuple[int, int, int]) -> Pair:
    """``(acc, shared_a, shared_b, at_a, at_b)``: acc[i * b_size + j] += sum over k < depth of a[k, i] * b[k, j].

    ``a = (size, pitch, step)``: the thread's values of row k start at ``at_a + k * pitch``, in groups of four
    that lie ``step`` apart. Fully unrolled: accumulators stay in registers, k by k.
    """
    (rows, pitch_a, step_a), (columns, pitch_b, step_b) = a, b

    def twin(acc: Array, shared_a: Any, shared_b: Any, at_a: Array, at_b: Array) -> None:
        def read(shared: Any, at: Array, size: int, pitch: int, step: int) -> Array:
            group = np.arange(size)
            own = group // 4 * step + group % 4
            k = np.arange(depth)
            return np.asarray(shared.read(k[:, None, None] * pitch + own[:, None] + np.asarray(at)))

        x, y = read(shared_a, at_a, *a), read(shared_b, at_b, *b)
        product = np.einsum("kit,kjt->ijt", x, y)
        acc += product.reshape(acc.shape)

    def rule(acc: Any, shared_a: Any, shared_b: Any, at_a: Any, at_b: Any) -> Any:
        from llvmlite import ir
        from numba.cuda import types

        def read(builder: Any, first: Any, size: int, step: int) -> list[Any]:
            out = []
            for group in range(size // 4):
                four = builder.load(_vector_pointer(builder, _at(builder, first, group * step), 4), align=16)
                out += [builder.extract_element(four, _number(j)) for j in range(4)]
            return out

        def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            kind = ir.FloatType() if acc.dtype.bitwidth == 32 else ir.DoubleType()
            fma = builder.module.declare_intrinsic(_FULL, [kind], ir.FunctionType(kind, [kind] * 3))
            data, of_a, of_b = (_array(context, builder, t, v) for t, v in zip(sig.args[:3], args[:3], strict=True))
            places = [_at(builder, data, i) for i in range(rows * columns)]
            sums = [builder.load(place) for place in places]
            of_a, of_b = _at(builder, of_a, args[3]), _at(builder, of_b, args[4])
            for k in range(depth):
                x = read(builder, _at(builder, of_a, k * pitch_a), rows, step_a)
                y = read(builder, _at(builder, of_b, k * pitch_b), columns, step_b)
                for i in range(rows):
                    for j in range(columns):
                        sums[i * columns + j] = builder.call(fma, [x[i], y[j], sums[i * columns + j]])
            for place, value in zip(places, sums, strict=True):
                builder.store(value, place)
            return context.get_dummy_value()

        return types.void, (acc, shared_a, shared_b, types.int32, types.int32), emit

    name = f"multiply_tile_{depth}_" + "_".join(map(str, (*a, *b)))
    return Pair(name, twin, rule)
