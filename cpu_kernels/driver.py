"""Running compiled kernels: one Numba call for a whole list of them, without the GIL.

A kernel is the address of a C function ``entry(task, buffers)``, where ``buffers`` points to the
addresses of its arrays. `CallList` packs kernels and buffers into flat tables; `CallList.run` enters one
parallel region, in which every thread walks the same list:

    for each phase of each call:  while (t = next task) < tasks: entry(t)      an atomic counter
                                  wait until all tasks are done                spin, then sched_yield

Threads take tasks as they come, so a slow core holds up nothing, a region that gets fewer threads than
it asked for still finishes, and no thread sleeps between two kernels. Tasks write disjoint outputs: no
result depends on who ran them.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import njit, prange, types
from numba.core import cgutils
from numba.extending import intrinsic

from rapydli_flow.config import settings
from rapydli_flow.errors import TemplateError
from rapydli_flow.spec import Spec

SPINS = 4000  # about 100 us of pauses before a waiting thread offers its core to others
LINE = 8  # int64 values in a cache line: counters of different use must not share one


@dataclass(frozen=True)
class Kernel:
    """A compiled kernel. ``tasks``: number of tasks of each phase; ``buffers``: specs in calling order."""

    address: int
    tasks: tuple[int, ...]
    buffers: tuple[Spec, ...]
    key: str
    module: str
    template: str
    config: tuple[tuple[str, Any], ...]
    reloaded: bool = field(default=False, compare=False)
    entry: Any = field(default=None, compare=False, repr=False)  # keeps the machine code alive


@intrinsic(prefer_literal=True)
def flat(typing, buffers, i, size, dtype):
    """The i-th buffer as a flat array of constant size, used by the entry of every generated module."""
    array = types.Array(dtype.dtype, 1, "C")

    def codegen(context, builder, signature, args):
        address = builder.load(builder.gep(args[0], [ir.Constant(ir.IntType(64), i.literal_value)]))
        out = context.make_array(array)(context, builder)
        item = context.get_abi_sizeof(context.get_data_type(array.dtype))
        constant = [context.get_constant(types.intp, v) for v in (size.literal_value, item)]
        context.populate_array(
            out,
            data=builder.inttoptr(address, out.data.type),
            shape=cgutils.pack_array(builder, [constant[0]]),
            strides=cgutils.pack_array(builder, [constant[1]]),
            itemsize=constant[1],
            meminfo=None,
        )
        return out._getvalue()

    return array(buffers, i, size, dtype), codegen


@intrinsic(prefer_literal=True)
def scratch(typing, size, dtype):
    """A flat array of constant size on the stack of the task, not cleared: nothing else can alias it."""
    array = types.Array(dtype.dtype, 1, "C")

    def codegen(context, builder, signature, args):
        out = context.make_array(array)(context, builder)
        kind = context.get_data_type(array.dtype)
        memory = cgutils.alloca_once(builder, ir.ArrayType(kind, size.literal_value))
        memory.align = 64
        constant = [context.get_constant(types.intp, v) for v in (size.literal_value, context.get_abi_sizeof(kind))]
        context.populate_array(
            out,
            data=builder.bitcast(memory, out.data.type),
            shape=cgutils.pack_array(builder, [constant[0]]),
            strides=cgutils.pack_array(builder, [constant[1]]),
            itemsize=constant[1],
            meminfo=None,
        )
        return out._getvalue()

    return array(size, dtype), codegen


@intrinsic
def call(typing, address, task, table, offset):
    """Call the C function at ``address`` with a task and a pointer to ``table[offset]``."""

    def codegen(context, builder, signature, args):
        i64 = ir.IntType(64)
        kind = ir.FunctionType(ir.VoidType(), [i64, i64.as_pointer()])
        data = context.make_array(table)(context, builder, args[2]).data
        builder.call(builder.inttoptr(args[0], kind.as_pointer()), [args[1], builder.gep(data, [args[3]])])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, table, types.int64), codegen


def _pointer(context, builder, array, value, at):
    return builder.gep(context.make_array(array)(context, builder, value).data, [at])


@intrinsic
def add_one(typing, array, at):
    """``array[at] += 1`` for all threads; returns the value before."""

    def codegen(context, builder, signature, args):
        one = ir.Constant(ir.IntType(64), 1)
        return builder.atomic_rmw("add", _pointer(context, builder, array, *args), one, "seq_cst")

    return types.int64(array, types.int64), codegen


@intrinsic
def look(typing, array, at):
    """``array[at]`` as other threads have left it."""

    def codegen(context, builder, signature, args):
        return builder.load_atomic(_pointer(context, builder, array, *args), "acquire", 8)

    return types.int64(array, types.int64), codegen


@intrinsic
def give_way(typing):
    """Offer this core to other threads (sched_yield)."""

    def codegen(context, builder, signature, args):
        kind = ir.FunctionType(ir.IntType(32), [])
        builder.call(cgutils.get_or_insert_function(builder.module, kind, "sched_yield"), [])
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def clock_ns(typing):
    """Nanoseconds of the monotonic clock: the one of time.perf_counter_ns."""

    def codegen(context, builder, signature, args):
        i64, i32 = ir.IntType(64), ir.IntType(32)
        spec = ir.LiteralStructType([i64, i64])
        kind = ir.FunctionType(i32, [i32, spec.as_pointer()])
        out = cgutils.alloca_once(builder, spec)
        function = cgutils.get_or_insert_function(builder.module, kind, "clock_gettime")
        builder.call(function, [ir.Constant(i32, time.CLOCK_MONOTONIC), out])
        seconds, rest = (builder.load(cgutils.gep_inbounds(builder, out, 0, i)) for i in (0, 1))
        return builder.add(builder.mul(seconds, ir.Constant(i64, 10**9)), rest)

    return types.int64(), codegen


@njit(nogil=True, cache=True)
def _work(rows, table, counters, ends, first, last):
    """One thread's walk. A row is (entry, first task, tasks, offset of its buffers, clock it?)."""
    for row in range(first, last):
        tasks = rows[row, 2]
        taken, finished = row * 2 * LINE, row * 2 * LINE + LINE
        while True:
            t = add_one(counters, taken)
            if t >= tasks:
                break
            call(rows[row, 0], rows[row, 1] + t, table, rows[row, 3])
            if add_one(counters, finished) == tasks - 1 and ends.size:
                ends[row] = clock_ns()
        spins = 0
        while look(counters, finished) < tasks:
            spins += 1
            if spins > SPINS:
                give_way()


@njit(nogil=True, cache=True)
def _serial(rows, table, ends, first, last):
    for row in range(first, last):
        for t in range(rows[row, 2]):
            call(rows[row, 0], rows[row, 1] + t, table, rows[row, 3])
        if ends.size:
            ends[row] = clock_ns()


@njit(parallel=True, nogil=True, cache=True)
def _parallel(rows, table, counters, ends, first, last, threads):
    for _ in prange(threads):
        _work(rows, table, counters, ends, first, last)


_lock = threading.Lock()


def _entering() -> Any:
    """What to hold while in a parallel region: Numba's workqueue aborts when two threads enter at once."""
    try:
        return nullcontext() if numba.threading_layer() in ("omp", "tbb") else _lock
    except ValueError:  # no layer yet: the first region chooses it
        return _lock


def set_threads(threads: int) -> int:
    """Let regions entered by this Python thread use ``threads`` cores; returns the number that it will get."""
    threads = max(1, min(threads, numba.config.NUMBA_NUM_THREADS))
    numba.set_num_threads(threads)
    return threads


class CallList:
    """Kernels with their buffers, ready to run: ``calls`` are pairs of a kernel and its addresses.

    Addresses come in the order of ``Kernel.buffers``; `point` changes one. One Python thread at a time.
    """

    def __init__(self, calls: Sequence[tuple[Kernel, Sequence[int]]]) -> None:
        self.kernels = tuple(kernel for kernel, _ in calls)
        rows, table, self._starts, self._offsets = [], [], [0], []
        for kernel, addresses in calls:
            if len(addresses) != len(kernel.buffers):
                raise TemplateError(
                    f"kernel {kernel.module} takes {len(kernel.buffers)} buffers "
                    f"({', '.join(map(str, kernel.buffers))}) but got {len(addresses)}."
                )
            first = 0
            for tasks in kernel.tasks:
                rows.append((kernel.address, first, tasks, len(table)))
                first += tasks
            self._starts.append(len(rows))
            self._offsets.append(len(table))
            table.extend(addresses)
        self._rows = np.array(rows, np.int64).reshape(-1, 4)
        self._table = np.array(table, np.int64)
        self._counters = np.zeros(2 * LINE * max(1, len(rows)), np.int64)
        self._untimed = np.zeros(0, np.int64)
        self._ends = np.zeros(len(rows), np.int64)

    def __len__(self) -> int:
        return len(self.kernels)

    def point(self, call: int, buffer: int, address: int) -> None:
        """Let a buffer of a call lie elsewhere from now on."""
        self._table[self._offsets[call] + buffer] = address

    def run(self, first: int = 0, last: int | None = None, *, threads: int | None = None) -> None:
        """Execute the calls ``first`` to ``last - 1``, each after the one before."""
        self._run(first, len(self) if last is None else last, threads, self._untimed)

    def run_timed(self, first: int, last: int, out_ns: Any, *, threads: int | None = None) -> int:
        """The same; ``out_ns[call]`` gets the clock at the end of each call, the result is that at the start."""
        begin = time.perf_counter_ns()
        self._run(first, last, threads, self._ends)
        for i in range(first, last):
            before = out_ns[i - 1] if i > first else begin
            a, b = self._starts[i], self._starts[i + 1]
            out_ns[i] = self._ends[a:b].max() if self._rows[a:b, 2].any() else before
        return begin

    def _run(self, first: int, last: int, threads: int | None, ends: Any) -> None:
        a, b = self._starts[first], self._starts[last]
        threads = min(settings().threads if threads is None else threads, int(self._rows[a:b, 2].max(initial=1)))
        if threads <= 1:
            _serial(self._rows, self._table, ends, a, b)
            return
        self._counters[a * 2 * LINE : b * 2 * LINE] = 0
        with _entering():
            _parallel(self._rows, self._table, self._counters, ends, a, b, set_threads(threads))


def address_of(array: Any) -> int:
    """Address of a C-contiguous NumPy array."""
    if not array.flags.c_contiguous:
        raise TemplateError(f"kernels take C-contiguous arrays, not one with strides {array.strides}.")
    return int(array.__array_interface__["data"][0])


def run_kernel(
    kernel: Kernel,
    ins: Sequence[Any],
    outs: Sequence[Any],
    *,
    work: Sequence[Any] = (),
    extras: Sequence[Any] = (),
    at: Any = None,
    threads: int | None = None,
) -> None:
    """Run one kernel on NumPy arrays of any shape; ``at`` is an int64 array, by default the whole of output 0.

    For tests and for measuring: programs use a `CallList`.
    """
    if at is None:
        at = np.array([*[0] * outs[0].ndim, *outs[0].shape], np.int64)
    arrays = [*ins, *outs, *work, *extras, at]
    for array, spec in zip(arrays, kernel.buffers, strict=True):
        if array.dtype != spec.dtype or array.size != spec.size:
            given = f"{array.dtype} {array.shape}"
            raise TemplateError(f"kernel {kernel.module}: expected {spec} but got {given}.")
    CallList([(kernel, [address_of(array) for array in arrays])]).run(threads=threads)
