"""What the log of a run says, as arrays and values; nothing is drawn here.

Lines of a log may lack any field: a run that is going on, that failed, or that an older version wrote.
Steps are counted as in the log, from 0; times are in seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import SettingError
from ..runtime.events import read_log, session
from ..spec import Array

PLACE = ("kind", "step", "epoch")


@dataclass(frozen=True)
class Series:
    """A number over steps."""

    step: Array
    value: Array


@dataclass(frozen=True)
class Numbers:
    """A run as its log tells it. ``train`` and ``held_out`` hold a series for each scalar and metric.

    ``step_s``: seconds a step, ``feed_s``: how much of it records were waited for, where that is known. ``ranks_s``:
    seconds of a step of each rank by kind, as in `KINDS`; ``timeline``: what each rank did in a step, as number of a
    kind, begin and end.
    """

    started: dict[str, Any]
    outcome: str
    time_s: float | None
    steps: int
    train: dict[str, Series] = field(default_factory=dict)
    held_out: dict[str, Series] = field(default_factory=dict)
    step_s: Series | None = None
    feed_s: Series | None = None
    feed_share: float | None = None
    ops_s: dict[str, float] = field(default_factory=dict)
    ranks_s: tuple[tuple[float, ...], ...] = ()
    timeline: tuple[tuple[tuple[int, float, float], ...], ...] = ()
    events: tuple[dict[str, Any], ...] = ()

    @property
    def batch(self) -> int | None:
        return self.started.get("batch")

    @property
    def done(self) -> bool:
        return self.outcome == "done"

    @property
    def names(self) -> list[str]:
        """Loss first, then the other metrics."""
        known = list(dict.fromkeys([*self.train, *self.held_out]))
        return sorted(known, key=lambda name: name != "loss")


def read_numbers(run_dir: Path) -> Numbers:
    """The numbers of the run in this folder; SettingError where there is no log, or nothing in it."""
    path = run_dir / "metrics.jsonl"
    lines = read_log(path)
    if not lines:
        what = "is empty" if path.exists() else "does not exist"
        raise SettingError(f"report: {path} {what}. Train with rf.fit(..., run_dir={str(run_dir)!r}) first.")
    return numbers_of(lines)


def numbers_of(lines: Sequence[dict[str, Any]]) -> Numbers:
    """The numbers of the lines of a log."""
    steps = [line for line in lines if line.get("kind") == "step"]
    segments = [line for line in lines if line.get("kind") == "segment" and line.get("steps") and line.get("time_s")]
    started, ended = session(lines)
    warm = segments[1:] or segments  # the first segment also loads code and data
    return Numbers(
        started=dict(started),
        outcome=str(ended.get("outcome", "")) or "unfinished",
        time_s=ended.get("time_s"),
        steps=max((int(line.get("step", -1)) + 1 for line in steps), default=0),
        train=_series(steps),
        held_out=_series([line for line in lines if line.get("kind") == "validated"]),
        step_s=_step_s(warm, "time_s"),
        feed_s=_step_s([s for s in warm if _number(s.get("feed_s"))], "feed_s"),
        feed_share=_share(warm),
        ops_s=_ops(warm),
        ranks_s=next((tuple(map(tuple, s["ranks"])) for s in reversed(warm) if s.get("ranks")), ()),
        timeline=next((s["timeline"] for s in reversed(segments) if s.get("timeline")), ()),
        events=tuple(line for line in lines if line.get("kind") not in ("step", "segment")),
    )


def smooth(values: Array, width: int) -> Array:
    """The mean of each value and ``width - 1`` around it, as far as there are any; NaN is left out."""
    known = np.isfinite(values)
    total = np.concatenate([[0.0], np.cumsum(np.where(known, values, 0.0))])
    count = np.concatenate([[0], np.cumsum(known)])
    i = np.arange(len(values))
    lo, hi = np.maximum(i - width // 2, 0), np.minimum(i + (width + 1) // 2, len(values))
    n = count[hi] - count[lo]
    return np.where(n > 0, (total[hi] - total[lo]) / np.maximum(n, 1), np.nan)


def _series(lines: Sequence[dict[str, Any]]) -> dict[str, Series]:
    names = dict.fromkeys(name for line in lines for name, v in line.items() if name not in PLACE and _number(v))
    out = {}
    for name in names:
        pairs = [(line.get("step", 0), line[name]) for line in lines if _number(line.get(name))]
        out[name] = Series(np.array([a for a, _ in pairs], float), np.array([b for _, b in pairs], float))
    return out


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _step_s(segments: Sequence[dict[str, Any]], name: str) -> Series | None:
    """Seconds a step, at the middle of each segment."""
    if not segments:
        return None
    middle = [s.get("step", 0) + (s["steps"] - 1) / 2 for s in segments]
    return Series(np.array(middle, float), np.array([s[name] / s["steps"] for s in segments], float))


def _share(segments: Sequence[dict[str, Any]]) -> float | None:
    """The part of the time in which records were waited for."""
    known = [s for s in segments if _number(s.get("feed_s"))]
    return sum(s["feed_s"] for s in known) / sum(s["time_s"] for s in known) if known else None


def _ops(segments: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Seconds in each op in one step, the median over segments; the longest first."""
    timed = [s["ops"] for s in segments if s.get("ops")]
    names = dict.fromkeys(name for ops in timed for name in ops)
    median = {name: float(np.median([ops[name] for ops in timed if name in ops])) for name in names}
    return dict(sorted(median.items(), key=lambda pair: -pair[1]))
