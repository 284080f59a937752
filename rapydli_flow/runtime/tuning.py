"""Tuning the kernels of rank graphs, here or on a worker, and remembering what was found."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from distributed import Client

from cpu_kernels.compile import host

from .. import markup
from ..config import settings
from ..errors import SettingError
from ..graph import Graph
from ..ops import Leaf
from ..template import Device
from ..tuner import Request, Trial, Tuning, TuningCache, tune
from .measure import Measure, distinct

Found = list[tuple[Request, Trial, Trial]]


@dataclass(frozen=True)
class TuningReport:
    """What tuning found: (request, best trial, trial of the default) for each kernel that was reached."""

    found: Found
    requests: int
    tuning: Tuning

    def _rows(self) -> list[tuple[str, ...]]:
        rows = []
        for request, best, default in self.found:
            gain = (default.time_s or 0.0) / best.time_s if best.time_s else 0.0
            rows.append((str(request)[:60], _ms(default), _ms(best), f"{gain:.2f}x", str(best.choice)))
        return rows

    def _repr_html_(self) -> str:
        rows = [(kernel, config, default, best, gain) for kernel, default, best, gain, config in self._rows()]
        head = markup.title("Tuning", f"{len(rows):,} of {self.requests:,} kernels tuned")
        return head + markup.table(("kernel", "best template and config", "default", "best", "gain"), rows, right=3)

    def __str__(self) -> str:
        rows = [("kernel", "default", "best", "gain", "config"), *self._rows()]
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        return "\n".join([*(line.rstrip() for line in lines), f"{len(self.found)} of {self.requests} kernels tuned"])


def _ms(trial: Trial) -> str:
    return "failed" if trial.time_s is None else f"{trial.time_s * 1e3:.3f} ms"


def cache() -> TuningCache:
    """The tuning results of this user on this host."""
    return TuningCache(settings().cache_dir / "tuning.sqlite")


def known(device: Device) -> Tuning:
    """What is known for a device, as far as RAPYDLI_TUNING lets it be used."""
    how = settings().tuning
    if how == "off":
        return Tuning(device)
    return replace(cache().tuning(device), strict=how == "strict")


def check_allowed() -> None:
    """Raise SettingError where RAPYDLI_TUNING says that nothing is tuned."""
    how = settings().tuning
    if how != "on":
        raise SettingError(f"autotune: nothing is tuned with RAPYDLI_TUNING={how}. Set it to 'on', or leave it out.")


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
    check_allowed()
    if client is None:
        device = host()
        requests = requests_of(graphs, device)

        def tell(request: Request, best: Trial, trials: int) -> None:
            if watch is not None:
                watch(f"{request}: {_ms(best)} with {best.choice} ({trials} tried)")

        found = tune(requests, device, Measure(device, threads=threads), budget_s=budget_s, watch=tell)
    else:
        worker = min(client.scheduler_info(n_workers=-1)["workers"])
        device = client.submit(host, workers=[worker], pure=False).result()
        requests = requests_of(graphs, device)
        found = client.submit(tune_here, requests, threads, budget_s, workers=[worker], pure=False).result()
    for request, best, default in found:
        cache().record(device, request, [default, best])
        cache().add(device, request, best, default)
    return TuningReport(found, len(requests), known(device))
