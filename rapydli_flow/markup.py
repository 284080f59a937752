"""Small HTML that notebooks show: tables, a bar, curves as inline SVG. Nothing is loaded from elsewhere.

Text takes the colour of the page, so that it reads on light and dark ones. All words are escaped here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from math import isfinite, log10

TRAIN, HELD_OUT, SOFT = "#4a83cf", "#dd7420", "#8390a0"
MOST_ROWS, MOST_POINTS = 40, 400
WIDTH, HEIGHT, LEFT, TOP, FOOT = 460.0, 150.0, 52.0, 8.0, 20.0

Points = Sequence[tuple[float, float]]


def table(
    head: Sequence[str],
    rows: Sequence[Sequence[object]],
    *,
    right: int = 0,
    colors: Mapping[tuple[int, int], str] | None = None,
    most: int = MOST_ROWS,
) -> str:
    """A table; the last ``right`` columns hold numbers. Of many rows the first ``most``.

    ``colors``: the background of the cell in a row and column, counted from 0 below the header.
    """
    first = len(head) - right

    def row(cells: Sequence[object], tag: str, at: int = -1) -> str:
        style = "text-align:{};padding:1px 12px;font-variant-numeric:tabular-nums;vertical-align:top{}"
        each = []
        for i, cell in enumerate(cells):
            color = (colors or {}).get((at, i))
            words = style.format("left" if i < first else "right", f";background:{color}" if color else "")
            each.append(f'<{tag} style="{words}">{escape(str(cell))}</{tag}>')
        return f"<tr>{''.join(each)}</tr>"

    body = "".join(row(cells, "td", at) for at, cells in enumerate(rows[:most]))
    shown = f'<table style="font-size:12px;border-collapse:collapse"><thead>{row(head, "th")}</thead>{body}</table>'
    return shown + (small(f"and {len(rows) - most:,} more") if len(rows) > most else "")


def title(text: str, words: str = "") -> str:
    """A heading, and what is said beside it."""
    return (
        f'<div style="margin:2px 0 6px"><b>{escape(text)}</b> <span style="color:{SOFT}">{escape(words)}</span></div>'
    )


def small(text: str) -> str:
    """A note."""
    return f'<div style="font-size:12px;color:{SOFT};margin:3px 0">{escape(text)}</div>'


def link(address: str, text: str) -> str:
    """A link to a file or page."""
    return f'<a href="{escape(address)}" target="_blank">{escape(text)}</a>'


def bar(part: float, *, color: str = TRAIN) -> str:
    """How much of something is done, 0 to 1."""
    percent = 100.0 * min(max(part, 0.0), 1.0)
    inside = f'<div style="width:{percent:.1f}%;height:100%;border-radius:4px;background:{color}"></div>'
    return f'<div style="height:8px;border-radius:4px;background:{SOFT}40;margin:5px 0;max-width:960px">{inside}</div>'


def size(size_bytes: float) -> str:
    """Bytes as people read them: 1.5 MB."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if size_bytes < 1000 or unit == "TB":
            return f"{size_bytes:.3g} {unit}" if unit != "B" else f"{size_bytes:.0f} B"
        size_bytes /= 1000
    raise AssertionError


def number(name: str, value: float) -> str:
    """A metric: accuracies in percent."""
    return f"{value:.2%}" if "accuracy" in name and isfinite(value) else f"{value:.4g}"


def spans(name: str, least: float, most: float) -> bool:
    """Does a logarithmic axis help? Not for shares of 1."""
    return least > 0 and most > 20 * least and "accuracy" not in name


def curve(
    name: str, training: Points, validation: Points = (), *, labels: tuple[str, str] = ("training", "validation")
) -> str:
    """A number over steps as SVG; '' where there is nothing to draw. Spread out values get a logarithmic axis."""
    lines = [[(x, y) for x, y in _thinned(points) if isfinite(y)] for points in (training, validation)]
    known = [point for line in lines for point in line]
    if len(known) < 2:
        return ""
    values = [y for _, y in known]
    log = spans(name, min(values), max(values))
    scale = log10 if log else float
    lo, hi = scale(min(values)), scale(max(values))
    lo, hi = (lo, hi) if hi > lo else (lo - 0.5, hi + 0.5)
    first, last = min(x for x, _ in known), max(x for x, _ in known)
    across = (last - first) or 1.0

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            LEFT + (x - first) / across * (WIDTH - LEFT - 8.0),
            TOP + (hi - scale(y)) / (hi - lo) * (HEIGHT - TOP - FOOT),
        )

    parts = []
    for share in (0.0, 0.5, 1.0):
        y = hi - share * (hi - lo)
        at = TOP + share * (HEIGHT - TOP - FOOT)
        parts.append(f'<path d="M{LEFT} {at:.1f}H{WIDTH - 8.0}" stroke="{SOFT}" stroke-opacity=".3"/>')
        text = f"{10.0**y if log else y:.3g}"
        parts.append(_text(LEFT - 7.0, at + 3.5, text, "end"))
    parts += [
        _text(LEFT, HEIGHT - 4.0, f"{first:,.0f}", "start"),
        _text(WIDTH - 8.0, HEIGHT - 4.0, f"{last:,.0f}", "end"),
    ]
    for line, color, width in zip(lines, (TRAIN, HELD_OUT), (1.3, 2.0), strict=True):
        d = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in line))
        if line:
            parts.append(
                f'<polyline points="{d}" fill="none" stroke="{color}" stroke-width="{width}" stroke-linejoin="round"/>'
            )
    words = [
        (name, SOFT),
        *([(labels[0], TRAIN)] if lines[0] and labels[0] else []),
        *([(labels[1], HELD_OUT)] if lines[1] and labels[1] else []),
    ]
    legend = "".join(
        f'<tspan fill="{color}" dx="{8 * bool(i)}">{escape(word)}</tspan>' for i, (word, color) in enumerate(words)
    )
    parts.append(
        f'<text x="{(LEFT + WIDTH) / 2}" y="{HEIGHT - 4.0}" text-anchor="middle" font-size="11">{legend}</text>'
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH:.0f} {HEIGHT:.0f}" width="{WIDTH:.0f}" '
        f'height="{HEIGHT:.0f}" style="max-width:100%;font-family:system-ui,sans-serif">{"".join(parts)}</svg>'
    )


def curves(training: Mapping[str, Points], validation: Mapping[str, Points]) -> str:
    """A curve for each number, side by side; the loss first."""
    names = sorted(dict.fromkeys([*training, *validation]), key=lambda name: name != "loss")
    drawn = "".join(curve(name, training.get(name, ()), validation.get(name, ())) for name in names)
    return f'<div style="display:flex;flex-wrap:wrap;gap:6px 18px">{drawn}</div>' if drawn else ""


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="11" fill="{SOFT}">{text}</text>'


def _thinned(points: Points) -> Points:
    """Few enough points for a small picture, the last one always."""
    stride = -(-len(points) // MOST_POINTS) or 1
    return points[::-1][::stride][::-1]
