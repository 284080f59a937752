"""Simulation: strategies run on recorded times, no kernel runs. Which one finds good configs with few trials?

record = Recording.of("conv", trials)             every config of a space, measured once
curve = replay(record, "guided", seed=0)          the best time after 1, 2, 3, ... evaluations
report = compare(record, repeats=20)              the fraction of the optimum against evaluations
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from html import escape
from math import inf
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from .. import markup
from ..errors import SettingError
from ..space import Point, Space, calling
from .strategies import STRATEGIES, Strategy, named
from .trial import Trial

COLORS = ("#4a83cf", "#dd7420", "#65a03c", "#8d5fc4", "#c8324f", "#7a8794")
WIDTH, HEIGHT, LEFT, TOP, FOOT = 560.0, 260.0, 46.0, 12.0, 34.0
FLOOR = 0.5  # where the picture's axis begins


@dataclass(frozen=True)
class Recording:
    """Seconds of every config of a space (inf: it failed), the default first."""

    name: str
    points: tuple[tuple[tuple[str, Any], ...], ...]
    times: tuple[float, ...]

    @classmethod
    def of(cls, name: str, trials: Sequence[Trial]) -> Recording:
        """From the trials of one template. Raises SettingError where they are of several, or none has a time."""
        if len({t.choice.template for t in trials}) != 1 or not any(t.time_s for t in trials):
            raise SettingError(f"simulation: {name} needs trials of one template, some of them with a time.")
        return cls(name, tuple(t.choice.config for t in trials), tuple(t.time_s or inf for t in trials))

    @cached_property
    def space(self) -> Space:
        """The recorded points as a space."""
        columns = [dict(point) for point in self.points]
        names = list(columns[0])
        values = {n: sorted({c[n] for c in columns}, key=lambda v: (str(type(v)), v)) for n in names}
        inside = set(self.points)
        recorded = calling(lambda **config: tuple(sorted(config.items())) in inside, names)
        return Space(values, hard={"recorded": recorded})

    @cached_property
    def best_s(self) -> float:
        return min(self.times)

    @property
    def default(self) -> Point:
        return dict(self.points[0])

    def to_json(self) -> dict[str, Any]:
        names = [n for n, _ in self.points[0]]
        rows = [[*(v for _, v in p), t if t < inf else None] for p, t in zip(self.points, self.times, strict=True)]
        return {"name": self.name, "parameters": names, "rows": rows}

    @classmethod
    def from_json(cls, form: Mapping[str, Any]) -> Recording:
        names = form["parameters"]
        points = tuple(tuple(zip(names, row[:-1], strict=True)) for row in form["rows"])
        return cls(form["name"], points, tuple(inf if row[-1] is None else float(row[-1]) for row in form["rows"]))


def read_recordings(path: Path) -> list[Recording]:
    """The recordings of a file. Raises SettingError where it has none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return [Recording.from_json(form) for form in (found if isinstance(found, list) else [found])]
    except OSError as error:
        raise SettingError(f"{path} cannot be read: {error.strerror or error}.") from None
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise SettingError(f"{path} holds no recorded spaces: {type(error).__name__}: {error}.") from None


def replay(
    recording: Recording,
    strategy: str | Strategy,
    *,
    seed: int = 0,
    trials: int | None = None,
    batch: int = 4,
    cold: bool = False,
) -> list[float]:
    """The best time after each evaluation, up to ``trials`` of them.

    The search starts with the default, or if ``cold`` with a config by chance.
    """
    times = dict(zip(recording.points, recording.times, strict=True))
    function = named(strategy) if isinstance(strategy, str) else strategy
    start = recording.space.sample(1, np.random.default_rng(seed + 1)) if cold else [recording.default]
    search = function(recording.space, start, np.random.default_rng(seed), batch=batch)
    best = inf
    curve: list[float] = []
    most = trials or len(recording.points)
    try:
        asked = next(search)
        while len(curve) < most:
            told = [times[tuple(sorted(point.items()))] for point in asked]
            for time_s in told:
                best = min(best, time_s)
                curve.append(best)
            asked = search.send(told)
    except StopIteration:
        pass
    return curve[:most]


def evaluations(curve: Sequence[float], best_s: float, fraction: float) -> int | None:
    """How many evaluations it took to reach a fraction of the optimum; None: never."""
    return next((i for i, time_s in enumerate(curve, 1) if best_s / time_s >= fraction), None)


@dataclass(frozen=True)
class Comparison:
    """Strategies on one recording: the curves of all repeats of each, the best time after each evaluation."""

    recording: Recording
    curves: Mapping[str, tuple[tuple[float, ...], ...]]

    def fraction(self, strategy: str, share: float) -> float:
        """Median fraction of the optimum after a share of all evaluations."""
        at = max(1, int(share * len(self.recording.points)))
        return median(self.recording.best_s / curve[min(at, len(curve)) - 1] for curve in self.curves[strategy])

    def needed(self, strategy: str, fraction: float = 0.98) -> float | None:
        """Median share of all evaluations that reached a fraction of the optimum; None where half never did."""
        counts = [evaluations(curve, self.recording.best_s, fraction) or inf for curve in self.curves[strategy]]
        middle = median(counts)
        return middle / len(self.recording.points) if middle < inf else None

    def to_json(self) -> dict[str, Any]:
        size = len(self.recording.points)
        shares = (0.02, 0.05, 0.10, 0.15, 0.25, 0.5)
        return {
            "recording": self.recording.name,
            "points": size,
            "default_fraction": self.recording.best_s / self.recording.times[0],
            "strategies": {
                name: {
                    "share_of_evaluations_to_98": self.needed(name),
                    "fraction_of_optimum_after": {str(s): self.fraction(name, s) for s in shares},
                    "repeats": len(self.curves[name]),
                }
                for name in self.curves
            },
        }

    def __str__(self) -> str:
        shares = (0.05, 0.10, 0.15, 0.25)
        head = ("strategy", *(f"{s:.0%}" for s in shares), "to 98 %")
        rows = [head]
        for name in self.curves:
            needed = self.needed(name)
            cells = [f"{self.fraction(name, s):.3f}" for s in shares]
            rows.append((name, *cells, "never" if needed is None else f"{needed:.1%}"))
        widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
        title = f"{self.recording.name}: {len(self.recording.points):,} points"
        lines = [
            "  ".join(c.ljust(w) if not i else c.rjust(w) for i, (c, w) in enumerate(zip(r, widths, strict=True)))
            for r in rows
        ]
        return "\n".join([title, *lines])

    def svg(self) -> str:
        """The median fraction of the optimum over the share of evaluations."""
        size, parts = len(self.recording.points), []
        for mark in (0.5, 0.6, 0.7, 0.8, 0.9, 1.0):
            y = _y(mark)
            parts.append(f'<path d="M{LEFT} {y:.1f}H{WIDTH - 8}" stroke="{markup.SOFT}" stroke-opacity=".3"/>')
            parts.append(_text(LEFT - 6, y + 4, f"{mark:.0%}", "end"))
        for share in (0.0, 0.1, 0.2, 0.3, 0.4, 0.5):
            parts.append(_text(_x(share), HEIGHT - 18, f"{share:.0%}", "middle"))
        parts.append(_text((LEFT + WIDTH) / 2, HEIGHT - 3, "of all configs evaluated", "middle"))
        for name, color in zip(self.curves, COLORS, strict=False):
            shares = [i / size for i in range(1, size // 2 + 1)]
            line = " ".join(f"{_x(s):.1f},{_y(self.fraction(name, s)):.1f}" for s in shares)
            parts.append(f'<polyline points="{line}" fill="none" stroke="{color}" stroke-width="2"/>')
        legend = "".join(
            f'<tspan fill="{c}" dx="{10 * bool(i)}">{escape(n)}</tspan>'
            for i, (n, c) in enumerate(zip(self.curves, COLORS, strict=False))
        )
        parts.append(f'<text x="{WIDTH - 12}" y="{HEIGHT - FOOT - 8}" text-anchor="end" font-size="12">{legend}</text>')
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH:.0f} {HEIGHT:.0f}" width="{WIDTH:.0f}" '
            f'height="{HEIGHT:.0f}" style="max-width:100%;font-family:system-ui,sans-serif">{"".join(parts)}</svg>'
        )

    _repr_html_ = svg


def compare(
    recording: Recording,
    strategies: Sequence[str] = tuple(STRATEGIES),
    *,
    repeats: int = 20,
    batch: int = 4,
    cold: bool = False,
) -> Comparison:
    """Each strategy from ``repeats`` seeds, until half of the space is known; ``cold``: not from the default."""
    half = max(1, len(recording.points) // 2)
    how: dict[str, Any] = {"trials": half, "batch": batch, "cold": cold}
    curves = {
        name: tuple(tuple(replay(recording, name, seed=seed, **how)) for seed in range(repeats)) for name in strategies
    }
    return Comparison(recording, curves)


def _x(share: float) -> float:
    return LEFT + share / 0.5 * (WIDTH - LEFT - 8)


def _y(fraction: float) -> float:
    return TOP + (1 - max(fraction, FLOOR)) / (1 - FLOOR) * (HEIGHT - TOP - FOOT)


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="11" fill="{markup.SOFT}">{text}</text>'
