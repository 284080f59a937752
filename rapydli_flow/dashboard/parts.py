"""Parts of pages about a run, as HTML: the report has them all, the page on Dask's dashboard some of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ..markup import number, size
from ..runtime.events import SNAPSHOTS
from ..runtime.timeline import KINDS
from .numbers import Numbers

SHOWN_OPS, SHOWN_RANKS = 14, 16
STYLE = Path(__file__).with_name("report.css")
LOW = ("loss", "error", "perplexity")  # metrics that are better when they are smaller
BEGINNING = ("ranks", "threads", "batch", "steps", "granularity", "seed")  # what the table of events says of it


def header(numbers: Numbers, name: str) -> str:
    """What the run is called, how it stands, how far it is."""
    started, outcome = numbers.started, numbers.outcome
    badge, _, message = outcome.partition(": ")
    if numbers.done or badge == "stopped":  # by a callback, in good order
        kind = "done"
    elif outcome in ("unfinished", "running"):
        kind = "open"
    else:
        kind = "bad"
        badge, message = ("failed", outcome) if outcome != "interrupted" else (outcome, "")
    if outcome == "unfinished":
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


def done(numbers: Numbers) -> str:
    """A thin bar: how far the run is."""
    steps = numbers.started.get("steps") or 0
    return f'<div class="done"><s style="width:{100 * min(1, numbers.steps / steps):.1f}%"></s></div>' if steps else ""


def tiles(numbers: Numbers) -> str:
    """The last numbers, large."""
    shown: list[tuple[str, str, str]] = []
    for name in numbers.names:
        held_out = numbers.held_out.get(name)
        if held_out is not None:
            best = held_out.value.min() if any(word in name for word in LOW) else held_out.value.max()
            shown.append((f"validation {name}", number(name, held_out.value[-1]), f"best {number(name, best)}"))
        else:
            shown.append((f"training {name}", number(name, numbers.train[name].value[-1]), "last step"))
    if numbers.step_s is not None:
        step_s = sorted(numbers.step_s.value)[len(numbers.step_s.value) // 2]
        if numbers.batch:
            shown.append(("records a second", f"{numbers.batch / step_s:,.0f}", "median"))
        shown.append(("a step", f"{1e3 * step_s:,.3g} ms", "median"))
    if numbers.feed_share is not None:
        shown.append(("waiting for data", f"{numbers.feed_share:.1%}", "of the time"))
    each = "".join(f"<div><i>{escape(a)}</i><b>{escape(b)}</b><i>{escape(c)}</i></div>" for a, b, c in shown)
    return f'<section class="tiles">{each}</section>' if shown else ""


def time(numbers: Numbers, *, across: bool = False) -> str:
    """Horizontal bars: where the time of a step goes; ``across`` all columns of a grid."""
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
    return card("time by op", f'<table class="bars">{bars}</table>', words, across=across)


def ranks(numbers: Numbers) -> str:
    """Bars in parts: where each rank's time of a step goes; and a step of all ranks, one below the other."""
    if len(numbers.ranks_s) < 2:
        return ""
    longest = max(max(map(sum, numbers.ranks_s)), 1e-12)
    head = "".join(f'<td class="{kind}">{kind}</td>' for kind in KINDS)
    bars = f"<tr><td></td><td></td>{head}</tr>"
    for rank, times in enumerate(numbers.ranks_s):
        parts = zip(KINDS, times, strict=True)
        inside = "".join(f'<s class="{kind}" style="width:{100 * t / longest:.2f}%"></s>' for kind, t in parts)
        told = "".join(f"<td>{1e3 * t:.3g} ms</td>" for t in times)
        bars += f'<tr><td>rank {rank}</td><td><div class="stacked">{inside}</div></td>{told}</tr>'
    words = "of one step; over connections, what is on its way counts as waiting"
    return card("ranks", f'<table class="bars">{bars}</table>{_timeline(numbers)}', words, wide=True)


def _timeline(numbers: Numbers) -> str:
    """What each rank did from when to when in a step."""
    if not any(numbers.timeline):
        return ""
    end_s = max(spans[-1][2] for spans in numbers.timeline if spans)
    lanes = ""
    for rank, spans in enumerate(numbers.timeline):
        inside = "".join(
            f'<s class="{KINDS[kind]}" style="left:{100 * a / end_s:.2f}%;width:{100 * (b - a) / end_s:.2f}%" '
            f'title="{KINDS[kind]}: {1e3 * (b - a):.3g} ms from {1e3 * a:.3g} ms on"></s>'
            for kind, a, b in spans
        )
        lanes += f'<tr><td>rank {rank}</td><td><div class="lane">{inside}</div></td></tr>'
    ends = f'<tr><td></td><td><div class="ends"><i>0</i><i>{1e3 * end_s:.3g} ms</i></div></td></tr>'
    return f'<table class="bars timeline">{lanes}{ends}</table>'


def links(sent_bytes: Sequence[Sequence[int]]) -> str:
    """What each rank sends to each in a step: the more, the darker; of many ranks the first `SHOWN_RANKS`."""
    if len(sent_bytes) < 2:
        return ""
    shown = [row[:SHOWN_RANKS] for row in sent_bytes[:SHOWN_RANKS]]
    most = max(max(map(max, shown)), 1)
    head = "".join(f"<th>to {rank}</th>" for rank in range(len(shown)))
    rows = ""
    for rank, row in enumerate(shown):
        cells = "".join(
            f'<td style="background:rgba(221,116,32,{0.6 * sent / most:.2f})">{size(sent) if sent else ""}</td>'
            for sent in row
        )
        rows += f"<tr><th>rank {rank}</th>{cells}<td>{size(sum(sent_bytes[rank]))}</td></tr>"
    words = "what ranks send to each other in a step, by the plan"
    if len(shown) < len(sent_bytes):
        words += f"; the first {len(shown)} of {len(sent_bytes)}"
    return card(
        "links", f'<table class="links"><tr><th></th>{head}<th>together</th></tr>{rows}</table>', words, wide=True
    )


def plan(numbers: Numbers) -> str:
    explanation = numbers.started.get("explanation")
    return card("plan", f"<pre>{escape(str(explanation))}</pre>", wide=True) if explanation else ""


def events(numbers: Numbers, *, newest_first: bool = False) -> str:
    """Snapshots, validations, beginnings and ends."""
    rows = []
    for event in numbers.events:
        kind, step = str(event.get("kind", "?")), event.get("step")
        after = step + 1 if isinstance(step, int) and kind in ("validated", "saved") else step
        rows.append((f"{after:,}" if isinstance(after, int) else "", kind, _said(kind, after, event)))
    if newest_first:
        rows.reverse()
    return card("events", f'<div class="scroll">{_table(("step", "event", ""), rows)}</div>', wide=True) if rows else ""


def _said(kind: str, after: Any, event: Mapping[str, Any]) -> str:
    """What an event says of itself. Kinds that are not known here say all that they have."""
    if kind == "saved":
        folder = event.get("name", SNAPSHOTS)
        return (f"{folder}/step-{after:08d}" if folder == SNAPSHOTS else folder) if isinstance(after, int) else ""
    unsaid = ("kind", "step", "explanation", "addresses", "arena_bytes", "sent_bytes")
    rest = {k: v for k, v in event.items() if k not in unsaid and v is not None}
    if kind == "started":
        rest = {k: v for k, v in rest.items() if k in BEGINNING}
    return ", ".join(f"{k} {_plain(v)}" for k, v in rest.items())


def memory(rows: Iterable[tuple[str, str, int, int, int]], words: str) -> str:
    """Bars: name of a rank, its worker, bytes of the process, of the arena planned, and the limit (0: none)."""
    rows = list(rows)
    longest = max((max(used, arena, limit) for _, _, used, arena, limit in rows), default=0) or 1
    bars = ""
    for name, worker, used, arena, limit in rows:
        plan = f'<u style="width:{100 * arena / longest:.2f}%"></u>' if arena else ""
        full = f'<em style="left:{100 * limit / longest:.2f}%"></em>' if limit else ""
        bars += (
            f'<tr title="{escape(worker)}"><td>{escape(name)}</td>'
            f'<td><div class="gauge"><s style="width:{100 * used / longest:.2f}%"></s>{plan}{full}</div></td>'
            f"<td>{escape(size(used))}{f' of {escape(size(limit))}' if limit else ''}</td>"
            f"<td>{f'plan {escape(size(arena))}' if arena else ''}</td></tr>"
        )
    return card("memory", f'<table class="bars">{bars}</table>', words) if rows else ""


# pieces ------------------------------------------------------------------------------------------------


def card(title: str, inside: str, words: str = "", *, wide: bool = False, across: bool = False) -> str:
    note = f"<p>{escape(words)}</p>" if words else ""
    kind = "card" + " wide" * wide + " across" * across
    return f'<section class="{kind}"><h2>{escape(title)}</h2>{note}{inside}</section>'


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    first = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    rest = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<table class="events"><thead><tr>{first}</tr></thead><tbody>{rest}</tbody></table>'


def _plain(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def _count(number: Any, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}" if number else ""


def _duration(time_s: float) -> str:
    minutes, seconds = divmod(time_s, 60)
    hours, minutes = divmod(int(minutes), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds:.0f} s" if minutes else f"{seconds:.1f} s"
