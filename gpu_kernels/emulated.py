"""A card that NumPy plays: its memory is the host's, its kernels run through `emulate`, at once.

It needs no driver and no compiler, and is thousands of times slower than a card: for tests of everything around
kernels, and for looking into them.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import psutil

from rapydli_flow.spec import Array, Block, Spec
from rapydli_flow.template import Device

from . import emulate
from .card import PAGE, Accelerator, Alive, Box, Communicator, Mark
from .compile import Request
from .emulated_nccl import Meeting, new_meeting
from .many import Many

ALIGNMENT = 256  # of memory, as the driver has it
TARGET = "sm_80"  # what every template serves
_one_block = threading.RLock()  # the emulator runs one block at a time, whoever asks


def device() -> Device:
    """What templates are told of it."""
    memory = int(psutil.virtual_memory().total)
    return Device("cuda", "emulated", target=TARGET, cores=108, vector_bytes=16, memory_bytes=memory, emulated=True)


class Moment(Mark):
    def __init__(self) -> None:
        self.at = 0.0

    def set(self) -> None:
        self.at = time.perf_counter()

    def wait(self) -> None:
        pass

    def passed(self) -> bool:
        return True

    def seconds_since(self, before: Mark) -> float:
        assert isinstance(before, Moment)
        return self.at - before.at


class Emulated(Accelerator):
    """Everything is done as soon as it is asked for."""

    name = "emulated"

    def __init__(self) -> None:
        self._memory: dict[int, Array] = {}

    def describe(self) -> Device:
        return device()

    def free_bytes(self) -> int:
        return int(psutil.virtual_memory().available)

    def use(self) -> None:
        pass

    def reserve(self, size_bytes: int) -> int:
        block = np.empty(size_bytes + ALIGNMENT, np.uint8)
        address = block.ctypes.data + -block.ctypes.data % ALIGNMENT
        self._memory[address] = block
        return int(address)

    def free(self, address: int) -> None:
        del self._memory[address]

    def pinned(self, size_bytes: int) -> Array:
        return np.empty(size_bytes, np.uint8)

    def pin(self, data: Array) -> None:
        assert data.ctypes.data % PAGE == data.nbytes % PAGE == 0

    def unpin(self, data: Array) -> None:
        pass

    def briefly(self) -> AbstractContextManager[None]:
        return nullcontext()

    def upload(self, address: int, data: Array) -> None:
        ctypes.memmove(address, data.ctypes.data, data.nbytes)

    def download(self, data: Array, address: int) -> None:
        ctypes.memmove(data.ctypes.data, address, data.nbytes)

    def copy(self, target: int, source: int, size_bytes: int) -> None:
        ctypes.memmove(target, source, size_bytes)

    def copy_box(self, target: int, source: int, box: Box) -> None:
        for plane in range(box.planes):
            for row in range(box.rows):
                to = target + (plane * box.target_height + row) * box.target_pitch
                ctypes.memmove(to, source + (plane * box.source_height + row) * box.source_pitch, box.width)

    def fill(self, address: int, size_bytes: int, byte: int) -> None:
        ctypes.memset(address, byte, size_bytes)

    def prepare(self, request: Request) -> Kernel:
        return Kernel(request)

    def prepare_many(self, many: Many, target: str) -> KernelOfMany:
        return KernelOfMany(many)

    def meeting(self) -> bytes:
        return new_meeting()

    def meet(self, meeting: bytes, rank: int, ranks: int, alive: Alive) -> Communicator:
        return Meeting(meeting, rank, ranks, alive)

    def capture(self, launches: Sequence[Callable[[], None]]) -> Callable[[], None]:
        def replay() -> None:
            for launch in launches:
                launch()

        return replay

    def mark(self) -> Moment:
        return Moment()

    def after(self, mark: Mark) -> None:
        pass

    def wait(self) -> None:
        pass

    def wait_for(self, stream: int) -> None:
        pass

    def follow(self, stream: int, other: int) -> None:
        pass

    def close(self) -> None:
        pass


class Kernel:
    """The grids of a call."""

    def __init__(self, request: Request) -> None:
        self.request, self.grids = request, request.grids()

    def bind(self, addresses: Sequence[int], *, at: int = 0, stream: int | None = None) -> Callable[[], None]:
        request = self.request
        specs = (*request.ins, *request.outs, *request.work, *request.epilogue.extras)
        arrays = [array_at(address, spec) for address, spec in zip(addresses, specs, strict=True)]
        n, m = len(request.ins), len(request.outs)
        extras = arrays[len(arrays) - len(request.epilogue.extras) :]
        return partial(self._run, arrays[:n], arrays[n : n + m], extras, at)

    def _run(self, ins: list[Array], outs: list[Array], extras: list[Array], at: int) -> None:
        where, request = None, self.request
        if at:
            axes = len(request.outs[0].shape)
            numbers = tuple(map(int, array_at(at, Spec((2 * axes,), "int64"))))
            lo, whole = numbers[:axes], numbers[axes:]
            hi = tuple(first + size for first, size in zip(lo, request.outs[0].shape, strict=True))
            where = Block(lo, hi, whole)
        with _one_block:
            made = emulate.run(self.grids, ins, request.outs, extras=extras, work=request.work, at=where)
        for out, value in zip(outs, made, strict=True):
            out[...] = value


class KernelOfMany:
    """One kernel on all arrays that a table names. It works where they lie: what overlaps on a card does so here."""

    def __init__(self, many: Many) -> None:
        self.many, self.grid = many, many.grid()

    def bind(self, addresses: Sequence[int]) -> Callable[[], None]:
        (table,) = addresses
        return partial(self._run, array_at(table, Spec((self.many.blocks, self.many.width), "int64")))

    def _run(self, table: Array) -> None:
        many, key = self.many, self.many.key
        dtypes, results = (*key.ins, *key.extras, *key.outs), len(key.outs)
        own, written = table.copy(), []
        with _one_block:
            emulate.memory.clear()
            for op, size in enumerate(many.sizes):
                rows = slice(many.rows_before(op), many.rows_before(op + 1))
                for j, (dtype, one) in enumerate(zip(dtypes, (*key.single, *(False,) * results), strict=True)):
                    first = int(table[rows.start, 1 + j])
                    data = array_at(first, Spec((1 if one else size,), dtype))
                    buffer = emulate.Buffer(f"array {j} of op {op}", data, output=j >= len(key.single))
                    own[rows, 1 + j] += emulate.memory.put(buffer) - first
                    written += [buffer] if buffer.writes is not None else []
            given = emulate.Buffer("the table", own.ravel())
            for block in range(self.grid.grid):
                emulate.machine.start(self.grid.block, block)
                with np.errstate(all="ignore"):
                    self.grid.kernel((given,), (), (), (), None)
            emulate.memory.clear()
        for buffer in written:
            buffer.check_once()
            if not np.all(buffer.writes):
                raise emulate.KernelFault(f"{buffer.name}: the kernel does not write all of it.")


def array_at(address: int, spec: Spec) -> Array:
    """The array that lies at an address."""
    data: Any = (ctypes.c_uint8 * spec.size_bytes).from_address(address)
    return np.frombuffer(data, np.uint8).view(spec.dtype).reshape(spec.shape)
