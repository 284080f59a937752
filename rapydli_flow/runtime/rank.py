"""Rank: one participant of a plan, with its memory and compiled kernels, ready to run steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np

from cpu_kernels.compile import Asked, ask, compile_kernel
from cpu_kernels.driver import CallList, Kernel, address_of

from ..errors import SettingError
from ..scheduler import Buffer, Call, Collective, Program, Wait
from ..spec import Array, Block, floating
from ..template import Device
from ..tuner import Choice, Request
from .timeline import Took
from .transport import Alone, Transport

ALIGN, HUGE_BYTES = 64, 1 << 21
CLOCKS: Mapping[str, float] = {"rate_factor": 1.0}  # clock leaves beside seed and step, where a run does not set them


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


class Rank:
    """A program bound to an arena, and to what `load` lends it. Not thread-safe: one step at a time."""

    together = True  # each step is one of all ranks: they have the same numbers, and meet within it

    def __init__(
        self,
        program: Program,
        device: Device,
        *,
        threads: int = 1,
        transport: Transport | None = None,
        poison: bool = False,
    ) -> None:
        self.program, self.device, self.threads = program, device, threads
        self.transport = transport or Alone()
        self._arena = memory_of(program.arena_bytes)
        self._base = address_of(self._arena)
        if poison:  # NaN: nothing may read what was not written
            self._arena[:] = 0xFF
        self._behind = ThreadPoolExecutor(1, thread_name_prefix="rapydli-sums") if program.behind else None
        self._begun: dict[str, Future[None]] = {}
        self._views: dict[Buffer, Array] = {}
        self._lent: tuple[Array, ...] = ()
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
        return address_of(self._lent[-1 - buffer.offset]) if buffer.offset < 0 else self._base + buffer.offset

    def leaf(self, name: str) -> Array:
        """The array of a leaf on this rank."""
        return self.view(self.program.leaves[name])

    def start(self, seed: int) -> None:
        """Give parameters and state their first values: this rank's block of each."""
        for name in self.program.kind("param", "state"):
            self.leaf(name)[...] = self.program.starts[name].start(seed, self.program.layout[name])

    def state(self) -> dict[str, Array]:
        """Copies of parameters and state on this rank."""
        return {name: self.leaf(name).copy() for name in self.program.kind("param", "state")}

    def load(self, state: Mapping[str, Array], *, whole: bool = True) -> None:
        """Set parameters and state; ``whole`` arrays are cut to this rank's blocks.

        Those that the program is lent are not copied, if they are contiguous and of the right dtype: they must stay as
        they are until others are loaded.
        """
        lent: dict[str, Array] = {}
        for name in self.program.kind("param", "state"):
            if name not in state:
                raise SettingError(f"the state has no {name!r}; it has {', '.join(sorted(state)) or 'nothing'}.")
            block = self.program.layout[name]
            value = np.asarray(state[name])
            expected = block.whole if whole else block.shape
            if value.shape != expected:
                raise SettingError(f"state {name!r} has shape {value.shape} but the network expects {expected}.")
            own = value[block.slices] if whole else value
            if name in self.program.lent:
                lent[name] = np.require(own, self.program.leaves[name].spec.dtype, ["C", "A"])
            else:
                self.leaf(name)[...] = own
        if lent:
            self._lent = tuple(lent[name] for name in self.program.lent)
            self._views.clear()
            self._bind()

    def feed(self, batch: Mapping[str, Array]) -> None:
        """Set this rank's rows of what is fed."""
        for name in self.program.kind("batch"):
            view, value = self.leaf(name), batch[name]
            if value.shape != view.shape:
                raise SettingError(
                    f"feed: {name} has shape {value.shape} but the program takes {view.shape} on this rank."
                )
            np.copyto(view, value, casting="same_kind")

    def block(self, name: str) -> Block:
        """Which part of a leaf is on this rank."""
        return self.program.layout[name]

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
        for name, value in {**CLOCKS, **clocks, "seed": seed, "step": step}.items():
            if name in self.program.leaves:
                self.leaf(name)[...] = value

    def step(self, seed: int, step: int, clocks: Mapping[str, float] = CLOCKS) -> dict[str, float]:
        """Run the program once; its scalar outputs. ``clocks``: values of further clock leaves."""
        self.set_clock(seed, step, clocks)
        for part in self._plan:
            if isinstance(part, _Run):
                self._calls.run(part.first, part.last, threads=self.threads)
            else:
                self._other(part)
        return self.scalars()

    def scalars(self) -> dict[str, float]:
        """The outputs of the last step that are scalars."""
        return {k: float(self.view(b)) for k, b in self.program.outputs.items() if b.spec.shape == ()}

    def output(self, name: str) -> Array:
        """A copy of an output of the last step."""
        return self.view(self.program.outputs[name]).copy()

    def step_timed(
        self, seed: int, step: int, clocks: Mapping[str, float] = CLOCKS
    ) -> tuple[dict[str, float], list[Took]]:
        """Like `step`; also what every call and collective took."""
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
        return self.scalars(), times

    def _timed(self, name: str, title: str, work: Callable[[], object]) -> Took:
        """Do something, and say what it took; what is not done by this thread may have waited longer than this one."""
        line = self.transport.aside if title == Wait.name and self.transport.aside is not None else self.transport
        waited_s, begin = line.waited_s, time.perf_counter()
        work()
        time_s = time.perf_counter() - begin
        return Took(name, title, begin, time_s, min(time_s, line.waited_s - waited_s))

    def first_nonfinite(self, seed: int, step: int, clocks: Mapping[str, float] = CLOCKS) -> int | None:
        """Like `step`; the position in the program of the first node whose output is not finite, if any."""
        self.set_clock(seed, step, clocks)
        first: int | None = None
        for position, (part, done) in enumerate(self._one_by_one()):
            done()
            if first is None and not all(np.isfinite(y).all() for y in self._written(part) if floating(y)):
                first = position
        return first

    def _written(self, part: Call | Collective) -> list[Array]:
        """What a node writes: of a joined array its own channels."""
        if isinstance(part, Collective) and part.op.behind:
            return []  # not yet
        outs = [self.view(b) for b in part.outs]
        if isinstance(part, Call) and part.request.epilogue.into:
            first, size = part.request.epilogue.into[0], part.request.outs[0].shape[-1]
            outs[0] = outs[0][..., first : first + size]
        return outs

    def describe(self, position: int) -> str:
        """A node of the program in words: its name, op and output."""
        part = self.program.steps[position]
        specs = part.request.outs if isinstance(part, Call) else [b.spec for b in part.outs]
        return f"{part.name} ({part.title}, {', '.join(map(str, specs))})"

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
        results = run_reference(part.request, [self.view(b) for b in (*part.ins, *part.extras)], part.at)
        for buffer, value in zip(part.outs, results, strict=True):
            self.view(buffer)[...] = value

    def _meet(self, part: Collective) -> None:
        """A collective. Those that run behind the kernels are carried out by another thread, in their order, on a line
        of their own: what kernels wait for does not stand behind them."""
        if isinstance(part.op, Wait):
            self._begun.pop(part.name).result()
            return
        ins, outs = [self.view(b) for b in part.ins], [self.view(b) for b in part.outs]
        if not part.op.behind:
            self.transport.meet(part.name, part.op, ins, outs)
            return
        assert self._behind is not None
        assert self.transport.aside is not None
        self._begun[part.name] = self._behind.submit(self.transport.aside.meet, part.name, part.op, ins, outs)

    def finish(self) -> None:
        """Return when nothing of the steps that were run is under way any more."""

    def close(self) -> None:
        """Leave the collectives and let go of the memory."""
        self.transport.close()
        if self._behind is not None:
            self._behind.shutdown(wait=False, cancel_futures=True)


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


def run_reference(request: Request, inputs: Sequence[Array], at: Block | None) -> tuple[Array, ...]:
    """An op without a template, in NumPy; such ops have no epilogue."""
    return request.op.run(*inputs, at=at)


def at_array(at: Block) -> Array:
    """A block as kernels take it: lo of every axis, then whole."""
    return np.array([*at.lo, *at.whole], np.int64)
