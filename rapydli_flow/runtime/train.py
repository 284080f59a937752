"""The training loop: segments, validation and snapshots in order, whatever backend carries them out."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..spec import Array
from .backend import Backend
from .events import Callback, Ended, Event, Saved, Started, Stepped, Validated
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

    def next_pause(self, step: int) -> int:
        """The next step at which something other than training happens."""
        pauses = [self.last]
        if self.validate:
            pauses.append((step // self.steps_per_epoch + 1) * self.steps_per_epoch)
        if self.snapshot_every:
            pauses.append((step // self.snapshot_every + 1) * self.snapshot_every)
        return min(pauses)

    def validates(self, step: int) -> bool:
        return self.validate and (step % self.steps_per_epoch == 0 or step == self.last)

    def saves(self, step: int) -> bool:
        return bool(self.snapshot_every) and (step % self.snapshot_every == 0 or step == self.last)


class Loop:
    """Drives a backend through a schedule, and tells callbacks what happens."""

    def __init__(
        self, backend: Backend, schedule: Schedule, callbacks: Sequence[Callback], meta: Mapping[str, Any]
    ) -> None:
        self.backend, self.schedule, self.callbacks, self.meta = backend, schedule, tuple(callbacks), meta
        self.queue: deque[tuple[Callable[[Any], None], Callable[[], Any]]] = deque()
        self.step_s: float | None = None
        self.done = schedule.first

    def tell(self, event: Event) -> None:
        for callback in self.callbacks:
            callback.on_event(event)

    def run(self, state: Mapping[str, Array] | None, started: Started) -> dict[str, Array]:
        """Train; the final state. The backend is closed whatever happens."""
        begin = time.monotonic()
        outcome = "failed"
        try:
            self.tell(started)
            self.backend.start(state)
            final = self._train()
            outcome = "done"
        except KeyboardInterrupt:
            outcome = "interrupted"
            raise
        except BaseException as error:
            outcome = f"{type(error).__name__}: {error}"
            raise
        finally:
            try:
                self.backend.close(failed=outcome != "done")
            finally:
                self.tell(Ended(self.done, time.monotonic() - begin, outcome))
        return final

    def _train(self) -> dict[str, Array]:
        step = self.schedule.first
        while step < self.schedule.last:
            count = min(self._length(), self.schedule.next_pause(step) - step)
            self._order(self._stepped, self.backend.segment(step, count, profile=True))
            step += count
            if self.schedule.validates(step):
                self._order(self._validated(step), self.backend.evaluate())
            if self.schedule.saves(step):
                while self.queue:  # a snapshot never runs ahead of the log: a killed run goes on without a gap in it
                    self._take()
                self._order(self._saved(step), self.backend.snapshot(step, {**self.meta, "step": step}))
            while len(self.queue) > self.backend.depth or (self.step_s is None and self.queue):
                self._take()
        while self.queue:
            self._take()
        return self.backend.state()

    def _length(self) -> int:
        """Steps of the next segment: one at first, then about half a second."""
        return 1 if self.step_s is None else max(1, min(1000, round(SEGMENT_S / max(self.step_s, 1e-6))))

    def _order(self, then: Callable[[Any], None], pending: Callable[[], Any]) -> None:
        self.queue.append((then, pending))

    def _take(self) -> None:
        then, pending = self.queue.popleft()
        then(pending())

    def _stepped(self, result: SegmentResult) -> None:
        self.done = result.last
        if result.first > self.schedule.first or result.steps > 1:  # the first step also loads code and data
            self.step_s = result.time_s / result.steps
        elif self.step_s is None:
            self.step_s = result.time_s
        self.tell(Stepped(result.first, result.steps, result.scalars, result.time_s, result.feed_s, result.ops))

    def _validated(self, step: int) -> Callable[[Any], None]:
        epoch = -(-step // self.schedule.steps_per_epoch)
        return lambda metrics: self.tell(Validated(step, epoch, metrics))

    def _saved(self, step: int) -> Callable[[Any], None]:
        return lambda _: self.tell(Saved(step))
