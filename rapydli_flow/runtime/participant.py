"""Participant: one rank of a plan, wherever its memory is. `Rank` has it on the host, `CardRank` on a card."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from ..errors import SettingError
from ..scheduler import Buffer, Call, Collective, Program, Wait
from ..spec import Array, Block, floating
from ..template import Device
from ..tuner import Request
from .timeline import Took
from .transport import Alone, Transport

CLOCKS: Mapping[str, float] = {"rate_factor": 1.0}  # clock leaves beside seed and step, where a run does not set them
Scalars = dict[str, float]


class Participant(ABC):
    """A program bound to memory, ready to run steps. Not thread-safe: one step at a time.

    Steps are begun by `advance`; `taken` gives the scalars of those that were begun since it was last asked.
    """

    together = True  # each step is one of all ranks: they have the same numbers, and meet within it
    prompt = True  # a step is over when `advance` returns: to look at its numbers costs nothing

    def __init__(self, program: Program, device: Device, *, threads: int, transport: Transport | None) -> None:
        self.program, self.device, self.threads = program, device, threads
        self.transport = transport or Alone()
        behind = program.behind and not program.nccl  # a card carries out its own
        self._behind = ThreadPoolExecutor(1, thread_name_prefix="rapydli-sums") if behind else None
        self._begun: dict[str, tuple[Future[None], Collective]] = {}

    # memory -----------------------------------------------------------------------------------------

    @abstractmethod
    def put(self, values: Mapping[str, Array]) -> None:
        """Set leaves of this rank."""

    @abstractmethod
    def get(self, names: Sequence[str]) -> dict[str, Array]:
        """Copies of leaves of this rank."""

    @abstractmethod
    def output(self, name: str) -> Array:
        """A copy of an output of the last step."""

    @abstractmethod
    def lend(self, values: Mapping[str, Array]) -> None:
        """Give the program what it reads of others, if it is bound to it."""

    @abstractmethod
    def set_aside(self) -> None:
        """Remember the present parameters and state."""

    @abstractmethod
    def aside(self) -> dict[str, Array]:
        """What was set aside; nothing, if nothing was."""

    @abstractmethod
    def back(self) -> None:
        """Go back to what was set aside."""

    def aside_later(self) -> Future[dict[str, Array]]:
        """What was set aside, once it is on the host; until another one is."""
        return _here(self.aside())

    def state_later(self) -> Future[dict[str, Array]]:
        """Copies of parameters and state of this moment, once they are on the host. On a card they are set aside."""
        return _here(self.state())

    def start(self, seed: int) -> None:
        """Give parameters and state their first values: this rank's block of each."""
        for name in self.program.kind("param", "state"):
            self.put({name: self.program.starts[name].start(seed, self.program.layout[name])})

    def state(self) -> dict[str, Array]:
        """Copies of parameters and state on this rank."""
        return self.get(self.program.kind("param", "state"))

    def load(self, state: Mapping[str, Array], *, whole: bool = True) -> None:
        """Set parameters and state; ``whole`` arrays are cut to this rank's blocks.

        Those that the program is lent are not copied, if they are contiguous and of the right dtype: they must stay as
        they are until others are loaded.
        """
        own: dict[str, Array] = {}
        for name in self.program.kind("param", "state"):
            if name not in state:
                raise SettingError(f"the state has no {name!r}; it has {', '.join(sorted(state)) or 'nothing'}.")
            block = self.program.layout[name]
            value = np.asarray(state[name])
            expected = block.whole if whole else block.shape
            if value.shape != expected:
                raise SettingError(f"state {name!r} has shape {value.shape} but the network expects {expected}.")
            own[name] = value[block.slices] if whole else value
        lent = {name: own.pop(name) for name in self.program.lent}
        self.put(own)
        if lent:
            self.lend(lent)

    def feed(self, batch: Mapping[str, Array]) -> None:
        """Set this rank's rows of what is fed."""
        fed = {name: batch[name] for name in self.program.kind("batch")}
        for name, value in fed.items():
            expected = self.program.leaves[name].spec.shape
            if value.shape != expected:
                raise SettingError(
                    f"feed: {name} has shape {value.shape} but the program takes {expected} on this rank."
                )
        self._feed(fed)

    @abstractmethod
    def _feed(self, batch: Mapping[str, Array]) -> None: ...

    def block(self, name: str) -> Block:
        """Which part of a leaf is on this rank."""
        return self.program.layout[name]

    # running ----------------------------------------------------------------------------------------

    @abstractmethod
    def set_clock(self, seed: int, step: int, clocks: Mapping[str, float] = CLOCKS) -> None:
        """Set the clock leaves."""

    @abstractmethod
    def advance(self, seed: int, step: int, clocks: Mapping[str, float] = CLOCKS) -> None:
        """Run the program once. ``clocks``: values of further clock leaves."""

    @abstractmethod
    def advance_timed(self, seed: int, step: int, clocks: Mapping[str, float] = CLOCKS) -> list[Took]:
        """Like `advance`; what every call and collective took."""

    @abstractmethod
    def taken(self) -> list[Scalars]:
        """The scalar outputs of each step since this was last asked; they are over when it returns."""

    def step(self, seed: int, step: int, clocks: Mapping[str, float] = CLOCKS) -> Scalars:
        """Run the program once; its scalar outputs."""
        self.advance(seed, step, clocks)
        return self.taken()[-1]

    def step_timed(self, seed: int, step: int, clocks: Mapping[str, float] = CLOCKS) -> tuple[Scalars, list[Took]]:
        """Like `step`; also what every call and collective took."""
        times = self.advance_timed(seed, step, clocks)
        return self.taken()[-1], times

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
        outs = self._look(part.outs)
        if isinstance(part, Call) and part.request.epilogue.into:
            first, size = part.request.epilogue.into[0], part.request.outs[0].shape[-1]
            outs[0] = outs[0][..., first : first + size]
        return outs

    @abstractmethod
    def _look(self, buffers: Sequence[Buffer]) -> list[Array]:
        """What buffers hold, to be read at once."""

    @abstractmethod
    def _one_by_one(self) -> Iterator[tuple[Call | Collective, Callable[[], None]]]:
        """The steps of the program, and what carries out each."""

    def describe(self, position: int) -> str:
        """A node of the program in words: its name, op and output."""
        return described(self.program.steps[position])

    # others -----------------------------------------------------------------------------------------

    def _meet(self, part: Collective) -> None:
        """A collective. Those that run behind the kernels are carried out by another thread, in their order, on a line
        of their own: what kernels wait for does not stand behind them."""
        if isinstance(part.op, Wait):
            begun, first = self._begun.pop(part.name)
            begun.result()
            self._bring_back(first)
            return
        ins, outs = self._at_hand(part)
        if not part.op.behind:
            self.transport.meet(part.name, part.op, ins, outs)
            self._bring_back(part)
            return
        assert self._behind is not None
        assert self.transport.aside is not None
        begun = self._behind.submit(self.transport.aside.meet, part.name, part.op, ins, outs)
        self._begun[part.name] = begun, part

    @abstractmethod
    def _at_hand(self, part: Collective) -> tuple[list[Array], list[Array]]:
        """The buffers of a collective as arrays of the host, one over the other where they are so in the program."""

    @abstractmethod
    def _bring_back(self, part: Collective) -> None:
        """A collective has written to its arrays of the host: let the program have it."""

    def _timed(self, name: str, title: str, work: Callable[[], object]) -> Took:
        """Do something, and say what it took; what is not done by this thread may have waited longer than this one."""
        line = self.transport.aside if title == Wait.name and self.transport.aside is not None else self.transport
        waited_s, begin = line.waited_s, time.perf_counter()
        work()
        time_s = time.perf_counter() - begin
        return Took(name, title, begin, time_s, min(time_s, line.waited_s - waited_s))

    def finish(self) -> None:  # noqa: B027 - most have nothing to do
        """Return when nothing of the steps that were run is under way any more."""

    def close(self) -> None:
        """Leave the collectives and let go of the memory."""
        self.transport.close()
        if self._behind is not None:
            self._behind.shutdown(wait=False, cancel_futures=True)


def _here(state: dict[str, Array]) -> Future[dict[str, Array]]:
    """What need not be waited for."""
    found: Future[dict[str, Array]] = Future()
    found.set_result(state)
    return found


def described(part: Call | Collective) -> str:
    """A node of a program in words: its name, op and outputs."""
    specs = part.request.outs if isinstance(part, Call) else [b.spec for b in part.outs]
    return f"{part.name} ({part.title}, {', '.join(map(str, specs))})"


def clock_values(program: Program, seed: int, step: int, clocks: Mapping[str, float]) -> dict[str, float]:
    """What the clock leaves of a program say."""
    said = {**CLOCKS, **clocks, "seed": seed, "step": step}
    return {name: value for name, value in said.items() if name in program.leaves}


def run_reference(request: Request, inputs: Sequence[Array], at: Block | None) -> tuple[Array, ...]:
    """A whole op in NumPy, its tail included; as kernels, it says nothing of numbers that are not finite."""
    with np.errstate(all="ignore"):
        return (request.whole or request.op).run(*inputs, at=at)


def at_array(at: Block) -> Array:
    """A block as kernels take it: lo of every axis, then whole."""
    return np.array([*at.lo, *at.whole], np.int64)
