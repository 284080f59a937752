"""Running compiled kernels: one Numba call for a whole list of them, without the GIL.

A kernel is the address of a C function ``entry(task, buffers)``, where ``buffers`` points to the
addresses of its arrays. `CallList` packs kernels and buffers into one flat table. `CallList.run` opens it
to the helper threads of the calling Python thread, and all walk the same list:

    for each phase of each call:  while (t = next task) < tasks: entry(t)      an atomic counter
                                  wait until all tasks are done                spin, then sched_yield

Threads take tasks as they come. A helper that the system does not let run (other processes want its
core) is not waited for, and nobody sleeps between two kernels. That is why this is not Numba's `prange`:
its layers wait for every thread at the end of every region (milliseconds on a busy machine), and
`workqueue` aborts when two Python threads enter one. Tasks write disjoint outputs, so no result
depends on who ran them.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np.arrayobj import populate_array

from rapydli_flow.config import settings
from rapydli_flow.errors import TemplateError
from rapydli_flow.spec import Spec

SPINS = 2000  # looks at a counter before a waiting thread offers its core to others: tens of microseconds
LINE = 8  # int64 values in a cache line: counters of different use do not share one
FIELDS = 4  # of a row of a CallList: entry, first task, tasks, place of its buffers in the table

# POSIX functions; pointers are passed as integers.
sem_init = types.ExternalFunction("sem_init", types.int32(types.int64, types.int32, types.uint32))
sem_post = types.ExternalFunction("sem_post", types.int32(types.int64))
sem_wait = types.ExternalFunction("sem_wait", types.int32(types.int64))
sched_yield = types.ExternalFunction("sched_yield", types.int32())


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


@intrinsic
def words(typing, address, size):  # type: ignore[no-untyped-def]
    """``size`` int64 values at an address."""
    array = types.Array(types.int64, 1, "C")

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        out = context.make_array(array)(context, builder)
        item = context.get_constant(types.intp, 8)
        data = builder.inttoptr(args[0], out.data.type)
        populate_array(out, data, [args[1]], [item], item, None)
        return out._getvalue()

    return array(types.int64, types.int64), codegen


@intrinsic
def call(typing, address, task, buffers):  # type: ignore[no-untyped-def]
    """Call the C function at ``address`` with a task and the address of its buffers' addresses."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        i64 = ir.IntType(64)
        pointer = ir.FunctionType(ir.VoidType(), [i64, i64.as_pointer()]).as_pointer()
        builder.call(builder.inttoptr(args[0], pointer), [args[1], builder.inttoptr(args[2], i64.as_pointer())])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


def _pointer(context: Any, builder: Any, array: Any, value: Any, at: Any) -> Any:
    return builder.gep(context.make_array(array)(context, builder, value).data, [at])


@intrinsic
def add(typing, array, at, value):  # type: ignore[no-untyped-def]
    """``array[at] += value``, seen by all threads; returns what was there before."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        pointer = _pointer(context, builder, array, args[0], args[1])
        return builder.atomic_rmw("add", pointer, args[2], "seq_cst")

    return types.int64(array, types.int64, types.int64), codegen


@intrinsic
def look(typing, array, at):  # type: ignore[no-untyped-def]
    """``array[at]`` as other threads have left it."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.load_atomic(_pointer(context, builder, array, *args), "seq_cst", 8)

    return types.int64(array, types.int64), codegen


@intrinsic
def clock_ns(typing):  # type: ignore[no-untyped-def]
    """Nanoseconds of the monotonic clock: the one of time.perf_counter_ns."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        i64, i32 = ir.IntType(64), ir.IntType(32)
        time_kind = ir.LiteralStructType([i64, i64])
        kind = ir.FunctionType(i32, [i32, time_kind.as_pointer()])
        out = cgutils.alloca_once(builder, time_kind)
        function = cgutils.get_or_insert_function(builder.module, kind, "clock_gettime")
        builder.call(function, [ir.Constant(i32, time.CLOCK_MONOTONIC), out])
        seconds, rest = (builder.load(cgutils.gep_inbounds(builder, out, 0, i)) for i in (0, 1))
        return builder.add(builder.mul(seconds, ir.Constant(i64, 10**9)), rest)

    return types.int64(), codegen


# The parts of a crew's state, a cache line each: a semaphore on which helpers sleep, whether a list is open
# to them, how many are in it, whether they shall end; and the list: its address, words, calls, rows, ends.
SLEEP, OPEN, INSIDE, STOP, LIST = 0, LINE, 2 * LINE, 3 * LINE, 4 * LINE
STATE = 5 * LINE


@njit(nogil=True, cache=True)
def _stamp(ends, row):  # type: ignore[no-untyped-def]
    if ends:
        words(ends, row + 1)[row] = clock_ns()


@njit(nogil=True, cache=True)
def _walk(rows, counters, first, last, ends):  # type: ignore[no-untyped-def]
    """One thread's walk over rows ``first`` to ``last - 1``; the last to finish one notes the time."""
    for row in range(first, last):
        entry, begin, tasks, buffers = rows[row * FIELDS : row * FIELDS + FIELDS]
        taken, finished = row * 2 * LINE, row * 2 * LINE + LINE
        while True:
            t = add(counters, taken, 1)
            if t >= tasks:
                break
            call(entry, begin + t, buffers)
            if add(counters, finished, 1) == tasks - 1:
                _stamp(ends, row)
        spins = 0
        while look(counters, finished) < tasks:
            spins += 1
            if spins > SPINS:
                sched_yield()


@njit(nogil=True, cache=True)
def _serial(rows, first, last, ends):  # type: ignore[no-untyped-def]
    for row in range(first, last):
        for t in range(rows[row * FIELDS + 2]):
            call(rows[row * FIELDS], rows[row * FIELDS + 1] + t, rows[row * FIELDS + 3])
        _stamp(ends, row)


@njit(nogil=True, cache=True)
def _lead(state, rows, counters, first, last, ends, helpers):  # type: ignore[no-untyped-def]
    """Open a list to the helpers, walk it, close it, and wait for those that are inside."""
    counters[first * 2 * LINE : last * 2 * LINE] = 0
    state[LIST] = rows.ctypes.data
    state[LIST + 1] = counters.ctypes.data
    state[LIST + 2] = first
    state[LIST + 3] = last
    state[LIST + 4] = ends
    add(state, OPEN, 1)
    for _ in range(helpers):
        sem_post(state.ctypes.data)
    _walk(rows, counters, first, last, ends)
    add(state, OPEN, -1)
    spins = 0
    while look(state, INSIDE) > 0:
        spins += 1
        if spins > SPINS:
            sched_yield()


@njit(nogil=True, cache=True)
def _help(state):  # type: ignore[no-untyped-def]
    """A helper's life: sleep, and join the list that is open, if it still is."""
    while look(state, STOP) == 0:
        sem_wait(state.ctypes.data)
        add(state, INSIDE, 1)
        if look(state, OPEN) > 0:
            last = state[LIST + 3]
            rows = words(state[LIST], last * FIELDS)
            _walk(rows, words(state[LIST + 1], last * 2 * LINE), state[LIST + 2], last, state[LIST + 4])
        add(state, INSIDE, -1)


@njit(nogil=True, cache=True)
def _prepare(state):  # type: ignore[no-untyped-def]
    return sem_init(state.ctypes.data, 0, 0)


@njit(nogil=True, cache=True)
def _dismiss(state, helpers):  # type: ignore[no-untyped-def]
    add(state, STOP, 1)
    for _ in range(helpers):
        sem_post(state.ctypes.data)


class _Crew:
    """The helper threads of one Python thread; they end with it."""

    def __init__(self) -> None:
        self.state = np.zeros(STATE, np.int64)
        self.process = os.getpid()
        self.helpers = 0
        self._end: weakref.finalize[Any, Any] | None = None
        _prepare(self.state)

    def grow(self, helpers: int) -> None:
        """Have at least so many helpers."""
        for _ in range(helpers - self.helpers):
            threading.Thread(target=_help, args=(self.state,), name="rapydli-kernels", daemon=True).start()
            self.helpers += 1
            if self._end is not None:
                self._end.detach()
            self._end = weakref.finalize(self, _dismiss, self.state, self.helpers)
            self._end.atexit = False  # they are daemons


_local = threading.local()


def _crew(helpers: int) -> _Crew:
    crew: _Crew | None = getattr(_local, "crew", None)
    if crew is None or crew.process != os.getpid():  # threads do not survive a fork
        crew = _local.crew = _Crew()
    crew.grow(helpers)
    return crew


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
        self._table = np.array(table, np.int64)
        base = self._table.ctypes.data
        self._tasks = [tasks for _, _, tasks, _ in rows]
        flat_rows = [v for entry, begin, tasks, at in rows for v in (entry, begin, tasks, base + 8 * at)]
        self._rows = np.array(flat_rows, np.int64)
        self._counters = np.zeros(2 * LINE * len(rows), np.int64)
        self._ends = np.zeros(len(rows), np.int64)

    def __len__(self) -> int:
        return len(self.kernels)

    def point(self, call: int, buffer: int, address: int) -> None:
        """Let a buffer of a call lie elsewhere from now on."""
        self._table[self._offsets[call] + buffer] = address

    def run(self, first: int = 0, last: int | None = None, *, threads: int | None = None) -> None:
        """Execute the calls ``first`` to ``last - 1``, each after the one before."""
        self._run(first, len(self) if last is None else last, threads, 0)

    def run_timed(self, first: int, last: int, out_ns: Any, *, threads: int | None = None) -> int:
        """The same; ``out_ns[call]`` gets the time at the end of each call, the result is that at the start.

        Times are those of ``time.perf_counter_ns``.
        """
        begin = before = time.perf_counter_ns()
        self._run(first, last, threads, self._ends.ctypes.data)
        for i in range(first, last):
            ends = [int(self._ends[row]) for row in range(self._starts[i], self._starts[i + 1]) if self._tasks[row]]
            before = max([before, *ends])
            out_ns[i] = before
        return begin

    def _run(self, first: int, last: int, threads: int | None, ends: int) -> None:
        a, b = self._starts[first], self._starts[last]
        useful = max(self._tasks[a:b], default=1)
        helpers = min(settings().threads if threads is None else threads, useful) - 1
        if helpers < 1:
            _serial(self._rows, a, b, ends)
        else:
            _lead(_crew(helpers).state, self._rows, self._counters, a, b, ends, helpers)


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
