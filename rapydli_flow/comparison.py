"""What a run came to, in a few numbers, and two runs beside each other.

Metrics are those of the validation set; of the training steps where nothing was validated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from math import isnan
from statistics import median
from typing import Any, Protocol

from .graph import Graph
from .ops import Leaf
from .runtime.events import Validated, direction

SETTINGS = ("steps_per_epoch", "batch", "ranks", "threads", "granularity", "seed", "version", "host")
Row = Sequence[str]


@dataclass(frozen=True)
class Summary:
    """What a run came to. ``records_s``: records a second, the median over segments but the first."""

    name: str
    outcome: str
    steps: int
    last: Mapping[str, float]
    best: Mapping[str, float]
    records_s: float | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)


class Comparable(Protocol):
    """A run, live or found again."""

    def summary(self) -> Summary:
        """What it came to."""


@dataclass(frozen=True)
class Comparison:
    """Two runs beside each other; prints as a table."""

    one: Summary
    other: Summary

    @property
    def differences(self) -> dict[str, tuple[Any, Any]]:
        """What was set otherwise, as far as both runs say it; None where only one of them does."""
        names = dict.fromkeys([*self.one.settings, *self.other.settings])
        pairs = {name: (self.one.settings.get(name), self.other.settings.get(name)) for name in names}
        return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}

    def rows(self) -> list[Row]:
        """A header; then outcome, metrics, steps and speed; then what was set otherwise."""
        one, other = self.one, self.other
        out: list[Row] = [("", one.name, other.name), ("outcome", one.outcome, other.outcome)]
        out.append(("steps", f"{one.steps:,}", f"{other.steps:,}"))
        for title, mine, its in (("last", one.last, other.last), ("best", one.best, other.best)):
            for name in dict.fromkeys([*mine, *its]):
                out.append((f"{title} {name}", number(mine.get(name)), number(its.get(name))))
        out.append(("records/s", _speed(one.records_s), _speed(other.records_s)))
        out += [(name, _words(a), _words(b)) for name, (a, b) in self.differences.items()]
        return out

    def __repr__(self) -> str:
        return text_table(self.rows())

    def _repr_html_(self) -> str:
        return html_table(self.rows())


# numbers of a run ---------------------------------------------------------------------------------------


def last_metrics(validation: Sequence[Validated], scalars: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The last validation metrics, or the scalars of the last step."""
    if validation:
        return dict(validation[-1].metrics)
    return {name: values[-1] for name, values in scalars.items() if values}


def best_metrics(validation: Sequence[Validated], scalars: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The best value of each metric, where its name tells which direction is better."""
    series: dict[str, list[float]] = {name: list(values) for name, values in scalars.items()}
    if validation:
        series = {}
        for event in validation:
            for name, value in event.metrics.items():
                series.setdefault(name, []).append(value)
    out = {}
    for name, values in series.items():
        known, way = [value for value in values if not isnan(value)], direction(name)
        if known and way:
            out[name] = min(known) if way == "min" else max(known)
    return out


def records_s(batch: int | None, segments: Sequence[tuple[int, float]]) -> float | None:
    """Records a second from (steps, seconds) of segments; the first one also loads code and data."""
    speeds = [steps / time_s for steps, time_s in segments[1:] or segments if time_s > 0]
    return batch * median(speeds) if batch and speeds else None


def settings_of(started: Mapping[str, Any]) -> dict[str, Any]:
    """What made the run what it is, from its 'started' line or event."""
    known = {name: started[name] for name in SETTINGS if name in started}
    known |= {"steps asked for": started["steps"]} if "steps" in started else {}
    plan = {"plan": started["explanation"]} if started.get("explanation") else {}
    return {**known, **started.get("settings", {}), **plan}


def optimizer_words(step: Graph) -> str:
    """The ops that update parameters, and those that make their rates, which depend on clocks only."""
    timed: dict[int, bool] = {}
    for i, node in enumerate(step.nodes):
        if isinstance(node.op, Leaf):
            timed[i] = node.op.kind == "clock"
        else:
            timed[i] = bool(node.inputs) and all(timed[j] for j, _ in node.inputs)
    words: dict[str, None] = {}
    seen: set[int] = set()
    todo = [step.updates[leaf.name][0] for leaf in step.leaves("param") if leaf.name in step.updates]
    while todo:
        i = todo.pop(0)
        node = step.nodes[i]
        if i in seen or isinstance(node.op, Leaf):
            continue
        seen.add(i)
        words[str(node.op)] = None
        todo += [j for j, _ in node.inputs if timed[j]]
    return ", ".join(words)


# tables -------------------------------------------------------------------------------------------------


def number(value: float | None) -> str:
    """A metric in a table."""
    return "" if value is None else f"{value:.4g}"


def text_table(rows: Sequence[Row]) -> str:
    """A header and rows as aligned text; what has several lines shows its first."""
    cells = [[cell.split("\n")[0] for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    return "\n".join([lines[0], rule, *lines[1:]])


def html_table(rows: Sequence[Row]) -> str:
    """A header and rows as an HTML table."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in rows[0])
    body = "".join("<tr>" + "".join(f"<td>{_lines(cell)}</td>" for cell in row) + "</tr>" for row in rows[1:])
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _lines(cell: str) -> str:
    return escape(cell).replace("\n", "<br>")


def _speed(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}"


def _words(value: Any) -> str:
    return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)
