"""Tiles in shared memory from sm_80 on: where elements lie, and asynchronous copies to them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from rapydli_flow.spec import HALVES

from .arithmetic import indexing
from .emulate import machine
from .pair import Pair, stored_type
from .ptx import _address, _array, _number


def in_shared(dtype: str) -> Any:
    """What an element is in shared memory, for ``cuda.shared.array``: halves are bits there."""
    return np.uint16 if dtype in HALVES else np.dtype(dtype).type


@dataclass(frozen=True)
class Layout:
    """``lines`` of ``pitch`` elements, in chunks of 16 bytes that are swapped so that reads meet no bank twice.

    The chunk with number i, counted through all lines, lies at ``i ^ bits(line)``. Sizes are powers of two.
    """

    lines: int
    pitch: int
    itemsize: int
    shift: int
    mask: int = 7
    left: int = 0

    @property
    def chunk(self) -> int:
        """Elements of 16 bytes."""
        return 16 // self.itemsize

    @property
    def size(self) -> int:
        return self.lines * self.pitch

    def bits(self, line: Any) -> Any:
        return (line >> self.shift & self.mask) << self.left

    def place(self, line: Any, column: Any) -> Any:
        """Where an element lies."""
        return line * self.pitch + column ^ self.bits(line) * self.chunk

    def move(self, line: int, column: int) -> tuple[int, int]:
        """``(x, p)``: an element this far away lies at ``(place ^ x) + p``, if no bit of the sums carries."""
        far, banks = line * self.pitch + column, 8 * self.chunk
        return far % banks ^ self.bits(line) * self.chunk, far - far % banks


def layout_of(dtype: str, *, lines: int, pitch: int, rows: bool, left: bool) -> Layout:
    """The layout of an operand's tile in shared memory that its reads meet no bank twice in."""
    itemsize = np.dtype(dtype).itemsize
    if not rows and dtype not in HALVES:
        return Layout(lines, pitch, itemsize, 0, 3, 1)
    together = max(1, 128 // (pitch * itemsize))  # lines that share all banks
    return Layout(lines, pitch, itemsize, 2 if rows and not left else together.bit_length() - 1)


@cache
def place_of(layout: Layout) -> Pair:
    """``(line, column) -> place`` of an element."""
    return indexing(f"place_{layout.pitch}_{layout.itemsize}_{layout.shift}_{layout.mask}_{layout.left}", layout.place)


def shared_window(context: Any, builder: Any, kind: Any, value: Any) -> Any:
    """The pointer to a shared array in its own address space, which 32 bits can tell."""
    from llvmlite import ir

    data = _array(context, builder, kind, value)
    return builder.addrspacecast(data, ir.PointerType(data.type.pointee, addrspace=3))


@cache
def copy_async(dtype: str, width: int) -> Pair:
    """``(active, pointer, at, shared, to)``: begin to copy ``width`` elements, 4, 8 or 16 bytes; zeros if inactive."""
    size = np.dtype(dtype).itemsize * width
    assert size in (4, 8, 16), f"{width} elements of {dtype} are {size} bytes"

    def twin(active: Any, pointer: Any, at: Any, shared: Any, to: Any) -> None:
        to = np.broadcast_to(to, machine.threads)
        if np.any(to % width):
            raise ValueError(f"{width} elements are copied to one that is not a multiple of {width}.")
        for j, value in enumerate(pointer.read(active, at, width)):
            shared.copy(to + j, value.astype(pointer.data.dtype).view(shared.data.dtype))

    def rule(active: Any, pointer: Any, at: Any, shared: Any, to: Any) -> Any:
        from llvmlite import ir
        from numba.cuda import types

        # 16 bytes pass by the first cache, and bring the rest of their 128
        asm = f"cp.async.{'cg' if size == 16 else 'ca'}.shared.global{'.L2::128B' if size == 16 else ''}"
        asm += f" [$0], [$1], {size}, $2;"
        i32, i64 = ir.IntType(32), ir.IntType(64)

        def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            call = ir.InlineAsm(ir.FunctionType(ir.VoidType(), [i32, i64, i32]), asm, "r,l,r,~{memory}", True)
            target = builder.ptrtoint(shared_window(context, builder, sig.args[3], args[3]), i32)
            target = builder.add(target, builder.mul(args[4], _number(size // width)))
            count = builder.select(args[0], _number(size), _number(0))
            builder.call(call, [target, _address(builder, args[1], args[2]), count])
            return context.get_dummy_value()

        return types.void, (types.boolean, types.CPointer(stored_type(dtype)), types.int32, shared, types.int32), emit

    return Pair(f"copy_async{width}_{dtype}", twin, rule)


def _statement(name: str, asm: str, twin: Callable[[], None]) -> Pair:
    def rule() -> Any:
        from llvmlite import ir
        from numba.cuda import types

        def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            call = ir.InlineAsm(ir.FunctionType(ir.VoidType(), []), asm, "~{memory}", side_effect=True)
            builder.call(call, [])
            return context.get_dummy_value()

        return types.void, (), emit

    return Pair(name, twin, rule)


commit = _statement("commit", "cp.async.commit_group;", lambda: machine.commit_copies())


@cache
def wait(groups: int) -> Pair:
    """``()``: until no more than this many groups of the thread's copies are under way. A barrier must follow."""
    return _statement(f"wait{groups}", f"cp.async.wait_group {groups};", lambda: machine.wait_copies(groups))
