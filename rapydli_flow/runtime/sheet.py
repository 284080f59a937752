"""A run as a notebook shows it: its last numbers, its curves, and where the report is."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from .. import markup
from .events import Validated


def sheet(
    steps: int, scalars: Mapping[str, Sequence[float]], validation: Sequence[Validated], path: Path | None
) -> str:
    """HTML of a run of ``steps`` steps, of which the last have these scalars."""
    first = steps - max((len(values) for values in scalars.values()), default=0)
    training = {name: [(first + i, v) for i, v in enumerate(values)] for name, values in scalars.items()}
    held_out: dict[str, list[tuple[float, float]]] = {}
    for event in validation:
        for name, value in event.metrics.items():
            held_out.setdefault(name, []).append((event.step - 1, value))
    rows = [(name, _last(name, training), _last(name, held_out)) for name in dict.fromkeys([*training, *held_out])]
    head = ("", "training", "validation") if held_out else ("", "training")
    shown = markup.table(head, [row[: len(head)] for row in rows], right=len(head) - 1) if rows else ""
    return markup.title("Run", f"{steps:,} steps") + shown + markup.curves(training, held_out) + _files(path)


def _last(name: str, series: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    return markup.number(name, series[name][-1][1]) if series.get(name) else ""


def _files(path: Path | None) -> str:
    """The folder of the run, with a link to the report if it is there."""
    if path is None:
        return ""
    report = path / "report.html"
    words = markup.link(os.path.relpath(report), "report") if report.exists() else ""
    return markup.small(f"kept in {path}") + words
