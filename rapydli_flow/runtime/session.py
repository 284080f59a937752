"""A tuning session on one host: the kernels of a step, in the order of their share of its time, within one budget.

    defaults compiled (in parallel) and timed  ->  share of each kernel = its calls x its default time
    for each kernel, the largest share first:      budget = what is left x its part of the shares that are left
        tuner.Tuner with the bench as its harness
    the whole step, with the defaults and with what was found, in turns  ->  the gain that counts

What is told on the way (`Progress`) goes to whoever watches: a terminal, or a page on Dask's dashboard.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from math import inf
from statistics import median
from typing import Any

import numpy as np

from ..graph import Graph
from ..scheduler import Program, compile_program
from ..space import Rules
from ..template import Device
from ..tuner import Budget, Choice, Found, Request, Trial, Tuner, Tuning
from .bench import Bench
from .peak import Peak, measured_peak
from .rank import Rank

STEP_ROUNDS, STEP_S = 11, 3.0


@dataclass(frozen=True)
class Job:
    """A kernel to tune: how often a step calls it, and what is known of it and of similar ones."""

    request: Request
    calls: int = 1
    known: tuple[Trial, ...] = ()
    similar: tuple[Choice, ...] = ()


@dataclass(frozen=True)
class Options:
    """How to tune. ``budget_s`` is for all kernels together, ``trials`` for each."""

    threads: int
    budget_s: float = 60.0
    trials: int | None = None
    strategy: str = "guided"
    soft: Rules = ()
    seed: int = 0


@dataclass(frozen=True)
class Progress:
    """Where a session is: at which kernel, how many configs were tried, the best time and what that is worth."""

    device: str
    kernel: str
    number: int
    kernels: int
    trials: int
    all_trials: int
    best_s: float | None
    default_s: float | None
    gflops: float | None
    peak_gflops: float | None
    elapsed_s: float
    budget_s: float
    config: str = ""
    ended: str = ""
    funnel: tuple[dict[str, Any], ...] = ()

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        best = "failed" if self.best_s is None else f"{self.best_s * 1e3:.3f} ms"
        gain = f", {self.default_s / self.best_s:.2f}x" if self.best_s and self.default_s else ""
        speed = f", {self.gflops:,.0f} GFLOP/s" if self.gflops and self.gflops >= 1 else ""
        end = f" ({self.ended})" if self.ended else ""
        return f"[{self.number}/{self.kernels}] {self.kernel}: {best}{gain}{speed} after {self.trials} trials{end}"


@dataclass(frozen=True)
class StepTime:
    """Seconds of a whole step, medians of rounds in turn."""

    default_s: float
    tuned_s: float

    @property
    def gain(self) -> float:
        return self.default_s / self.tuned_s


@dataclass(frozen=True)
class Session:
    """What a session found on one device."""

    device: Device
    found: tuple[Found, ...]
    jobs: tuple[Job, ...]
    peak: Peak | None
    step: StepTime | None
    elapsed_s: float
    interrupted: bool


Tell = Callable[[Progress], None]


def tune_all(
    jobs: Sequence[Job],
    device: Device,
    options: Options,
    *,
    graph: Graph | None = None,
    tell: Tell = lambda progress: None,
    keep: Callable[[Found], None] = lambda found: None,
    stop: Callable[[], bool] = lambda: False,
) -> Session:
    """Tune on this host. Ctrl-C, or ``stop`` that says so, ends it early and keeps what was learnt.

    ``graph``: the step, which is timed with the defaults and with what was found. ``keep`` is given what was found
    for each kernel, as soon as it is.
    """
    begun, found, interrupted = time.monotonic(), [], False  # type: float, list[Found], bool
    end = begun + options.budget_s
    peak: Peak | None = None
    order: list[tuple[float, Job, Trial | None]] = [(0.0, job, None) for job in jobs]
    with Bench(device, threads=options.threads, seed=options.seed) as bench:
        try:
            peak = measured_peak(device, options.threads)
            order = _by_share(jobs, device, bench)
        except KeyboardInterrupt:
            interrupted = True
        for number, (share, job, default) in enumerate(order, 1):
            if interrupted or default is None:
                break
            rest = sum(s for s, *_ in order[number - 1 :])
            seconds = max(0.0, end - time.monotonic()) * (share / rest if rest else 0.0)
            earlier = sum(len(f.trials) for f in found)

            def watch(request: Request, trials: Sequence[Trial], n: int = number, before: int = earlier) -> None:
                if stop():
                    raise KeyboardInterrupt
                tell(_progress(request, trials, device, n, len(order), before, peak, begun, options))

            tuner = Tuner(
                job.request,
                device,
                bench,
                strategy=options.strategy,
                budget=Budget(seconds, options.trials),
                soft=options.soft,
                known=(default, *job.known),
                similar=job.similar,
                batch=max(4, 2 * device.cores),
                seed=options.seed,
                watch=watch,
            )
            result = tuner.run()
            found.append(result)
            keep(result)
            interrupted = tuner.interrupted
            tell(_ended(result, device, number, len(order), earlier, peak, begun, options))
    step = None
    if graph is not None and not interrupted:
        with suppress(KeyboardInterrupt):
            step = _step_time(graph, device, options.threads, found)
    return Session(device, tuple(found), tuple(jobs), peak, step, time.monotonic() - begun, interrupted)


def _by_share(jobs: Sequence[Job], device: Device, bench: Bench) -> list[tuple[float, Job, Trial | None]]:
    """Share of the step's time, job and default's trial, the largest share first; what fails comes first of all."""
    defaults = [Tuning(device).choose(job.request) for job in jobs]
    bench.compile([(job.request, choice) for job, choice in zip(jobs, defaults, strict=True)])
    out: list[tuple[float, Job, Trial | None]] = []
    for job, choice in zip(jobs, defaults, strict=True):
        (trial,) = bench(job.request, [choice])
        out.append((job.calls * trial.time_s if trial.time_s else 0.0, job, trial))
    worst = sum(share for share, *_ in out) or 1.0
    out = [(share or worst, job, trial) for share, job, trial in out]
    return sorted(out, key=lambda row: -row[0])


def gflops(request: Request, time_s: float | None) -> float | None:
    return request.op.flops(*request.ins) / time_s / 1e9 if time_s else None


def _progress(
    request: Request,
    trials: Sequence[Trial],
    device: Device,
    number: int,
    kernels: int,
    before: int,
    peak: Peak | None,
    begun: float,
    options: Options,
) -> Progress:
    good = [t for t in trials if t.time_s is not None]
    best = min(good, key=lambda t: t.time_s or inf, default=None)
    default = trials[0].time_s if trials else None
    return Progress(
        device=device.key,
        kernel=str(request),
        number=number,
        kernels=kernels,
        trials=len(trials),
        all_trials=before + len(trials),
        best_s=best.time_s if best else None,
        default_s=default,
        gflops=gflops(request, best.time_s if best else None),
        peak_gflops=peak.flops_s / 1e9 if peak else None,
        elapsed_s=time.monotonic() - begun,
        budget_s=options.budget_s,
        config=str(best.choice) if best else "",
    )


def _ended(
    found: Found,
    device: Device,
    number: int,
    kernels: int,
    before: int,
    peak: Peak | None,
    begun: float,
    options: Options,
) -> Progress:
    said = _progress(found.request, found.trials, device, number, kernels, before, peak, begun, options)
    fields = {k: v for k, v in asdict(said).items() if k not in ("best_s", "default_s", "gflops", "config")}
    return Progress(
        **{**fields, "ended": found.ended, "funnel": tuple(found.funnel.to_json())},
        best_s=found.best.time_s,
        default_s=found.default.time_s,
        gflops=gflops(found.request, found.best.time_s),
        config=str(found.best.choice),
    )


def _step_time(graph: Graph, device: Device, threads: int, found: Sequence[Found]) -> StepTime | None:
    """A step of the graph with default and tuned kernels, in turns; None for a rank that meets others."""
    chosen = {f.request.key(device): f.best.choice for f in found if f.best.time_s is not None}
    programs = [compile_program(graph, tuning) for tuning in (Tuning(device), Tuning(device, chosen))]
    if any(node.op.collective for node in graph):
        return None
    ranks = [_fed(program, device, threads) for program in programs]
    times: list[list[float]] = [[], []]
    begun = time.monotonic()
    for r in range(STEP_ROUNDS + 1):
        for which in (0, 1) if r % 2 else (1, 0):
            begin = time.perf_counter()
            ranks[which].step(0, 0)
            times[which].append(time.perf_counter() - begin)
        if r > 2 and time.monotonic() - begun > STEP_S:
            break
    return StepTime(*(median(each[1:]) for each in times))


def _fed(program: Program, device: Device, threads: int) -> Rank:
    rank, rng = Rank(program, device, threads=threads), np.random.default_rng(0)
    rank.start(0)
    for name in program.kind("batch"):
        view = rank.leaf(name)
        view[...] = rng.standard_normal(view.shape) if view.dtype.kind == "f" else 0
    return rank
