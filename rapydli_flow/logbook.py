"""Finding runs again: a table of all runs below a folder, from their ``metrics.jsonl``.

A log without an end is of a run that is going on, if its process still runs on this host, or of one that
was killed: then there is a last complete snapshot to go on from, where the run wrote any.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, overload

from .comparison import (
    Comparable,
    Comparison,
    Summary,
    best_metrics,
    html_table,
    last_metrics,
    number,
    records_s,
    settings_of,
    text_table,
)
from .data import latest
from .errors import SettingError
from .runtime.events import PLACE, Validated, read_log, session, validations
from .runtime.process import is_alive

__all__ = ["Record", "Row", "Runs", "runs"]

LOG = "metrics.jsonl"
NO_RUNS = re.compile(r"\.|snapshots$|step-|.*\.zarr$")
HEADER = ("name", "status", "steps", "last", "best", "began (UTC)", "took", "why, and how to go on")


@dataclass(frozen=True)
class Record:
    """A run as its log tells it. ``status``: done, stopped, interrupted, failed, going on, unfinished; ``why``.

    ``scalars``: those of each step, ``validation``: metrics of each validation. ``time_s``: of training, also
    before the run was resumed. ``snapshot``: the step of the newest complete snapshot.
    """

    name: str
    path: Path
    status: str
    why: str
    steps: int
    time_s: float
    started: Mapping[str, Any]
    began: str = ""
    snapshot: int | None = None
    scalars: dict[str, list[float]] = field(default_factory=dict)
    validation: list[Validated] = field(default_factory=list)
    segments: list[tuple[int, float]] = field(default_factory=list)

    @property
    def metrics(self) -> dict[str, float]:
        """The last validation metrics, or the scalars of the last step."""
        return last_metrics(self.validation, self.scalars)

    @property
    def best(self) -> dict[str, float]:
        """The best of each validation metric (or scalar) whose name tells what is better."""
        return best_metrics(self.validation, self.scalars)

    def summary(self) -> Summary:
        """What the run came to."""
        return Summary(
            name=self.name,
            outcome=f"{self.status}: {self.why}" if self.why else self.status,
            steps=self.steps,
            last=self.metrics,
            best=self.best,
            records_s=records_s(self.started.get("batch"), self.segments),
            settings=settings_of(self.started),
        )

    def compare(self, other: Comparable) -> Comparison:
        """This run beside another one, live or found: numbers, and what was set otherwise."""
        return Comparison(self.summary(), other.summary())


@dataclass(frozen=True)
class Row:
    """A run in the table: its record without the series."""

    name: str
    path: Path
    status: str
    why: str
    step: int
    steps: int | None
    last: Mapping[str, float]
    best: Mapping[str, float]
    began: str
    time_s: float
    snapshot: int | None

    @property
    def go_on(self) -> str:
        """What goes on with the run, where that makes sense."""
        if self.status in ("done", "going on"):
            return ""
        if self.snapshot is None:
            return "it has no snapshot to go on from"
        return f"rf.fit(..., run_dir={str(self.path)!r}, resume=True) goes on from step {self.snapshot:,}"

    def record(self) -> Record:
        """All that the log says now."""
        return read_run(self.path, self.name)

    def summary(self) -> Summary:
        """What the run came to."""
        return self.record().summary()

    def compare(self, other: Comparable) -> Comparison:
        """This run beside another one, live or found: numbers, and what was set otherwise."""
        return Comparison(self.summary(), other.summary())

    def cells(self) -> tuple[str, ...]:
        """The row in words, as in `HEADER`."""
        steps = f"{self.step:,} of {self.steps:,}" if self.steps is not None else f"{self.step:,}"
        why = "; ".join(part for part in (self.why, self.go_on) if part)
        began = self.began[:19].replace("T", " ")  # to the second
        return self.name, self.status, steps, _numbers(self.last), _numbers(self.best), began, _time(self.time_s), why


class Runs(Sequence[Row]):
    """Runs, the oldest first; prints as a table. ``runs["digits"]`` is a row, as is ``runs[-1]``."""

    def __init__(self, folder: Path, rows: Sequence[Row]) -> None:
        self.folder, self.rows = folder, tuple(rows)

    @overload
    def __getitem__(self, at: int | str) -> Row: ...
    @overload
    def __getitem__(self, at: slice) -> Runs: ...
    def __getitem__(self, at: int | str | slice) -> Row | Runs:
        if isinstance(at, slice):
            return Runs(self.folder, self.rows[at])
        if isinstance(at, int):
            return self.rows[at]
        for row in self.rows:
            if row.name == at:
                return row
        names = ", ".join(row.name for row in self.rows) or "none"
        raise SettingError(f"runs: {self.folder} has no run {at!r}; its runs: {names}.")

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        return text_table(self._table()) if self.rows else f"no runs in {self.folder}"

    def _repr_html_(self) -> str:
        return html_table(self._table())

    def _table(self) -> list[tuple[str, ...]]:
        return [HEADER, *(row.cells() for row in self.rows)]


def runs(folder: str | os.PathLike[str] = "runs") -> Runs:
    """All runs below a folder that was the ``run_dir`` of some, or holds such folders at any depth.

    Raises SettingError where there is no such folder.
    """
    top = Path(folder)
    if not top.is_dir():
        raise SettingError(f"runs: {top} is not a folder. Runs are kept with rf.fit(..., run_dir='runs/name').")
    rows = [row_of(read_run(path, _name(path, top))) for path in _folders(top)]
    return Runs(top, sorted(rows, key=lambda row: (row.began, row.name)))


def read_run(path: Path, name: str | None = None) -> Record:
    """The record of the run in this folder; SettingError where nothing was logged."""
    lines = read_log(path / LOG)
    if not lines:
        raise SettingError(f"runs: {path} has no {LOG}, or nothing is in it: it is not the folder of a run.")
    started, ended = session(lines)
    status, why = _status(started, ended)
    steps = [line for line in lines if line.get("kind") == "step"]
    scalars: dict[str, list[float]] = {}
    for line in steps:
        for key, value in line.items():
            if key not in PLACE:
                scalars.setdefault(key, []).append(value)
    newest = latest(path / "snapshots")
    return Record(
        name=name or path.name,
        path=path,
        status=status,
        why=why,
        steps=steps[-1]["step"] + 1 if steps else int(started.get("step", 0)),
        time_s=_trained_s(lines),
        started=started,
        began=next((line["began"] for line in lines if line.get("began")), ""),
        snapshot=int(newest.name.removeprefix("step-")) if newest is not None else None,
        scalars=scalars,
        validation=validations(lines),
        segments=[(line["steps"], line["time_s"]) for line in lines if line.get("kind") == "segment"],
    )


def row_of(record: Record) -> Row:
    """The record without its series."""
    return Row(
        name=record.name,
        path=record.path,
        status=record.status,
        why=record.why,
        step=record.steps,
        steps=record.started.get("steps"),
        last=record.metrics,
        best=record.best,
        began=record.began,
        time_s=record.time_s,
        snapshot=record.snapshot,
    )


def _folders(top: Path) -> Iterator[Path]:
    """Folders with a log that says something; what cannot hold runs is not walked through."""
    for path, folders, files in os.walk(top):
        folders[:] = sorted(name for name in folders if not NO_RUNS.match(name))
        if LOG in files and (Path(path) / LOG).stat().st_size:
            yield Path(path)


def _name(path: Path, top: Path) -> str:
    return path.relative_to(top).as_posix() if path != top else top.absolute().name


def _status(started: Mapping[str, Any], ended: Mapping[str, Any]) -> tuple[str, str]:
    """How a run is, and why."""
    outcome = str(ended.get("outcome", ""))
    if outcome in ("done", "interrupted"):
        return outcome, ""
    if outcome.startswith("stopped: "):
        return "stopped", outcome.removeprefix("stopped: ")
    if outcome:
        return "failed", outcome
    alive = is_alive(started)
    if alive is None:
        where = f"it was on host {started['host']}" if started.get("host") else "its log does not say where it was"
        return "unfinished", f"its process cannot be looked at from here: {where}"
    return ("going on", "") if alive else ("unfinished", "its process is gone")


def _trained_s(lines: Sequence[Mapping[str, Any]]) -> float:
    """Seconds of all sessions: what their ends say, or their segments where there is no end."""
    starts = [i for i, line in enumerate(lines) if line.get("kind") == "started"]
    total = 0.0
    for a, b in pairwise([*starts, len(lines)]):
        _, ended = session(lines[a:b])
        segments = sum(line["time_s"] for line in lines[a:b] if line.get("kind") == "segment")
        total += ended.get("time_s", segments)
    return total


def _numbers(metrics: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {number(value)}" for name, value in metrics.items())


def _time(time_s: float) -> str:
    minutes, seconds = divmod(round(time_s), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
