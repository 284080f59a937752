"""A rank of an asynchronous plan: it trains while what it owns of the parameters is updated behind it.

    this thread    gradients of step 7       of step 8                of step 9 (waits until the update of 6 is done)
    behind it      sums for step 6, update, parts to all | sums for step 7, ...

A rank on a card makes gradients there; sums and updates are the host's, where gradients come to anyway, and parameters
go out from: so it does not matter what the others are on. All that ranks tell each other is told by the thread behind,
in the order of the steps, so messages of several steps are never mixed up; see `rapydli_flow.scheduler.stale` for the
two halves.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from ..errors import RunLost
from ..scheduler import Program
from ..scheduler.collective import EXCHANGE, halves
from ..scheduler.stale import HANDED
from ..spec import Array
from ..template import Device
from .card_rank import CardRank
from .devices import here
from .participant import CLOCKS, Participant, Scalars
from .rank import Rank
from .timeline import Took
from .transport import Transport


def rank_of(programs: Sequence[Program], number: int, device: Device, **how: Any) -> Participant:
    """A rank of a plan, as its program and its device ask for it; ``how`` as for `Rank`."""
    if programs[number].gradients is None:
        return rank_on(programs[number], device, **how)
    return StaleRank(programs, number, device, **how)


def rank_on(program: Program, device: Device, **how: Any) -> Participant:
    """A program on a device; ``how`` as for `Rank`."""
    return Rank(program, device, **how) if device.kind == "cpu" else CardRank(program, device, **how)


class StaleRank(Rank):
    """The update of what a rank owns, and in front of it the program that makes gradients, which has the device."""

    together = False

    def __init__(
        self,
        programs: Sequence[Program],
        number: int,
        device: Device,
        *,
        threads: int,
        transport: Transport,
        poison: bool = False,
    ) -> None:
        program = programs[number]
        own = device if device.kind == "cpu" else here(program.device)
        super().__init__(program, own, threads=threads, transport=transport, poison=poison)
        assert program.gradients is not None
        self.front = rank_on(program.gradients, device, threads=threads, poison=poison)
        self.programs, self.number = tuple(programs), number
        self._updater = ThreadPoolExecutor(1, thread_name_prefix="rapydli-update")
        self._under_way: deque[Future[None]] = deque()
        held = [(name, program.gradients.leaves[name].spec) for name in program.gradients.kind("param", "state")]
        self._fresh = {name: np.empty(spec.shape, spec.dtype) for name, spec in held}
        self._lock = threading.Lock()  # of what is fresh
        self._changed = self._known = self._broken = False

    # what a rank does ---------------------------------------------------------------------------------

    def start(self, seed: int) -> None:
        super().start(seed)
        self._renew()

    def load(self, state: Mapping[str, Array], *, whole: bool = True) -> None:
        self.finish()
        super().load(state, whole=whole)
        self._renew()

    def state(self) -> dict[str, Array]:
        self.finish()
        return super().state()

    def feed(self, batch: Mapping[str, Array]) -> None:
        self.front.feed(batch)

    def advance(self, seed: int, step: int, clocks: Mapping[str, float] = CLOCKS) -> None:
        """Gradients of a step, handed over."""
        self._begin()
        self.front.advance(seed, step, clocks)
        self._hand_over(seed, step, clocks)

    def advance_timed(self, seed: int, step: int, clocks: Mapping[str, float] = CLOCKS) -> list[Took]:
        begun = self._timed("updates", EXCHANGE, self._begin)
        times = self.front.advance_timed(seed, step, clocks)
        self._hand_over(seed, step, clocks)
        return [begun, *times]

    def taken(self) -> list[Scalars]:
        """Those of this rank's records."""
        return [
            {name: value for name, value in values.items() if not name.startswith(HANDED)}
            for values in self.front.taken()
        ]

    def finish(self) -> None:
        self._catch_up(0)

    def close(self) -> None:
        super().close()
        self.front.close()
        self._updater.shutdown(wait=False, cancel_futures=True)

    # this thread --------------------------------------------------------------------------------------

    def _renew(self) -> None:
        """Parameters and state were set: all ranks get them from their owners, before the next step."""
        self._known = False
        self._under_way.append(self._updater.submit(self._in_turn, self._publish))

    def _begin(self) -> None:
        """Let a step begin: not more than the plan allows before the updates of others."""
        self._catch_up(self.program.ahead if self._known else 0)
        self._known = True

    def _catch_up(self, ahead: int) -> None:
        """Wait until no more than so many updates are under way, and take the parameters that are there."""
        while len(self._under_way) > ahead or (self._under_way and self._under_way[0].done()):
            self._under_way.popleft().result()
        with self._lock:
            if self._changed:
                self.front.put(self._fresh)
                self._changed = False

    def _hand_over(self, seed: int, step: int, clocks: Mapping[str, float]) -> None:
        handed = {name: self.front.output(name) for name in self.program.kind("batch")}
        self._under_way.append(self._updater.submit(self._in_turn, self._update, handed, seed, step, clocks))

    # the thread behind --------------------------------------------------------------------------------

    def _in_turn(self, function: Callable[..., None], *arguments: Any) -> None:
        """Nothing is done after something that failed."""
        if self._broken:
            raise RunLost(f"rank {self.number}: the update of a step before failed.")
        try:
            function(*arguments)
        except BaseException:
            self._broken = True
            raise

    def _update(self, handed: Mapping[str, Array], seed: int, step: int, clocks: Mapping[str, float]) -> None:
        """Sum what all ranks hand over of the parts that this one owns, update them, and give them to all."""
        names = self.program.kind("batch")
        sends = [[handed[name][each.layout[name].slices] for name in names] for each in self.programs]
        parts = self._swap("the gradients", sends, [self.program] * len(sends), names)
        for name, *summands in zip(names, *parts, strict=True):
            self.leaf(name)[...] = halves(summands)
        super().advance(seed, step, clocks)
        super().taken()
        self._publish()

    def _publish(self) -> None:
        """Hand this rank's parts to all, and take theirs."""
        names = self.front.program.kind("param", "state")
        mine = [self.leaf(name) for name in names]
        parts = self._swap("the parameters", [mine] * len(self.programs), self.programs, names)
        with self._lock:
            for program, arrays in zip(self.programs, parts, strict=True):
                for name, array in zip(names, arrays, strict=True):
                    self._fresh[name][program.layout[name].slices] = array
            self._changed = True

    def _swap(
        self, what: str, sends: Sequence[list[Array]], sources: Sequence[Program], names: Sequence[str]
    ) -> list[list[Array]]:
        """What each rank sends to this one: arrays as the leaves of a program for each of them; of this one its own."""
        others = [r for r in range(len(self.programs)) if r != self.number]
        wants = {r: [sources[r].leaves[name].spec for name in names] for r in others}
        got = self.transport.swap_arrays(what, {r: sends[r] for r in others}, wants)
        return [got[r] if r in got else sends[r] for r in range(len(self.programs))]
