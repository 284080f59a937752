"""Intrinsics of halves that stay two to a word: both are compared at once, and nothing is converted but results."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

from rapydli_flow.spec import Array

from .pair import Pair, stored_type
from .ptx import _address, _array, _at, _number, _widened

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
