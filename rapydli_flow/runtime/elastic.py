"""A run that outlives its workers: ranks are placed anew, and go on from copies in the memory of those that are left.

    generation 1   rank 0 on A   rank 1 on B   rank 2 on C        B dies, or does not answer for some seconds
    generation 2   rank 0 on A   rank 1 on D   rank 2 on C        D is a spare, or B's successor
    generation 3   rank 0 on A   rank 1 on C                      nobody is left: fewer ranks, if that is allowed
    generation 4   rank 0 on A   rank 1 on E   rank 2 on C        E has come: as many as before

Each generation is a `Cluster` with a name of its own, so nothing of an older one can be mistaken for it. The step at
which it begins is the last one of which the copies of the survivors have everything; nothing is read from disk unless
there is no such step. Batches and random numbers do not depend on the number of ranks: the run stays the same, to the
bit if the ranks are as many as before.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from distributed import Client

from ..data import latest, read_snapshot
from ..errors import NoWorkers, RunLost, SettingError, ShapeError
from ..scheduler import Links
from ..spec import Array
from .backend import Recovering, Recovery
from .cluster import ANSWER_S, Cluster, Offers, PendingSegment
from .copies import common_step
from .events import SNAPSHOTS
from .job import Job
from .links import known_links, remembered
from .placing import placed
from .segment import SegmentResult
from .workers import answering

STUCK = 5  # losses in a row without a step between them that a run survives
GROW_S = 5.0  # how often a run with fewer ranks than it could have looks for workers


@dataclass(frozen=True)
class Policy:
    """What a run does about lost workers.

    ``retries``: how many losses it survives; ``least``: the fewest ranks that it goes on with; ``patience_s``: how long
    it waits for workers to come before it takes fewer.
    """

    retries: int
    least: int
    patience_s: float


Begin = Offers | Mapping[str, Array] | None  # what a generation begins with
JobOf = Callable[[int], tuple[Job, Mapping[str, Any]]]  # for so many ranks: the job, and what its snapshots say


class Elastic(Recovering):
    """Ranks of a run on the workers of a client, whichever there are."""

    depth = Cluster.depth

    def __init__(self, client: Client, job_of: JobOf, ranks: int, policy: Policy, workers: Mapping[str, Any]) -> None:
        self.client, self.job_of, self.ranks, self.policy = client, job_of, ranks, policy
        job, self.meta = job_of(ranks)
        self.cluster = self._placed(job, workers, known_links(client, workers, ranks, job.timeout_s))
        self.devices = Counter(program.on.key for program in job.programs)  # how many ranks each kind has
        self.losses, self.stuck, self.looked, self.reached = 0, 0, time.monotonic(), -1
        self.initial: Mapping[str, Array] | None = None
        self.first: int | None = None  # the first step of all

    @property
    def addresses(self) -> tuple[str, ...]:
        return self.cluster.addresses

    def _placed(self, job: Job, workers: Mapping[str, Any], links: Links) -> Cluster:
        """A job's ranks, on workers that suit them."""
        how: dict[str, Any] = {"links": links, "data": job.data, "before": job.before}
        self.placement = placed(self.client, job.programs, job.plan, workers, **how)
        return Cluster(self.client, job, self.placement.addresses, workers, links)

    # orders -----------------------------------------------------------------------------------------

    def start(self, state: Mapping[str, Array] | None) -> None:
        self.initial = state
        try:
            self.cluster.start(state)
        except RunLost as error:
            self._count(error)
            self._again(self.cluster, error, lambda: (-1, state))

    def segment(self, first: int, steps: int, *, profile: bool, clocks: Mapping[str, float]) -> PendingSegment:
        self.first = first if self.first is None else self.first
        return self.cluster.segment(first, steps, profile=profile, clocks=clocks)

    def evaluate(self) -> Callable[[], dict[str, float]]:
        return self.cluster.evaluate()

    def snapshot(self, step: int, meta: Mapping[str, Any], *, name: str = SNAPSHOTS) -> Callable[[], object]:
        return self.cluster.snapshot(step, meta, name=name)

    def state(self) -> dict[str, Array]:
        return self.cluster.state()

    def close(self, *, failed: bool) -> None:
        self.cluster.close(failed=failed)

    # losses -----------------------------------------------------------------------------------------

    def recover(self, error: RunLost, pending: Sequence[Callable[[], Any]]) -> Recovery:
        """Place the ranks anew after a loss; the error itself where that cannot be done."""
        begin, old = time.monotonic(), self.cluster
        self._count(error)
        reason = old.lost() or str(error)
        step = self._again(old, error, lambda: self._gone_back(old, error, pending))
        self.stuck = self.stuck + 1 if step == self.reached else 0
        if self.stuck > STUCK:
            raise error
        self.reached = step
        results = tuple(_salvaged(pending, step))
        return self._recovery(step, results, begin, reason.partition(". ")[0])

    def _count(self, error: RunLost) -> None:
        """One more loss; the error itself if it is one too many."""
        self.losses += 1
        if self.losses > self.policy.retries:
            raise error

    def _again(self, old: Cluster, error: RunLost, find: Callable[[], tuple[int, Begin]]) -> int:
        """A new generation from what ``find`` says: the step, and its state. The step."""
        for _ in range(STUCK):
            try:
                step, state = find()
                self._place(old, state, error)
            except RunLost as other:
                if other is error:
                    raise
            else:
                old.let_go()
                return step
        raise error

    def _recovery(self, step: int, results: tuple[SegmentResult, ...], begin: float, reason: str) -> Recovery:
        """What the run is told of its new ranks."""
        job = self.cluster.job
        arenas = tuple(program.memory_bytes for program in job.programs)
        seconds = time.monotonic() - begin
        told, sent = self.placement.explain(), tuple(map(tuple, self.placement.traffic))
        return Recovery(step, results, job.ranks, seconds, reason, self.meta, self.addresses, arenas, told, sent)

    def _gone_back(self, old: Cluster, error: RunLost, pending: Sequence[Callable[[], Any]]) -> tuple[int, Begin]:
        """The step to go back to, and its state: copies on workers, the beginning, or the last snapshot."""
        old.give_up()
        known = old.offered()
        step = common_step((steps for ranks in known.values() for steps in ranks.values()), old.job.programs)
        if step is not None:
            return step, old.offers(known, step)
        if self.first is not None and any(isinstance(p, PendingSegment) and p.first == self.first for p in pending):
            return self.first, self.initial  # nobody has heard of any step
        run_dir = old.job.run_dir
        newest = latest(run_dir / SNAPSHOTS) if run_dir is not None else None
        if newest is None:
            raise error
        snapshot = read_snapshot(newest)
        return snapshot.step, snapshot.arrays

    def _place(self, old: Cluster, state: Begin, error: RunLost) -> None:
        """A new generation on the workers that answer."""
        workers = self._workers()
        self._make(old, min(self.ranks, len(workers)), workers, error)
        try:
            self.cluster.start(state)
        except BaseException:
            self.cluster.close(failed=True)
            raise

    def _make(self, old: Cluster, ranks: int, workers: Mapping[str, Any], error: Exception) -> None:
        """The largest number of ranks, from ``ranks`` down, for which there is a plan; links are not measured now."""
        while ranks >= self.policy.least:
            try:
                job, self.meta = self.job_of(ranks)
            except (ShapeError, SettingError):  # a plan that does not go with so many
                ranks -= 1
            else:
                self.cluster = self._placed(replace(job, before=old.job.run), workers, remembered(workers))
                return
        raise error

    def _workers(self) -> dict[str, dict[str, Any]]:
        """Workers that answer: enough for all ranks, or after some patience enough for the fewest."""
        limit = time.monotonic() + self.policy.patience_s
        while True:
            workers = answering(self.client, ANSWER_S, self.devices)
            if Counter(worker["device"].key for worker in workers.values()) >= self.devices:
                return workers
            if time.monotonic() > limit:
                break
            time.sleep(0.2)
        if len(workers) >= self.policy.least:
            return workers
        raise NoWorkers(
            f"the run needs {self.policy.least} worker(s) to go on but {len(workers)} answer after "
            f"{self.policy.patience_s:g} s. Start more workers and go on with fit(..., resume=True), or allow fewer "
            "with min_workers."
        )

    # growth -----------------------------------------------------------------------------------------

    def may_grow(self) -> bool:
        """Has the run fewer ranks than it was planned for, and are there workers for more? Asked now and then."""
        if self.cluster.job.ranks >= self.ranks or time.monotonic() - self.looked < GROW_S:
            return False
        self.looked = time.monotonic()
        return len(answering(self.client, ANSWER_S, self.devices)) > self.cluster.job.ranks

    def grow(self, step: int) -> Recovery:
        """More ranks, from this step on; nothing is in the queue."""
        begin, old = time.monotonic(), self.cluster
        state = old.state()
        workers = answering(self.client, ANSWER_S, self.devices)
        self._make(old, min(self.ranks, len(workers)), workers, RunLost("the workers that came are gone again"))
        self.cluster.start(state)
        old.let_go()
        return self._recovery(step, (), begin, f"{self.cluster.job.ranks - old.job.ranks} worker(s) came")


def _salvaged(pending: Sequence[Callable[[], Any]], step: int) -> Iterator[SegmentResult]:
    """Results of segments before a step: ranks that are left have them."""
    for each in pending:
        if isinstance(each, PendingSegment) and each.last <= step:
            result = each.salvage()
            if result is None:
                raise RunLost(f"the numbers of steps {each.first} to {each.last - 1} are lost with a worker.")
            yield result
