"""The report of a run: one HTML file that needs no network, made from ``metrics.jsonl``.

It shows how the run went, its curves and its speed, where the time of a step goes, what the network gets
wrong, the plan, the graph and the events. It can be written while a run goes on, and after one that failed.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from html import escape
from math import isfinite
from pathlib import Path
from typing import Any

from bokeh.embed import components
from bokeh.resources import Resources

from ..data import latest, read_snapshot
from ..errors import RapydliError
from ..graph import Graph, from_json
from ..graph.draw import sheet, svg
from ..version import __version__
from .curves import Predictions, curves, gallery
from .numbers import Numbers, read_numbers

__all__ = ["Predictions", "report"]

SHOWN_OPS = 14
STYLE = Path(__file__).with_name("report.css")


def report(
    run_dir: str | os.PathLike[str], *, predictions: Predictions | None = None, title: str | None = None
) -> Path:
    """Write ``report.html`` into the folder of a run; where it is.

    ``predictions``: test images with what the network said of them. SettingError where nothing was logged.
    """
    folder = Path(run_dir)
    numbers = read_numbers(folder)
    figures = dict(curves(numbers))
    drawn = dict(figures)
    shown = gallery(predictions) if predictions is not None else None
    if shown is not None:
        drawn["test images"] = shown[0]
    script, boxes = components(drawn) if drawn else ("", {})
    name = title or folder.absolute().name
    body = [
        _header(numbers, name),
        _tiles(numbers),
        '<div class="grid">' + "".join(_card(key, boxes[key]) for key in figures) + _time(numbers) + "</div>",
    ]
    if predictions is not None and shown is not None:
        body.append(_images(predictions, boxes["test images"], shown[1], shown[2]))
    body += [_plan(numbers), _graph(folder), _events(numbers)]
    scripts = Resources(mode="inline", components=["bokeh"]).render() if drawn else ""
    page = (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(name)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE.read_text(encoding="utf-8")}</style>\n'
        f"{scripts}"
        f"</head><body><main>{''.join(body)}<footer>rapydli_flow {__version__}</footer></main>{script}</body></html>\n"
    )
    path = folder / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


# parts of the page -------------------------------------------------------------------------------------


def _header(numbers: Numbers, name: str) -> str:
    started = numbers.started
    kind = "done" if numbers.done else "open" if numbers.outcome == "unfinished" else "bad"
    badge, _, message = (
        ("failed", ":", numbers.outcome)
        if kind == "bad" and numbers.outcome != "interrupted"
        else (numbers.outcome, "", "")
    )
    if kind == "open":
        message = "The log has no end: the run is still going on, or was killed. What is shown is what it wrote so far."
    words = [
        f"{numbers.steps:,} of {started['steps']:,} steps" if started.get("steps") else f"{numbers.steps:,} steps",
        f"{numbers.steps / started['steps_per_epoch']:.3g} epochs" if started.get("steps_per_epoch") else "",
        f"batch {started['batch']:,}" if started.get("batch") else "",
        _count(started.get("ranks"), "rank"),
        _count(started.get("threads"), "thread") + " each" if started.get("threads") else "",
        f"granularity {started['granularity']}" if started.get("granularity") else "",
        _duration(numbers.time_s) if numbers.time_s is not None else "",
    ]
    chips = "".join(f"<span>{escape(word)}</span>" for word in words if word)
    note = f'<p class="note {kind}">{escape(message)}</p>' if message else ""
    return (
        f'<header><h1>{escape(name)} <b class="badge {kind}">{escape(badge)}</b></h1><div class="chips">{chips}</div>'
        f"{note}</header>"
    )


def _tiles(numbers: Numbers) -> str:
    """The last numbers, large."""
    tiles: list[tuple[str, str, str]] = []
    for name in numbers.names:
        held_out = numbers.held_out.get(name)
        if held_out is not None:
            best = held_out.value.min() if name == "loss" else held_out.value.max()
            tiles.append((f"validation {name}", _value(name, held_out.value[-1]), f"best {_value(name, best)}"))
        else:
            tiles.append((f"training {name}", _value(name, numbers.train[name].value[-1]), "last step"))
    if numbers.step_s is not None:
        step_s = sorted(numbers.step_s.value)[len(numbers.step_s.value) // 2]
        if numbers.batch:
            tiles.append(("records a second", f"{numbers.batch / step_s:,.0f}", "median"))
        tiles.append(("a step", f"{1e3 * step_s:,.3g} ms", "median"))
    if numbers.feed_share is not None:
        tiles.append(("waiting for data", f"{numbers.feed_share:.1%}", "of the time"))
    each = "".join(f"<div><i>{escape(a)}</i><b>{escape(b)}</b><i>{escape(c)}</i></div>" for a, b, c in tiles)
    return f'<section class="tiles">{each}</section>' if tiles else ""


def _time(numbers: Numbers) -> str:
    """Horizontal bars: where the time of a step goes."""
    if not numbers.ops_s:
        return ""
    total = sum(numbers.ops_s.values())
    rows = list(numbers.ops_s.items())
    if len(rows) > SHOWN_OPS:
        rest = rows[SHOWN_OPS - 1 :]
        rows = [*rows[: SHOWN_OPS - 1], (f"{len(rest)} others", sum(v for _, v in rest))]
    longest = max(max(v for _, v in rows), 1e-12)
    bars = "".join(
        f'<tr><td>{escape(name)}</td><td><s style="width:{100 * v / longest:.1f}%"></s></td>'
        f"<td>{1e3 * v:.3f} ms</td><td>{v / total if total else 0:.1%}</td></tr>"
        for name, v in rows
    )
    words = f"{1e3 * total:.3g} ms in ops of one step, the median over segments"
    if numbers.feed_share is not None:
        words += f"; {numbers.feed_share:.1%} of the time waiting for data"
    return _card("time by op", f'<table class="bars">{bars}</table>', words)


def _images(predictions: Predictions, box: str, wrong: int, right: int) -> str:
    count, all_wrong = len(predictions.images), len(predictions.wrong)
    words = f"{count - all_wrong:,} of {count:,} right ({1 - all_wrong / max(1, count):.2%}). "
    words += f"{'The first' if wrong < all_wrong else 'All'} {wrong:,}" + (
        f" of {all_wrong:,}" if wrong < all_wrong else ""
    )
    words += f" wrong ones as label → predicted, then {right:,} of the right ones."
    return _card("test images", box, words, wide=True)


def _plan(numbers: Numbers) -> str:
    explanation = numbers.started.get("explanation")
    return _card("plan", f"<pre>{escape(str(explanation))}</pre>", wide=True) if explanation else ""


def _graph(folder: Path) -> str:
    """The table and picture of the network, from graph.json or the newest snapshot."""
    graph = _network(folder)
    if graph is None:
        return ""
    words = f"{graph.parameters:,} parameters, {graph.flops / 1e9:.3g} GFLOP a batch"
    parts = "".join(f'<div class="scroll">{part}</div>' for part in (sheet(graph), svg(graph)))
    return _card("network", f'<div class="network">{parts}</div>', words, wide=True)


def _network(folder: Path) -> Graph | None:
    try:
        if (folder / "graph.json").exists():
            return from_json((folder / "graph.json").read_text(encoding="utf-8"))
        newest = latest(folder / "snapshots")
        network = read_snapshot(newest).meta.get("network") if newest is not None else None
        return from_json(network) if network else None
    except RapydliError:  # a report of the numbers is worth having without the picture
        return None


def _events(numbers: Numbers) -> str:
    """Snapshots, validations, beginnings and ends."""
    rows = []
    for event in numbers.events:
        kind = str(event.get("kind", "?"))
        step = event.get("step")
        after = step + 1 if isinstance(step, int) and kind in ("validated", "saved") else step
        rest = {k: v for k, v in event.items() if k not in ("kind", "step", "explanation")}
        if kind == "saved":
            text = f"snapshots/step-{after:08d}" if isinstance(after, int) else ""
        else:
            text = ", ".join(f"{k} {_plain_value(v)}" for k, v in rest.items())
        rows.append((f"{after}" if after is not None else "", kind, text))
    return (
        _card("events", f'<div class="scroll">{_table(("step", "event", ""), rows)}</div>', wide=True) if rows else ""
    )


# pieces ------------------------------------------------------------------------------------------------


def _card(title: str, inside: str, words: str = "", *, wide: bool = False) -> str:
    note = f"<p>{escape(words)}</p>" if words else ""
    return f'<section class="card{" wide" if wide else ""}"><h2>{escape(title)}</h2>{note}{inside}</section>'


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    first = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    rest = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<table class="events"><thead><tr>{first}</tr></thead><tbody>{rest}</tbody></table>'


def _value(name: str, value: float) -> str:
    if not isfinite(value):
        return str(value)
    return f"{value:.2%}" if name == "accuracy" else f"{value:.4g}"


def _plain_value(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def _count(number: Any, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}" if number else ""


def _duration(time_s: float) -> str:
    minutes, seconds = divmod(time_s, 60)
    hours, minutes = divmod(int(minutes), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds:.0f} s" if minutes else f"{seconds:.1f} s"
