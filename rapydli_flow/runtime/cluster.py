"""Training on a Dask cluster: every rank pinned to a worker, segments as tasks, tokens on the edges.

    prepare(0) -> prepare(r) -> join(r) -> begin(r) -> segment(0, r) -> segment(1, r) -> ...
                                                        \\-> evaluate(r)   \\-> snapshot(0) -> written(0)

Nothing is asked of the cluster but that it runs: what workers and scheduler need is installed by `register_plugin`.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from concurrent.futures import Future as Running
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from dask._task_spec import Task
from dask.highlevelgraph import HighLevelGraph, MaterializedLayer
from distributed import Client, Future
from distributed import wait as wait_for
from tornado.platform.asyncio import BaseAsyncIOLoop

from ..data import latest
from ..errors import RunLost, SettingError, SnapshotError
from ..scheduler import Links, Program
from ..scheduler.topology import LOOPBACK, Topology
from ..spec import Array, Block, even_bounds
from ..template import Device
from . import worker as tasks
from .backend import Backend, Writers, holding, holds_all, one_result, whole_state
from .copies import sources
from .devices import device_of
from .evaluate import Predictor, Scorer, batches, mean_scores, scored
from .events import SNAPSHOTS
from .grouped import kernels_by_device
from .job import Job
from .remembered import known
from .segment import SegmentResult
from .upkeep import begun, over
from .worker import Order, executor_of
from .workers import answers, everyone

ANSWER_S = 2.0  # a worker that is stopped, or swaps, is not waited for longer when a run ends
SILENT_S = 7.0  # a worker that has not answered for so long is lost: Dask itself takes minutes to say so
BEAT_S = 1.0
LOOK_S = 0.25  # how often tasks that are waited for are looked at, for those that failed


@dataclass(frozen=True)
class Offers:
    """Copies of a state on workers: who offers what, and where it is."""

    known: tuple[tuple[str, tuple[tuple[str, Block], ...]], ...]
    futures: tuple[Future[Any], ...]


class PendingSegment:
    """A segment that was ordered; called, it waits for the result."""

    def __init__(self, cluster: Cluster, futures: Sequence[Future[Any]], first: int, steps: int) -> None:
        self.cluster, self.futures, self.first, self.last = cluster, tuple(futures), first, first + steps

    def __call__(self) -> SegmentResult:
        return one_result(self.cluster.results(self.futures))

    def salvage(self) -> SegmentResult | None:
        """The result of any rank that has it and still answers: all have the same numbers."""
        for future in self.futures:
            if future.status == "finished":
                with suppress(Exception):  # of a worker that is gone
                    return future.result(timeout=ANSWER_S)  # type: ignore[no-any-return]
        return None


class Cluster(Backend):
    """Ranks of a job on the workers at ``addresses``."""

    depth = 3

    def __init__(
        self, client: Client, job: Job, addresses: Sequence[str], workers: Mapping[str, Any], links: Links
    ) -> None:
        self.client, self.addresses = client, tuple(addresses)
        hosts = [workers[address]["host"] for address in addresses]
        transport = job.transport
        if transport == "auto":
            alone = "comm" if len(set(hosts)) == len(hosts) else "hosts"
            transport = "shared" if len(set(hosts)) == 1 else alone
        if transport == "shared" and len(set(hosts)) > 1:
            raise SettingError(
                f"transport='shared' is for ranks of one host, but these are on {len(set(hosts))}: "
                f"{', '.join(sorted(set(hosts)))}. Use transport='auto' or 'comm'."
            )
        topology = Topology.of(hosts, links)
        if transport == "comm":
            topology = replace(topology, near=LOOPBACK)
        self.job = replace(job, run=f"{job.run}-{uuid.uuid4().hex[:12]}", transport=transport, topology=topology)
        self.holding = holding(job.step, [program.layout for program in job.programs])
        network = job.step.network
        self.each_predicts = network is not None and all(holds_all(network, p.layout) for p in job.programs)
        self.tokens: list[Future[Any]] = []
        self.count = 0
        self.looked = self.felt = time.monotonic()
        self.heard = dict.fromkeys(self.addresses, self.looked)
        self.asked: dict[str, Any] = {}  # beats that are on their way
        own = device_of()  # of this process: the state is brought here where no rank holds all of it
        tuning = job.tuning(own) or known(own)
        self.scorer = Scorer(job.step, job.validation, tuning, threads=job.threads, ranks=job.ranks)
        self.writers = Writers(job.run_dir, job.keep)  # of a state that is held in parts
        self.written: set[str] = set()
        self.workers = workers

    # tasks ------------------------------------------------------------------------------------------

    def each(
        self,
        name: str,
        function: Callable[..., Any],
        *arguments: Any,
        after: Sequence[Any] | Callable[[int], Sequence[Any]] = (),
        chain: Sequence[Any] = (),
        ranks: int | None = None,
    ) -> list[Future[Any]]:
        """One pinned task for each rank: ``function(*arguments, *after, its token of chain)``.

        Arguments that are functions are called with the rank's number.
        """
        layers, keys = {}, []
        self.count += 1
        for number in range(self.job.ranks if ranks is None else ranks):
            key = (f"{name}-{self.job.run}", self.count, number)
            values = [a(number) if callable(a) else a for a in arguments]
            others = after(number) if callable(after) else after
            task = Task(key, function, *values, *others, *chain[number : number + 1])
            layers[f"{name}-{self.count}-{number}"] = MaterializedLayer(
                {key: task},
                annotations={
                    "workers": [self.addresses[number]],
                    "allow_other_workers": False,
                    "executor": "default" if name == "prepare" else executor_of(self.job.run),
                    "retries": 0,
                },
            )
            keys.append(key)
        graph = HighLevelGraph(layers, {layer: set() for layer in layers})
        return list(self.client.get(graph, keys, sync=False))

    def results(self, futures: Sequence[Future[Any]]) -> list[Any]:
        """Wait for tasks; RunLost as soon as a worker that holds a rank is gone."""
        pending = set(futures)
        while pending:
            with suppress(TimeoutError), self.client.as_current():  # there may be several
                wait_for(list(pending), timeout=LOOK_S)
            done = {future for future in pending if future.status != "pending"}
            pending -= done
            self._heard(done)
            failed = [future for future in done if future.status == "error"]
            if failed:
                self._raise(futures, failed)
            self._look()
        return self._gathered(futures)

    def _heard(self, done: Iterable[Future[Any]]) -> None:
        """A task that a rank has done is a sign of life: while segments come, workers need not be asked."""
        for key in (future.key for future in done if future.status == "finished"):
            if isinstance(key, tuple) and isinstance(key[2], int):  # of `each`
                self.heard[self.addresses[key[2]]] = time.monotonic()

    def _gathered(self, futures: Sequence[Future[Any]]) -> list[Any]:
        """Results of tasks that are done; those of a worker that died since then would never come."""
        asked = self.client.gather(list(futures), asynchronous=True)
        coming = self._soon(asked)
        while True:
            try:
                return list(coming.result(timeout=1.0))
            except TimeoutError:
                if coming.done():
                    raise
                self._look(now=True)

    def _soon(self, coroutine: Coroutine[Any, Any, Any]) -> Running[Any]:
        """Have a coroutine run in the client's event loop."""
        loop = self.client.loop
        assert isinstance(loop, BaseAsyncIOLoop)
        return asyncio.run_coroutine_threadsafe(coroutine, loop.asyncio_loop)

    def _raise(self, futures: Sequence[Future[Any]], failed: Sequence[Future[Any]]) -> None:
        """Raise the error that says most: not that of a rank that was given up for another's."""
        self.give_up()
        limit = time.monotonic() + self.job.timeout_s
        while time.monotonic() < limit:
            try:
                with self.client.as_current():
                    wait_for(list(futures), timeout=1.0)
                break
            except TimeoutError:
                self._look(now=True)
        errors = [self._meant(future.exception(), future.key) for future in futures if future.status == "error"]
        self._look(now=True)
        raise next((e for e in errors if not isinstance(e, RunLost)), errors[0])

    def _meant(self, error: BaseException, key: Any) -> BaseException:
        """The error of a task; that a rank is lost, of one whose worker began anew and does not know the run."""
        if isinstance(error, ValueError) and str(error).startswith("Invalid executor"):
            rank = f"rank {key[2]} of run {self.job.run}"
            return RunLost(f"{rank} is not on this worker any more; resume from the last snapshot.")
        return error

    def _look(self, *, now: bool = False) -> None:
        if not now and time.monotonic() - self.looked < 1.0:
            return
        self.looked = time.monotonic()
        lost = self.lost()
        if lost:
            self.give_up()
            raise RunLost(f"{lost}. Go on from the last snapshot with fit(..., resume=True).")
        self._feel()

    def _feel(self) -> None:
        """Ask workers for a sign of life; one that has not answered for some time is lost.

        Time that the client spent elsewhere, in a callback, does not count: nobody was asked.
        """
        now = time.monotonic()
        elsewhere_s, self.felt = max(0.0, now - self.felt - 2 * BEAT_S), now
        self.heard = {address: heard + elsewhere_s for address, heard in self.heard.items()}
        for number, address in enumerate(self.addresses):
            asked = self.asked.get(address)
            if asked is not None and asked[0].done():
                if asked[0].exception() is None:
                    self.heard[address] = max(self.heard[address], asked[1])
                asked = self.asked.pop(address)
            if address not in self.asked and now - max(self.heard[address], asked[1] if asked else 0.0) > BEAT_S:
                beat = self.client._run(tasks.beat, workers=[address], on_error="raise")
                self.asked[address] = self._soon(beat), now
            if now - self.heard[address] > SILENT_S:
                self.give_up()
                raise RunLost(
                    f"rank {number} is lost: its worker {address} has not answered for {now - self.heard[address]:.0f} "
                    "s. It is stopped or cut off. Go on from the last snapshot with fit(..., resume=True)."
                )

    def _present(self) -> set[str]:
        """Addresses of the workers that are there; of a scheduler that does not answer, nothing is believed.

        Not ``client.scheduler_info``: what it returns may be that of the client's own refresh, which asks for no
        workers at all.
        """
        try:
            return everyone(self.client)
        except OSError:  # NoWorkers, of a client that was closed, is one
            return set(self.addresses)

    def give_up(self) -> None:
        """Wake the ranks that wait for others."""
        self._on_workers(tasks.give_up)

    def let_go(self) -> None:
        """Forget the ranks, without waiting for anything."""
        self._released()
        with suppress(Exception):  # a snapshot that was being written of a state in parts
            self.writers.close()

    def _released(self) -> None:
        """Have workers let go of the run, and the scheduler forget it."""
        self._on_workers(tasks.release)
        self.tokens = []
        with suppress(Exception):  # of a scheduler that is gone
            over(self.client, self.job.run)

    def lost(self) -> str:
        """The first rank whose worker left the cluster, in words; '' if all are there."""
        present = self._present()
        for number, address in enumerate(self.addresses):
            if address not in present:
                return f"rank {number} is lost: its worker {address} left the cluster"
        return ""

    def offered(self) -> dict[str, dict[int, dict[int, list[tuple[str, Block]]]]]:
        """What ranks on workers that answer have copies of: by address, rank and step; they keep that."""
        return answers(self.client, self._there(), ANSWER_S, tasks.offered, self.job.run)

    def offers(self, known: Mapping[str, Mapping[int, Mapping[int, Any]]], step: int) -> Offers:
        """Have the copies of a step made ready on the workers that have them."""
        found, futures = [], []
        for address, ranks in known.items():
            for number, steps in ranks.items():
                if step in steps:
                    found.append((address, tuple(steps[step])))
                    futures.append(self._on(address, "handed_out", tasks.handed_out, self.job.run, number, step))
        return Offers(tuple(found), tuple(futures))

    def _on(self, address: str, name: str, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """A task on one worker, in Dask's own executor."""
        self.count += 1
        key = f"{name}-{self.job.run}-{self.count}"
        where = {"workers": [address], "allow_other_workers": False, "retries": 0}
        return self.client.submit(function, *arguments, key=key, pure=False, **where)

    def _there(self) -> list[str]:
        """The workers of ranks that are there."""
        present = self._present()
        return [address for address in self.addresses if address in present]

    def _on_workers(self, function: Callable[[str], None]) -> None:
        alive = self._there()
        if alive:
            told = {"workers": alive, "on_error": "ignore", "callback_timeout": ANSWER_S}
            with suppress(TimeoutError):
                self.client.sync(self.client._run, function, self.job.run, **told)

    def _warm(self) -> None:
        """Compile each kernel once a host, divided over its workers."""
        kernels = kernels_by_device([*self.job.programs, *self._scoring(self.job)])
        hosts: dict[tuple[str, Device], list[str]] = {}
        for address, program in zip(self.addresses, self.job.programs, strict=True):
            for device in dict.fromkeys(half.device for half in program.halves):
                hosts.setdefault((self.workers[address]["host"], device), []).append(address)
        futures = []
        for (_, device), members in hosts.items():
            for i, address in enumerate(members):
                share = kernels[device][i :: len(members)]
                futures.append(self._on(address, "compile_kernels", tasks.warm, share, device))
        self.results(futures)

    def _scoring(self, job: Job) -> list[Program]:
        """The programs of validation: one for each size of batch that a rank will meet."""
        if job.validation is None:
            return []
        shares = list(pairwise(even_bounds(len(job.validation), job.ranks)))
        programs = []
        for tuning in job.tunings:
            predictor = Predictor(scored(job.step), {}, tuning, threads=job.threads)
            sizes = {hi - lo for a, b in shares for lo, hi in batches(a, b, predictor.batch_size)}
            programs += [predictor.program(size) for size in sorted(sizes)]
        return programs

    # orders -----------------------------------------------------------------------------------------

    def start(self, state: Mapping[str, Array] | Offers | None) -> None:
        begun(self.client, self.job.run, self.addresses)
        self._warm()
        first = self.each("prepare", tasks.prepare, self.job, _number, ranks=1)
        self.results(first)
        addresses = self.each("prepare", _others, self.job, _number, after=first)
        joined = self.each("join", tasks.join, self.job, _number, after=addresses)
        if isinstance(state, Offers):
            taken = [
                [state.futures[i] for i in sources(program, state.known, address)]
                for program, address in zip(self.job.programs, self.addresses, strict=True)
            ]
            after = [[*futures, *joined] for futures in taken]
            self.tokens = self.each("begin", tasks.begin, self.job.run, _number, None, after=after.__getitem__)
        else:
            held = self.client.scatter([dict(state)], hash=False)[0] if state is not None else None
            self.tokens = self.each("begin", tasks.begin, self.job.run, _number, held, after=joined)
        self.results(self.tokens)

    def segment(self, first: int, steps: int, *, profile: bool, clocks: Mapping[str, float]) -> PendingSegment:
        order = Order(first, steps, profile, dict(clocks))
        self.tokens = futures = self._ordered("segment", tasks.segment, order)
        return PendingSegment(self, futures, first, steps)

    def _ordered(
        self, name: str, function: Callable[..., Any], *arguments: Any, ranks: int | None = None
    ) -> list[Future[Any]]:
        return self.each(name, function, self.job.run, _number, *arguments, chain=self.tokens, ranks=ranks)

    def evaluate(self) -> Callable[[], dict[str, float]]:
        if self.each_predicts:
            futures = self._ordered("evaluate", tasks.evaluate)
            self.tokens = futures
            return lambda: mean_scores(self.results(futures))
        metrics = self.scorer(self.state())
        return lambda: metrics

    def snapshot(self, step: int, meta: Mapping[str, Any], *, name: str = SNAPSHOTS) -> Callable[[], object]:
        self.written.add(name)
        if self.holding > 1:
            state = self.state()
            return self.writers.write(name, step, lambda: state, meta)
        futures = self._ordered("snapshot", tasks.snapshot, name, step, dict(meta), ranks=1)
        self.tokens = [*futures, *self.tokens[1:]]
        return lambda: self.results(futures)

    def state(self) -> dict[str, Array]:
        parts = self.results(self._ordered("state", tasks.state_of, ranks=self.holding))
        return whole_state(self.job.step, [program.layout for program in self.job.programs], parts)

    def close(self, *, failed: bool) -> None:
        try:
            if not failed and self.written:
                self.results(self._ordered("written", tasks.written, ranks=1))
                self._visible()
        finally:
            self._released()
            self.writers.close()

    def _visible(self) -> None:
        assert self.job.run_dir is not None
        for name in sorted(self.written):
            if latest(self.job.run_dir / name) is None:
                raise SnapshotError(
                    f"the workers wrote snapshots to {self.job.run_dir / name}, but this process does not see them. "
                    "Let run_dir be on a file system that all share."
                )


def _number(number: int) -> int:
    return number


def _others(job: Job, number: int, first: str) -> str:
    """The addresses of all ranks: rank 0 has prepared already."""
    return first if number == 0 else tasks.prepare(job, number)
