"""What happens in a run, as small values, and callbacks that watch it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO


@dataclass(frozen=True)
class Started:
    """A run begins at ``step`` of ``steps``; a resumed one not at 0."""

    step: int
    steps: int
    steps_per_epoch: int
    batch: int
    ranks: int
    threads: int
    granularity: str
    explanation: str = ""


@dataclass(frozen=True)
class Stepped:
    """Steps ``first`` to ``first + steps - 1`` are done: their scalars, and where the time went."""

    first: int
    steps: int
    scalars: Mapping[str, tuple[float, ...]]
    time_s: float
    feed_s: float
    ops: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Validated:
    """Metrics over the validation set after ``step`` steps."""

    step: int
    epoch: int
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class Saved:
    """A snapshot of the state after ``step`` steps is being written."""

    step: int


@dataclass(frozen=True)
class Ended:
    """The run is over: 'done', or why not."""

    step: int
    time_s: float
    outcome: str = "done"


Event = Started | Stepped | Validated | Saved | Ended


class Callback:
    """Something that watches a run. Override `on_event`; an exception stops the run cleanly."""

    def on_event(self, event: Event) -> None:
        """Called for every event, in order, in the process that called fit."""


class MetricsLog(Callback):
    """``metrics.jsonl``: one line a step and one for each other event, readable while the run goes on."""

    def __init__(self, folder: Path, *, first_step: int = 0) -> None:
        self.path = folder / "metrics.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        kept = [line for line in read_log(self.path) if line.get("step", 0) < first_step] if first_step else []
        partial = self.path.with_suffix(".partial")  # a kill here must not cost the lines of an earlier run
        partial.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        partial.replace(self.path)
        self._file: TextIO = self.path.open("a", encoding="utf-8")

    def on_event(self, event: Event) -> None:
        kind = type(event).__name__.lower()
        if isinstance(event, Stepped):
            for i in range(event.steps):
                values = {name: series[i] for name, series in event.scalars.items()}
                self._write({"kind": "step", "step": event.first + i, **values})
            times = {"time_s": event.time_s, "feed_s": event.feed_s, "ops": dict(event.ops)}
            self._write({"kind": "segment", "step": event.first, "steps": event.steps, **times})
        elif isinstance(event, Validated):
            self._write({"kind": kind, "step": event.step - 1, "epoch": event.epoch, **event.metrics})
        elif isinstance(event, Saved):
            self._write({"kind": kind, "step": event.step - 1})
        else:
            self._write({"kind": kind, **asdict(event)})
        self._file.flush()

    def _write(self, line: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(line) + "\n")

    def close(self) -> None:
        self._file.close()


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a ``metrics.jsonl``; a last line that a killed process left half written is dropped."""
    out: list[dict[str, Any]] = []
    if not path.exists():
        return out
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            out.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return out
