"""The page "rapydli-tuning" on Dask's own dashboard: what a tuning session does while it does it.

The best time so far of each kernel over seconds, GFLOP/s against the measured peak of the machine, and the funnel from
the Cartesian space to timed kernels. It is told by `rapydli_flow.runtime.session` on the workers that tune.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import reduce
from html import escape
from itertools import pairwise
from operator import add
from typing import Any

from bokeh.layouts import column
from bokeh.models import ColumnDataSource, HoverTool
from bokeh.models.widgets import Div
from bokeh.plotting import figure

from ..tuner import Funnel, time_text
from . import parts
from .curves import INK, TRAIN, plain
from .serving import CARD, SHEET, fill, prefix_of, serve

PATH = "rapydli-tuning"
SESSIONS, POINTS, SHOWN = 6, 2000, 24
Line = Mapping[str, Any]


def install(scheduler: Any) -> TuningPage | None:
    """Add the page to a running scheduler; None where there is no dashboard to add it to."""
    prefix = prefix_of(scheduler)
    return TuningPage(scheduler, prefix) if prefix is not None else None


@dataclass
class Told:
    """One session, as far as it was told: the last line and the improvements of each kernel of each device."""

    last: dict[tuple[str, str], Line] = field(default_factory=dict)
    curves: dict[tuple[str, str], list[tuple[float, float]]] = field(default_factory=dict)
    newest: Line = field(default_factory=dict)
    changed: int = 0

    def hear(self, line: Line) -> None:
        self.changed += 1
        self.newest = line
        key = (str(line["device"]), str(line["kernel"]))
        self.last[key] = line
        if line.get("best_s") and line.get("default_s"):
            curve = self.curves.setdefault(key, [])
            if len(curve) < POINTS:
                curve.append((float(line["elapsed_s"]), float(line["default_s"]) / float(line["best_s"])))

    @property
    def funnel(self) -> Funnel:
        """Of all kernels that are done."""
        done = [Funnel.from_json(line["funnel"]) for line in self.last.values() if line.get("funnel")]
        return reduce(add, done, Funnel.empty())


class TuningPage:
    """The page of one scheduler, and what it remembers."""

    def __init__(self, scheduler: Any, prefix: str) -> None:
        self.sessions: dict[str, Told] = {}
        serve(scheduler, prefix, PATH, self.open)

    def hear(self, message: Any) -> None:
        """A line of a session."""
        told = self.sessions.setdefault(str(message["session"]), Told())
        told.hear(message)
        while len(self.sessions) > SESSIONS:
            self.sessions.pop(next(iter(self.sessions)))

    def open(self, scheduler: Any, extra: dict[str, Any], doc: Any) -> None:
        """Make the document of one who looks."""
        fill(doc, extra, View(self), title="Dask: rapydli tuning")


class View:
    """What one who looks sees: the newest session."""

    def __init__(self, page: TuningPage) -> None:
        self.page, self.seen = page, (0, -1)
        sheet = parts.STYLE.read_text(encoding="utf-8") + SHEET.read_text(encoding="utf-8")
        names = ("header", "kernels", "funnel")
        wide: dict[str, Any] = {"sizing_mode": "stretch_width"}
        self.words = {n: Div(text="", name=n, stylesheets=[sheet], margin=0, **wide) for n in names}
        self.source = ColumnDataSource({"x": [], "y": [], "kernel": [], "alpha": []}, name="curves")
        title = Div(text="<h2>best so far: times as fast as the default</h2>", stylesheets=[sheet], margin=0)
        self.root = column(
            self.words["header"],
            column(title, _figure(self.source), styles=CARD, **wide),
            self.words["kernels"],
            self.words["funnel"],
            name="page",
            spacing=14,
            **wide,
        )
        self.refresh()

    def refresh(self) -> None:
        """Show what has changed."""
        if not self.page.sessions:
            self.words[
                "header"
            ].text = "<header><h1>No tuning yet</h1>What rf.autotune(..., client) does is shown here.</header>"
            return
        told = list(self.page.sessions.values())[-1]
        if self.seen == (id(told), told.changed):
            return
        self.seen = (id(told), told.changed)
        self.words["header"].text = header(told)
        self.words["kernels"].text = kernels(told)
        funnel = told.funnel
        if funnel.stages[0].left:
            self.words["funnel"].text = _card("from the Cartesian space to timed kernels", funnel.svg())
        self.source.data = curves(told)


def header(told: Told) -> str:
    """Which kernel, how many trials, how much of the budget."""
    line = told.newest
    share = min(1.0, line["elapsed_s"] / line["budget_s"]) if line["budget_s"] else 1.0
    trials = sum(int(each["trials"]) for each in told.last.values())
    over = line["number"] == line["kernels"] and line["ended"]
    words = [
        f"kernel {line['number']} of {line['kernels']}",
        f"{trials:,} configs tried",
        f"{line['elapsed_s']:.0f} of {line['budget_s']:.0f} s",
        str(line["device"]),
        f"peak {line['peak_gflops']:,.0f} GFLOP/s" if line.get("peak_gflops") else "",
    ]
    chips = "".join(f"<span>{escape(word)}</span>" for word in words if word)
    badge = '<b class="badge done">done</b>' if over else '<b class="badge open">tuning</b>'
    bar = f'<div class="done"><s style="width:{100 * share:.1f}%"></s></div>'
    return f'<header><h1>{escape(str(line["kernel"]))} {badge}</h1><div class="chips">{chips}</div></header>{bar}'


def kernels(told: Told) -> str:
    """A row for each kernel: default, best, gain, GFLOP/s as a bar whose whole is the peak."""
    rows = []
    for line in list(told.last.values())[:SHOWN]:
        best, default, speed = line.get("best_s"), line.get("default_s"), line.get("gflops") or 0.0
        share = min(1.0, speed / line["peak_gflops"]) if line.get("peak_gflops") else 0.0
        cells = [
            time_text(default),
            time_text(best),
            f"{default / best:.2f}x" if best and default else "",
            f"{line['trials']}",
        ]
        bar = (
            f'<div style="background:#e6eaef;border-radius:3px;width:150px;display:inline-block">'
            f'<div style="background:{TRAIN};height:9px;border-radius:3px;width:{100 * share:.1f}%"></div></div>'
        )
        style = "text-align:right;white-space:nowrap;padding:1px 10px"
        numbers = "".join(f'<td style="{style}">{cell}</td>' for cell in cells)
        rows.append(
            f"<tr><td>{escape(str(line['kernel'])[:70])}</td>{numbers}"
            f"<td style='white-space:nowrap'>{bar} {speed:,.0f} ({share:.0%})</td>"
            f"<td>{escape(str(line['config']))}</td></tr>"
        )
    head = "".join(
        f'<th style="text-align:left;padding:1px 10px">{name}</th>'
        for name in ("kernel", "default", "best", "gain", "trials", "GFLOP/s, of peak", "config")
    )
    return _card("kernels, in the order of their share of the step", f"<table><tr>{head}</tr>{''.join(rows)}</table>")


def curves(told: Told) -> dict[str, list[Any]]:
    """A line for each kernel that got faster; what came before another began is pale."""
    out: dict[str, list[Any]] = {"x": [], "y": [], "kernel": [], "alpha": []}
    newest = (str(told.newest["device"]), str(told.newest["kernel"]))
    for key, curve in told.curves.items():
        x, y = zip(*curve, strict=True)
        out["x"].append([x[0], *(v for pair in zip(x[1:], x[1:], strict=True) for v in pair)])
        out["y"].append([y[0], *(v for pair in pairwise(y) for v in pair)])
        out["kernel"].append(str(told.last[key]["kernel"]))
        out["alpha"].append(1.0 if key == newest else 0.45)
    return out


def _figure(source: Any) -> Any:
    plot = figure(height=260, sizing_mode="stretch_width", tools="xpan,xwheel_zoom,box_zoom,reset")
    plain(plot)
    plot.xaxis.axis_label = "seconds"
    plot.yaxis.axis_label = "times as fast"
    for axis in (plot.xaxis, plot.yaxis):
        axis.axis_label_text_color = INK
        axis.axis_label_text_font_style = "normal"
    lines = plot.multi_line("x", "y", source=source, color=TRAIN, alpha="alpha", line_width=2)
    plot.add_tools(HoverTool(renderers=[lines], tooltips=[("kernel", "@kernel")]))
    return plot


def _card(title: str, inside: str) -> str:
    return f'<div class="card wide"><h2>{escape(title)}</h2>{inside}</div>'
