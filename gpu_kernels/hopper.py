"""Intrinsics for sm_90a: the copy engine (TMA), barriers in shared memory (mbarrier) and warpgroup products (wgmma).

Shared memory is lines of 128 bytes, in chunks of 64 lines (8 KB, `LINES`); a line holds 64 halves, or 32 of float32.
The copy engine swizzles the 16-byte pieces of a line and wgmma undoes that, so kernels name whole lines only. A chunk
of an operand is 64 of its rows (or columns) by a line's worth of the inner sum (`depth_of`); halves in either order:

    k-major     line = row, the inner sum runs along it          [row][k]
    mn-major    line = step of the inner sum, rows along it      [k][row]

float32 is multiplied as TF32 (`multiply`), or each factor as the sum of two of those (`multiply_split`).

Copies and products are asynchronous. A barrier's phase is complete when all have arrived and all bytes that were
announced have; waiting names the parity of the phase. The twins keep what hardware would not tell: a line that is
read before its copy was waited for, or overwritten while a product reads it, is a `KernelFault`.

Descriptors and fences are as the PTX ISA has them (wgmma matrix descriptors, canonical layouts with 128-byte swizzle).
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
from .ptx import _array, _at, _number

LINE_BYTES = 128
LINES = 64  # of a chunk
CHUNK_BYTES = LINES * LINE_BYTES
STEPS = 4  # products of a line: wgmma multiplies 32 bytes of the inner sum at a time
ALIGNMENT = 1024  # of chunks: the swizzle repeats after 8 lines
_PTX_NAMES = {"bfloat16": "bf16", "float16": "f16", "float32": "tf32"}
_NUMPY = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}
_TF32_BITS, _TF32_HALF = 0xFFFFE000, 0x1000  # what TF32 keeps of float32, and half of its last place


def depth_of(dtype: str) -> int:
    """How much of the inner sum a line holds."""
    return LINE_BYTES // int(np.dtype(_NUMPY[dtype]).itemsize)


def _types(count: int, kind: str) -> tuple[Any, ...]:
    from numba.cuda import types

    return (getattr(types, kind),) * count


def _call(builder: Any, asm: str, constraints: str, args: Sequence[Any], result: Any = None) -> Any:
    from llvmlite import ir

    signature = ir.FunctionType(result or ir.VoidType(), [arg.type for arg in args])
    return builder.call(ir.InlineAsm(signature, asm, constraints, side_effect=True), list(args))


def _statement(name: str, asm: str, twin: Callable[..., None], parameters: int = 0) -> Pair:
    """PTX without a result; ``parameters`` are 32-bit integers, $0 and so on."""

    def rule(*given: Any) -> Any:
        from numba.cuda import types

        def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            _call(builder, asm, ",".join([*["r"] * parameters, "~{memory}"]), args)
            return context.get_dummy_value()

        return types.void, _types(parameters, "int32"), emit

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
        return _call(builder, asm, "=r", (), ir.IntType(32))

    return types.int32, (), emit


def _elected_rule() -> Any:
    from llvmlite import ir
    from numba.cuda import types

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        within = _call(builder, "{ .reg .u32 t; mov.u32 t, %tid.x; and.b32 $0, t, 127; }", "=r", (), ir.IntType(32))
        return builder.icmp_unsigned("==", within, _number(0))

    return types.boolean, (), emit


warpgroup = Pair("warpgroup", lambda: int(cuda.threadIdx.x[0]) // WARPGROUP, _warpgroup_rule)
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


def _current() -> Any:
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
    me = _current()
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
            _call(builder, asm, "l,~{memory}", [builder.ptrtoint(args[0], ir.IntType(64))])
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
        index, rest = divmod(at - low, step)
        if rest or not 0 <= index < count:
            raise KernelFault(f"a box of pixels starts at {at}, which is not one of {count} from {low}, {step} apart.")
        first = first * count + index
    rest = first + np.arange(m.box[1])
    channel = start[0] + np.arange(m.box[0])
    inside, offset = channel < m.dims[0], channel
    outside = np.zeros(rest.size, bool)
    far = np.zeros(rest.size, np.int64)
    for axis, count in enumerate(counts):
        at = rest % count * m.steps[axis] + m.lower[axis] + taps[axis]
        rest = rest // count
        outside |= (at < 0) | (at >= sizes[axis])
        far += at * m.pitches[axis]
    image = rest + start[-1]
    outside |= image >= m.dims[-1]
    far += image * m.pitches[-1]
    on = ~outside[:, None] & inside
    return np.where(on, data[np.where(on, far[:, None] + offset, 0)], 0).astype(data.dtype)


def _begin(lines: Array, bars: Shared, i: int, tiles: Shared, line: int) -> None:
    """A copy to ``line`` and those after it; until its barrier is complete they are nobody's."""
    known = _lines(tiles)
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


def _lines(tiles: Shared) -> dict[str, Any]:
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
            _call(builder, asm, ",".join(["r", "l", "r", *["r"] * rank, *["h"] * taps, "~{memory}"]), operands)
            return context.get_dummy_value()

        return types.void, (types.CPointer(types.uint64), *_types(4 + rank + taps, "int32")), emit

    return Pair(f"copy_{'pixels' if pixels else 'box'}_{rank}", twin, _counted(rule, 5 + rank + taps))


# ---- products


class _Group:
    """Products of a warpgroup that were issued together."""

    def __init__(self, acc: Array, sums: Array, used: list[tuple[Array, slice]]) -> None:
        self.acc, self.sums, self.used = acc, sums, used

    def finish(self) -> None:
        self.acc += self.sums
        for readers, lines in self.used:
            readers[lines] -= 1


def _under_way() -> list[_Group]:
    found: list[_Group] = _current().products
    return found


def _finish(left: int) -> None:
    groups = _under_way()
    while len(groups) > left:
        groups.pop(0).finish()


def _operand(tiles: Shared, line: int, rows: int, dtype: str, *, mn_major: bool) -> tuple[Array, tuple[Array, slice]]:
    """``rows`` x 64 of the inner sum."""
    known, where = _lines(tiles), slice(int(line), int(line) + rows)
    if known["flight"][where].any() or not (known["known to"][where] >> _current().number & 1).all():
        raise KernelFault("a product reads shared memory before the copy to it was waited for.")
    known["readers"][where] += 1
    words = tiles.data.reshape(-1, LINE_BYTES // tiles.data.itemsize)[where]
    values = words.view(_NUMPY[dtype]).astype(np.float32)
    if mn_major:
        values = values.reshape(rows // LINES, LINES, LINES).swapaxes(1, 2).reshape(rows, LINES)
    return values, (known["readers"], where)


def tf32(x: Array, *, nearest: bool) -> Array:
    """float32 with the mantissa of TF32; the hardware cuts the rest off where nobody has rounded."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    cut = (bits + np.uint32(_TF32_HALF * nearest)) & np.uint32(_TF32_BITS)
    return np.where(np.isfinite(x), cut.view(np.float32), x).astype(np.float32)


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
            a, b = tf32(a, nearest=False), tf32(b, nearest=False)
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
            _call(builder, "wgmma.fence.sync.aligned;", "~{memory}", ())
            for step in range(STEPS):
                for part in range(parts):
                    own = slice(part * held, (part + 1) * held)
                    at_a = _ahead(builder, a, step * _step_bytes(mn_major[0]) + part * CHUNK_BYTES)
                    at_b = _ahead(builder, b, step * _step_bytes(mn_major[1]))
                    found = _call(builder, asm, constraints, [*sums[own], at_a, at_b], result)
                    sums[own] = [builder.extract_value(found, i) for i in range(held)]
            rest = f"wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned {left};"
            _call(builder, rest, "~{memory}", ())
            for place, value in zip(places, sums, strict=True):
                builder.store(value, place)
            return context.get_dummy_value()

        return types.void, (acc, *_types(3, "int32")), emit

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
        high, b = tf32(a, nearest=True), tf32(b, nearest=False)[:, PLACES]
        sums = high @ b[:n].T
        if pieces == 2:
            sums = tf32(a - high, nearest=False) @ b[:n].T + high @ b[n:].T + sums
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
            _call(builder, "wgmma.fence.sync.aligned;", "~{memory}", ())
            for own, other in factors:
                for step in range(STEPS):
                    text, constraints = asm(not sums)
                    operands = [*sums, *own[step], _ahead(builder, other, 32 * step)]
                    found = _call(builder, text, constraints, operands, result)
                    sums = [builder.extract_value(found, i) for i in range(held)]
            tied = ",".join([*["=f"] * held, *map(str, range(held)), "~{memory}"])
            text = "wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;"
            found = _call(builder, text, tied, sums, result)
            for i, place in enumerate(places):
                value = builder.extract_value(found, i)
                builder.store(builder.fadd(builder.load(place), value) if pieces == 2 else value, place)
            return context.get_dummy_value()

        return types.void, (acc, *_types(3, "int32")), emit

    return Pair(f"multiply_split_64x{n}_{pieces}{'_mn' if mn_major else ''}", twin, rule)


# Which row of mn-major a a row of the product is: a thread reads two neighbours, for its rows g and g + 8 of a warp
ROWS = tuple(row // 16 * 16 + row % 8 * 2 + row % 16 // 8 for row in range(LINES))


def _lane(builder: Any) -> tuple[Any, Any, Any]:
    """Of this thread: its warp in the warpgroup, lane / 4, and lane % 4."""
    from llvmlite import ir

    thread = builder.and_(_call(builder, "mov.u32 $0, %tid.x;", "=r", (), ir.IntType(32)), _number(WARPGROUP - 1))
    group = builder.and_(builder.lshr(thread, _number(2)), _number(7))
    return builder.lshr(thread, _number(5)), group, builder.and_(thread, _number(3))


def _read(builder: Any, place: Any, count: int, offset: int = 0) -> list[Any]:
    """Neighbours in shared memory."""
    from llvmlite import ir

    regs = ", ".join(f"${i}" for i in range(count))
    asm = f"ld.shared.v{count}.f32 {{{regs}}}, [${count}+{offset}];"
    result = ir.LiteralStructType([ir.FloatType()] * count)
    found = _call(builder, asm, ",".join([*["=f"] * count, "r", "~{memory}"]), [place], result)
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

    asm = f"{{ .reg .b32 t; mov.b32 t, $1; add.u32 t, t, {_TF32_HALF}; and.b32 $0, t, {_TF32_BITS}; }}"
    return _call(builder, asm, "=r,f", [value], ir.IntType(32))


def _rest(builder: Any, value: Any, near: Any) -> Any:
    """What the hardware cuts off of this is below 2^-21 of the value."""
    from llvmlite import ir

    asm = "{ .reg .f32 t; mov.b32 t, $2; sub.rn.f32 t, $1, t; mov.b32 $0, t; }"
    return _call(builder, asm, "=r,f,r", [value, near], ir.IntType(32))


def _rounded(builder: Any, value: Any) -> Any:
    from llvmlite import ir

    return _call(builder, "cvt.rna.tf32.f32 $0, $1;", "=r,f", [value], ir.IntType(32))


def _tf32_twin(values: Sequence[Array]) -> tuple[Array, ...]:
    return tuple(tf32(value, nearest=True) for value in values)


@cache
def rounded(width: int, *, rest: bool = False) -> Pair:
    """``(values) -> each as TF32``, or its rest."""

    def twin(values: Sequence[Array]) -> tuple[Array, ...]:
        high = _tf32_twin(values)
        return _tf32_twin([value - near for value, near in zip(values, high, strict=True)]) if rest else high

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


@cache
def pick(width: int, step: int) -> Pair:
    """``(registers, first) -> width of them, step apart``"""

    def rule(held: Any, first: Any) -> Any:
        from numba.cuda import types

        def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            data = _array(context, builder, sig.args[0], args[0])
            values = [builder.load(_at(builder, data, args[1], j * step)) for j in range(width)]
            return context.make_tuple(builder, sig.return_type, values)

        return types.UniTuple(held.dtype, width), (held, types.int32), emit

    return Pair(f"pick{width}_{step}", lambda held, first: tuple(held[first + j * step] for j in range(width)), rule)


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
            found = _call(builder, "wgmma.wait_group.sync.aligned 0;", constraints, sums, result)
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
        return _call(builder, asm, "=f,f", [value], ir.FloatType())

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        data = _array(context, builder, sig.args[0], args[0])
        lane = _call(builder, "mov.u32 $0, %laneid;", "=r", (), ir.IntType(32))
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


@cache
def add(width: int) -> Pair:
    """``(registers, first, values)``: registers += values."""

    def twin(held: Array, first: int, values: Sequence[Any]) -> None:
        for j in range(width):
            held[first + j] += values[j]

    def rule(held: Any, first: Any, values: Any) -> Any:
        from numba.cuda import types

        def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            data = _array(context, builder, sig.args[0], args[0])
            for j in range(width):
                place = _at(builder, data, args[1], j)
                builder.store(builder.fadd(builder.load(place), builder.extract_value(args[2], j)), place)
            return context.get_dummy_value()

        return types.void, (held, types.int32, types.UniTuple(held.dtype, width)), emit

    return Pair(f"add{width}", twin, rule)
