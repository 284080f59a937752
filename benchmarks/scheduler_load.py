"""Training steps a second that Dask's scheduler keeps up with, where 64 ranks have segments of steps to do and no work.

Ranks are pinned to 64 workers with one thread, and their segments are chained by tokens, by the code of a real run;
orders are given three segments ahead, as there, and results are fetched. The scheduler is a process of its own. The
workers are threads of this one, which takes most of the time: ``steps_s`` is what all of them get through here, and
``scheduler_steps_s`` how many steps the scheduler does in a second of processor time. Messages are those of the streams
between it and workers and client, calls aside.
"""

from __future__ import annotations

import logging
import subprocess
import sys
import time
from argparse import Namespace
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import dask
import psutil
from common import LEAST, environment
from distributed import Client, Worker, get_worker
from distributed.utils import silence_logging_cmgr

from rapydli_flow.runtime.backend import one_result
from rapydli_flow.runtime.cluster import Cluster
from rapydli_flow.runtime.rank import CLOCKS
from rapydli_flow.runtime.segment import SegmentResult
from rapydli_flow.runtime.worker import Order, Resident, make_room, of_a_rank

RANKS, STEPS = 64, 10  # steps of a segment
SEGMENTS = 10  # of a round
LIMIT_S = 60.0
TARGET = 100.0  # steps a second
# what workers do for themselves; 64 of them in one process would do little else
QUIET = {"distributed.worker.profile.enabled": False, "distributed.admin.system-monitor.interval": "1h"}


class Idle(Cluster):
    """The tasks of a run of ``len(addresses)`` ranks that have no programs."""

    def __init__(self, client: Client, addresses: list[str]) -> None:
        self.client, self.addresses = client, tuple(addresses)
        self.job: Any = SimpleNamespace(run=f"idle-{time.monotonic_ns()}", ranks=len(addresses), timeout_s=LIMIT_S)
        self.count, self.looked = 0, time.monotonic()
        self.felt = self.looked
        self.heard, self.asked = dict.fromkeys(self.addresses, self.looked), {}
        self.tokens: list[Any] = self.each("prepare", ready, self.job.run)
        self.results(self.tokens)

    def train(self, segments: int) -> float:
        """Seconds of so many segments."""
        begin = time.perf_counter()
        queue: deque[list[Any]] = deque()
        for first in range(0, segments * STEPS, STEPS):
            self.tokens = self._ordered("segment", idle, Order(first, STEPS, True, dict(CLOCKS)))
            queue.append(self.tokens)
            while len(queue) > self.depth:
                one_result(self.results(queue.popleft()))
        while queue:
            one_result(self.results(queue.popleft()))
        return time.perf_counter() - begin


def ready(run: str) -> int:
    """The run has its executor here."""
    make_room(run, get_worker())
    return 0


@of_a_rank
def idle(run: str, number: int, order: Order, *before: Any) -> SegmentResult:
    """What a segment gives, without its steps."""
    return SegmentResult(number, order.first, order.steps, {"loss": (0.0,) * order.steps}, 0.0, 0.0)


def measure(given: Namespace) -> list[dict[str, Any]]:
    """One row."""
    with cluster() as (process, client, workers):
        ranks = Idle(client, sorted(worker.address for worker in workers))
        ranks.train(SEGMENTS)
        before = totals(process, client, workers)
        spent: list[float] = []
        while len(spent) < LEAST or sum(spent) < given.seconds:
            spent.append(ranks.train(SEGMENTS))
        steps = len(spent) * SEGMENTS * STEPS
        used = {name: (now - before[name]) / steps for name, now in totals(process, client, workers).items()}
    return [
        {
            "ranks": RANKS,
            "steps_a_segment": STEPS,
            "steps_s": SEGMENTS * STEPS / median(spent),
            "scheduler_steps_s": 1 / used["cpu_s"],
            "target": TARGET,
            "tasks_a_step": RANKS / STEPS,
            "sent_a_step": used["sent"],
            "received_a_step": used["received"],
            "rounds": len(spent),
        }
    ]


@contextmanager
def cluster() -> Iterator[tuple[psutil.Process, Client, list[Worker]]]:
    """A scheduler, a client of it, and workers in this process."""
    with TemporaryDirectory() as folder, dask.config.set(QUIET), silence_logging_cmgr(logging.CRITICAL):
        file = Path(folder) / "scheduler.json"
        command = ["scheduler", "--host", "127.0.0.1", "--port", "0", "--scheduler-file", str(file), "--no-dashboard"]
        whole = [sys.executable, "-m", "dask", *command]
        process = subprocess.Popen(whole, env=environment(), stderr=subprocess.DEVNULL)
        try:
            with Client(scheduler_file=str(file), timeout=60) as client:
                workers = client.sync(_started, client.scheduler.address)
                client.register_plugin(Resident())
                yield psutil.Process(process.pid), client, workers
                client.sync(_ended, workers)
        finally:
            process.terminate()
            process.wait()


async def _started(address: str) -> list[Worker]:
    return [await Worker(address, nthreads=1, memory_limit=0, dashboard=False) for _ in range(RANKS)]


async def _ended(workers: list[Worker]) -> None:
    for worker in workers:
        await worker.close()


def totals(process: psutil.Process, client: Client, workers: list[Worker]) -> dict[str, float]:
    """Seconds that the scheduler has had a core for; messages that it has sent, and that it was sent."""
    times = process.cpu_times()
    streams = [worker.batched_stream for worker in workers] + [client.scheduler_comm]
    return {
        "cpu_s": times.user + times.system,
        "sent": client.run_on_scheduler(_sent),
        "received": sum(stream.message_count for stream in streams),
    }


def _sent(dask_scheduler: Any) -> int:
    """On the scheduler: how many messages it has sent."""
    streams = (*dask_scheduler.stream_comms.values(), *dask_scheduler.client_comms.values())
    return sum(stream.message_count for stream in streams)
