"""Training in this process: one rank, or several as threads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, TypeVar

from ..data import Dataset
from ..errors import RunLost
from ..graph import Graph
from ..scheduler import Plan, Program
from ..spec import Array
from ..template import Device
from ..tuner import Tuning
from .backend import Backend, Writers, holding, one_result, whole_state
from .devices import free_bytes, here
from .evaluate import Scorer
from .events import SNAPSHOTS
from .feeding import fed_layout, feed_of, label_classes
from .grouped import kernels_by_device
from .segment import SegmentResult, Trainer, average_of, finite
from .stale import rank_of
from .transport import TIMEOUT_S, Alone, Threads, Transport
from .warm import warm

T = TypeVar("T")


class Local(Backend):
    """All ranks of a plan in this process. Orders are carried out at once."""

    def __init__(
        self,
        step: Graph,
        plan: Plan,
        programs: Sequence[Program],
        tuning: Tuning,
        data: Dataset | None,
        validation: Dataset | None,
        *,
        seed: int,
        shuffle: bool = True,
        run_dir: Path | None = None,
        keep: int = 3,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        self.graph, self.plan, self.tuning, self.validation = step, plan, tuning, validation
        _check_memory(programs)
        many = plan.ranks > 1
        transports: Sequence[Transport] = Threads.of(plan.ranks, timeout_s=timeout_s) if many else (Alone(),)
        for device, kernels in kernels_by_device(programs).items():
            warm(kernels, here(device))
        self.trainers = []
        for number, (program, transport) in enumerate(zip(programs, transports, strict=True)):
            rank = rank_of(programs, number, program.on, threads=plan.threads, transport=transport)
            feed = feed_of(data, fed_layout(program), label_classes(step), seed=seed, shuffle=shuffle)
            average = average_of(plan, programs, number)
            self.trainers.append(Trainer(rank, feed, seed, step, number=number, average=average))
        self.seed = seed
        self.scorer = Scorer(step, validation, tuning, threads=plan.threads, ranks=plan.ranks)
        self.writers = Writers(run_dir, keep)
        self.pool = ThreadPoolExecutor(plan.ranks, thread_name_prefix="rapydli-rank") if many else None

    def each(self, function: Callable[[Trainer], T]) -> list[T]:
        """Run something on every rank at once; the first real error wins over ranks that were given up."""
        if self.pool is None:
            return [function(self.trainers[0])]
        futures = [self.pool.submit(function, trainer) for trainer in self.trainers]
        done, _ = wait(futures, return_when=FIRST_EXCEPTION)
        if any(future.exception() for future in done):
            for trainer in self.trainers:
                trainer.rank.transport.close()
            errors = [error for error in (future.exception() for future in futures) if error is not None]
            raise next((e for e in errors if not isinstance(e, RunLost)), errors[0])
        return [future.result() for future in futures]

    def start(self, state: Mapping[str, Array] | None) -> None:
        for trainer in self.trainers:
            if state is None:
                trainer.rank.start(self.seed)
            else:
                trainer.rank.load(state)

    def segment(
        self, first: int, steps: int, *, profile: bool, clocks: Mapping[str, float]
    ) -> Callable[[], SegmentResult]:
        result = one_result(self.each(lambda t: t.segment(first, steps, profile=profile, clocks=clocks)))
        return lambda: result

    def evaluate(self) -> Callable[[], dict[str, float]]:
        metrics = self.scorer(self._gather())
        return lambda: metrics

    def snapshot(self, step: int, meta: Mapping[str, Any], *, name: str = SNAPSHOTS) -> Callable[[], object]:
        held = [t.rank.program.layout for t in self.trainers]
        parts = [t.state_later() for t in self.trainers[: holding(self.graph, held)]]
        return self.writers.write(name, step, lambda: whole_state(self.graph, held, [part() for part in parts]), meta)

    def state(self) -> dict[str, Array]:
        return finite(self._gather())

    def _gather(self) -> dict[str, Array]:
        held = [t.rank.program.layout for t in self.trainers]
        return whole_state(self.graph, held, [t.rank.state() for t in self.trainers[: holding(self.graph, held)]])

    def close(self, *, failed: bool) -> None:
        if self.pool is not None:
            if failed:  # who waits for others is told
                for trainer in self.trainers:
                    trainer.rank.transport.close()
            self.pool.shutdown()  # before memory is let go that they work on
        for trainer in self.trainers:
            trainer.close()
        self.writers.close()


def _check_memory(programs: Sequence[Program]) -> None:
    """TooLittleMemory where what is free on a device is not enough for the ranks there."""
    free: dict[tuple[Device, int], int] = {}
    for number, program in enumerate(programs):
        card = program.on, program.on.number
        bytes_now, where = free_bytes(program.on)
        left = free.setdefault(card, bytes_now)
        program.check_memory(left, number, where=where)
        free[card] = left - program.needed_bytes
