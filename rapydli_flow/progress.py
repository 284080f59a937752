"""A progress bar for a terminal; a picture in a notebook; plain lines, few of them, where there is neither.

epoch 3/30  step 66  loss 0.3551  accuracy 0.8876  3,266 records/s ━━━━━━╸━━━━  10% 0:00:12 0:01:40
"""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from .notebook import NotebookProgress
from .runtime.events import Callback, Ended, Event, Started, Stepped, Validated
from .runtime.session import Progress as Tuned

LINES = 10  # at least, of a whole run, where there is no terminal


class ProgressBar(Callback):
    """Shows the plan of a run and how far it is: ``rf.fit(..., callbacks=[ProgressBar()])``.

    It finds out where it is: in a notebook it draws a bar and curves, in a terminal a bar, elsewhere it prints
    lines. With a ``console`` it writes there.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console()
        self.notebook = NotebookProgress() if self.console.is_jupyter else None
        self.started = Started(0, 1, 1, 1, 1, 1, "")
        self.bar: Progress | None = None
        self.task = TaskID(0)
        self.printed = 0
        self.speed = ""
        self.validates = False

    def on_event(self, event: Event) -> None:
        if self.notebook is not None:
            self.notebook.on_event(event)
        elif isinstance(event, Started):
            self._start(event)
        elif isinstance(event, Stepped):
            self._step(event)
        elif isinstance(event, Validated):
            self.printed, self.validates = event.step, True
            self._line(self._words(event.epoch, event.step, event.metrics, "validation: "))
        elif isinstance(event, Ended):
            self._end(event)

    def _start(self, event: Started) -> None:
        self.started, self.printed, self.speed = event, event.step, ""
        if event.explanation:
            self._line(event.explanation)
        if event.step:
            self._line(f"resumed at step {event.step:,}")
        if not self.console.is_terminal:
            return
        self.bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
            expand=True,
        )
        self.task = self.bar.add_task("compiling and loading", total=event.steps, completed=event.step)
        self.bar.start()

    def _step(self, event: Stepped) -> None:
        done = event.first + event.steps
        if event.time_s > 0:
            self.speed = f"{event.steps * self.started.batch / event.time_s:,.0f} records/s"
        last = {name: values[-1] for name, values in event.scalars.items() if values}
        words = self._words(-(-done // self.started.steps_per_epoch), done, last)
        if self.bar is not None:
            self.bar.update(self.task, completed=done, description=words)
            return
        follows = self.validates and done % self.started.steps_per_epoch == 0  # a line with better numbers
        if (done - self.printed) * LINES >= self.started.steps and not follows:
            self.printed = done
            self._line(f"{100 * done // self.started.steps:3d}%  {words}")

    def _end(self, event: Ended) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None
        self._line(f"{event.outcome} after {event.step:,} of {self.started.steps:,} steps, {event.time_s:.1f} s")

    def _words(self, epoch: int, step: int, metrics: Mapping[str, float], what: str = "") -> str:
        epochs = -(-self.started.steps // self.started.steps_per_epoch)
        numbers = "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())
        return "  ".join(
            part for part in (f"epoch {epoch}/{epochs}", f"step {step:,}", what + numbers, self.speed) if part
        )

    def _line(self, text: str) -> None:
        """Above the bar, if there is one. Plans and errors have brackets, which are no markup."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)


class TuningBar:
    """Shows how a tuning session goes: ``rf.autotune(step, watch=TuningBar())``. A bar in a terminal, else lines."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console()
        self.bar: Progress | None = None
        self.task = TaskID(0)

    def __enter__(self) -> TuningBar:
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

    def __call__(self, progress: Tuned) -> None:
        if not self.console.is_terminal:
            if progress.ended and progress.trials > 1:
                self.console.print(str(progress), markup=False, highlight=False, soft_wrap=True)
            return
        if self.bar is None:
            columns = (TextColumn("{task.description}", markup=False), BarColumn(bar_width=None), TimeElapsedColumn())
            self.bar = Progress(*columns, console=self.console, expand=True)
            self.task = self.bar.add_task("", total=progress.budget_s)
            self.bar.start()
        if progress.ended and progress.trials > 1:
            self.bar.console.print(str(progress), markup=False, highlight=False)
        self.bar.update(self.task, description=str(progress), completed=min(progress.elapsed_s, progress.budget_s))
