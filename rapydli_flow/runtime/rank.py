"""Rank: a participant whose memory and kernels are this machine's processor's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from cpu_kernels.compile import Asked, ask, compile_kernel
from cpu_kernels.driver import CallList, Kernel, address_of

from ..scheduler import Buffer, Call, Collective, Program
from ..spec import Array, Block
from ..template import Device
from ..tuner import Choice, Request
from .participant import CLOCKS, Participant, Scalars, at_array, clock_values, run_reference
from .timeline import Took
from .transport import Transport

ALIGN, HUGE_BYTES = 64, 1 << 21


@dataclass(frozen=True)
class _Run:
    """Calls ``first`` to ``last - 1`` of the call list, without a pause."""

    first: int
    last: int


def memory_of(size: int) -> Array:
    """Bytes for arrays, on huge pages where the system has them: NumPy asks for those from 4 MiB on.

    On small pages the same kernel takes half as long again, or does not, by where its arrays happen to lie.
    """
    whole = np.empty(max(size, HUGE_BYTES) + HUGE_BYTES, np.uint8)
    return whole[-whole.ctypes.data % HUGE_BYTES :][:size]


class Rank(Participant):
    """A program bound to an arena, and to what `load` lends it."""

    def __init__(
        self,
        program: Program,
        device: Device,
        *,
        threads: int = 1,
        transport: Transport | None = None,
        poison: bool = False,
    ) -> None:
        super().__init__(program, device, threads=threads, transport=transport)
        self._arena = memory_of(program.arena_bytes)
        self._base = address_of(self._arena)
        if poison:  # NaN: nothing may read what was not written
            self._arena[:] = 0xFF
        self._views: dict[Buffer, Array] = {}
        self._lent: tuple[Array, ...] = ()
        self._aside: dict[str, Array] = {}
        self._taken: list[Scalars] = []
        if not program.lent:
            self._bind()

    # memory -----------------------------------------------------------------------------------------

    def view(self, buffer: Buffer) -> Array:
        """The array of a buffer: the arena's own memory, or what is lent."""
        if buffer not in self._views:
            spec, first = buffer.spec, buffer.offset
            lent = first < 0
            flat = self._lent[-1 - first] if lent else self._arena[first : first + spec.size_bytes].view(spec.dtype)
            self._views[buffer] = flat.reshape(spec.shape)
        return self._views[buffer]

    def _address(self, buffer: Buffer) -> int:
        """Where a buffer begins."""
        lent = buffer.offset < 0
        at: int = address_of(self._lent[-1 - buffer.offset]) if lent else self._base + buffer.offset
        return at

    def leaf(self, name: str) -> Array:
        """The array of a leaf on this rank."""
        return self.view(self.program.leaves[name])

    def put(self, values: Mapping[str, Array]) -> None:
        for name, value in values.items():
            self.leaf(name)[...] = value

    def get(self, names: Sequence[str]) -> dict[str, Array]:
        return {name: self.leaf(name).copy() for name in names}

    def output(self, name: str) -> Array:
        return self.view(self.program.outputs[name]).copy()

    def lend(self, values: Mapping[str, Array]) -> None:
        leaves = self.program.leaves
        lent = ((values[name], leaves[name].spec.dtype) for name in self.program.lent)
        self._lent = tuple(np.require(value, dtype, ["C", "A"]) for value, dtype in lent)
        self._views.clear()
        self._bind()

    def set_aside(self) -> None:
        self._aside = self.state()

    def aside(self) -> dict[str, Array]:
        return self._aside

    def back(self) -> None:
        self.load(self._aside, whole=False)

    def _feed(self, batch: Mapping[str, Array]) -> None:
        for name, value in batch.items():
            np.copyto(self.leaf(name), value, casting="same_kind")

    # running ----------------------------------------------------------------------------------------

    def _bind(self) -> None:
        calls: list[tuple[Kernel, Sequence[int]]] = []
        self._ats: list[Array] = []
        self._plan: list[_Run | Call | Collective] = []
        self._names: list[str] = []
        for step in self.program.steps:
            if isinstance(step, Collective) or step.choice.reference:
                self._plan.append(step)
                continue
            kernel = kernel_of(step.request, step.choice, self.device)
            at = at_array(step.at or Block.all(step.outs[0].spec.shape))
            self._ats.append(at)
            buffers = (*step.ins, *step.outs, *step.work, *step.extras)
            calls.append((kernel, [*map(self._address, buffers), address_of(at)]))
            self._names.append(step.name)
            n = len(calls)
            last = self._plan[-1] if self._plan else None
            if isinstance(last, _Run):
                self._plan[-1] = _Run(last.first, n)
            else:
                self._plan.append(_Run(n - 1, n))
        self._calls = CallList(calls)
        self._titles = [s.title for s in self.program.steps if isinstance(s, Call) and not s.choice.reference]

    def set_clock(self, seed: int, step: int, clocks: Mapping[str, float] = CLOCKS) -> None:
        for name, value in clock_values(self.program, seed, step, clocks).items():
            self.leaf(name)[...] = value

    def advance(self, seed: int, step: int, clocks: Mapping[str, float] = CLOCKS) -> None:
        self.set_clock(seed, step, clocks)
        for part in self._plan:
            if isinstance(part, _Run):
                self._calls.run(part.first, part.last, threads=self.threads)
            else:
                self._other(part)
        self._taken.append(self.scalars())

    def taken(self) -> list[Scalars]:
        taken, self._taken = self._taken, []
        return taken

    def scalars(self) -> Scalars:
        """The outputs of the last step that are scalars."""
        return {k: float(self.view(b)) for k, b in self.program.outputs.items() if b.spec.shape == ()}

    def advance_timed(self, seed: int, step: int, clocks: Mapping[str, float] = CLOCKS) -> list[Took]:
        self.set_clock(seed, step, clocks)
        times: list[Took] = []
        out_ns = np.zeros(len(self._calls), np.int64)
        for part in self._plan:
            if isinstance(part, _Run):
                before = self._calls.run_timed(part.first, part.last, out_ns, threads=self.threads)
                for i in range(part.first, part.last):
                    times.append(Took(self._names[i], self._titles[i], before * 1e-9, (out_ns[i] - before) * 1e-9))
                    before = int(out_ns[i])
            else:
                times.append(self._timed(part.name, part.title, partial(self._other, part)))
        self._taken.append(self.scalars())
        return times

    def _look(self, buffers: Sequence[Buffer]) -> list[Array]:
        return [self.view(b) for b in buffers]

    def _one_by_one(self) -> Iterator[tuple[Call | Collective, Callable[[], None]]]:
        position = 0
        for step in self.program.steps:
            if isinstance(step, Call) and not step.choice.reference:
                first = position
                position += 1
                yield step, partial(self._calls.run, first, first + 1, threads=self.threads)
            else:
                yield step, partial(self._other, step)

    def _other(self, part: Call | Collective) -> None:
        """A collective, or an op without a template."""
        if isinstance(part, Collective):
            self._meet(part)
            return
        results = run_reference(part.request, self._look((*part.ins, *part.extras)), part.at)
        for buffer, value in zip(part.outs, results, strict=True):
            self.view(buffer)[...] = value

    def _at_hand(self, part: Collective) -> tuple[list[Array], list[Array]]:
        return self._look(part.ins), self._look(part.outs)

    def _bring_back(self, part: Collective) -> None:
        """It is there already."""


def kernel_of(request: Request, choice: Choice, device: Device) -> Kernel:
    """The compiled kernel of a choice."""
    template = choice.find(request, device)
    return compile_kernel(
        template, request.op, request.ins, request.outs, device, dict(choice.config), epilogue=request.epilogue
    )


def asked_of(request: Request, choice: Choice, device: Device) -> Asked:
    """The kernel of a choice, as it is asked for; nothing is compiled."""
    template = choice.find(request, device)
    config = dict(choice.config)
    return ask(template, request.op, request.ins, request.outs, device, config, epilogue=request.epilogue)
