"""What the pictures of plans are drawn with: arrays, and the blocks of them that ranks have, read from rank graphs."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from html import escape
from itertools import pairwise

from rapydli_flow.graph import Graph
from rapydli_flow.ops import Leaf
from rapydli_flow.scheduler import AllReduce, Exchange
from rapydli_flow.spec import Block

RANKS = (("#a9cbf5", "#2f6db5"), ("#ffc794", "#c2600f"), ("#bfe3a2", "#4c8a26"), ("#d2c2f6", "#6f4fbf"))  # fill, line
INK, PALE, FRAME, EMPTY = "#1d2733", "#5b6776", "#c3cad3", "#f4f6f8"
WIDTH, MARGIN, LABELS, GAP = 760.0, 18.0, 74.0, 16.0
LETTER, BOLD = 0.5, 0.62  # width of a letter by its height, at most
FONT = "system-ui,-apple-system,&quot;Segoe UI&quot;,Roboto,&quot;DejaVu Sans&quot;,sans-serif"


@dataclass
class Picture:
    """Collects the parts of a picture, from top to bottom; ``height`` is what is taken so far."""

    parts: list[str] = field(default_factory=list)
    patterns: dict[str, str] = field(default_factory=dict)
    kinds: dict[str, tuple[str, str, str]] = field(default_factory=dict)  # for the legend: fill, line, and more
    height: float = MARGIN

    def rect(self, x: float, y: float, w: float, h: float, *, fill: str, line: str = "none", more: str = "") -> None:
        self.parts.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{w:.1f}" height="{h:.1f}" fill="{fill}" stroke="{line}"{more}/>'
        )

    def line(self, x: float, y: float, to_x: float, to_y: float, *, color: str = FRAME, width: float = 1.0) -> None:
        self.parts.append(f'<path d="M{x:.1f} {y:.1f}L{to_x:.1f} {to_y:.1f}" stroke="{color}" stroke-width="{width}"/>')

    def text(
        self,
        x: float,
        y: float,
        words: str,
        *,
        room: float = WIDTH,
        size: float = 12,
        fill: str = INK,
        bold: bool = False,
        at: str = "start",
    ) -> None:
        """A line of text, which must not be wider than ``room``."""
        assert len(words) * size * (BOLD if bold else LETTER) <= room, f"{words!r} is too long for {room:.0f}"
        weight = ' font-weight="600"' if bold else ""
        self.parts.append(
            f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size:g}" fill="{fill}"{weight} text-anchor="{at}">'
            f"{escape(words)}</text>"
        )

    def hatched(self, rank: int) -> str:
        """The fill of what has come from a rank."""
        name, turned = f"from{rank}", 'patternUnits="userSpaceOnUse" patternTransform="rotate(45)"'
        self.patterns[name] = (
            f'<pattern id="{name}" width="5" height="5" {turned}><rect width="5" height="5" fill="#ffffff"/>'
            f'<rect width="1.7" height="5" fill="{RANKS[rank][1]}"/></pattern>'
        )
        return f"url(#{name})"

    def banded(self, ranks: Sequence[int]) -> str:
        """The fill of a sum of what ranks have."""
        name, size = "sum" + "".join(map(str, ranks)), 5 * len(ranks)
        turned = 'patternUnits="userSpaceOnUse" patternTransform="rotate(-45)"'
        bands = "".join(
            f'<rect x="{5 * i}" width="5" height="{size}" fill="{RANKS[r][0]}"/>' for i, r in enumerate(ranks)
        )
        self.patterns[name] = f'<pattern id="{name}" width="{size}" height="{size}" {turned}>{bands}</pattern>'
        return f"url(#{name})"

    def rank(self, rank: int, y: float) -> None:
        """The name of a row."""
        self.rect(MARGIN, y, 11, 11, fill=RANKS[rank][0], line=RANKS[rank][1])
        self.text(MARGIN + 17, y + 10, f"rank {rank}")

    def legend(self) -> None:
        """What the fills that are shown mean."""
        x, y = MARGIN, self.height + 8
        for words, (fill, line, more) in self.kinds.items():
            self.rect(x, y, 22, 12, fill=fill, line=line, more=more)
            self.text(x + 28, y + 10.5, words, size=11, fill=PALE)
            x += 28 + len(words) * 11 * LETTER * 1.06 + 20
        assert x <= WIDTH + 40, "the legend is too long"
        self.height = y + 12

    def svg(self) -> str:
        w, h = f"{WIDTH:.0f}", f"{self.height + MARGIN:.0f}"
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {w} {h}" width="{w}" height="{h}" '
            f'font-family="{FONT}"><defs>{"".join(self.patterns.values())}</defs>\n'
            f'<rect x="0.5" y="0.5" width="{WIDTH - 1:.0f}" height="{self.height + MARGIN - 1:.0f}" rx="8" '
            'fill="#ffffff" stroke="#d9dee5"/>\n' + "\n".join(self.parts) + "\n</svg>\n"
        )


# what ranks have of a value ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Region:
    """A block that a rank has, and whose it is: its own, another's, or several ranks' parts of a sum."""

    block: Block
    ranks: tuple[int, ...]
    leaves: bool = False  # a part of a sum, of which others get what they want


@dataclass(frozen=True)
class Held:
    """What a rank has of a value after it was fed, kept or moved, and the bytes that it sent for that."""

    regions: tuple[Region, ...] = ()
    sent: int | None = None


def alone(op: Exchange, shard: int) -> Exchange:
    """What an exchange of several arrays does with the one that a shard is of."""
    for (first, begin), (last, end) in pairwise([(0, 0), *op.ends]):
        if first <= shard < last:
            return replace(op, have=op.have[first:last], want=op.want[begin:end], ends=())
    raise AssertionError(f"no array has shard {shard}")


def held(graph: Graph, rank: int, name: str) -> Held:
    """What a rank has of a leaf ('x'), after an exchange ('x/move'), or of what an all-reduce has summed."""
    for node in graph:
        op = node.op
        sources = [graph.nodes[i].name for i, _ in node.inputs]
        if node.name == name and isinstance(op, Leaf):
            assert node.at is not None
            return Held((Region(node.at, (rank,)),))
        if isinstance(op, AllReduce) and name in sources:
            spec = node.specs[sources.index(name)]
            return Held((Region(Block.all(spec.shape), tuple(sorted(op.ranks))),), op.sent_bytes(spec))
        if isinstance(op, Exchange) and op.ends:  # of several arrays: that which has a shard of this name
            values = [graph.value_name(v) for v in node.inputs]
            if name.removesuffix("/move") not in values:
                continue
            op = alone(op, op.held[values.index(name.removesuffix("/move"))])
        elif node.name.rpartition("_")[0] != name:
            continue
        if isinstance(op, Exchange):
            own = [Region(op.have[i].block, (rank,), leaves=op.sums) for i in op.held]
            found: dict[Block, list[int]] = {}
            for piece in op.pieces:
                if piece.target in op.wanted:
                    found.setdefault(piece.region, []).append(op.have[piece.source].rank)
            got = [Region(block, tuple(sorted(ranks))) for block, ranks in found.items() if ranks != [rank]]
            return Held((*own, *got), op.sent_bytes())
    return Held()


# arrays of ranks ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Column:
    """An array of a step: what it is, what has happened to it, its value in rank graphs, and two axes to show."""

    title: str
    note: str
    value: str
    axes: tuple[int, int]
    words: str  # the axes, the one that goes down first
    size: tuple[float, float] = (84, 84)  # width, height
    phase: str = "forward"


def table(
    picture: Picture, graphs: Sequence[Graph], columns: Sequence[Column], *, across: int = 1, headed: bool = True
) -> None:
    """A row for each rank, a column for each array; ``across``: ranks beside each other, as in a grid."""
    left = MARGIN + (LABELS if across == 1 else 0.0)
    room = (WIDTH - MARGIN - left - GAP * (len(columns) - 1)) / len(columns)
    xs = [left + n * (room + GAP) for n in range(len(columns))]
    if headed:
        _heads(picture, columns, xs, room)
    row = max(column.size[1] for column in columns) + (26 if across == 1 else 40)
    for rank, graph in enumerate(graphs):
        y = picture.height + rank // across * row
        if across == 1:
            picture.rank(rank, y)
        for x, column in zip(xs, columns, strict=True):
            at = x + rank % across * (column.size[0] + 10)
            _cell(picture, held(graph, rank, column.value), rank, column, at, y, named=across > 1)
    picture.height += -(-len(graphs) // across) * row - 8


def _heads(picture: Picture, columns: Sequence[Column], xs: Sequence[float], room: float) -> None:
    top, lines = picture.height, 0
    for n, (x, column) in enumerate(zip(xs, columns, strict=True)):
        if n == 0 or columns[n - 1].phase != column.phase:
            last = max(i for i, other in enumerate(columns) if other.phase == column.phase)
            picture.text(x, top + 11, column.phase, size=11, fill=PALE)
            picture.line(x, top + 17, xs[last] + room, top + 17)
        picture.text(x, top + 34, column.title, room=room + GAP, bold=True)
        picture.text(x, top + 49, column.words, room=room + GAP - 6, size=10, fill=PALE)
        for i, note in enumerate(textwrap.wrap(column.note, int((room + GAP - 6) / (10.5 * LETTER * 1.12)))):
            picture.text(x, top + 62 + 13 * i, note, size=10.5, fill=PALE)
            lines = max(lines, i + 1)
    picture.height = top + 60 + 13 * lines


def _cell(picture: Picture, each: Held, rank: int, column: Column, x: float, y: float, *, named: bool) -> None:
    if not each.regions:
        picture.text(x, y + 10, "nothing is moved", size=11, fill=PALE)
        return
    (w, h), (down, right) = column.size, column.axes
    whole = each.regions[0].block.whole
    by_y, by_x = h / whole[down], w / whole[right]
    picture.rect(x, y, w, h, fill=EMPTY, line=FRAME)
    for region in each.regions:
        fill, line, more = _look(picture, region, rank)
        (top, bottom), (first, last) = ((region.block.lo[axis], region.block.hi[axis]) for axis in (down, right))
        box = x + first * by_x, y + top * by_y, (last - first) * by_x, (bottom - top) * by_y
        picture.rect(*box, fill=fill, line=line, more=more)
    if not any(len(region.ranks) > 1 for region in each.regions):
        grid = [f"M{x:.1f} {y + i * by_y:.1f}h{w:.1f}" for i in range(1, whole[down]) if by_y >= 5]
        grid += [f"M{x + i * by_x:.1f} {y:.1f}v{h:.1f}" for i in range(1, whole[right]) if by_x >= 5]
        picture.parts += [f'<path d="{"".join(grid)}" stroke="#ffffff" stroke-opacity="0.6"/>'] if grid else []
    words = [f"rank {rank}"] if named else []
    words += [f"sends {each.sent:,} B"] if each.sent is not None else []
    for i, each_line in enumerate(words):
        picture.text(x, y + h + 14 + 13 * i, each_line, size=11, fill=PALE)


def _look(picture: Picture, region: Region, rank: int) -> tuple[str, str, str]:
    """Fill, line and further attributes of a region of a rank; the legend will explain them."""
    look: tuple[str, str, str]
    if len(region.ranks) > 1:
        kind, look = "the sum of parts", (picture.banded(region.ranks), PALE, "")
    elif region.leaves:
        kind, look = "a part of a sum, sent away", (*RANKS[rank], ' fill-opacity="0.35" stroke-dasharray="3 3"')
    elif region.ranks[0] == rank:
        kind, look = "a rank's own", (*RANKS[rank], "")
    else:
        sender = region.ranks[0]
        kind, look = "received from the rank of this colour", (picture.hatched(sender), RANKS[sender][1], "")
    picture.kinds.setdefault(kind, look)
    return look
