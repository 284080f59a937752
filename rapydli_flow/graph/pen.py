"""Writing a picture as SVG: the colours of boxes, and lines that run below them. They fit light and dark pages."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from html import escape

from .layout import PAD, Box, Frame, Point

LEGEND = 34.0
TITLE_W, DETAIL_W, COUNT_W, NAME_W = 7.6, 6.4, 6.4, 6.2  # of a letter, at most
OTHER, ENDS = "shape, sum", "input, output"
KINDS = {  # what a box can be: its fill, its line, and the files of rapydli_flow.ops; the most telling first
    "convolution, dense": ("#dbe9fb", "#4a83cf", ("conv", "dense")),
    "collective": ("#ffdfc6", "#dd7420", ("collective",)),
    "pooling": ("#d3f1ea", "#2f9d86", ("pool",)),
    "normalisation": ("#e8e0fa", "#8b6cd0", ("norm",)),
    "loss": ("#fcdce2", "#d2506c", ("loss", "element_loss")),
    "update": ("#dff1d3", "#65a03c", ("update", "rate")),
    "pointwise": ("#fdf0cd", "#cf9f28", ("pointwise", "activation", "elementary", "select", "softmax", "dropout")),
    OTHER: ("#e9ecf0", "#8c97a6", ()),
    ENDS: ("#ffffff", "#5f6b7a", ()),
}
STYLE = (
    ".rf{font:12px system-ui,-apple-system,'Segoe UI',Roboto,'DejaVu Sans',sans-serif}"
    ".rf .t{font-weight:600;fill:#1d2733}.rf .d{font:10.5px ui-monospace,Menlo,Consolas,'DejaVu Sans Mono',monospace;"
    "fill:#5b6776}.rf .p{font-size:10.5px;fill:#5b6776}.rf .n{font-size:11px;fill:#8390a0}"
    ".rf .h{font-size:13px;letter-spacing:.06em}"
    ".rf .f{fill:#8390a0;fill-opacity:.07;stroke:#8390a0;stroke-opacity:.45}"
    ".rf .e{fill:none;stroke:#8491a1;stroke-width:1.4}.rf .k{fill:none;stroke:#8491a1;stroke-opacity:.75;"
    "stroke-dasharray:3 3}.rf .a{fill:#8491a1}"
)


@dataclass
class Pen:
    """Collects the parts of a picture: borders lie below lines, lines below boxes."""

    borders: list[str] = field(default_factory=list)
    lines: dict[str, None] = field(default_factory=dict)  # in order, each once
    boxes: list[str] = field(default_factory=list)
    kinds: set[str] = field(default_factory=set)
    spots: dict[int, tuple[float, float, float]] = field(default_factory=dict)
    top: float = 0.0

    def frame(self, frame: Frame, x: float, y: float, *, up: bool = False, side: Point | None = None) -> None:
        """Draw what is in a frame whose corner is at x, y; ``up``: upside down, but the text."""
        for k, item in enumerate(frame.items):
            left, top = x + frame.x[k], y + (frame.h - frame.y[k] - item.h if up else frame.y[k])
            sides = side or (left, left + item.w)
            if isinstance(item, Frame):
                if item.name:
                    self.border(item, left, top, up)
                self.frame(item, left, top, up=up, side=sides if item.name else side)
                continue
            self.box(item, left, top)
            self.spots |= {i: (*sides, top + item.h / 2) for i in item.nodes}
        for route in frame.routes:
            points = [(x + px, y + (frame.h - py if up else py)) for px, py in route.points]
            self.line(points, route.head, up)

    def heading(self, text: str, x: float) -> None:
        self.top = 26.0
        self.borders.append(f'<text class="n h" x="{x:.1f}" y="-14" text-anchor="middle">{text}</text>')

    def border(self, frame: Frame, x: float, y: float, up: bool) -> None:
        self.borders.append(
            f'<rect class="f" x="{x:.1f}" y="{y:.1f}" width="{frame.w:.1f}" height="{frame.h:.1f}" rx="9"/>'
        )
        at = y + frame.h - 7 if up else y + 15
        self.borders.append(
            f'<text class="n" x="{x + 9:.1f}" y="{at:.1f}">{plain(_short(frame.name, frame.w - 18, NAME_W))}</text>'
        )

    def line(self, points: list[Point], head: bool, up: bool) -> None:
        path, (x, y) = [f"M{points[0][0]:.1f} {points[0][1]:.1f}"], points[0]
        for px, py in points[1:]:
            if abs(px - x) < 0.05:
                path.append(f"V{py:.1f}")
            else:
                middle = (y + py) / 2
                path.append(f"C{x:.1f} {middle:.1f} {px:.1f} {middle:.1f} {px:.1f} {py:.1f}")
            x, y = px, py
        self.lines.setdefault(f'<path class="e" d="{"".join(path)}"/>')
        if head:
            self.lines.setdefault(f'<path class="a" d="M{x:.1f} {y:.1f}l-3.5 {6 if up else -6}h7z"/>')

    def turn(self, x: float, y: float, across: float, to: float) -> None:
        """From the foot of a column to the head of the next."""
        self.lines.setdefault(
            f'<path class="e" d="M{x:.1f} {y:.1f}v4q0 8 8 8H{across - 8:.1f}'
            f'q8 0 8 -8V0q0 -8 8 -8H{to - 8:.1f}q8 0 8 8"/>'
        )

    def across(self, source: int, reader: int, leave: float, enter: float, *, kept: bool) -> None:
        """From a layer to one in another column, through the gutter; dashed if it is kept from the way down."""
        way = 1 if enter > leave else -1
        start, y = self.spots[source][way > 0], self.spots[source][2]
        end, to_y = self.spots[reader][way < 0], self.spots[reader][2]
        middle = (leave + enter) / 2
        self.lines.setdefault(
            f'<path class="{"k" if kept else "e"}" d="M{start:.1f} {y:.1f}H{leave:.1f}'
            f'C{middle:.1f} {y:.1f} {middle:.1f} {to_y:.1f} {enter:.1f} {to_y:.1f}H{end:.1f}"/>'
            f'<path class="a" d="M{end:.1f} {to_y:.1f}l{-6 * way} -3.5v7z"/>'
        )

    def around(self, source: int, reader: int, right: float) -> None:
        """From a layer to one in the same column, at its right side."""
        (_, start, y), (_, end, to_y) = self.spots[source], self.spots[reader]
        turn = 8 if to_y > y else -8
        self.lines.setdefault(
            f'<path class="e" d="M{start:.1f} {y:.1f}H{right + 12:.1f}q8 0 8 {turn}V{to_y - turn:.1f}'
            f'q0 {turn} -8 {turn}H{end:.1f}"/><path class="a" d="M{end:.1f} {to_y:.1f}l6 -3.5v7z"/>'
        )

    def box(self, box: Box, x: float, y: float) -> None:
        self.kinds.add(box.kind)
        fill, edge, _ = KINDS[box.kind]
        count = f"{box.parameters:,}" if box.parameters else ""
        room = box.w - 20
        title = _short(box.title, room - COUNT_W * len(count) - (8 if count else 0), TITLE_W)
        parts = [
            f'<g><title>{plain(box.tip)}</title><rect x="{x:.1f}" y="{y:.1f}" width="{box.w:.1f}" height="{box.h:.1f}"'
        ]
        parts.append(f' rx="{min(7.0, box.h / 2):.0f}" fill="{fill}" stroke="{edge}" stroke-width="1.2"/>')
        if not box.detail:
            parts.append(f'<text class="t" x="{x + box.w / 2:.1f}" y="{y + box.h / 2 + 4:.1f}" text-anchor="middle">')
        else:
            parts.append(f'<text class="t" x="{x + 10:.1f}" y="{y + 17:.1f}">')
        parts.append(f"{plain(title)}</text>")
        if count:
            parts.append(f'<text class="p" x="{x + box.w - 10:.1f}" y="{y + 17:.1f}" text-anchor="end">{count}</text>')
        if box.detail:
            parts.append(
                f'<text class="d" x="{x + 10:.1f}" y="{y + 32:.1f}">{plain(_short(box.detail, room, DETAIL_W))}</text>'
            )
        self.boxes.append("".join([*parts, "</g>"]))

    def picture(self, width: float, height: float) -> str:
        """The whole SVG, with a legend of the kinds that occur."""
        x, legend = 0.0, []
        for kind, (fill, edge, _) in KINDS.items():
            if kind in self.kinds:
                square = f'x="{x:.1f}" y="{-26 - self.top:.0f}" width="10" height="10" rx="3"'
                legend.append(f'<rect {square} fill="{fill}" stroke="{edge}"/>')
                legend.append(f'<text class="n" x="{x + 15:.1f}" y="{-17 - self.top:.0f}">{kind}</text>')
                x += 34 + NAME_W * len(kind)
        w, h = max(width, x) + 2 * PAD, height + LEGEND + self.top + 2 * PAD + 8
        parts = "".join([*legend, *self.borders, *self.lines, *self.boxes])
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" class="rf" width="{w:.0f}" height="{h:.0f}" '
            f'viewBox="0 0 {w:.0f} {h:.0f}"><style>{STYLE}</style>'
            f'<g transform="translate({PAD:.0f} {LEGEND + self.top + PAD + 4:.0f})">{parts}</g></svg>\n'
        )


def wanted(box: Box) -> float:
    """The width at which nothing of a box is cut."""
    count = len(f"{box.parameters:,}") * COUNT_W + 8 if box.parameters else 0.0
    return 20 + max(TITLE_W * len(box.title) + count, DETAIL_W * len(box.detail))


def _short(text: str, room: float, each: float) -> str:
    fits = max(3, int(room / each))
    return text if len(text) <= fits else text[: fits - 1] + "…"


def plain(text: str) -> str:
    """Text as XML has it; control characters, which XML has not, become a replacement mark."""
    return escape(re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]", "\ufffd", text))
