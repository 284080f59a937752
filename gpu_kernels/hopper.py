"""Intrinsics for sm_90a: roles of warpgroups, barriers in shared memory (mbarrier), and the copy engine (TMA).

Shared memory is lines of 128 bytes, in chunks of 64 lines (8 KB, `LINES`); a line holds 64 halves, or 32 of float32.
The copy engine swizzles the 16-byte pieces of a line, and products (`warpgroup`) undo that: kernels name whole lines.

Copies are asynchronous. A barrier's phase is complete when all have arrived and all bytes that were announced have;
waiting names the parity of the phase. The twins keep what hardware would not tell: a line that is read before its copy
was waited for, or overwritten while another copy or a product uses it, is a `KernelFault`.

PTX with registers or labels stands within braces, to which they are local, so that it may be there several times.
Blocks are in no clusters, so `shared::cluster` is a block's own memory.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import ml_dtypes
import numpy as np

from rapydli_flow.spec import Array

from .emulate import KernelFault, Shared, View
from .emulate import machine as cuda
from .grid import WARPGROUP
from .pair import Pair
from .ptx import _array, _number

LINE_BYTES = 128
LINES = 64  # of a chunk
CHUNK_BYTES = LINES * LINE_BYTES
ALIGNMENT = 1024  # of chunks: the swizzle repeats after 8 lines
STORED = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}


def depth_of(dtype: str) -> int:
    """How much of the inner sum a line holds."""
    return LINE_BYTES // int(np.dtype(STORED[dtype]).itemsize)


def numbers(count: int, kind: str) -> tuple[Any, ...]:
    """Types of parameters."""
    from numba.cuda import types

    return (getattr(types, kind),) * count


def emit_ptx(builder: Any, asm: str, constraints: str, args: Sequence[Any], result: Any = None) -> Any:
    """A statement of PTX, which keeps its place among the others."""
    from llvmlite import ir

    signature = ir.FunctionType(result or ir.VoidType(), [arg.type for arg in args])
    return builder.call(ir.InlineAsm(signature, asm, constraints, side_effect=True), list(args))


def _statement(name: str, asm: str, twin: Callable[..., None], parameters: int = 0) -> Pair:
    """PTX without a result; ``parameters`` are 32-bit integers, $0 and so on."""

    def rule(*given: Any) -> Any:
        from numba.cuda import types

        def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            emit_ptx(builder, asm, ",".join([*["r"] * parameters, "~{memory}"]), args)
            return context.get_dummy_value()

        return types.void, numbers(parameters, "int32"), emit

    return Pair(name, twin, _counted(rule, parameters))


def _counted(rule: Any, parameters: int) -> Any:
    """A rule that takes any types, told how many."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    rule.__signature__ = inspect.Signature([inspect.Parameter(f"a{i}", kind) for i in range(parameters)])
    return rule


# ---- who a thread is


def _warpgroup_rule() -> Any:
    from llvmlite import ir
    from numba.cuda import types

    asm = "{ .reg .u32 t; mov.u32 t, %tid.x; shr.u32 t, t, 7; shfl.sync.idx.b32 $0, t, 0, 0x1f, 0xffffffff; }"

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return emit_ptx(builder, asm, "=r", (), ir.IntType(32))

    return types.int32, (), emit


def _elected_rule() -> Any:
    from llvmlite import ir
    from numba.cuda import types

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        within = emit_ptx(builder, "{ .reg .u32 t; mov.u32 t, %tid.x; and.b32 $0, t, 127; }", "=r", (), ir.IntType(32))
        return builder.icmp_unsigned("==", within, _number(0))

    return types.boolean, (), emit


own_warpgroup = Pair("own_warpgroup", lambda: int(cuda.threadIdx.x[0]) // WARPGROUP, _warpgroup_rule)
elected = Pair("elected", lambda: True, _elected_rule)  # one thread of the warpgroup: what it does, is done once


@cache
def registers(count: int, *, more: bool) -> Pair:
    """The threads of this warpgroup need ``count`` registers from here on: ``more`` or fewer than at launch."""
    way = "inc" if more else "dec"
    asm = f"setmaxnreg.{way}.sync.aligned.u32 {count};"
    return _statement(f"registers_{way}_{count}", asm, lambda: None)


# ---- shared memory


@cache
def place_of(alignment: int) -> Pair:
    """``(shared array) -> its place``, which the other intrinsics of this module take; rounded up."""

    def rule(shared: Any) -> Any:
        from llvmlite import ir
        from numba.cuda import types

        def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            data = _array(context, builder, sig.args[0], args[0])
            window = builder.addrspacecast(data, ir.PointerType(data.type.pointee, addrspace=3))
            place = builder.ptrtoint(window, ir.IntType(32))
            return builder.and_(builder.add(place, _number(alignment - 1)), _number(-alignment))

        return types.int32, (shared,), emit

    return Pair(f"place_{alignment}", lambda shared: shared, rule)


def _crew() -> Any:
    assert cuda.crew is not None, "these intrinsics are for grids with roles"
    return cuda.crew


def current() -> Any:
    """The warpgroup that runs."""
    return _crew().current


class _Barrier:
    """The twin of an mbarrier."""

    def __init__(self, arrivals: int) -> None:
        self.arrivals, self.phase = arrivals, 0
        self.missing, self.expected, self.copied = arrivals, 0, 0
        self.copies: list[Callable[[], Array]] = []
        self.here: list[Array] = []  # who knows of each line that came with the last phase

    def arrive(self, count: int = 1) -> None:
        self.missing -= count
        if self.missing < 0:
            raise KernelFault(f"{self.arrivals - self.missing} threads arrive at a barrier of {self.arrivals}.")
        self._complete()

    def _complete(self) -> None:
        if self.copied > self.expected:
            raise KernelFault(f"{self.copied} bytes come to a barrier that expects {self.expected}.")
        if self.missing or self.copied < self.expected:
            return
        self.here = [deliver() for deliver in self.copies]
        self.phase += 1
        self.missing, self.expected, self.copied, self.copies = self.arrivals, 0, 0, []

    def end(self) -> None:
        if self.copies:
            raise KernelFault(f"{self.copied} bytes are under way when a block ends, and nobody waits for them.")

    def expect(self, size_bytes: int) -> None:
        self.expected += size_bytes
        self.arrive()

    def copy(self, size_bytes: int, deliver: Callable[[], Array]) -> None:
        self.copied += size_bytes
        self.copies.append(deliver)
        if not self.missing:
            self._complete()


def _barrier(bars: Shared, i: int) -> _Barrier:
    found: _Barrier | None = bars.notes.get(f"barrier {int(i)}")
    if found is None:
        raise KernelFault(f"barrier {int(i)} is used but was never started.")
    return found


@cache
def start_barriers(first: int, count: int, arrivals: int) -> Pair:
    """``(barriers)``: ``count``, each for ``arrivals`` threads a phase. By one thread, before all synchronise."""

    def twin(bars: Shared) -> None:
        for i in range(first, first + count):
            bars.notes[f"barrier {i}"] = barrier = _Barrier(arrivals)
            _crew().at_end.append(barrier.end)

    places = range(8 * first, 8 * (first + count), 8)
    asm = " ".join(f"mbarrier.init.shared::cta.b64 [$0+{place}], {arrivals};" for place in places)
    asm += " fence.mbarrier_init.release.cluster;"
    return _statement(f"start_barriers_{first}_{count}_{arrivals}", asm, twin, 1)


def _slot(operation: str) -> str:
    return "{ .reg .u32 a; shl.b32 a, $1, 3; add.u32 a, a, $0; " + operation + " }"


@cache
def expect(size_bytes: int) -> Pair:
    """``(barriers, i)``: this thread arrives, and so many bytes will."""
    asm = _slot(f"mbarrier.arrive.expect_tx.shared::cta.b64 _, [a], {size_bytes};")
    return _statement(f"expect_{size_bytes}", asm, lambda bars, i: _barrier(bars, i).expect(size_bytes), 2)


def _wait_twin(bars: Shared, i: int, parity: int) -> None:
    barrier = _barrier(bars, i)
    me = current()
    _crew().wait(lambda: barrier.phase % 2 != parity)
    for known_to in barrier.here:
        known_to |= 1 << me.number


arrive = _statement(  # (barriers, i): one thread of each warp does
    "arrive",
    "{ .reg .u32 a, l; .reg .pred p; shl.b32 a, $1, 3; add.u32 a, a, $0; mov.u32 l, %laneid; "
    "setp.eq.u32 p, l, 0; @p mbarrier.arrive.shared::cta.b64 _, [a]; }",
    lambda bars, i: _barrier(bars, i).arrive(WARPGROUP // 32),
    2,
)
wait = _statement(  # (barriers, i, parity): until the phase of this parity is complete
    "wait",
    "{ .reg .u32 a; .reg .pred p; shl.b32 a, $1, 3; add.u32 a, a, $0; again: "
    "mbarrier.try_wait.parity.shared::cta.b64 p, [a], $2; @p bra done; bra again; done: }",
    _wait_twin,
    3,
)


# ---- the copy engine


@cache
def acquire() -> Pair:
    """``(map)``: the descriptor was written by the host. By the thread that uses it, once."""

    def rule(descriptor: Any) -> Any:
        from llvmlite import ir
        from numba.cuda import types

        asm = "fence.proxy.tensormap::generic.acquire.sys [$0], 128; prefetch.tensormap [$0];"

        def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            emit_ptx(builder, asm, "l,~{memory}", [builder.ptrtoint(args[0], ir.IntType(64))])
            return context.get_dummy_value()

        return types.void, (types.CPointer(types.uint64),), emit

    return Pair("acquire", lambda view: None, rule)


def _box(view: View, start: Sequence[int]) -> Array:
    """The lines of a box of a tile."""
    m, data = view.description, view.buffer.data
    offset: Array = np.zeros((), np.int64)
    inside: Array = np.ones((), bool)
    for size, pitch, extent, first in zip(m.dims, (1, *m.pitches), m.box, start, strict=True):
        at = first + np.arange(extent)
        inside = inside[None] & _along((at >= 0) & (at < size), inside.ndim)
        offset = offset[None] + _along(at * pitch, offset.ndim)
    return np.where(inside, data[np.where(inside, offset, 0)], 0).astype(data.dtype).reshape(-1, m.box[0])


def _along(values: Array, after: int) -> Array:
    return values.reshape(-1, *[1] * after)


def _pixels(view: View, start: Sequence[int], taps: Sequence[int]) -> Array:
    """The lines of a box of pixels, as they follow each other in the box of corners."""
    m, data = view.description, view.buffer.data
    sizes = m.dims[1:-1]
    counts = [-(-(n + u - lo) // s) for n, u, lo, s in zip(sizes, m.upper, m.lower, m.steps, strict=True)]
    first = 0
    for count, at, low, step in reversed(list(zip(counts, start[1:], m.lower, m.steps, strict=False))):
        index, left = divmod(at - low, step)
        if left or not 0 <= index < count:
            raise KernelFault(f"a box of pixels starts at {at}, which is not one of {count} from {low}, {step} apart.")
        first = first * count + index
    rest: Array = first + np.arange(m.box[1])
    channel: Array = start[0] + np.arange(m.box[0])
    inside, offset = channel < m.dims[0], channel
    outside: Array = np.zeros(rest.size, bool)
    far: Array = np.zeros(rest.size, np.int64)
    for axis, count in enumerate(counts):
        place = rest % count * m.steps[axis] + m.lower[axis] + taps[axis]
        rest = rest // count
        outside |= (place < 0) | (place >= sizes[axis])
        far += place * m.pitches[axis]
    image = rest + start[-1]
    outside |= image >= m.dims[-1]
    far += image * m.pitches[-1]
    on = ~outside[:, None] & inside
    return np.where(on, data[np.where(on, far[:, None] + offset, 0)], 0).astype(data.dtype)


def _begin(lines: Array, bars: Shared, i: int, tiles: Shared, line: int) -> None:
    """A copy to ``line`` and those after it; until its barrier is complete they are nobody's."""
    known = lines_of(tiles)
    where = slice(int(line), int(line) + len(lines))
    if where.stop > len(known["flight"]):
        raise KernelFault(f"lines to {where.stop} of shared memory are copied but it has {len(known['flight'])}.")
    if known["flight"][where].any():
        raise KernelFault("a copy to shared memory begins while another to the same lines is under way.")
    if known["readers"][where].any():
        raise KernelFault("shared memory is overwritten while a product reads it.")
    known["flight"][where] = True
    words = tiles.data.reshape(-1, LINE_BYTES // tiles.data.itemsize)
    words[where] = np.iinfo(words.dtype).max

    def deliver() -> Array:
        known["flight"][where] = False
        words[where] = lines.view(words.dtype)
        known["known to"][where] = 0
        seen: Array = known["known to"][where]
        return seen

    _barrier(bars, i).copy(lines.size * lines.itemsize, deliver)


def lines_of(tiles: Shared) -> dict[str, Any]:
    """What is known of each line: is a copy to it under way, how many products read it, who has waited for its copy."""
    count = tiles.data.size * tiles.data.itemsize // LINE_BYTES
    if not tiles.notes:
        tiles.notes = {"flight": np.zeros(count, bool), "readers": np.zeros(count, np.int32)}
        tiles.notes["known to"] = np.zeros(count, np.int32)  # a bit for each warpgroup that waited for its copy
    return tiles.notes


@cache
def copy(rank: int, *, pixels: bool = False) -> Pair:
    """``(map, barriers, i, tiles, line, coordinates..., taps...)``: begin to copy a box, of which barrier i will tell.

    By one thread. Coordinates are innermost first; boxes of ``pixels`` have a tap for each spatial dimension.
    """
    taps = rank - 2 if pixels else 0
    mode = f"{rank}d.shared::cluster.global.{'im2col' if pixels else 'tile'}.mbarrier::complete_tx::bytes"
    places = ", ".join(f"${3 + j}" for j in range(rank))
    asm = f"cp.async.bulk.tensor.{mode} [$0], [$1, {{{places}}}], [$2]"
    asm += f", {{{', '.join(f'${3 + rank + j}' for j in range(taps))}}};" if taps else ";"

    def twin(view: View, bars: Shared, i: int, tiles: Shared, line: int, *where: int) -> None:
        start, tap = [int(v) for v in where[:rank]], [int(v) for v in where[rank:]]
        _begin(_pixels(view, start, tap) if pixels else _box(view, start), bars, i, tiles, line)

    def rule(*given: Any) -> Any:
        from llvmlite import ir
        from numba.cuda import types

        def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            descriptor, bars, i, tiles, line, *where = args
            target = builder.add(tiles, builder.mul(line, _number(LINE_BYTES)))
            bar = builder.add(bars, builder.mul(i, _number(8)))
            start, tap = where[:rank], [builder.trunc(value, ir.IntType(16)) for value in where[rank:]]
            operands = [target, builder.ptrtoint(descriptor, ir.IntType(64)), bar, *start, *tap]
            emit_ptx(builder, asm, ",".join(["r", "l", "r", *["r"] * rank, *["h"] * taps, "~{memory}"]), operands)
            return context.get_dummy_value()

        return types.void, (types.CPointer(types.uint64), *numbers(4 + rank + taps, "int32")), emit

    return Pair(f"copy_{'pixels' if pixels else 'box'}_{rank}", twin, _counted(rule, 5 + rank + taps))
