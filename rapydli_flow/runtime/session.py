"""A tuning session on one host: the kernels of a step, in the order of their share of its time, within one budget.

    defaults compiled (in parallel) and timed  ->  share of each kernel = its calls x its default time
    for each kernel, the largest share first:      budget = what is left x its part of the shares that are left
        tuner.Tuner with the bench as its harness
    the whole step, with the defaults and with what was found, in turns  ->  the gain that counts

What is told on the way (`Progress`) goes to whoever watches: a terminal, or a page on Dask's dashboard.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from statistics import median
from typing import Any

import numpy as np

from ..graph import Graph
from ..scheduler import Program, compile_program
from ..space import Rules
from ..spec import Array, floating
from ..template import Device
from ..tuner import Budget, Choice, Found, Request, Trial, Tuner, Tuning, time_text
from .bench import Bench
from .peak import Peak, measured_peak
from .rank import Rank

STEP_ROUNDS, STEP_S = 11, 3.0
CHUNK = 8  # defaults that are compiled together


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

    @classmethod
    def from_json(cls, form: Mapping[str, Any]) -> Progress:
        """From what `to_json` gave, whatever was added on the way."""
        return cls(**{field.name: form[field.name] for field in fields(cls)})

    def __str__(self) -> str:
        best = time_text(self.best_s)
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


Share = tuple[float, Job, Trial]  # of the step's time, the kernel, its default's trial


class Sitting:
    """One session while it goes on. ``tell`` is told where it is, ``keep`` what was found for each kernel.

    ``graph``: the step, which is timed at the end with the defaults and with what was found. Ctrl-C, or ``stop``
    that says so, ends it early and keeps what was learnt. ``operands``: of the one job, if not random numbers.
    """

    def __init__(
        self,
        jobs: Sequence[Job],
        device: Device,
        options: Options,
        *,
        graph: Graph | None = None,
        tell: Callable[[Progress], None] = lambda progress: None,
        keep: Callable[[Found], None] = lambda found: None,
        stop: Callable[[], bool] = lambda: False,
        operands: Sequence[Array] | None = None,
    ) -> None:
        self.operands = operands
        self.jobs, self.device, self.options, self.graph = tuple(jobs), device, options, graph
        self.tell, self.keep, self.stop = tell, keep, stop
        self.found: list[Found] = []
        self.peak: Peak | None = None
        self.number, self.kernels, self.interrupted = 0, len(self.jobs), False
        self.begun = time.monotonic()

    def run(self) -> Session:
        """Tune, in the order of shares, until the budget is spent."""
        step = None
        how: dict[str, Any] = {"threads": self.options.threads, "seed": self.options.seed}
        with Bench(self.device, operands=self.operands, **how) as bench:
            try:
                self.peak = measured_peak(self.device, self.options.threads)
                shares = self._shares(bench)
            except KeyboardInterrupt:
                self.interrupted, shares = True, []
            self.kernels, self.number = len(shares) or self.kernels, 0
            while shares and not self.interrupted:
                left = self._left() * (shares[0][0] / sum(share for share, *_ in shares))
                self._tune(bench, left, *shares.pop(0)[1:])
        if self.graph is not None and not self.interrupted:
            with suppress(KeyboardInterrupt):
                step = _step_time(self.graph, self.device, self.options.threads, self.found)
        if self.peak is not None and not self.interrupted:  # once more: the first time may have been a busy moment
            with suppress(KeyboardInterrupt):
                self.peak = self.peak.better(measured_peak(self.device, self.options.threads))
        spent = time.monotonic() - self.begun
        return Session(self.device, tuple(self.found), self.jobs, self.peak, step, spent, self.interrupted)

    def _left(self) -> float:
        return max(0.0, self.begun + self.options.budget_s - time.monotonic())

    def _shares(self, bench: Bench) -> list[Share]:
        """The largest share first; what fails comes first of all.

        Those with the most operations are compiled and timed first. When the budget is spent the others are left out.
        """
        sized = sorted(self.jobs, key=lambda job: -job.calls * job.request.op.flops(*job.request.ins))
        defaults = [(job, Tuning(self.device).choose(job.request)) for job in sized]
        out: list[Share] = []
        for first in range(0, len(defaults), CHUNK):
            if first and not self._left():
                break
            part = defaults[first : first + CHUNK]
            bench.compile([(job.request, choice) for job, choice in part])
            timed = [bench(job.request, [choice])[0] for job, choice in part]
            for (job, choice), trial in zip(part, timed, strict=True):
                if trial.time_s is not None:  # once more: the first time may have been a busy moment
                    trial = min(trial, *bench(job.request, [choice]), key=lambda t: t.seconds)
                self.number += 1
                self._watch(job.request, [trial])
                out.append((job.calls * trial.time_s if trial.time_s else 0.0, job, trial))
        worst = sum(share for share, *_ in out) or 1.0
        return sorted(((share or worst, job, trial) for share, job, trial in out), key=lambda row: -row[0])

    def _tune(self, bench: Bench, seconds: float, job: Job, default: Trial) -> None:
        self.number += 1
        tuner = Tuner(
            job.request,
            self.device,
            bench,
            strategy=self.options.strategy,
            budget=Budget(seconds, self.options.trials),
            soft=self.options.soft,
            known=(default, *job.known),
            similar=job.similar,
            batch=max(4, 2 * self.device.cores),
            seed=self.options.seed,
            watch=self._watch,
        )
        found = tuner.run()
        self.interrupted = tuner.interrupted
        ended = replace(
            self._progress(found.request, found.trials, found.best),
            default_s=found.default.time_s,
            ended=found.ended,
            funnel=tuple(found.funnel.to_json()),
        )
        self.found.append(found)
        self.keep(found)
        self.tell(ended)

    def _watch(self, request: Request, trials: Sequence[Trial]) -> None:
        if self.stop():
            raise KeyboardInterrupt
        self.tell(self._progress(request, trials, min(trials, key=lambda t: t.seconds)))

    def _progress(self, request: Request, trials: Sequence[Trial], best: Trial) -> Progress:
        return Progress(
            device=self.device.key,
            kernel=str(request),
            number=self.number,
            kernels=self.kernels,
            trials=len(trials),
            all_trials=sum(len(f.trials) for f in self.found) + len(trials),
            best_s=best.time_s,
            default_s=trials[0].time_s,
            gflops=gflops(request, best.time_s),
            peak_gflops=self.peak.flops_s / 1e9 if self.peak else None,
            elapsed_s=time.monotonic() - self.begun,
            budget_s=self.options.budget_s,
            config=str(best.choice),
        )


def gflops(request: Request, time_s: float | None) -> float | None:
    """Operations of a call, in 1e9 a second."""
    return request.op.flops(*request.ins) / time_s / 1e9 if time_s else None


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
        view[...] = rng.standard_normal(view.shape) if floating(view) else 0
    return rank
