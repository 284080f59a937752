"""What runs on Dask workers: ranks that stay resident between tasks, and the tasks that use them.

A rank lives in the process of its worker under (run, rank). Its tasks carry small tokens. Each run has an executor of
one thread on each of its workers, and its tasks do not count against the worker's threads: where runs share workers, a
task that waits for the other ranks must not keep back a task of another run that those wait for.
"""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import wraps
from typing import Any, TypeVar

import numpy as np
from distributed import WorkerPlugin, get_worker
from distributed.system import MEMORY_LIMIT
from distributed.worker import thread_state
from distributed.worker_state_machine import SecedeEvent

from ..data import EVERYWHERE, Dataset, Feed
from ..errors import RunLost
from ..spec import Array, Block, even_bounds
from ..template import Device
from ..tuner import Choice, Request, compilers
from ..version import __version__
from .backend import Writers
from .copies import Copies, Piece, put_together
from .devices import device_of, here, named
from .evaluate import Scorer
from .feeding import RankFeed, fed_layout, feed_of, label_classes
from .job import Job
from .reach import connected, opened
from .segment import SegmentResult, Trainer, average_of
from .stale import rank_of
from .transport import Transport
from .upkeep import RELEASE
from .warm import warm as warm_up

F = TypeVar("F", bound=Callable[..., Any])


def executor_of(run: str) -> str:
    """The name of a run's executor on its workers."""
    return f"rapydli-{run}"


def of_a_rank(function: F) -> F:
    """Marks a task that may wait for other ranks: it makes room for another one, as `distributed.secede` does for
    threads of Dask's own pool."""

    @wraps(function)
    def run(*arguments: Any) -> Any:
        worker, stimulus = get_worker(), f"rapydli-{time.time()}"
        event = SecedeEvent(key=thread_state.key, compute_duration=0.0, stimulus_id=stimulus)
        worker.loop.add_callback(worker.handle_stimulus, event)
        return function(*arguments)

    return run  # type: ignore[return-value]


def _released(run: str, **_: Any) -> None:
    """The scheduler says that a run is over: its client is gone."""
    release(run)


class Resident(WorkerPlugin):
    """Gives a worker an ear for runs whose client is gone."""

    name = "rapydli"
    idempotent = True

    def setup(self, worker: Any) -> None:
        worker.stream_handlers[RELEASE] = _released

    def teardown(self, worker: Any) -> None:
        del worker.stream_handlers[RELEASE]


@dataclass
class Held:
    """A rank on this worker, between its tasks."""

    job: Job
    number: int
    transport: Transport  # until the rank has joined, its own end of it
    _trainer: Trainer | None = None
    scorer: Scorer | None = None
    writers: Writers = field(init=False)

    def __post_init__(self) -> None:
        self.writers = Writers(self.job.run_dir, self.job.keep)

    @property
    def trainer(self) -> Trainer:
        if self._trainer is None:
            raise RunLost(f"rank {self.number} of run {self.job.run} has not joined yet.")
        return self._trainer

    @property
    def copies(self) -> Copies | None:
        """What is kept to go on from; nothing before the rank has joined."""
        return self._trainer.copies if self._trainer is not None else None

    def close(self) -> None:
        """Let go of memory, feed, connections and writers."""
        self.transport.close()
        if self._trainer is not None:
            self._trainer.feed.close()
        self.writers.close()


_held: dict[tuple[str, int], Held] = {}
_rooms: dict[str, list[Any]] = {}  # workers of this process on which a run has an executor
_over: set[str] = set()  # runs that were given up or released here


def libraries() -> str:
    """The versions beside the package's own that the bits of a run depend on."""
    return f"{compilers('cpu')}, numpy {np.__version__}"


def who(dask_worker: Any) -> dict[str, Any]:
    """What this worker is. ``memory_bytes``: its limit, or all that the machine or container has."""
    worker = dask_worker
    limit = getattr(worker.memory_manager, "memory_limit", None)
    return {
        "version": __version__,
        "libraries": libraries(),
        "device": device_of(),
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "threads": worker.state.nthreads,
        "memory_bytes": int(limit or MEMORY_LIMIT),
        "used_bytes": int(worker.monitor.get_process_memory()),
        **named(device_of()),
    }


def _feed_before(run: str) -> Feed | None:
    """A feed of a rank of a run that is, or was, on this worker."""
    trainers = [held._trainer for (name, _), held in list(_held.items()) if name == run]
    return next((t.feed.feed for t in trainers if t is not None and isinstance(t.feed, RankFeed)), None)


async def at_hand(data: Dataset, before: str) -> tuple[bool, float]:
    """Does this worker reach a dataset, and what share of its records has it in memory, of a run before?"""

    def look() -> tuple[bool, float]:
        feed = _feed_before(before)
        reached = not {socket.gethostname(), EVERYWHERE}.isdisjoint(data.where())
        return reached, feed.cache.share(data.records) if feed is not None else 0.0

    return await asyncio.to_thread(look)  # a file system may take its time


def beat() -> int:
    """A sign of life."""
    return os.getpid()


def warm(requests: Sequence[tuple[Request, Choice]], device: Device) -> int:
    """Compile kernels into this host's cache; the error of the first that cannot be compiled."""
    warm_up(requests, here(device)).check()
    return len(requests)


def make_room(run: str, worker: Any) -> None:
    """Give a run its executor on a worker."""
    if executor_of(run) not in worker.executors:
        worker.executors[executor_of(run)] = ThreadPoolExecutor(1, thread_name_prefix="rapydli")
        _rooms.setdefault(run, []).append(worker)


def prepare(job: Job, number: int) -> str:
    """Make the rank's end of the transport; what the others need to reach it.

    When a worker dies, Dask runs again what its tasks depended on, here too: that must not begin the run anew.
    """
    worker = get_worker()
    if job.run in _over or (job.run, number) in _held:
        raise RunLost(f"rank {number} of run {job.run} was here before: another rank is lost; resume the run.")
    make_room(job.run, worker)
    transport, address = opened(job, number, worker)
    _held[job.run, number] = Held(job, number, transport)
    return address


@of_a_rank
def join(job: Job, number: int, *addresses: str) -> int:
    """Reach the other ranks, and bind the program to memory."""
    held = _find(job.run, number)
    held.transport = connected(job, number, held.transport, addresses)
    program = job.programs[number]
    rank = rank_of(job.programs, number, here(program.on), threads=job.threads, transport=held.transport)
    how: dict[str, Any] = {"seed": job.seed, "shuffle": job.shuffle, "like": _feed_before(job.before)}
    feed = feed_of(job.data, fed_layout(program), label_classes(job.step), **how)
    copies = Copies(rank, job.programs, number) if job.keeps_copies else None
    held._trainer = Trainer(
        rank, feed, job.seed, job.step, number=number, copies=copies, average=average_of(job.plan, job.programs, number)
    )
    return number


@of_a_rank
def begin(run: str, number: int, state: Mapping[str, Array] | None, *others: Any) -> int:
    """Set the first state: everyone has joined. Lists of pieces among ``others`` are what a run goes on from."""
    held = _find(run, number)
    held.transport.joined()
    rank = held.trainer.rank
    pieces = [piece for each in others if isinstance(each, list) for piece in each]
    if pieces:
        rank.load(put_together(pieces, rank.program), whole=False)
    elif state is None:
        rank.start(held.job.seed)
    else:
        rank.load(state)
    return number


def offered(run: str) -> dict[int, dict[int, list[tuple[str, Block]]]]:
    """What ranks of a run on this worker have copies of, by rank and step; they keep it."""
    found = [(number, held) for (name, number), held in list(_held.items()) if name == run]
    return {number: held.copies.offered() for number, held in found if held.copies is not None}


def handed_out(run: str, number: int, step: int) -> list[Piece]:
    """The copies of a rank at a step."""
    copies = _find(run, number).copies
    assert copies is not None
    return copies.handed_out(step)


@dataclass(frozen=True)
class Order:
    """Training steps that are asked for, and what clock leaves beside seed and step say in them."""

    first: int
    steps: int
    profile: bool
    clocks: Mapping[str, float]


@of_a_rank
def segment(run: str, number: int, order: Order, *before: Any) -> SegmentResult:
    """Run training steps; the token of a segment is its result."""
    trainer = _find(run, number).trainer
    return trainer.segment(order.first, order.steps, profile=order.profile, clocks=order.clocks)


@of_a_rank
def on_trainer(run: str, number: int, function: Callable[[Trainer, Any], Any], argument: Any, *before: Any) -> Any:
    """Do something with the rank that is not a segment of a run; see `rapydli_flow.runtime.stepper`."""
    return function(_find(run, number).trainer, argument)


@of_a_rank
def evaluate(run: str, number: int, *before: Any) -> dict[str, float]:
    """This rank's share of the validation set, with its present parameters."""
    held = _find(run, number)
    job = held.job
    assert job.validation is not None
    if held.scorer is None:
        device = here(job.programs[number].on)
        tuning = job.tuning(device)
        assert tuning is not None
        tuning = replace(tuning, device=device)
        held.scorer = Scorer(job.step, job.validation, tuning, threads=job.threads)
    bounds = even_bounds(len(job.validation), job.ranks)
    return held.scorer.part(held.trainer.rank.state(), bounds[number], bounds[number + 1])


@of_a_rank
def snapshot(run: str, number: int, name: str, step: int, meta: Mapping[str, Any], *before: Any) -> int:
    """Copy this rank's state and write it behind the training's back; only where the rank holds all of it."""
    held = _find(run, number)
    held.writers.write(name, step, held.trainer.state_later(), meta)
    return step


@of_a_rank
def written(run: str, number: int, *before: Any) -> int:
    """Wait until this rank's snapshots are on disk."""
    _find(run, number).writers.wait()
    return number


@of_a_rank
def state_of(run: str, number: int, *before: Any) -> dict[str, Array]:
    """This rank's blocks of parameters and state."""
    return _find(run, number).trainer.finite_state()


def give_up(run: str) -> None:
    """Wake ranks of a run that wait for others; they raise RunLost."""
    _over.add(run)
    for (name, _), held in list(_held.items()):
        if name == run:
            held.transport.close()


def release(run: str) -> None:
    """Forget a run: its memory, feeds and connections."""
    _over.add(run)
    for key in [key for key in _held if key[0] == run]:
        _held.pop(key).close()
    for worker in _rooms.pop(run, ()):
        worker.executors.pop(executor_of(run)).shutdown(wait=False)


def _find(run: str, number: int) -> Held:
    held = _held.get((run, number))
    if held is None:
        raise RunLost(f"rank {number} of run {run} is not on this worker any more; resume from the last snapshot.")
    return held
