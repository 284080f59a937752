"""Segments: K training steps of one rank, run in one go by whoever holds the rank.

A segment remembers the state that it began with. When a loss is not finite it goes back there and runs
the same steps again with every output looked at, so that the error names the first node that broke. A step that
finds its loss scale has skipped such a loss by itself: then it only ends the run when the scale is at its least.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from ..errors import NonFinite, RunLost
from ..graph import Graph, broken, finds_scale
from ..scheduler import AllReduce, Plan, Program
from ..scheduler.collective import TITLES
from ..scheduler.independent import shares
from ..spec import Array, floating
from .copies import Copies
from .feeding import Given, RankFeed
from .participant import CLOCKS, Participant
from .timeline import Span, spans
from .transport import Transport

KEPT = "Snapshots written before are kept."


@dataclass(frozen=True)
class SegmentResult:
    """What a segment tells: scalars of each step, seconds, and where the time of one step went.

    Of one rank, ``ops`` and ``waited_s``: seconds of its last step by op, and of that waiting for others; ``spans``:
    what it did from when to when. Of all ranks, ``ops`` is their mean, ``ranks`` has the `shares` of each, and
    ``timeline`` their spans side by side.
    """

    rank: int
    first: int
    steps: int
    scalars: Mapping[str, tuple[float, ...]]
    time_s: float
    feed_s: float
    ops: Mapping[str, float] = field(default_factory=dict)
    waited_s: float = 0.0
    spans: tuple[Span, ...] = ()
    ranks: tuple[tuple[float, ...], ...] = ()
    timeline: tuple[tuple[Span, ...], ...] = ()

    @property
    def shares(self) -> tuple[float, ...]:
        """This rank's seconds of a step by kind, as in `KINDS`."""
        meeting = sum(time_s for title, time_s in self.ops.items() if title in TITLES)
        waiting = self.waited_s
        return sum(self.ops.values()) - meeting, meeting - waiting, waiting, self.feed_s / self.steps

    @property
    def last(self) -> int:
        """The step after the last one of the segment."""
        return self.first + self.steps

    def since(self, step: int) -> SegmentResult:
        """The steps from this one on."""
        skip = max(0, step - self.first)
        if not skip:
            return self
        scalars = {name: values[skip:] for name, values in self.scalars.items()}
        share = (self.steps - skip) / self.steps
        return replace(
            self,
            first=step,
            steps=self.steps - skip,
            scalars=scalars,
            time_s=self.time_s * share,
            feed_s=self.feed_s * share,
        )


@dataclass(frozen=True)
class Average:
    """Ranks that train by themselves, and take the mean of their parameters and state every so many steps.

    ``share`` is this rank's part of the records. Segments end at such a step, or at a pause, where it is done as well.
    """

    every: int
    share: float
    ranks: int

    def __call__(self, rank: Participant) -> None:
        state = {name: array for name, array in rank.state().items() if floating(array)}
        for dtype in sorted({array.dtype.name for array in state.values()}):
            same = [array for array in state.values() if array.dtype.name == dtype]
            for array in same:
                array *= self.share
            op = AllReduce(ranks=tuple(range(self.ranks)), parts=len(same))
            rank.transport.meet("the average", op, same, same)
        rank.put(state)


def average_of(plan: Plan, programs: Sequence[Program], number: int) -> Average | None:
    """How a rank averages, if its plan says so."""
    if not plan.average_every or plan.ranks == 1:
        return None
    name = programs[0].kind("batch")[0]
    share = shares([program.layout[name].shape[0] for program in programs])[number]
    return Average(plan.average_every, share, plan.ranks)


class Trainer:
    """One rank and its feed: runs segments."""

    def __init__(
        self,
        rank: Participant,
        feed: RankFeed | Given,
        seed: int,
        step: Graph,
        *,
        number: int = 0,
        copies: Copies | None = None,
        average: Average | None = None,
    ) -> None:
        self.rank, self.feed, self.seed, self.number = rank, feed, seed, number
        self.graph, self.copies, self.average = step, copies, average
        self.next: int | None = None
        self.begun = False  # is the state set aside that the last segment began with?

    def segment(
        self, first: int, steps: int, *, profile: bool = False, clocks: Mapping[str, float] = CLOCKS
    ) -> SegmentResult:
        """Run steps ``first`` to ``first + steps - 1``; NonFinite if a loss is not finite and that was not skipped.

        ``clocks``: what clock leaves beside seed and step say in all of them.
        """
        if self.next is not None and first != self.next:
            raise RunLost(f"rank {self.number}: a segment from step {first} came where {self.next} is next.")
        self.next = first + steps
        self.rank.set_aside()
        self.begun = True
        if self.copies is not None:
            self.copies.keep(first, self.rank.aside_later())
        together = self.average is None and self.rank.together
        scalars: dict[str, list[float]] = {}
        ops: dict[str, float] = {}
        waited_s, seen = 0.0, tuple[Span, ...]()
        feed_s, looked, begin = 0.0, 0, time.perf_counter()
        for step in range(first, first + steps):
            fed = time.perf_counter()
            self.rank.feed(self.feed.batch(step))
            loaded = time.perf_counter()
            feed_s += loaded - fed
            if profile and step == first + steps - 1:
                times = self.rank.advance_timed(self.seed, step, clocks)
                for took in times:
                    ops[took.title] = ops.get(took.title, 0.0) + took.time_s
                waited_s, seen = sum(took.waited_s for took in times), spans((fed, loaded), times)
            else:
                self.rank.advance(self.seed, step, clocks)
            if self.rank.prompt or step == first + steps - 1:
                for values in self.rank.taken():
                    for name, value in values.items():
                        scalars.setdefault(name, []).append(value)
            if self.average is not None and ((step + 1) % self.average.every == 0 or step == first + steps - 1):
                self.average(self.rank)
            if step == first and self.copies is not None and together:
                self.copies.settle(first)
            losses = scalars.get("loss", [])
            if together and not np.isfinite(losses[looked:]).all():
                bad = broken(self.graph, scalars)
                if bad is not None:
                    self._explain(range(first, first + bad + 1), losses[bad], clocks)
            looked = len(losses)
        if not together:
            self.rank.finish()
            self._agree(first, broken(self.graph, scalars))
            if self.copies is not None:
                self.copies.settle(first)
        frozen = {name: tuple(values) for name, values in scalars.items()}
        time_s = time.perf_counter() - begin
        return SegmentResult(self.number, first, steps, frozen, time_s, feed_s, ops, waited_s, seen)

    def _agree(self, first: int, bad: int | None) -> None:
        """NonFinite on all ranks if a loss of one of them, which trained by itself, is not finite."""
        mine = None if bad is None else first + bad
        everyone = [json.loads(each) for each in self.rank.transport.share("losses", json.dumps(mine).encode())]
        broken = [(step, rank) for rank, step in enumerate(everyone) if step is not None]
        if broken:
            step, rank = min(broken)
            raise NonFinite(f"the loss of rank {rank} is not finite at step {step}{fallen(self.graph)} {KEPT}")

    def _explain(self, steps: range, loss: float, clocks: Mapping[str, float]) -> None:
        """Raise NonFinite with the first node, over all steps of the segment and all ranks, that is not finite."""
        self.rank.back()
        mine: Broken | None = None
        for step in steps:
            self.rank.feed(self.feed.batch(step))
            position = self.rank.first_nonfinite(self.seed, step, clocks)
            passed = step != steps[-1] and finds_scale(self.graph)  # it was skipped, or did not break
            if mine is None and position is not None and not passed:
                mine = Broken(step, self._depth(position), self.rank.describe(position))
        found = earliest(self.rank.transport, mine)
        what = f"loss is {loss} at step {steps[-1]}"
        if found is None:
            raise NonFinite(f"{what}, but it was finite when the steps were run again: the run is not deterministic.")
        where = f"The first output that is not finite is of {found.node} at step {found.step}."
        raise NonFinite(f"{what}{fallen(self.graph, f'{where} ', ', or look at its inputs')} {KEPT}")

    def _depth(self, position: int) -> int:
        """Where a node of the rank's program is in the whole graph, which ranks with other programs have in common."""
        known = {node.name: i for i, node in enumerate(self.graph)}
        names = [step.name.partition("@")[0] for step in self.rank.program.steps[: position + 1]]
        return next((known[name] for name in reversed(names) if name in known), 0)

    def finite_state(self) -> dict[str, Array]:
        """A copy of parameters and state to keep; NonFinite if a value is not finite."""
        return finite(self.rank.state())

    def state_later(self) -> Callable[[], dict[str, Array]]:
        """What gives `finite_state` of this moment, when it has come from where it is. NonFinite at once, if it is
        here."""
        later = self.rank.state_later()
        if not later.done():
            return lambda: finite(later.result())
        state = finite(later.result())
        return lambda: state

    def close(self) -> None:
        self.rank.close()
        self.feed.close()


def finite(state: dict[str, Array]) -> dict[str, Array]:
    """The state; NonFinite if a value in it is not finite."""
    for name, value in state.items():
        if floating(value) and not np.isfinite(value).all():
            raise NonFinite(f"{name} is not finite after the last step. Use a smaller learning rate.")
    return state


def fallen(step: Graph, where: str = "", more: str = "") -> str:
    """The end of a sentence about a loss that is not finite: that no scale helps, where it broke, and what may help."""
    if finds_scale(step):
        return f", and its scale has fallen to 1. {where}Use a smaller learning rate, or precision='bfloat16'{more}."
    return f". {where}Use a smaller learning rate{more}."


class Broken(NamedTuple):
    """A node whose output is not finite: at which step, how deep in the graph, and which it is."""

    step: int
    depth: int
    node: str


def earliest(transport: Transport, mine: Broken | None) -> Broken | None:
    """The first of what the ranks found."""
    everyone = transport.share("the search for what is not finite", json.dumps(mine).encode())
    found = [Broken(*each) for each in map(json.loads, everyone) if each is not None]
    return min(found) if found else None
