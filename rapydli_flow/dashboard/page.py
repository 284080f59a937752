"""The page "rapydli" on Dask's own dashboard: what runs do while they do it.

It runs on the scheduler, in the Bokeh server that is there: loss and metrics, records a second, working and
waiting, time by op, what ranks do from when to when and send to each other, the memory of each worker against the plan,
events. Figures and words are those of the
report. What it shows comes from `rapydli_flow.runtime.publish`, memory from the scheduler's own numbers.
"""

from __future__ import annotations

from html import escape
from typing import Any

from bokeh.layouts import column, row
from bokeh.models import ColumnDataSource
from bokeh.models.ui import UIElement
from bokeh.models.widgets import Div, Select

from . import parts
from .curves import columns, curves, form
from .history import History, Told
from .metrics import runs
from .serving import CARD, SHEET, fill, prefix_of, serve

PATH = "rapydli"
NEWEST = ("", "newest run")
Options = list[str | tuple[Any, str]]  # of a choice


def install(scheduler: Any) -> Page | None:
    """Add the page to a running scheduler; None where there is no dashboard to add it to."""
    prefix = prefix_of(scheduler)
    return Page(scheduler, prefix) if prefix is not None else None


class Page:
    """The page of one scheduler, and what it remembers."""

    def __init__(self, scheduler: Any, prefix: str) -> None:
        self.scheduler, self.history = scheduler, History()
        self.clocks: dict[str, dict[str, float]] = {}
        serve(scheduler, prefix, PATH, self.open)
        runs.add(self.history)

    def hear(self, message: Any) -> None:
        """A message of a run."""
        lines = message.get("lines", ())
        run = self.history.runs.get(str(message.get("run")))
        tasks = message.get("tasks") or (run.about.get("tasks") if run else None)
        if tasks:
            for line in lines:
                if line.get("kind") == "segment" and not line.get("ops"):
                    line["ops"] = self._in_tasks(str(message["run"]), tasks, line["steps"])
                elif line.get("kind") == "started":
                    self._in_tasks(str(message["run"]), tasks, 1)
        self.history.hear(message)
        self.clocks = {key: times for key, times in self.clocks.items() if key in self.history.runs}

    def leave(self, client: str) -> None:
        """A client is gone."""
        self.history.leave(client)

    def _in_tasks(self, key: str, names: list[str], steps: int) -> dict[str, float]:
        """Seconds a step in tasks of these names since the last call, where kernels are tasks of their own."""
        prefixes = self.scheduler.task_prefixes
        now = {name: prefixes[name].all_durations["compute"] for name in names if name in prefixes}
        before = self.clocks.get(key, {})
        self.clocks[key] = now
        spent = {name: (time_s - before.get(name, 0.0)) / steps for name, time_s in now.items()}
        return {name: time_s for name, time_s in spent.items() if time_s > 0}

    def memory(self, run: Told) -> str:
        """The memory of the workers of a run: of the process as the scheduler knows it, of the arena as planned."""
        workers = self.scheduler.workers
        addresses, arenas = run.about.get("addresses") or [], run.about.get("arena_bytes") or []
        rows = []
        if addresses:
            for rank, (address, arena) in enumerate(zip(addresses, arenas, strict=True)):
                rows.append((f"rank {rank}", address, arena))
        else:
            rows = [(str(w.name), address, 0) for address, w in workers.items()]
        shown = []
        for name, address, arena in rows:
            worker = workers.get(address)
            used = int(worker.metrics.get("memory", 0)) if worker is not None else 0
            limit = int(worker.memory_limit or 0) if worker is not None else 0
            shown.append((name if worker is not None else f"{name} (gone)", address, used, arena, limit))
        words = "of the worker's process; the mark is what the plan needs" if addresses else "of the workers' processes"
        return parts.memory(shown, words)

    def open(self, scheduler: Any, extra: dict[str, Any], doc: Any) -> None:
        """Make the document of one who looks."""
        fill(doc, extra, View(self), title="Dask: rapydli")


class View:
    """What one who looks sees: a run, chosen or the newest. Figures are made anew only when their form changes."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.sheet = parts.STYLE.read_text(encoding="utf-8") + SHEET.read_text(encoding="utf-8")
        self.form: Any = None
        self.seen: Any = None
        self.sources: dict[str, Any] = {}
        options: Options = [NEWEST]
        self.choice = Select(name="run", options=options, value="", width=230, margin=(14, 0, 0, 20))
        self.choice.on_change("value", lambda attr, old, new: self.refresh())
        self.words = {
            name: Div(text="", name=name, stylesheets=[self.sheet], sizing_mode="stretch_width", margin=0)
            for name in ("header", "tiles", "ops", "memory", "ranks", "links", "events", "plan")
        }
        wide: dict[str, Any] = {"sizing_mode": "stretch_width"}
        self.figures = column(name="figures", spacing=14, **wide)
        self.root = column(
            row(self.words["header"], self.choice, **wide),
            self.words["tiles"],
            self.figures,
            row(self.words["ops"], self.words["memory"], spacing=14, **wide),
            self.words["ranks"],
            self.words["links"],
            self.words["events"],
            self.words["plan"],
            name="page",
            spacing=14,
            **wide,
        )
        self.refresh()

    @property
    def run(self) -> Told | None:
        history = self.page.history
        return history.runs.get(self.choice.value) or history.newest

    def refresh(self) -> None:
        """Show what has changed."""
        runs: Options = [NEWEST, *((run.key, run.label) for run in reversed(self.page.history.runs.values()))]
        if self.choice.options != runs:
            self.choice.options = runs
        run = self.run
        if run is None:
            self._say(header="<header><h1>No run yet</h1>What rf.fit(..., client=client) does is shown here.</header>")
            return
        self._say(memory=self.page.memory(run))
        if self.seen == (run.key, run.changed) and run.over:
            return
        numbers = run.numbers()
        self._say(header=parts.header(numbers, run.name) + parts.done(numbers))
        if self.seen == (run.key, run.changed):
            return
        self.seen = (run.key, run.changed)
        self._say(
            tiles=parts.tiles(numbers),
            ops=parts.time(numbers),
            ranks=parts.ranks(numbers),
            links=parts.links(run.about.get("sent_bytes") or ()),
            events=parts.events(numbers, newest_first=True),
            plan=parts.plan(numbers),
        )
        now = (run.key, form(numbers))
        if self.form == now:
            for name, data in columns(numbers).items():
                self.sources[name].data = data
        else:
            self.form = now
            self._draw(curves(numbers))

    def _say(self, **words: str) -> None:
        for name, text in words.items():
            if self.words[name].text != text:
                self.words[name].text = text

    def _draw(self, drawn: list[tuple[str, Any]]) -> None:
        """Figures in cards, two beside each other."""
        cards = [
            column(
                Div(text=f"<h2>{escape(title)}</h2>", stylesheets=[self.sheet], margin=0),
                figure,
                sizing_mode="stretch_width",
                styles=CARD,
            )
            for title, figure in drawn
        ]
        pairs: list[UIElement] = [
            row(*cards[i : i + 2], spacing=14, sizing_mode="stretch_width") for i in range(0, len(cards), 2)
        ]
        self.sources = {s.name: s for _, figure in drawn for s in figure.select({"type": ColumnDataSource}) if s.name}
        self.figures.children = pairs
