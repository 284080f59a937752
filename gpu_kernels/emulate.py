"""Runs GPU kernels on a CPU: one Python call a block, per-thread values are NumPy vectors over the thread.

The kernels are the functions that are compiled for the GPU; their intrinsics (`ptx`) answer with their
NumPy twins here. Control flow is the same for all threads of a block; what differs is a guard ("active")
inside an intrinsic. The emulator refuses what a GPU would do silently wrong:

- reads and writes outside an array, or not aligned to the vector;
- an output element that is written twice, or never;
- a race in shared memory: an element that is read, or written again, between the same two barriers as it
  is written. What an asynchronous copy brings counts as written where the kernel waits for it, and may neither
  be read nor written before; so it can be read after the next barrier.

Where warpgroups have roles, each runs the kernel for itself, in turns: one goes on until it waits for another,
and the first in their order that can go on is next. So the producer runs ahead as far as it may, every run is the
same, and that none can go on is known at once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np

from rapydli_flow.errors import RapydliError
from rapydli_flow.spec import HALVES, Array, Block, Spec

from .grid import WARPGROUP, Grid, TensorMap, grids_of


class KernelFault(RapydliError, RuntimeError):
    """A kernel did what a GPU would not forgive; raised by the emulator."""


class Buffer:
    """A flat array in device memory. Halves are float32 in registers."""

    def __init__(self, name: str, data: Array, *, output: bool = False) -> None:
        self.name, self.data = name, data
        self.writes = np.zeros(data.size, np.uint8) if output else None

    def begin(self) -> None:
        """Another kernel starts: it may write again what those before it wrote."""
        assert self.writes is not None
        self.writes[:] = 0

    def check_once(self) -> None:
        """No element may have been written twice by one kernel: by whom last would be chance."""
        if self.writes is not None and np.any(self.writes > 1):
            wrong = int(np.flatnonzero(self.writes > 1)[0])
            raise KernelFault(f"{self.name}: element {wrong} is written {self.writes[wrong]} times by one kernel.")

    def _places(self, active: Any, at: Any, width: int) -> tuple[Array, Array]:
        """The lanes that take part, and where each starts."""
        on = np.broadcast_to(np.asarray(active, bool), machine.threads)
        at = np.broadcast_to(np.asarray(at), machine.threads)
        used = at[on]
        if used.size and (used.min() < 0 or used.max() + width > self.data.size):
            raise KernelFault(f"{self.name} has {self.data.size} elements but {used.min()}..{used.max()} are touched.")
        if np.any(used % width):
            raise KernelFault(f"{self.name}: {width} elements are touched at once from {used[used % width != 0][0]}.")
        return on, np.where(on, at, 0)

    def read(self, active: Any, at: Any, width: int) -> tuple[Array, ...]:
        on, at = self._places(active, at, width)
        held = np.dtype(np.float32) if self.data.dtype.name in HALVES else self.data.dtype
        reach = [np.minimum(at + j, self.data.size - 1) for j in range(width)]
        return tuple(np.where(on, self.data[place].astype(held), held.type(0)) for place in reach)

    def write(self, active: Any, at: Any, values: Sequence[Any]) -> None:
        if self.writes is None:
            raise KernelFault(f"{self.name} is an input but the kernel writes to it.")
        on, at = self._places(active, at, len(values))
        for j, value in enumerate(values):
            np.add.at(self.writes, at[on] + j, 1)
            self.data[at[on] + j] = np.broadcast_to(value, machine.threads)[on]


class Memory:
    """Arrays by address, for kernels that read addresses from a table: each has a terabyte to itself."""

    def __init__(self) -> None:
        self._arrays: list[Buffer] = []

    def put(self, buffer: Buffer) -> int:
        """An address for an array."""
        self._arrays.append(buffer)
        return len(self._arrays) << 40

    def clear(self) -> None:
        self._arrays.clear()

    def at(self, address: int) -> Part:
        """What lies from an address on."""
        number, offset = (address >> 40) - 1, address & ((1 << 40) - 1)
        if not 0 <= number < len(self._arrays):
            raise KernelFault(f"no array lies at {hex(address)}.")
        return Part(self._arrays[number], offset)


class Part:
    """An array from an address on."""

    def __init__(self, buffer: Buffer, offset: int) -> None:
        self._buffer, self._first = buffer, offset // buffer.data.itemsize

    def read(self, active: Any, at: Any, width: int) -> tuple[Array, ...]:
        return self._buffer.read(active, at + self._first, width)

    def write(self, active: Any, at: Any, values: Sequence[Any]) -> None:
        self._buffer.write(active, at + self._first, values)


class Shared:
    """An array that the threads of one block share; each element knows when it was last written and read."""

    def __init__(self, size: int, dtype: Any) -> None:
        self.data = np.full(size * np.dtype(dtype).itemsize, 0xFF, np.uint8).view(dtype)  # NaN, whatever is stored
        self.written = np.full(size, -1)
        self.used = np.full(size, -1)
        self.awaited = np.zeros(size, bool)  # by an asynchronous copy that is under way
        self.notes: dict[str, Any] = {}  # of intrinsics, on what is under way

    def _overwrite(self, at: Array, value: Array) -> None:
        if np.any(self.used[at] == machine.interval):
            raise KernelFault("shared memory is overwritten before the barrier after its last read.")
        if np.any(self.written[at] == machine.interval) or np.unique(at).size != at.size:
            raise KernelFault("an element of shared memory is written twice between two barriers.")
        if np.any(self.awaited[at]):
            raise KernelFault("shared memory is written while an asynchronous copy to it is under way.")
        self.data[at] = value

    def write(self, at: Array, value: Array) -> None:
        """``at``: one place for each thread."""
        self._overwrite(at, value)
        self.written[at] = machine.interval

    def copy(self, at: Array, value: Array) -> None:
        """Begin an asynchronous copy to these places, as part of the group that is open."""
        self._overwrite(at, value)
        self.awaited[at] = True
        machine.copies[-1].append((self, at))

    def arrive(self, at: Array) -> None:
        """The kernel has waited for a copy to these places."""
        self.awaited[at] = False
        self.written[at] = machine.interval

    def read(self, at: Array) -> Array:
        """``at[..., thread]``."""
        if np.any(self.awaited[at]):
            raise KernelFault("shared memory is read while an asynchronous copy to it is under way.")
        if np.any(self.written[at] == machine.interval):
            raise KernelFault("shared memory is read before the barrier after its write.")
        self.used[at] = machine.interval
        values: Array = self.data[at]
        return values


class View:
    """An array as the copy engine sees it."""

    def __init__(self, description: TensorMap, buffer: Buffer) -> None:
        self.description, self.buffer = description, buffer


class _Stopped(BaseException):
    """Another warpgroup has failed."""


class _Member:
    """A warpgroup that runs the kernel for itself, in a thread of its own, whenever it is its turn."""

    def __init__(self, number: int) -> None:
        self.number, self.arrays = number, 0
        self.ready: Callable[[], bool] = lambda: True
        self.turn = threading.Semaphore(0)
        self.products: list[Any] = []  # that were begun and are not waited for
        self.done = False


class _Crew:
    """The warpgroups of a block, one of which runs at a time."""

    def __init__(self, count: int) -> None:
        self.members = [_Member(i) for i in range(count)]
        self.shared: list[Shared] = []
        self.back = threading.Semaphore(0)
        self.current = self.members[0]
        self.arrived = 0
        self.error: BaseException | None = None
        self.at_end: list[Callable[[], None]] = []  # what must be true when all are done
        self.stopped = False

    def run(self, program: Callable[[], None]) -> None:
        def work(me: _Member) -> None:
            me.turn.acquire()
            try:
                with np.errstate(all="ignore"):
                    if not self.stopped:
                        program()
            except _Stopped:
                pass
            except BaseException as error:
                self.error = error
            me.done = True
            self.back.release()

        threads = [threading.Thread(target=work, args=(member,), daemon=True) for member in self.members]
        for thread in threads:
            thread.start()
        while self.error is None and not all(member.done for member in self.members):
            able = [member for member in self.members if not member.done and member.ready()]
            if not able:
                waiting = [member.number for member in self.members if not member.done]
                self.error = KernelFault(f"deadlock: warpgroups {waiting} wait for what nobody will do.")
                break
            self._let(able[0])
        self.stopped = True
        for member in self.members:
            if not member.done:
                self._let(member)
        for thread in threads:
            thread.join()
        if self.error is not None:
            raise self.error
        for check in self.at_end:
            check()

    def _let(self, member: _Member) -> None:
        self.current = member
        machine.take_place(member.number)
        member.turn.release()
        self.back.acquire()

    def wait(self, ready: Callable[[], bool]) -> None:
        """The current warpgroup goes on when ``ready`` is true."""
        if ready():
            return
        me, me.ready = self.current, ready
        self.back.release()
        me.turn.acquire()
        if self.stopped:
            raise _Stopped

    def array(self, make: Callable[[], Shared]) -> Shared:
        """The array that the other warpgroups get where they ask for it."""
        me = self.current
        if me.arrays == len(self.shared):
            self.shared.append(make())
        me.arrays += 1
        return self.shared[me.arrays - 1]

    def synchronise(self) -> None:
        self.arrived += 1
        whole = -(-self.arrived // len(self.members)) * len(self.members)
        self.wait(lambda: self.arrived >= whole)


class Machine:
    """Stands where kernels say ``cuda``: one block at a time."""

    def __init__(self) -> None:
        self.shared = SimpleNamespace(array=self._shared)
        self.local = SimpleNamespace(array=self._local)
        self.start(1, 0)

    def start(self, threads: int, block: int, shared_bytes: int = 0) -> None:
        self.threads, self.interval, self.dynamic_bytes = threads, 0, shared_bytes
        self.copies: list[list[tuple[Shared, Array]]] = [[]]  # groups of copies under way; the last one is open
        self.crew: _Crew | None = None
        self.threadIdx = SimpleNamespace(x=np.arange(threads, dtype=np.int32))
        self.blockIdx = SimpleNamespace(x=block)

    def start_roles(self, threads: int, block: int, shared_bytes: int) -> _Crew:
        self.start(WARPGROUP, block, shared_bytes)
        self.crew = _Crew(threads // WARPGROUP)
        return self.crew

    def take_place(self, warpgroup: int) -> None:
        """Be one of several warpgroups."""
        self.threadIdx.x = np.arange(WARPGROUP, dtype=np.int32) + warpgroup * WARPGROUP

    def syncthreads(self) -> None:
        if self.crew is not None:
            self.crew.synchronise()
        else:
            self.interval += 1

    def _shared(self, size: int, dtype: Any, alignment: int | None = None) -> Shared:
        if self.crew is not None:
            return self.crew.array(lambda: self._made(size, dtype))
        return self._made(size, dtype)

    def _made(self, size: int, dtype: Any) -> Shared:
        """``size`` 0: all of the dynamic shared memory, which is one array."""
        if size == 0:
            size, self.dynamic_bytes = self.dynamic_bytes // np.dtype(dtype).itemsize, 0
            if size == 0:
                raise KernelFault("the grid has no dynamic shared memory, or it is taken by another array.")
        return Shared(size, dtype)

    def commit_copies(self) -> None:
        """Close the open group."""
        self.copies.append([])

    def wait_copies(self, groups: int) -> None:
        """Until no more than this many closed groups are under way."""
        closed = len(self.copies) - 1
        for group in self.copies[: max(0, closed - groups)]:
            for shared, at in group:
                shared.arrive(at)
        del self.copies[: max(0, closed - groups)]

    def _local(self, size: int, dtype: Any) -> Array:
        poison = np.nan if np.dtype(dtype).kind == "f" else -(2**20)
        return np.full((size, self.threads), poison, dtype)


machine = Machine()
memory = Memory()


def run(
    built: Grid | tuple[Grid, ...],
    ins: Sequence[Array],
    outs: Sequence[Spec],
    *,
    extras: Sequence[Array] = (),
    work: Sequence[Spec] = (),
    at: Block | None = None,
) -> tuple[Array, ...]:
    """The outputs of a template's kernels, which start with NaN in all of them and in the workspace."""
    flat = [_poisoned(spec) for spec in outs]
    inputs = tuple(Buffer(f"input {i}", np.ascontiguousarray(x).ravel()) for i, x in enumerate(ins))
    outputs = tuple(Buffer(f"output {i}", x, output=True) for i, x in enumerate(flat))
    space = tuple(Buffer(f"workspace {i}", _poisoned(spec), output=True) for i, spec in enumerate(work))
    tail = tuple(Buffer(f"extra {i}", np.ascontiguousarray(x).ravel()) for i, x in enumerate(extras))
    where = at or Block.all(outs[0].shape)
    place = Buffer("at", np.asarray((*where.lo, *where.whole) or (0,), np.int64))
    for grid in grids_of(built):
        for buffer in space:
            buffer.begin()
        arrays = (*inputs, *outputs, *space, *tail)
        views = (tuple(View(m, arrays[m.array]) for m in grid.maps),) if grid.maps else ()
        program = partial(grid.kernel, inputs, outputs, space, tail, place, *views)
        for block in range(grid.grid):
            if grid.roles:
                machine.start_roles(grid.block, block, grid.shared_bytes).run(program)
                continue
            machine.start(grid.block, block, grid.shared_bytes)
            with np.errstate(all="ignore"):  # inactive lanes compute with zeros
                program()
        for buffer in space:
            buffer.check_once()
    for buffer in outputs:
        if buffer.writes is not None and np.any(buffer.writes != 1):
            wrong = int(np.flatnonzero(buffer.writes != 1)[0])
            raise KernelFault(f"{buffer.name}: element {wrong} is written {buffer.writes[wrong]} times, not once.")
    return tuple(x.reshape(spec.shape) for x, spec in zip(flat, outs, strict=True))


def _poisoned(spec: Spec) -> Array:
    """A flat array of what nothing has written yet."""
    return np.full(spec.size, np.nan if spec.floating else np.iinfo(spec.dtype).max, spec.dtype)
