"""Runs for Prometheus: on ``/metrics`` of Dask's scheduler, beside its own, where prometheus_client is installed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from weakref import WeakSet

try:
    import prometheus_client
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
except ImportError:  # an extra: then Dask's scheduler has no metrics, either
    prometheus_client = None  # type: ignore[assignment]

from ..runtime.timeline import KINDS
from .history import History, Told
from .numbers import Numbers, Series

LABELS = ("run", "name")


class Runs:
    """The collector of a process: the runs of all schedulers in it. Prometheus takes no two of the same names."""

    def __init__(self) -> None:
        self.histories: WeakSet[History] = WeakSet()
        self.registered = False

    def add(self, history: History) -> None:
        """Tell of the runs that a page remembers."""
        self.histories.add(history)
        if prometheus_client is not None and not self.registered:
            prometheus_client.REGISTRY.register(self)
            self.registered = True

    def collect(self) -> Iterator[Metric]:
        """What `prometheus_client` asks a collector for."""
        gauges = {
            "going": GaugeMetricFamily("rapydli_run_going", "1 while the run goes on", labels=LABELS),
            "steps": GaugeMetricFamily("rapydli_run_steps", "Training steps that are done", labels=LABELS),
            "planned": GaugeMetricFamily("rapydli_run_planned_steps", "Training steps of the whole run", labels=LABELS),
            "training": GaugeMetricFamily(
                "rapydli_run_training", "Loss and metrics of the last step", labels=(*LABELS, "metric")
            ),
            "validation": GaugeMetricFamily(
                "rapydli_run_validation", "Metrics of the last validation", labels=(*LABELS, "metric")
            ),
            "step": GaugeMetricFamily("rapydli_run_step_seconds", "Seconds of a step, of late", labels=LABELS),
            "speed": GaugeMetricFamily("rapydli_run_records_per_second", "Records a second, of late", labels=LABELS),
            "ranks": GaugeMetricFamily(
                "rapydli_run_rank_seconds", "Seconds of a step of a rank by kind", labels=(*LABELS, "rank", "kind")
            ),
            "sent": GaugeMetricFamily(
                "rapydli_run_sent_bytes", "Bytes that a rank sends to others in a step", labels=(*LABELS, "rank")
            ),
        }
        counters = {
            "recovered": CounterMetricFamily(
                "rapydli_run_recoveries", "Losses of workers after which the run went on", labels=LABELS
            ),
            "saved": CounterMetricFamily("rapydli_run_snapshots", "Snapshots written", labels=LABELS),
        }
        for run in [run for history in self.histories for run in list(history.runs.values())]:
            label = [run.key, run.name]
            for name, more, value in _values(run, run.numbers()):
                gauges[name].add_metric([*label, *more], value)
            for name, counter in counters.items():
                counter.add_metric(label, run.counts[name])
        yield from (*gauges.values(), *counters.values())


runs = Runs()


def _values(run: Told, numbers: Numbers) -> Iterator[tuple[str, tuple[str, ...], float]]:
    """Gauges of a run: which, further labels, the value."""
    yield "going", (), float(not run.over)
    yield "steps", (), float(numbers.steps)
    if numbers.started.get("steps"):
        yield "planned", (), float(numbers.started["steps"])
    for name, series in numbers.train.items():
        yield "training", (name,), _last(series)
    for name, series in numbers.held_out.items():
        yield "validation", (name,), _last(series)
    if numbers.step_s is not None:
        yield "step", (), _last(numbers.step_s)
        if numbers.batch:
            yield "speed", (), numbers.batch / _last(numbers.step_s)
    for rank, times in enumerate(numbers.ranks_s):
        for kind, time_s in zip(KINDS, times, strict=True):
            yield "ranks", (str(rank), kind), time_s
    sent: Any = run.about.get("sent_bytes") or ()
    for rank, row in enumerate(sent):
        yield "sent", (str(rank),), float(sum(row))


def _last(series: Series) -> float:
    return float(series.value[-1])
