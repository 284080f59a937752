"""CardRank: a participant whose memory and kernels are a card's.

    feed       -> pinned -> on the card --.    two in turn, by a queue of their own
    clocks     -> pinned, one a step ------+--> arena on the card: kernels --> scalars, pinned, one set a step
                                           |           |    ^
                                           |           v    |   ops without a kernel, collectives
                                           '-------- mirror: the arena's arrays on the host, where they are needed

In a plan with NCCL collectives are work of the card, too (`card_meetings`), and the mirror has none of them.
Nothing waits for the card but `taken`, what needs the mirror, and a feed that is two steps ahead. Pointwise ops that
may go together are one kernel (`grouped`), and kernels that follow each other without a pause become one CUDA graph.
The first step waits for each kernel, so that one that fails is named.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import numpy as np

from gpu_kernels.card import PAGE, Accelerator, Mark
from gpu_kernels.many import Many

from ..config import settings
from ..errors import DeviceFault
from ..scheduler import Buffer, Call, Collective, Exchange, Program
from ..scheduler.arena import aligned
from ..spec import Array, Block
from ..template import Device
from .building import card_request, many_of
from .card_meetings import Meetings
from .devices import card_of, tell_hosted
from .grouped import in_groups, on_host
from .participant import CLOCKS, Participant, Scalars, at_array, clock_values, described, run_reference
from .rank import memory_of
from .staging import Clocks, Feeds, Numbers, SetAside
from .timeline import Took
from .transport import Transport

SLOTS = 512  # steps that may be under way before the card is waited for


class CardRank(Participant):
    """A program bound to an arena on a card. ``replay``: run kernels as CUDA graphs."""

    def __init__(
        self,
        program: Program,
        device: Device,
        *,
        threads: int = 1,
        transport: Transport | None = None,
        poison: bool = False,
        replay: bool = True,
        card: Accelerator | None = None,
    ) -> None:
        super().__init__(program, device, threads=threads, transport=transport)
        self.prompt = self.transport.ranks > 1  # ranks look at losses together
        self.card, self._line = card or card_of(device), card_of(device)
        self.card.use()
        self._order = in_groups(program)
        self._many = {numbers: self._many_of(numbers) for numbers in self._order if len(numbers) > 1}
        self._places = self._laid_out()
        self._memory: list[int] = []
        self._pages: list[Array] = []  # of the mirror, which the card reaches itself
        self._queues, self._meetings = [self._line, self.card], list[Meetings]()
        how = self._memory, self._pages, self._meetings
        weakref.finalize(self, let_go, self._queues, *how).atexit = False
        self._base = self._reserve(self._size_bytes)
        if poison:  # NaN: nothing may read what was not written
            self.card.fill(self._base, self._size_bytes, 0xFF)
        self._way_out: Accelerator | None = None  # of state that was set aside
        self._mirror = memory_of(self._size_bytes + PAGE)  # pages that nothing touches are not there
        self._checked, self._replay = False, replay
        self._steps = 0
        self._taken: list[Scalars] = []
        self._stage()
        self._bind()

    # memory -----------------------------------------------------------------------------------------

    def _laid_out(self) -> dict[Any, int]:
        """Where blocks that indexed ops read, leaves that others would lend, and tables of groups lie behind the
        arena."""
        places: dict[Any, int] = {}
        end = aligned(self.program.arena_bytes)
        blocks = [s.at for s in self.program.steps if isinstance(s, Call) and s.at is not None]
        sizes: dict[Any, int] = {block: at_array(block).nbytes for block in blocks}
        sizes |= {name: self.program.leaves[name].spec.size_bytes for name in self.program.lent}
        sizes |= {numbers: many.blocks * many.width * 8 for numbers, many in self._many.items()}
        for key, size in sizes.items():
            places[key] = end
            end += aligned(size)
        self._size_bytes = end
        return places

    def _reserve(self, size_bytes: int) -> int:
        """Memory of the card, given back with this object at the latest."""
        self._memory.append(self.card.reserve(size_bytes))
        return self._memory[-1]

    def _offset(self, buffer: Buffer) -> int:
        """Where a buffer begins in the rank's memory; lent leaves have copies there."""
        return buffer.offset if buffer.offset >= 0 else self._places[self.program.lent[-1 - buffer.offset]]

    def _address(self, buffer: Buffer) -> int:
        return self._base + self._offset(buffer)

    def put(self, values: Mapping[str, Array]) -> None:
        self._state.still = False
        self.card.use()
        sent = []
        for name, value in values.items():
            leaf = self.program.leaves[name]
            sent.append(np.ascontiguousarray(value, leaf.spec.dtype))
            self.card.upload(self._address(leaf), sent[-1])
        self.card.wait()

    def lend(self, values: Mapping[str, Array]) -> None:
        """A card has copies of its own."""
        self.put(values)

    def get(self, names: Sequence[str]) -> dict[str, Array]:
        return dict(zip(names, self._look([self.program.leaves[name] for name in names]), strict=True))

    def output(self, name: str) -> Array:
        return self._look([self.program.outputs[name]])[0]

    def _look(self, buffers: Sequence[Buffer]) -> list[Array]:
        self.card.use()
        self._settled()
        found = [np.empty(buffer.spec.shape, buffer.spec.dtype) for buffer in buffers]
        for array, buffer in zip(found, buffers, strict=True):
            self.card.download(array, self._address(buffer))
        self._wait()
        return found

    def set_aside(self) -> None:
        self.card.use()
        self._state.set_aside(self._reserve)

    def aside(self) -> dict[str, Array]:
        return self.aside_later().result() if self._state.there else {}

    def aside_later(self) -> Future[dict[str, Array]]:
        """A thread brings it, by a queue of its own, while kernels go on."""
        return self._state.later(self._bring)

    def state_later(self) -> Future[dict[str, Array]]:
        self.set_aside()
        return self.aside_later()

    def _bring(self) -> dict[str, Array]:
        """What was set aside, to the host."""
        with _explained(self.device):
            if self._way_out is None:
                self._way_out = self._another_queue()
            return self._state.bring(self._way_out)

    def back(self) -> None:
        self.card.use()
        self._state.back()

    def _another_queue(self) -> Accelerator:
        """One more queue of the card, which is given back with the others."""
        self._queues.insert(0, card_of(self.device))
        return self._queues[0]

    # staging ----------------------------------------------------------------------------------------

    def _stage(self) -> None:
        """Pinned memory for what is fed, for clocks, and for scalars; what is set aside."""
        leaves, outputs = self.program.leaves, self.program.outputs
        fed = {name: (self._address(leaves[name]), leaves[name].spec) for name in self.program.kind("batch")}
        scalars = {k: (self._address(b), b.spec) for k, b in outputs.items() if b.spec.shape == ()}
        clocks = {name: leaves[name] for name in clock_values(self.program, 0, 0, CLOCKS)}
        held = {name: (self._address(leaves[name]), leaves[name].spec) for name in self.program.kind("param", "state")}
        self._state = SetAside(self.card, held)
        self._feeds = Feeds(self.card, self._line, fed, self._reserve)
        self._clocks = Clocks(self.card, clocks, self._base, SLOTS)
        self._numbers = Numbers(self.card, scalars, SLOTS)

    def _feed(self, batch: Mapping[str, Array]) -> None:
        self.card.use()
        self._feeds.send(batch)

    def set_clock(self, seed: int, step: int, clocks: Mapping[str, float] = CLOCKS) -> None:
        self._state.still = False  # a step begins
        self.card.use()
        self._clocks.send(self._steps, clock_values(self.program, seed, step, clocks))

    # running ----------------------------------------------------------------------------------------

    def _bind(self) -> None:
        """Load kernels, and pack what each call is launched with."""
        for block, place in self._places.items():
            if isinstance(block, Block):
                data = at_array(block)
                self.card.upload(self._base + place, data)
                self.card.wait()
        kernels: dict[Any, Any] = {}
        hosted: dict[str, None] = {}
        self._parts: list[_Run | Call | Collective] = []
        self._single: dict[int, Callable[[], None]] = {}  # launches of kernels for one step, by its number
        for numbers in self._order:
            step = self.program.steps[numbers[0]]
            if isinstance(step, Collective) or on_host(step):
                if isinstance(step, Call):
                    hosted[step.title] = None
                self._parts.append(step)
                continue
            last = self._parts[-1] if self._parts else None
            if not isinstance(last, _Run):
                last = _Run()
                self._parts.append(last)
            last.calls.append(self._calls(numbers))
            if len(numbers) > 1:
                last.launches.append(self._bound(numbers))
                continue
            key = step.request, step.choice
            if key not in kernels:
                kernels[key] = self.card.prepare(card_request(*key, self.device))
            at = self._base + self._places[step.at] if step.at is not None else 0
            last.launches.append(kernels[key].bind(self._addresses(step), at=at))
            self._single[numbers[0]] = last.launches[-1]
        if self.program.nccl:
            self._meet_on_card()
        else:
            self._pin()
        tell_hosted(hosted)

    def _meet_on_card(self) -> None:
        """Bind collectives to the card. Those behind kernels have a queue of their own."""
        beside = self._another_queue() if self.program.behind else self.card
        how: Any = (self.transport, self.card, beside, self._address, self._reserve)
        self._meetings.append(Meetings(self.program, self.device, *how))

    def _wait(self) -> None:
        """Until the card has done everything, or another rank is gone."""
        if self._meetings:
            self._meetings[0].wait()
        else:
            self.card.wait()

    def _settled(self) -> None:
        """Before the host reads, which holds this thread until the card has come to it: not behind another rank."""
        if self._meetings:
            self._wait()

    def _calls(self, numbers: Sequence[int]) -> tuple[Call, ...]:
        return tuple(step for step in map(self.program.steps.__getitem__, numbers) if isinstance(step, Call))

    def _many_of(self, numbers: Sequence[int]) -> Many:
        return many_of([call.request for call in self._calls(numbers)])

    def _addresses(self, call: Call) -> list[int]:
        return [self._address(b) for b in (*call.ins, *call.outs, *call.work, *call.extras)]

    def _bound(self, numbers: tuple[int, ...]) -> Callable[[], None]:
        """What launches a group; its table is put where the kernel will read it."""
        many, place = self._many[numbers], self._base + self._places[numbers]
        calls = self._calls(numbers)
        table = many.table([[self._address(b) for b in (*call.ins, *call.extras, *call.outs)] for call in calls])
        self.card.upload(place, table)
        self.card.wait()
        launch: Callable[[], None] = self.card.prepare_many(many, self.device.target).bind([place])
        return launch

    def _apart(self) -> None:
        """Have launches for each call of a group as well: its rows of the table are a table for it."""
        for numbers, many in self._many.items():
            for i, number in enumerate(numbers):
                if number not in self._single:
                    place = self._base + self._places[numbers] + many.rows_before(i) * many.width * 8
                    self._single[number] = self.card.prepare_many(many.one(i), self.device.target).bind([place])

    def advance(self, seed: int, step: int, clocks: Mapping[str, float] = CLOCKS) -> None:
        with _explained(self.device):
            self.set_clock(seed, step, clocks)
            for part in self._parts:
                if isinstance(part, _Run):
                    self._run(part)
                else:
                    self._other(part)
            self._end()

    def _end(self) -> None:
        """Have the scalars of this step brought over."""
        self._numbers.fetch(self._steps)
        self._steps += 1
        self._checked = not settings().cuda_wait
        if self._steps == SLOTS:
            self._drain()

    def _drain(self) -> None:
        """Wait, and take the scalars that came."""
        self.card.use()
        with _explained(self.device):
            self._wait()
        self._taken += self._numbers.read(self._steps)
        self._steps = 0

    def taken(self) -> list[Scalars]:
        self._drain()
        taken, self._taken = self._taken, []
        return taken

    def _run(self, run: _Run) -> None:
        """Kernels without a pause: each looked after in the first step, a graph of them from the second one on."""
        if not self._checked:
            for calls, launch in zip(run.calls, run.launches, strict=True):
                self._launch(calls, launch)
            return
        if run.replay is None:
            run.replay = self._captured(run) if self._replay and len(run.launches) > 1 else run.plain
        run.replay()

    def _captured(self, run: _Run) -> Callable[[], None]:
        try:
            return self.card.capture(run.launches)
        except DeviceFault:  # a driver without graphs: launches do the same
            self._wait()
            return run.plain

    def _launch(self, calls: Sequence[Call], launch: Callable[[], None]) -> None:
        """One kernel; until the first step is over it is waited for."""
        try:
            launch()
            if not self._checked:
                self._wait()
        except DeviceFault as error:
            kernel = f"{described(calls[0])} with {calls[0].choice}"
            if len(calls) > 1:
                kernel = f"one kernel for {len(calls)} calls: {', '.join(map(described, calls))}"
            message = f"{kernel} on {self.device.name}: {error} Snapshots written before are kept."
            raise DeviceFault(message, sticky=error.sticky, kernel=kernel) from error

    def advance_timed(self, seed: int, step: int, clocks: Mapping[str, float] = CLOCKS) -> list[Took]:
        self.set_clock(seed, step, clocks)
        self._wait()
        begin, origin = time.perf_counter(), self.card.mark()
        origin.set()
        times: list[Took | tuple[Sequence[Call], Mark, Mark]] = []
        for part in self._parts:
            if isinstance(part, _Run):
                before = self.card.mark()
                before.set()
                for calls, launch in zip(part.calls, part.launches, strict=True):
                    self._launch(calls, launch)
                    after = self.card.mark()
                    after.set()
                    times.append((calls, before, after))
                    before = after
            else:
                self._wait()
                times.append(self._timed(part.name, part.title, partial(self._other, part, timed=True)))
        self._end()
        self._wait()
        return [took for each in times for took in ([each] if isinstance(each, Took) else _took(*each, origin, begin))]

    def _one_by_one(self) -> Iterator[tuple[Call | Collective, Callable[[], None]]]:
        self._apart()
        for i, step in enumerate(self.program.steps):
            if isinstance(step, Call) and i in self._single:
                yield step, partial(self._launch, (step,), self._single[i])
            else:
                yield step, partial(self._other, step)

    def _other(self, part: Call | Collective, *, timed: bool = False) -> None:
        """A collective, or an op that runs on the host; ``timed``: it is done when this returns, unless it goes behind
        kernels."""
        if isinstance(part, Collective):
            if not self._meetings:
                self._meet(part)
                return
            self._meetings[0].meet(part)
            if timed and not part.op.behind:
                self._wait()
            return
        results = run_reference(part.request, self._mirrored((*part.ins, *part.extras)), part.at)
        for buffer, value in zip(part.outs, results, strict=True):
            self._view(buffer)[...] = value
        self._return(part.outs)

    # the mirror -------------------------------------------------------------------------------------

    def _view(self, buffer: Buffer) -> Array:
        spec, first = buffer.spec, self._offset(buffer)
        return self._mirror[first : first + spec.size_bytes].view(spec.dtype).reshape(spec.shape)

    def _pin(self) -> None:
        """Have the card reach those pages of the mirror that collectives read and write."""
        meetings = [part for part in self.program.steps if isinstance(part, Collective)]
        buffers = [buffer for part in meetings for buffer in (*part.ins, *part.outs)]
        places = sorted((self._offset(b), self._offset(b) + b.spec.size_bytes) for b in buffers)
        pages: list[tuple[int, int]] = []
        for first, last in ((first // PAGE, -(-last // PAGE)) for first, last in places):
            if pages and first <= pages[-1][1]:
                pages[-1] = pages[-1][0], max(last, pages[-1][1])
            else:
                pages.append((first, last))
        for first, last in pages:
            self._pages.append(self._mirror[first * PAGE : last * PAGE])
            self.card.pin(self._pages[-1])

    def _mirrored(self, buffers: Sequence[Buffer]) -> list[Array]:
        """Buffers as arrays of the host. They lie as in the arena: where NumPy's lie decides the bits of its sums."""
        self.card.use()
        self._settled()
        found = [self._view(b) for b in buffers]
        for array, buffer in zip(found, buffers, strict=True):
            self.card.download(array, self._address(buffer))
        self._wait()
        return found

    def _return(self, buffers: Sequence[Buffer]) -> None:
        """What the mirror has, to the card."""
        self.card.use()
        for buffer in buffers:
            self.card.upload(self._address(buffer), self._view(buffer))
        self._wait()

    def _at_hand(self, part: Collective) -> tuple[list[Array], list[Array]]:
        ins = self._mirrored(part.ins)
        if isinstance(part.op, Exchange):  # writes parts of what is there
            return ins, self._mirrored(part.outs)
        return ins, [self._view(b) for b in part.outs]

    def _bring_back(self, part: Collective) -> None:
        self._return(part.outs)

    def close(self) -> None:
        super().close()
        for meetings in self._meetings:
            meetings.abort()
        self._state.close()
        self._parts, self._single = [], {}
        let_go(self._queues, self._memory, self._pages, self._meetings)


@contextmanager
def _explained(device: Device) -> Iterator[None]:
    """A failure of which nobody knows the kernel."""
    try:
        yield
    except DeviceFault as error:
        if error.kernel:
            raise
        raise DeviceFault(
            f"a step failed on {device.name}: {error} RAPYDLI_CUDA_WAIT=1 has kernels waited for, and says which it "
            "was. Snapshots written before are kept.",
            sticky=error.sticky,
        ) from error


def let_go(
    cards: Sequence[Accelerator],
    memory: list[int],
    pages: Sequence[Array] = (),
    meetings: Sequence[Meetings] = (),
) -> None:
    """Give everything back that was reserved on the last of the queues of a card, and these; of a card that failed
    nothing can be, nor need it. What waits for other cards is given up first."""
    if not memory:
        return
    for each in meetings:
        each.abort()
    with suppress(DeviceFault), cards[-1].briefly():
        for card in cards:
            card.wait()
        while memory:
            cards[-1].free(memory.pop())
        for page in pages:
            cards[-1].unpin(page)
        for card in cards:
            card.close()


class _Run:
    """Kernels without a pause, the calls that each of them is for, and how they are launched."""

    def __init__(self) -> None:
        self.calls: list[tuple[Call, ...]] = []
        self.launches: list[Callable[[], None]] = []
        self.replay: Callable[[], None] | None = None

    def plain(self) -> None:
        for launch in self.launches:
            launch()


def _took(calls: Sequence[Call], before: Mark, after: Mark, origin: Mark, begin: float) -> Iterator[Took]:
    """What a kernel took, shared out among its calls by what each reads and writes."""
    at, time_s = begin + before.seconds_since(origin), after.seconds_since(before)
    moved = [sum(b.spec.size_bytes for b in (*call.ins, *call.extras, *call.outs)) for call in calls]
    for call, size_bytes in zip(calls, moved, strict=True):
        share_s = time_s * size_bytes / sum(moved) if len(calls) > 1 else time_s
        yield Took(call.name, call.title, at, share_s)
        at += share_s
