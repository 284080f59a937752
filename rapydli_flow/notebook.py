"""The progress of a run in a notebook: a bar, the last numbers and curves, drawn anew in the same place."""

from __future__ import annotations

import time
from collections.abc import Mapping
from html import escape
from typing import Any

from . import markup
from .runtime.events import Callback, Ended, Event, Started, Stepped, Validated

DRAW_S = 0.3  # at least, from one picture to the next
KEPT = 2000  # points of a curve; every second one goes when there are more
GOOD, BAD = "#65a03c", "#c8324f"


class NotebookProgress(Callback):
    """What `rapydli_flow.ProgressBar` shows in a notebook."""

    def __init__(self) -> None:
        self.output: Any = None
        self._begin(Started(0, 1, 1, 1, 1, 1, ""))

    def _begin(self, event: Started) -> None:
        self.started, self.done, self.speed, self.outcome = event, event.step, "", ""
        self.begun = self.drawn = time.monotonic()
        self.training: dict[str, list[tuple[float, float]]] = {}
        self.validation: dict[str, list[tuple[float, float]]] = {}

    def on_event(self, event: Event) -> None:
        if isinstance(event, Started):
            self._begin(event)
        elif isinstance(event, Stepped):
            self.done = event.first + event.steps
            if event.time_s > 0:
                self.speed = f"{event.steps * self.started.batch / event.time_s:,.0f} records/s"
            for name, values in event.scalars.items():
                points = self.training.setdefault(name, [])
                points.extend((event.first + i, value) for i, value in enumerate(values))
                if len(points) > KEPT:
                    self.training[name] = points[::-1][::2][::-1]
        elif isinstance(event, Validated):
            self.done = event.step
            for name, value in event.metrics.items():
                self.validation.setdefault(name, []).append((event.step - 1, value))
        elif isinstance(event, Ended):
            self.done, self.outcome = event.step, event.outcome
        if isinstance(event, Started | Ended) or time.monotonic() - self.drawn >= DRAW_S:
            self._draw()

    def html(self) -> str:
        """The picture of this moment."""
        color = BAD if self._failed else GOOD if self.outcome else markup.TRAIN
        error = f'<div style="color:{BAD};margin:4px 0">{escape(self.outcome)}</div>' if self._failed else ""
        plan = self.started.explanation
        fold = (
            f'<details><summary style="font-size:12px;color:{markup.SOFT};cursor:pointer">plan</summary>'
            f'<pre style="font-size:12px;margin:2px 0">{escape(plan)}</pre></details>'
        )
        return (
            f'<div style="font:13px system-ui,sans-serif;font-variant-numeric:tabular-nums">{self._words()}'
            f"{markup.bar(self.done / max(1, self.started.steps), color=color)}"
            f"{error}{markup.curves(self.training, self.validation)}{fold if plan else ''}</div>"
        )

    @property
    def _failed(self) -> bool:
        return bool(self.outcome) and not self.outcome.startswith(("done", "stopped"))

    def _words(self) -> str:
        started = self.started
        taken = time.monotonic() - self.begun
        rest = taken / max(1, self.done - started.step) * (started.steps - self.done)
        epoch, epochs = -(-self.done // started.steps_per_epoch), -(-started.steps // started.steps_per_epoch)
        if self.outcome:
            ended = "failed" if self._failed else self.outcome
            state = f"{ended} after {self.done:,} of {started.steps:,} steps, {clock(taken)}"
        elif self.done == started.step:
            state = "compiling and loading" + (f", resumed at step {self.done:,}" if self.done else "")
        else:
            state = (
                f"epoch {epoch}/{epochs}, step {self.done:,} of {started.steps:,}, {clock(taken)}, {clock(rest)} to go"
            )
        numbers = [state, _last("", self.training), _last("validation ", self.validation), self.speed]
        return " \N{NO-BREAK SPACE}\N{MIDDLE DOT}\N{NO-BREAK SPACE} ".join(escape(part) for part in numbers if part)

    def _draw(self) -> None:
        from IPython.display import HTML, display  # only a notebook has it, and only there this is called

        self.drawn = time.monotonic()
        if self.output is None:
            self.output = display(HTML(self.html()), display_id=True)
        else:
            self.output.update(HTML(self.html()))
        if self.outcome:
            self.output = None  # another run draws below


def _last(what: str, series: Mapping[str, list[tuple[float, float]]]) -> str:
    return what + ", ".join(f"{name} {points[-1][1]:.4f}" for name, points in series.items()) if series else ""


def clock(time_s: float) -> str:
    """0:42, 12:05, 1:02:03."""
    minutes, seconds = divmod(round(time_s), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
