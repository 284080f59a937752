"""Tuning the kernels of rank graphs, here or on a worker, and remembering what was found."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from distributed import Client

from cpu_kernels.compile import host

from .. import markup
from ..config import settings
from ..graph import Graph
from ..ops import Leaf
from ..spec import Array
from ..template import Device
from ..tuner import Choice, Request, Trial, Tuning, TuningCache, tune
from .measure import Measure, distinct

Found = list[tuple[Request, Trial, Trial]]
SHOWN = 8  # configs that failed, in the text of a report


@dataclass(frozen=True)
class TuningReport:
    """What tuning found: (request, best trial, trial of the default) for each kernel that was reached.

    ``failed``: the configs that gave wrong numbers or could not be compiled, each with the reason.
    """

    found: Found
    requests: int
    tuning: Tuning
    failed: tuple[tuple[Request, Trial], ...] = ()

    def _rows(self) -> list[tuple[str, ...]]:
        rows = []
        for request, best, default in self.found:
            gain = (default.time_s or 0.0) / best.time_s if best.time_s else 0.0
            rows.append((str(request)[:60], _ms(default), _ms(best), f"{gain:.2f}x", str(best.choice)))
        return rows

    def _repr_html_(self) -> str:
        rows = [(kernel, config, default, best, gain) for kernel, default, best, gain, config in self._rows()]
        head = markup.title("Tuning", f"{len(rows):,} of {self.requests:,} kernels tuned")
        head += markup.table(("kernel", "best template and config", "default", "best", "gain"), rows, right=3)
        why = [(str(request)[:60], str(trial.choice), trial.error) for request, trial in self.failed]
        return head + (markup.table(("kernel", "failed with", "because"), why) if why else "")

    def __str__(self) -> str:
        rows = [("kernel", "default", "best", "gain", "config"), *self._rows()]
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        lines.append(f"{len(self.found)} of {self.requests} kernels tuned")
        if self.failed:
            lines.append(f"{len(self.failed)} config{'s' if len(self.failed) > 1 else ''} failed:")
            lines += [f"  {request}, {trial.choice}: {trial.error}" for request, trial in self.failed[:SHOWN]]
            more = len(self.failed) - SHOWN
            lines += [f"  and {more} more, in the report's failed"] if more > 0 else []
        return "\n".join(line.rstrip() for line in lines)


def _ms(trial: Trial) -> str:
    return "failed" if trial.time_s is None else f"{trial.time_s * 1e3:.3f} ms"


def cache() -> TuningCache:
    """The tuning results of this user on this host."""
    return TuningCache(settings().cache_dir / "tuning.jsonl")


def known(device: Device) -> Tuning:
    """What is known for a device."""
    return cache().tuning(device)


def requests_of(graphs: Sequence[Graph], device: Device) -> list[Request]:
    """The distinct kernels of rank graphs, the largest first."""
    tuning = Tuning(device)
    found: list[tuple[int, Request]] = []
    for graph in graphs:
        for node in graph:
            if not isinstance(node.op, Leaf) and not node.op.collective and not node.op.view:
                specs = [graph.spec(v) for v in node.inputs]
                found.append((node.op.flops(*specs), tuning.serve(node.op, specs)[0]))
    return distinct([request for _, request in sorted(found, key=lambda pair: -pair[0])], device)


def tune_here(requests: Sequence[Request], threads: int, budget_s: float) -> Found:
    """Tune on this host; also the body of a task."""
    device = host()
    return tune(requests, device, Measure(device, threads=threads), budget_s=budget_s)


def autotune(
    graphs: Sequence[Graph],
    threads: int,
    client: Client | None,
    *,
    budget_s: float,
    watch: Callable[[str], None] | None = None,
) -> TuningReport:
    """Tune every distinct kernel of rank graphs and keep the results."""
    if client is None:
        device = host()
        return _tuned(requests_of(graphs, device), Measure(device, threads=threads), budget_s, watch)
    worker = min(client.scheduler_info(n_workers=-1)["workers"])
    device = client.submit(host, workers=[worker], pure=False).result()
    requests = requests_of(graphs, device)
    found = client.submit(tune_here, requests, threads, budget_s, workers=[worker], pure=False).result()
    cache().add(device, [(request, best.choice, best.time_s or 0.0) for request, best, _ in found])
    return TuningReport(found, len(requests), known(device))


def tune_one(
    request: Request,
    threads: int,
    *,
    budget_s: float,
    operands: Sequence[Array] | None = None,
    watch: Callable[[str], None] | None = None,
) -> TuningReport:
    """Tune one kernel on this host and keep the result; every config is checked, whatever its size.

    ``operands``: what to measure on, in place of random numbers.
    """
    measure = Measure(host(), threads=threads, operands=operands, checked=math.inf)
    return _tuned([request], measure, budget_s, watch)


def _tuned(
    requests: Sequence[Request], measure: Measure, budget_s: float, watch: Callable[[str], None] | None
) -> TuningReport:
    """Tune on this host, keep the results, and note what failed."""
    device = measure.device
    failed: list[tuple[Request, Trial]] = []

    def noted(request: Request, choices: Sequence[Choice]) -> list[Trial]:
        trials = measure(request, choices)
        failed.extend((request, trial) for trial in trials if trial.error)
        return trials

    def tell(request: Request, best: Trial, trials: int) -> None:
        if watch is not None:
            watch(f"{request}: {_ms(best)} with {best.choice} ({trials} tried)")

    found = tune(requests, device, noted, budget_s=budget_s, watch=tell)
    cache().add(device, [(request, best.choice, best.time_s or 0.0) for request, best, _ in found])
    return TuningReport(found, len(requests), known(device), tuple(failed))
