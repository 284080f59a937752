"""The kernels before and after warpgroup products: b of float32 is laid out as lines; sums that were split are added.

wgmma wants the inner sum along the lines of float32, and b as TF32, or as that and the rest (`multiply_split`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from rapydli_flow.spec import HALVES, Array, Spec
from rapydli_flow.template import Epilogue

from .grid import Grid, blocks_of
from .hopper import depth_of, emit_ptx
from .pair import Pair
from .parts import add_in_order
from .ptx import cuda, float32, hold, load, store, take, unroll
from .tensor_core import SPLIT, rounded

# ---- intrinsics


def _rounded(builder: Any, value: Any) -> Any:
    from llvmlite import ir

    return emit_ptx(builder, "cvt.rna.tf32.f32 $0, $1;", "=r,f", [value], ir.IntType(32))


@cache
def as_tf32(width: int, *, rest: bool = False) -> Pair:
    """``(values) -> each as TF32``, or its rest."""

    def twin(values: Sequence[Array]) -> tuple[Array, ...]:
        high = [rounded(value) for value in values]
        return tuple(rounded(value - near) if rest else near for value, near in zip(values, high, strict=True))

    def rule(values: Any) -> Any:
        from llvmlite import ir
        from numba.cuda import types

        def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            out = []
            for i in range(width):
                value = builder.extract_value(args[0], i)
                near = builder.bitcast(_rounded(builder, value), ir.FloatType())
                if rest:
                    near = builder.bitcast(_rounded(builder, builder.fsub(value, near)), ir.FloatType())
                out.append(near)
            return context.make_tuple(builder, sig.return_type, out)

        return types.UniTuple(types.float32, width), (types.UniTuple(types.float32, width),), emit

    return Pair(f"tf32_{'rest' if rest else 'of'}_{width}", twin, rule)


# ---- before: b as lines


def laid_out(kind: str, b: Spec, taps: int, inner: int, columns_of: int) -> tuple[Spec, ...]:
    """The workspace for b: [piece, tap, column, inner], whole lines."""
    if kind == "half":
        return ()
    depth = depth_of(b.dtype)
    return (Spec((2 if kind == SPLIT else 1, taps, columns_of, blocks_of(inner, depth) * depth), b.dtype),)


def lay_out(
    kind: str, b: Spec, taps: int, inner: int, columns_of: int, *, along: bool, by_threads: bool = False
) -> Grid:
    """The first kernel for float32: b goes to the workspace as whole lines, as TF32 and, if it is split, the rest.

    b is stored as [tap, inner, column] or, ``along`` the inner sum, [tap, column, inner]. A thread moves 16 values.
    ``by_threads``: a is read as `multiply_split` does, so values go to `PLACES`.
    """
    (out,) = laid_out(kind, b, taps, inner, columns_of)
    pitch, size, threads, split = out.shape[-1], out.size // out.shape[0], 256, kind == SPLIT
    read, write, keep = load("float32", 4, constant=True), store("float32", 4), hold(4)
    across, high, low = take(4, 4), as_tf32(4), as_tf32(4, rest=True)
    wide = blocks_of(columns_of, 32)
    # a thread has four columns and four of the inner sum that are neighbours in a line: 4 apart where it is split
    moved, gather = split or by_threads, take(4)
    step = 4 if moved else 1

    def turned(ins: Any, outs: Any, work: Any, extras: Any, at: Any) -> None:
        held = cuda.local.array(16, float32)
        item = cuda.blockIdx.x * threads + cuda.threadIdx.x
        column = item // 32 % wide * 32 + item % 8 * 4
        run = item // (32 * wide) * 4 + item % 32 // 8
        tap = run // (pitch // 4)
        line = run % (pitch // 4) * 4  # where it begins
        k = line // 32 * 32 + line % 8 // 4 * 16 + line % 32 // 8 if moved else line
        for j in unroll(4):
            active = (tap < taps) & (k + j * step < inner) & (column < columns_of)
            keep(held, j * 4, read(active, ins[1], (tap * inner + k + j * step) * columns_of + column))
        for j in unroll(4):
            active = (tap < taps) & (column + j < columns_of)
            place = (tap * columns_of + column + j) * pitch + line
            write(active, work[0], place, high(across(held, j)))
            if split:
                write(active, work[0], size + place, low(across(held, j)))

    def straight(ins: Any, outs: Any, work: Any, extras: Any, at: Any) -> None:
        held = cuda.local.array(16, float32)
        item = cuda.blockIdx.x * threads + cuda.threadIdx.x
        row = item // (pitch // 16)
        begin = item % (pitch // 16) * 16
        for j in unroll(4):
            active = (row < taps * columns_of) & (begin + j * 4 < inner)
            keep(held, j * 4, read(active, ins[1], row * inner + begin + j * 4))
        for j in unroll(4):
            active = row < taps * columns_of
            if moved:
                place = row * pitch + begin // 32 * 32 + begin % 32 // 4 + j * 8
                write(active, work[0], place, high(across(held, j)))
                if split:
                    write(active, work[0], size + place, low(across(held, j)))
            else:
                write(active, work[0], row * pitch + begin + j * 4, high(gather(held, j * 4)))

    items = taps * columns_of * (pitch // 16) if along else 32 * wide * blocks_of(taps * (pitch // 4), 4)
    return Grid(straight if along else turned, blocks_of(items, threads), threads)


# ---- after: split sums


def split_sums(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], **config: Any) -> tuple[Spec, ...]:
    """The workspace: outputs of each split in float32."""
    return (Spec((config["splits"], *outs[0].shape), "float32"),) if config["splits"] > 1 else ()


def lanes_of(epilogue: Epilogue) -> int:
    """16 bytes of the widest operand that is read with the outputs."""
    wide = [spec.dtype for spec in (epilogue.out, *epilogue.extras) if spec.shape]
    return 8 if all(dtype in HALVES for dtype in wide) else 4


def add_up(kind: str, splits: int, epilogue: Epilogue) -> Grid:
    """The second kernel: the sums of all splits, in their order."""
    return add_in_order(epilogue, splits, lanes_of(epilogue), source=int(kind != "half"), from_zero=True)
