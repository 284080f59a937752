"""The training loop: segments, validation and snapshots in order, whatever backend carries them out."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import RunLost
from ..spec import Array
from .backend import Backend, Recovering, Recovery
from .events import (
    RATE_FACTOR,
    SNAPSHOTS,
    Action,
    Callback,
    Ended,
    Event,
    MetricsLog,
    Recovered,
    Save,
    Saved,
    SetFactor,
    Started,
    Stepped,
    Stop,
    Validated,
    actions_of,
)
from .segment import SegmentResult

SEGMENT_S = 0.5


@dataclass(frozen=True)
class Schedule:
    """How far a run goes, and where it pauses."""

    first: int
    last: int
    steps_per_epoch: int
    snapshot_every: int = 0
    validate: bool = False
    whole: int = 1  # segments end at multiples of so many steps, or at pauses

    def segment(self, step: int, wanted: int) -> int:
        """Steps of a segment from a step on, of about as many as are wanted."""
        end = -(-(step + wanted) // self.whole) * self.whole
        return min(end, self.next_pause(step)) - step

    def next_pause(self, step: int) -> int:
        """The next step at which something other than training happens."""
        pauses = [self.last]
        if self.validate:
            pauses.append((step // self.steps_per_epoch + 1) * self.steps_per_epoch)
        if self.snapshot_every:
            pauses.append((step // self.snapshot_every + 1) * self.snapshot_every)
        return min(pauses)

    def pauses(self, step: int) -> bool:
        """Does something other than training happen here?"""
        return step == self.last or self.validates(step) or self.saves(step)

    def validates(self, step: int) -> bool:
        return self.validate and (step % self.steps_per_epoch == 0 or step == self.last)

    def saves(self, step: int) -> bool:
        return bool(self.snapshot_every) and (step % self.snapshot_every == 0 or step == self.last)


class Loop:
    """Drives a backend through a schedule, tells callbacks what happens, and does what they ask for.

    ``leave`` says why the run must leave before it is done, '' if it need not: it then takes a snapshot and ends.
    """

    def __init__(
        self,
        backend: Backend,
        schedule: Schedule,
        callbacks: Sequence[Callback],
        meta: Mapping[str, Any],
        leave: Callable[[], str] = lambda: "",
    ) -> None:
        self.leave = leave
        self.lasting = backend if isinstance(backend, Recovering) else None
        self.backend, self.schedule, self.callbacks, self.meta = backend, schedule, tuple(callbacks), meta
        self.decides = any(callback.decides for callback in callbacks)
        self.queue: deque[tuple[Callable[[Any], None], Callable[[], Any]]] = deque()
        self.step_s: float | None = None
        self.done = self.ordered = self.saved = self.paused = self.validated = schedule.first
        self.last = schedule.last  # earlier where a callback stops the run
        self.changes: list[tuple[int, Mapping[str, float]]] = [(schedule.first, {})]  # of clocks, by step
        self.asked: list[Action] = []
        self.stop: Stop | None = None
        self.raised: Exception | None = None
        self.broken: list[Callback] = []

    def run(
        self, state: Mapping[str, Array] | None, started: Started, past: Sequence[Validated] = ()
    ) -> dict[str, Array]:
        """Train; the final state. ``past``: validations before a resumed run. The backend is always closed."""
        begin = time.monotonic()
        self.started, self.changes = started, [(self.schedule.first, dict(started.clocks))]
        outcome, usable, begun = "failed", False, False
        try:
            self.tell(started)
            self._remember(past)
            self.backend.start(state)
            begun = True
            final = self._train()
            usable = True
            outcome = "done" if self.stop is None else f"stopped: {self.stop.reason}"
        except KeyboardInterrupt:
            outcome = "interrupted"
            raise
        except BaseException as error:
            outcome = f"{type(error).__name__}: {error}"
            usable = begun and error is self.raised and self._leave(error)
            raise
        finally:
            try:
                self.backend.close(failed=not usable)
            finally:
                self.tell(Ended(self.done, time.monotonic() - begin, outcome))
        return final

    @property
    def clocks(self) -> Mapping[str, float]:
        """What clock leaves beside seed and step say in the next steps."""
        return next(clocks for step, clocks in reversed(self.changes) if step <= self.ordered)

    # callbacks --------------------------------------------------------------------------------------

    def tell(self, event: Event) -> None:
        """Tell every callback, and keep what they ask for; then the first error of one is raised.

        A callback that raised is told no more but the end; what another raises after it becomes a note.
        """
        error: Exception | None = None
        for callback in self.callbacks:
            if any(callback is other for other in self.broken) and not isinstance(event, Ended):
                continue
            try:
                self.asked += actions_of(callback, event, self.started)
            except Exception as problem:
                self.broken.append(callback)
                where = f"the callback {type(callback).__name__} raised this when it was told {_words(event)}"
                if self.raised is None and error is None:
                    problem.add_note(where)
                    error = problem
                else:
                    first = self.raised or error
                    assert first is not None
                    first.add_note(f"{type(problem).__name__}: {problem}; {where}")
        if error is not None:
            self.raised = error
            raise error

    def _remember(self, past: Sequence[Validated]) -> None:
        """Tell callbacks that decide what was validated before; what they asked for then was done then."""
        everyone, asked = self.callbacks, list(self.asked)
        self.callbacks = tuple(callback for callback in everyone if callback.decides)
        try:
            for event in past:
                self.tell(event)
        finally:
            self.callbacks, self.asked = everyone, asked

    # training ---------------------------------------------------------------------------------------

    def _train(self) -> dict[str, Array]:
        self._act()
        while True:
            try:
                self._advance()
                return self.backend.state()
            except RunLost as error:
                if self.lasting is None:
                    raise
                self._go_on(self.lasting.recover(error, [pending for _, pending in self.queue]))

    def _advance(self) -> None:
        """Order everything up to the last step, and take the results."""
        schedule = self.schedule
        if self.paused < self.ordered and schedule.pauses(self.ordered):  # a loss broke off a pause
            self._pause()
        while self.ordered < self.last:
            count = min(schedule.segment(self.ordered, self._length()), self.last - self.ordered)
            order = self.backend.segment(self.ordered, count, profile=True, clocks=self.clocks)
            self.ordered += count
            self._order(self._stepped, order)
            if schedule.pauses(self.ordered):
                self._pause()
            while len(self.queue) > self.backend.depth or (self.step_s is None and self.queue):
                self._take()
            if self.lasting is not None and self.lasting.may_grow():
                self._drain()
                self._go_on(self.lasting.grow(self.ordered))
            reason = self.leave()
            if reason and self.stop is None and self.ordered < self.last:
                self.stop, self.last = Stop(reason), self.ordered
        self._drain()
        if self.schedule.snapshot_every and self.stop is not None and self.saved < self.ordered:
            self._save(SNAPSHOTS)
            self._drain()

    def _go_on(self, again: Recovery) -> None:
        """Go on from the step that a recovery has, on the ranks that it has."""
        for result in again.results:
            self._stepped(result)
        self.queue.clear()
        self.ordered, self.meta, self.step_s = again.step, {**self.meta, **again.meta}, None
        where = again.addresses, again.arena_bytes, again.explanation, again.sent_bytes
        self.tell(Recovered(again.step, again.ranks, again.seconds, again.reason, *where))

    def _pause(self) -> None:
        """Validate, decide and save, as far as that is to be done at this step."""
        step = self.ordered
        validated = self.schedule.validates(step)
        if validated:
            self._order(self._validated(step), self.backend.evaluate())
        if self.decides:
            self._drain()
            self._act()
        if step == self.last and self.schedule.validate and not validated:
            self._order(self._validated(step), self.backend.evaluate())
            self._drain()
            self._act()
        if self.schedule.saves(step) or (step == self.last and self.schedule.snapshot_every):
            self._drain()  # a snapshot never runs ahead of the log: a killed run goes on without a gap in it
            self._save(SNAPSHOTS)
        if self.lasting is not None:  # what a pause asks for is of one state: after a loss it is asked for again
            self._drain()
        self.paused = step

    def _act(self) -> None:
        """Do what callbacks asked for since the last pause, in order."""
        asked, self.asked = self.asked, []
        for action in asked:
            if isinstance(action, SetFactor):
                self.changes.append((self.ordered, {**self.clocks, RATE_FACTOR: action.value}))
        for name in dict.fromkeys(action.name for action in asked if isinstance(action, Save)):
            self._save(name)
        stops = [action for action in asked if isinstance(action, Stop)]
        if stops and self.stop is None and self.ordered < self.schedule.last:
            self.stop, self.last = stops[0], self.ordered

    def _save(self, name: str) -> None:
        """A snapshot of the state that everything ordered so far leads to, with the clocks that are in force."""
        step, meta = self.ordered, {**self.meta, "step": self.ordered, "clocks": dict(self.clocks)}
        if name == SNAPSHOTS:
            self.saved = step
        self._order(lambda _: self.tell(Saved(step, name)), self.backend.snapshot(step, meta, name=name))

    def _leave(self, error: BaseException) -> bool:
        """After a callback raised: finish what was ordered, and keep the state; can the backend still be asked?

        The state is not kept when the log is what raised, or when it is not finite.
        """
        try:
            self._drain()
            if self.schedule.pauses(self.ordered):
                self._act()
            logged = not any(isinstance(callback, MetricsLog) for callback in self.broken)
            if self.schedule.snapshot_every and self.ordered > self.saved and logged:
                self.backend.state()  # raises if it is not finite
                self._save(SNAPSHOTS)
                self._drain()
        except Exception as other:
            error.add_note(f"No last snapshot was written: {type(other).__name__}: {other}")
            return False
        return True

    def _length(self) -> int:
        """Steps of the next segment: one at first, then about half a second."""
        return 1 if self.step_s is None else max(1, min(1000, round(SEGMENT_S / max(self.step_s, 1e-6))))

    def _order(self, then: Callable[[Any], None], pending: Callable[[], Any]) -> None:
        self.queue.append((then, pending))

    def _drain(self) -> None:
        while self.queue:
            self._take()

    def _take(self) -> None:
        then, pending = self.queue[0]  # it stays there while it is waited for: a loss may find a result all the same
        result = pending()
        self.queue.popleft()
        then(result)

    def _stepped(self, result: SegmentResult) -> None:
        if result.last <= self.done:  # told before a loss made it come again
            return
        if result.first > self.schedule.first or result.steps > 1:  # the first step also loads code and data
            self.step_s = result.time_s / result.steps
        elif self.step_s is None:
            self.step_s = result.time_s
        new = result.since(self.done)
        self.done = result.last
        where = new.ops, new.ranks, new.timeline
        self.tell(Stepped(new.first, new.steps, new.scalars, new.time_s, new.feed_s, *where))

    def _validated(self, step: int) -> Callable[[Any], None]:
        epoch = -(-step // self.schedule.steps_per_epoch)

        def tell(metrics: Any) -> None:
            if step > self.validated:
                self.validated = step
                self.tell(Validated(step, epoch, metrics))

        return tell


def _words(event: Event) -> str:
    """An event in a few words."""
    step = event.first if isinstance(event, Stepped) else event.step
    return f"{type(event).__name__} at step {step}"
