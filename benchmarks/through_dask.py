"""Runs of `rapydli_flow.fit` in this process and on one Dask worker with as many threads, in turns, both warm."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from distributed import Client, LocalCluster
from ours import training

import rapydli_flow as rf
from rapydli_flow.graph import Graph
from rapydli_flow.zoo import Network

HERE, ONE = "in process", "dask, 1 worker"
Sides = Mapping[str, Mapping[str, Any]]  # what `rapydli_flow.fit` is told beside step and data


@contextmanager
def clustered(workers: int, threads: int) -> Iterator[Client]:
    """A client of so many processes of this host."""
    with (
        LocalCluster(n_workers=workers, threads_per_worker=threads, dashboard_address=":0") as cluster,
        Client(cluster) as client,
    ):
        yield client


@contextmanager
def records(case: Network, *, count: int = 2048) -> Iterator[Any]:
    """A dataset of random records; its folder is gone afterwards."""
    with TemporaryDirectory() as folder:
        rng = np.random.default_rng(0)
        x = rng.standard_normal((count, *case.record), dtype=np.float32)
        label = rng.integers(0, case.classes, count)
        yield rf.ingest({"x": x, "label": label}, Path(folder) / "data.zarr", compress=False)


def sides(client: Client, threads: int) -> Sides:
    """The same plan in process and on the client's worker."""
    plan = rf.Plan(1, threads)
    return {HERE: {"plan": plan}, ONE: {"plan": plan, "client": client}}


def training_step(case: Network, batch: int) -> Graph:
    """The step of a network of the zoo."""
    return training(case.trace(batch))


def step_ms(step: Graph, data: Any, steps: int, where: Mapping[str, Any]) -> float:
    """Milliseconds a step of a run by the clock, from the end of its first segment on.

    That end is told at once, and that of the last one; what comes between may be told later than it is done.
    """
    marks: list[tuple[int, float]] = []

    class Clock(rf.Callback):
        def on_event(self, event: Any) -> None:
            if type(event).__name__ == "Stepped":
                marks.append((event.first + event.steps, time.perf_counter()))

    rf.fit(step, data, steps=steps, callbacks=[Clock()], **where)
    (a, begin), (b, end) = marks[0], marks[-1]
    return (end - begin) / (b - a) * 1e3


def in_turns(step: Graph, data: Any, steps: int, rounds: int, runs: Sides) -> dict[str, list[float]]:
    """Milliseconds a step of each run, one value a round; a round before them does not count."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds + 1):
        for name, where in runs.items():
            times[name].append(step_ms(step, data, steps, where))
    return {name: each[1:] for name, each in times.items()}


def check_same(step: Graph, data: Any, runs: Sides, *, steps: int = 8) -> None:
    """SystemExit unless all runs give the same losses, to the bit."""
    losses = {name: rf.fit(step, data, steps=steps, **where).scalars["loss"] for name, where in runs.items()}
    if any(loss != losses[HERE] for loss in losses.values()):
        raise SystemExit(f"losses differ: {losses}")


def medians(times: Mapping[str, list[float]]) -> dict[str, float]:
    """The median of each side."""
    return {name: median(each) for name, each in times.items()}
