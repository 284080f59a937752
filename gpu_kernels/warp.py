"""Intrinsics of reductions: partial results of a thread's lanes, merged over lanes, warps and blocks.

A partial result is a *state*: one or a few numbers, for each lane of a thread, e.g. a sum, or the largest element and
where it is. A `Merge` says how two states become one. All merges are trees of a fixed shape, so that results do not
depend on chance; butterflies leave the result in every thread.

    absorb     lanes of operands into lanes of a state: `formulas.lanewise`
    fold       the lanes of a state into one
    across_warp, across_block    the threads of a group into one
    give, get  states that pass through shared memory, where threads are no power of two: by `halving`
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from rapydli_flow.spec import Array

from .emulate import machine
from .formulas import definition, functions
from .pair import Pair, device_type
from .ptx import _array, _at, _number, _vector_pointer, cuda, unroll

WARP = 32


# ---- states


@dataclass(frozen=True)
class Merge:
    """``results`` of two states ``a0, ..`` and ``b0, ..``; merging with ``start`` changes nothing."""

    start: tuple[float, ...]
    results: tuple[str, ...]
    dtypes: tuple[str, ...] = ()
    lines: tuple[str, ...] = ()

    @property
    def kinds(self) -> tuple[str, ...]:
        return self.dtypes or ("float32",) * len(self.results)


def sums(count: int) -> Merge:
    return Merge((0.0,) * count, tuple(f"a{k} + b{k}" for k in range(count)))


LARGEST = Merge((-math.inf,), ("(a0 if (a0 >= b0) | (a0 != a0) else b0)",))  # NaN wins
SMALLEST = Merge((math.inf,), ("(a0 if (a0 <= b0) | (a0 != a0) else b0)",))
MAXIMUM = Merge((-math.inf,), ("larger(a0, b0)",))


def _first(sign: str) -> Merge:
    """The extreme and the first place that has it; NaN wins over all."""
    better = f"(b0 {sign} a0) | ((b0 != b0) & (a0 == a0))"
    alike = "((b0 == a0) | ((b0 != b0) & (a0 != a0))) & (b1 < a1)"
    lines = (f"wins = {better} | ({alike})",)
    worst = -math.inf if sign == ">" else math.inf
    return Merge(
        (worst, 2**31 - 1), ("(b0 if wins else a0)", "(b1 if wins else a1)"), ("float32", "int32"), lines=lines
    )


FIRST_LARGEST, FIRST_SMALLEST = _first(">"), _first("<")
# the largest x, and the sum of exp(x - largest); it starts with a finite number, so that no difference is NaN
LOWEST = float(np.finfo(np.float32).min)
EXPONENTIALS = Merge((LOWEST, 0.0), ("m", "a1 * exp(a0 - m) + b1 * exp(b0 - m)"), lines=("m = larger(a0, b0)",))


def _vector(value: Any) -> Array:
    """A number of every thread."""
    return np.broadcast_to(np.asarray(value), machine.threads)


@cache
def _merging(merge: Merge) -> tuple[Any, Any]:
    """``merged(a, b)`` on lists of numbers: for the emulator, and what makes it for the device."""
    count = len(merge.kinds)
    names = [f"{side}{k}" for side in "ab" for k in range(count)]
    on_vectors, on_device = functions(definition(names, merge.lines, merge.results))

    def merged(a: Sequence[Any], b: Sequence[Any]) -> list[Array]:
        return [np.asarray(v).astype(d) for v, d in zip(on_vectors(*a, *b), merge.kinds, strict=True)]

    def emitting(context: Any, builder: Any) -> Any:
        from numba.cuda import types
        from numba.cuda.typing import signature

        kinds = [device_type(dtype) for dtype in merge.kinds]
        one, function = signature(types.BaseTuple.from_types(kinds), *kinds, *kinds), on_device()

        def emitted(a: Sequence[Any], b: Sequence[Any]) -> list[Any]:
            found = context.compile_internal(builder, function, one, [*a, *b])
            return [builder.extract_value(found, k) for k in range(count)]

        return emitted

    return merged, emitting


def _state_type(merge: Merge, lanes: int) -> Any:
    from numba.cuda import types

    return types.BaseTuple.from_types([types.UniTuple(device_type(dtype), lanes) for dtype in merge.kinds])


def _made(context: Any, builder: Any, kind: Any, parts: Sequence[Sequence[Any]]) -> Any:
    return context.make_tuple(
        builder, kind, [context.make_tuple(builder, kind[k], list(part)) for k, part in enumerate(parts)]
    )


def _starts(merge: Merge) -> list[Any]:
    from llvmlite import ir

    of = {"float32": ir.FloatType(), "int32": ir.IntType(32)}
    return [ir.Constant(of[d], v) for d, v in zip(merge.kinds, merge.start, strict=True)]


@cache
def start(merge: Merge, lanes: int) -> Pair:
    """``() -> state`` of nothing."""

    def twin() -> Any:
        each = zip(merge.start, merge.kinds, strict=True)
        return tuple((np.full(machine.threads, value, dtype),) * lanes for value, dtype in each)

    def rule() -> Any:
        kind = _state_type(merge, lanes)

        def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            return _made(context, builder, kind, [[value] * lanes for value in _starts(merge)])

        return kind, (), emit

    return Pair("start", twin, rule)


@cache
def either(merge: Merge, lanes: int) -> Pair:
    """``(condition, state, other) -> state``"""

    def twin(condition: Any, state: Any, other: Any) -> Any:
        pairs = zip(state, other, strict=True)
        return tuple(tuple(np.where(condition, x, y) for x, y in zip(a, b, strict=True)) for a, b in pairs)

    def rule(condition: Any, state: Any, other: Any) -> Any:
        kind = _state_type(merge, lanes)

        def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            on, *both = args
            chosen = [
                [builder.select(on, *(builder.extract_value(value, [k, i]) for value in both)) for i in range(lanes)]
                for k in range(len(merge.kinds))
            ]
            return _made(context, builder, kind, chosen)

        return kind, (device_type("boolean"), kind, kind), emit

    return Pair("either", twin, rule)


@cache
def fold(merge: Merge, lanes: int) -> Pair:
    """``(state) -> state`` of one lane: halves of the lanes are merged until one is left."""
    merged, emitting = _merging(merge)

    def halve(parts: list[list[Any]], together: Any) -> list[Any]:
        while len(parts) > 1:
            half = len(parts) // 2
            parts = [together(a, b) for a, b in zip(parts[:half], parts[half:], strict=True)]
        return parts[0]

    def twin(state: Any) -> Any:
        parts = [[part[i] for part in state] for i in range(lanes)]
        return tuple((value,) for value in halve(parts, merged))

    def rule(state: Any) -> Any:
        kind = _state_type(merge, 1)

        def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            count = len(merge.kinds)
            parts = [[builder.extract_value(args[0], [k, i]) for k in range(count)] for i in range(lanes)]
            return _made(context, builder, kind, [[value] for value in halve(parts, emitting(context, builder))])

        return kind, (_state_type(merge, lanes),), emit

    return Pair("fold", twin, rule)


def _function(builder: Any, name: str, result: Any, parameters: Sequence[Any]) -> Any:
    """An intrinsic of NVVM."""
    from llvmlite import ir

    known = builder.module.globals.get(name)
    return known or ir.Function(builder.module, ir.FunctionType(result, parameters), name)


def _butterfly(context: Any, builder: Any, merge: Merge, state: list[Any], width: int) -> list[Any]:
    from llvmlite import ir

    i32, emitted, offset = ir.IntType(32), _merging(merge)[1](context, builder), width // 2
    exchange = _function(builder, "llvm.nvvm.shfl.sync.bfly.i32", i32, [i32] * 4)
    while offset:
        others = []
        for value in state:
            bits = value if value.type == i32 else builder.bitcast(value, i32)
            other = builder.call(exchange, [_number(-1), bits, _number(offset), _number(WARP - 1)])
            others.append(other if value.type == i32 else builder.bitcast(other, value.type))
        state = emitted(state, others)
        offset //= 2
    return state


def _butterfly_twin(merge: Merge, state: list[Array], width: int) -> list[Array]:
    merged, offset, thread = _merging(merge)[0], width // 2, np.arange(machine.threads)
    state = [_vector(value) for value in state]
    while offset:
        state = merged(state, [value[thread ^ offset] for value in state])
        offset //= 2
    return state


@cache
def across_warp(merge: Merge, width: int) -> Pair:
    """``(state) -> state``, of one lane: each ``width`` neighbouring threads get what theirs amount to."""

    def twin(state: Any) -> Any:
        return tuple((value,) for value in _butterfly_twin(merge, [part[0] for part in state], width))

    def rule(state: Any) -> Any:
        kind = _state_type(merge, 1)

        def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            own = [builder.extract_value(args[0], [k, 0]) for k in range(len(merge.kinds))]
            return _made(context, builder, kind, [[v] for v in _butterfly(context, builder, merge, own, width)])

        return kind, (kind,), emit

    return Pair(f"across_warp{width}", twin, rule)


def _bits(builder: Any, value: Any) -> Any:
    """What shared memory of float32 takes."""
    from llvmlite import ir

    return value if value.type == ir.FloatType() else builder.bitcast(value, ir.FloatType())


def _barrier(builder: Any) -> None:
    from llvmlite import ir

    builder.call(_function(builder, "llvm.nvvm.barrier0", ir.VoidType(), []), [])


@cache
def across_block(merge: Merge, threads: int) -> Pair:
    """``(shared, at, thread, state) -> state``, of one lane: what all threads amount to, for all of them.

    ``shared`` has ``threads / 32`` places for each number of a state from ``at`` on, used by nobody else before
    the next barrier; a power of two of whole warps.
    """
    warps, count = threads // WARP, len(merge.kinds)

    def twin(shared: Any, at: int, thread: Array, state: Any) -> Any:
        own = _butterfly_twin(merge, [part[0] for part in state], WARP)
        for k, value in enumerate(own):
            shared.write(at + k * warps + np.arange(warps), np.ascontiguousarray(value[::WARP]).view(np.float32))
        machine.syncthreads()
        read = [shared.read(at + k * warps + thread % warps).view(merge.kinds[k]) for k in range(count)]
        return tuple((value,) for value in _butterfly_twin(merge, read, warps))

    def rule(shared: Any, at: Any, thread: Any, state: Any) -> Any:
        from llvmlite import ir
        from numba.cuda import types

        kind = _state_type(merge, 1)

        def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            data = _at(builder, _array(context, builder, shared, args[0]), args[1])
            own = [builder.extract_value(args[3], [k, 0]) for k in range(count)]
            own = _butterfly(context, builder, merge, own, WARP)
            first = builder.icmp_unsigned("==", builder.and_(args[2], _number(WARP - 1)), _number(0))
            with builder.if_then(first):
                warp = builder.lshr(args[2], _number(5))
                for k, value in enumerate(own):
                    builder.store(_bits(builder, value), _at(builder, data, k * warps, warp))
            _barrier(builder)
            lane, read = builder.and_(args[2], _number(warps - 1)), []
            for k, value in enumerate(own):
                bits = builder.load(_at(builder, data, k * warps, lane))
                read.append(bits if bits.type == value.type else builder.bitcast(bits, ir.IntType(32)))
            return _made(context, builder, kind, [[v] for v in _butterfly(context, builder, merge, read, warps)])

        return kind, (shared, types.int32, types.int32, kind), emit

    return Pair(f"across_block{threads}", twin, rule)


# ---- states in shared memory


@cache
def give(merge: Merge, lanes: int, plane: int) -> Pair:
    """``(active, shared, at, state)``: lane i of number k goes to element ``at + i`` of plane k."""

    def twin(active: Any, shared: Any, at: Any, state: Any) -> None:
        on, places = np.broadcast_to(np.asarray(active, bool), machine.threads), _vector(at)
        for k, part in enumerate(state):
            for i, value in enumerate(part):
                shared.write(places[on] + k * plane + i, np.ascontiguousarray(_vector(value)[on]).view(np.float32))

    def rule(active: Any, shared: Any, at: Any, state: Any) -> Any:
        from llvmlite import ir
        from numba.cuda import types

        wide = next(w for w in (4, 2, 1) if lanes % w == 0)

        def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            with builder.if_then(args[0]):
                data = _at(builder, _array(context, builder, shared, args[1]), args[2])
                for k in range(len(merge.kinds)):
                    for i in range(0, lanes, wide):
                        vector = ir.Constant(ir.VectorType(ir.FloatType(), wide), ir.Undefined)
                        for w in range(wide):
                            value = _bits(builder, builder.extract_value(args[3], [k, i + w]))
                            vector = builder.insert_element(vector, value, _number(w))
                        target = _vector_pointer(builder, _at(builder, data, k * plane + i), wide)
                        builder.store(vector, target, align=4 * wide)
            return context.get_dummy_value()

        return types.void, (types.boolean, shared, types.int32, _state_type(merge, lanes)), emit

    return Pair(f"give{lanes}_{plane}", twin, rule)


@cache
def get(merge: Merge, lanes: int, plane: int) -> Pair:
    """``(active, shared, at) -> state``: the reverse of `give`; the start where not active."""

    def twin(active: Any, shared: Any, at: Any) -> Any:
        on, places = np.broadcast_to(np.asarray(active, bool), machine.threads), _vector(at)
        out = [[np.full(machine.threads, v, d) for _ in range(lanes)] for v, d in zip(merge.start, merge.kinds)]  # noqa: B905
        for k, part in enumerate(out):
            for i, value in enumerate(part):
                value[on] = shared.read(places[on] + k * plane + i).view(merge.kinds[k])
        return tuple(map(tuple, out))

    def rule(active: Any, shared: Any, at: Any) -> Any:
        from llvmlite import ir
        from numba.cuda import types

        kind, wide = _state_type(merge, lanes), next(w for w in (4, 2, 1) if lanes % w == 0)

        def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            starts, before, parts = _starts(merge), builder.block, []
            with builder.if_then(args[0]):
                data = _at(builder, _array(context, builder, shared, args[1]), args[2])
                for k, first in enumerate(starts):
                    values = []
                    for i in range(0, lanes, wide):
                        source = _vector_pointer(builder, _at(builder, data, k * plane + i), wide)
                        vector = builder.load(source, align=4 * wide)
                        values += [builder.extract_element(vector, _number(w)) for w in range(wide)]
                    floats = first.type == ir.FloatType()
                    parts.append([v if floats else builder.bitcast(v, first.type) for v in values])
                inside = builder.block
            chosen = []
            for first, values in zip(starts, parts, strict=True):
                chosen.append([builder.phi(first.type) for _ in values])
                for phi, value in zip(chosen[-1], values, strict=True):
                    phi.add_incoming(value, inside)
                    phi.add_incoming(first, before)
            return _made(context, builder, kind, chosen)

        return kind, (types.boolean, shared, types.int32), emit

    return Pair(f"get{lanes}_{plane}", twin, rule)


@cache
def merged(merge: Merge, lanes: int) -> Pair:
    """``(state, other) -> state``, lane by lane."""
    on_vectors, emitting = _merging(merge)

    def twin(state: Any, other: Any) -> Any:
        each = [on_vectors([p[i] for p in state], [p[i] for p in other]) for i in range(lanes)]
        return tuple(tuple(lane[k] for lane in each) for k in range(len(merge.kinds)))

    def rule(state: Any, other: Any) -> Any:
        kind, count = _state_type(merge, lanes), len(merge.kinds)

        def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            emitted = emitting(context, builder)
            each = [
                emitted(*([builder.extract_value(side, [k, i]) for k in range(count)] for side in args))
                for i in range(lanes)
            ]
            return _made(context, builder, kind, [[lane[k] for lane in each] for k in range(count)])

        return kind, (kind, kind), emit

    return Pair("merged", twin, rule)


def halving(merge: Merge, lanes: int, across: int, down: int, plane: int, *, even: bool = False) -> Callable[..., Any]:
    """A procedure ``(shared, row, column, state)`` of a kernel whose threads are across and down: the first row's are
    merged with those of the rows below, halving. It ends with a barrier. ``even``: rows are a power of two."""
    halves = tuple(1 << k for k in reversed(range((down - 1).bit_length())))
    level = len(halves)
    hand, fetch, combine = give(merge, lanes, plane), get(merge, lanes, plane), merged(merge, lanes)

    def halve(shared: Any, row: Any, column: Any, state: Any) -> Any:
        total = state
        for h in unroll(level):
            here = (row * across + column) * lanes
            hand((row >= halves[h]) & (row < halves[h] * 2), shared, here - halves[h] * across * lanes, total)
            cuda.syncthreads()
            takes = row < halves[h] if even else (row < halves[h]) & (row + halves[h] < down)
            total = combine(total, fetch(takes, shared, here))
            cuda.syncthreads()
        return total

    return halve


@cache
def piece(first: int, width: int) -> Pair:
    """``(values) -> width of them``"""

    def rule(values: Any) -> Any:
        from numba.cuda import types

        kind = types.UniTuple(values.dtype, width)

        def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            return context.make_tuple(builder, kind, [builder.extract_value(args[0], first + i) for i in range(width)])

        return kind, (values,), emit

    return Pair(f"piece{first}_{width}", lambda values: tuple(values[first : first + width]), rule)
