"""What the page on Dask's dashboard remembers of runs: bounded, and thinned where a run is long.

The numbers of a long run are kept from end to end, of ever fewer steps: every second line goes when there
are too many, the last one never.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from .numbers import Numbers, numbers_of

RUNS, STEPS, SEGMENTS, EVENTS = 12, 1200, 240, 200


@dataclass
class Told:
    """One run, as far as it was told. ``changed`` grows with every message."""

    about: Mapping[str, Any]
    steps: list[dict[str, Any]] = field(default_factory=list)
    segments: list[dict[str, Any]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    changed: int = 0
    counts: Counter[str] = field(default_factory=Counter)  # of lines by kind, the forgotten ones too

    @property
    def key(self) -> str:
        return str(self.about["run"])

    @property
    def name(self) -> str:
        return str(self.about.get("name") or "training run")

    @property
    def label(self) -> str:
        """Name and the time it began, for a list of runs."""
        return f"{self.name} \N{MIDDLE DOT} {time.strftime('%H:%M:%S', time.localtime(self.about.get('begun')))}"

    @property
    def over(self) -> bool:
        return bool(self.events) and self.events[-1].get("kind") == "ended"

    def add(self, line: dict[str, Any]) -> None:
        self.changed += 1
        kind = line.get("kind")
        self.counts[str(kind)] += 1
        timeline = line.pop("timeline", ())  # of the segment before, or of this one
        if kind == "step":
            self.steps = _bounded([*self.steps, line], STEPS)
        elif kind == "segment":
            self.segments = _bounded([*self.segments, line], SEGMENTS)
        else:
            if kind == "recovered" and line.get("addresses"):
                self.about = {**self.about, **{k: line.pop(k) for k in ("addresses", "arena_bytes", "sent_bytes")}}
            self.events = [*self.events[:1], *self.events[1:][-EVENTS + 2 :], line]
        if timeline and self.segments:  # the newest one is shown, and they are much
            for segment in self.segments:
                segment.pop("timeline", None)
            self.segments[-1]["timeline"] = timeline

    def numbers(self) -> Numbers:
        """What was told, as the report has it; a run without an end is running."""
        numbers = numbers_of([*self.events[:1], *self.steps, *self.segments, *self.events[1:]])
        if self.over:
            return numbers
        begun = float(self.about.get("begun") or time.time())
        return replace(numbers, outcome="running", time_s=max(0.0, time.time() - begun))


class History:
    """The newest `RUNS` runs, by their keys; the newest last."""

    def __init__(self) -> None:
        self.runs: dict[str, Told] = {}

    def hear(self, message: Mapping[str, Any]) -> Told | None:
        """Add a message; the run that it is of. The first message of a run says what the run is."""
        key = str(message.get("run"))
        if key not in self.runs:
            if "begun" not in message:
                return None  # of a run that is forgotten
            self.runs[key] = Told({k: v for k, v in message.items() if k != "lines"})
            while len(self.runs) > RUNS:
                self.runs.pop(next(iter(self.runs)))
        run = self.runs[key]
        for line in message.get("lines", ()):
            run.add(dict(line))
        return run

    def leave(self, client: str) -> None:
        """A client is gone: so are its runs."""
        for run in self.runs.values():
            if run.about.get("client") == client and not run.over:
                run.add({"kind": "ended", "outcome": "RunLost: the client of this run left the cluster"})

    @property
    def newest(self) -> Told | None:
        return next(reversed(self.runs.values()), None)


def _bounded(lines: list[dict[str, Any]], most: int) -> list[dict[str, Any]]:
    """At most so many lines: every second one, counted from the last."""
    return lines[::-1][::2][::-1] if len(lines) > most else lines
