"""Pictures of graphs: SVG without any outside program, and the table and picture that notebooks show.

A network flows down; an op is a box, a layer a frame around its boxes. A tall network is cut where one
value crosses, and set in columns like a newspaper.

A training step is a grid: down the network, up its gradients, and what they update; a layer, its gradient
and its updates share a row. Dashed lines are values that the gradients keep from the way down.

Parameters, state, clocks and constants are not drawn; numbers of parameters stand where they are first
read. In graphs of more than `COMPACT` ops a layer is one box. The colours fit light and dark pages.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import groupby, pairwise
from math import ceil, sqrt
from typing import TYPE_CHECKING

from ..ops import Fill, Leaf, Op
from . import table
from .layout import PAD, Box, Frame, Item, arrange
from .pen import ENDS, KINDS, OTHER, Pen, plain, wanted

if TYPE_CHECKING:
    from .graph import Graph, Node

COMPACT = 120
TIMES = "\u00d7"
TALL, COLUMN, GUTTER = 1500.0, 900.0, 96.0


def svg(graph: Graph) -> str:
    """The graph as an SVG picture, the same for the same graph."""
    drawing = _Drawing(graph)
    pen = Pen()
    if any(column for column in drawing.column.values()):
        width, height = _grid(drawing, pen)
    else:
        width, height = _newspaper(drawing, pen)
    return pen.picture(width, height)


def html(graph: Graph) -> str:
    """A table of the graph, and its picture under a fold."""
    return f"<div>{sheet(graph)}<details><summary>picture</summary>{svg(graph)}</details></div>"


def sheet(graph: Graph) -> str:
    """The table of a graph as HTML; see `rapydli_flow.graph.table`."""

    def row(cells: Sequence[str], tag: str, style: str = "") -> str:
        aligns = ("left", "left", "left", "right", "right", "right")
        each = (
            f'<{tag} style="text-align:{align};padding:1px 10px;{style}">{plain(c)}</{tag}>'
            for c, align in zip(cells, aligns, strict=True)
        )
        return f"<tr>{''.join(each)}</tr>"

    rows = "".join(row(cells, "td") for cells in table.rows(graph))
    last = row(table.total(graph), "td", "font-weight:600;border-top:1px solid #8390a0")
    head = f"<thead>{row(table.HEADER, 'th')}</thead>"
    return f'<table style="font-size:12px;border-collapse:collapse">{head}<tbody>{rows}{last}</tbody></table>'


# what is drawn -----------------------------------------------------------------------------------------


class _Drawing:
    """The nodes of a graph that are drawn: what each reads, its column (0 network, 1 gradients, 2 updates), its scopes.

    Named outputs are drawn too, under numbers that follow those of the nodes.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.nodes = [i for i, node in enumerate(graph.nodes) if not _hidden(node)]
        drawn = set(self.nodes)
        self.reads = {i: list(dict.fromkeys(j for j, _ in graph.nodes[i].inputs if j in drawn)) for i in self.nodes}
        self.ends = {len(graph) + k: (name, i) for k, (name, (i, _)) in enumerate(graph.outputs.items()) if i in drawn}
        self.reads |= {end: [i] for end, (_, i) in self.ends.items()}
        self.shown = _behind(graph, graph.outputs.values())
        self.parameters = _parameters(graph)
        self.compact = len(self.nodes) > COMPACT
        self.column: dict[int, int] = {}
        self.path: dict[int, tuple[str, ...]] = {}
        for i in self.nodes:
            self.column[i], self.path[i] = self._where(i)
        for end, (_, i) in self.ends.items():
            self.column[end], self.path[end] = self.column[i], () if not self.column[i] else self.path[i]
        boxes = [self.box((i,)) for i in [*self.nodes, *self.ends]]
        self.box_w = min(216.0, max((wanted(box) for box in boxes), default=0.0))

    def _where(self, i: int) -> tuple[int, tuple[str, ...]]:
        """Column and scopes. A gradient is in the scope of its node, an update in that of its parameter."""
        node = self.graph.nodes[i]
        if node.op.collective and self.reads[i]:
            last = max(self.reads[i], key=lambda j: (self.column[j], j))
            return self.column[last], self.path[last]
        scopes = tuple(node.name.split("/"))
        if scopes[0] == "grad" and len(scopes) > 2:
            return 1, scopes[1:-2]
        after = [j for j in self.reads[i] if self.column[j]] if i not in self.shown else []  # prepares an update
        if after or _kind(node.op) == "update":
            leaf = next((self.graph.nodes[j] for j, _ in node.inputs if _parameter(self.graph.nodes[j])), None)
            return 2, tuple(leaf.name.split("/")[:-1]) if leaf else self.path[after[0]] if after else ()
        return 0, scopes[:-1]

    def items(self, nodes: Iterable[int], depth: int = 0) -> list[Item]:
        """Boxes, and frames of neighbours in one scope; compact, a scope without scopes in it is a box."""
        out: list[Item] = []
        for scope, run in groupby(nodes, key=lambda i: self.path[i][depth] if len(self.path[i]) > depth else None):
            same = list(run)
            if scope is None or len(same) == 1:
                out += [self.sized(self.box((i,))) for i in same]
            elif self.compact and all(len(self.path[i]) == depth + 1 for i in same):
                out.append(self.sized(self.box(tuple(same), scope)))
            else:
                inner = self.items(same, depth + 1)
                stacked = range(len(inner)) if self.column[same[0]] == 2 else None
                out.append(arrange(scope, inner, self.down(same), layers=stacked))
        return out

    def down(self, nodes: Iterable[int]) -> dict[int, list[int]]:
        """What nodes read in their own column, and what reads them there: the lines of a column."""
        column = next((self.column[i] for i in nodes), 0)
        if column == 2:
            return {}
        return {
            i: [p for p in ps if self.column[p] == column] for i, ps in self.reads.items() if self.column[i] == column
        }

    def box(self, nodes: tuple[int, ...], scope: str = "") -> Box:
        """The box of a node, of an output, or of a whole layer."""
        if nodes[0] in self.ends:
            return Box(nodes, self.ends[nodes[0]][0], kind=ENDS, tip="output", h=24.0)
        each = [self.graph.nodes[i] for i in nodes if i not in self.ends]
        node = each[-1]
        kinds = [_kind(n.op) for n in each]
        parameters = sum(self.parameters.get(i, 0) for i in nodes)
        if isinstance(node.op, Leaf):
            return Box(nodes, node.name, _specs(node), kind=ENDS, tip=node.name)
        detail = _specs(node)
        if self.column[nodes[-1]] == 2:
            leaf = next((self.graph.nodes[j] for j, _ in node.inputs if _parameter(self.graph.nodes[j])), None)
            detail = f"{leaf.name.rsplit('/', 1)[-1]} {leaf.specs[0]}" if leaf else detail
        title = node.op.title
        if scope:
            title = {0: scope, 1: f"∇ {scope}", 2: f"{title} {TIMES}{len(each)}"}[self.column[nodes[0]]]
            detail = scope if self.column[nodes[0]] == 2 else detail
        tip = "\n".join(f"{n.name}: {n.op.title} {', '.join(map(str, n.specs))}" for n in each)
        return Box(nodes, title, detail, parameters, min(kinds, key=list(KINDS).index), tip)

    def sized(self, box: Box) -> Box:
        return replace(box, w=min(self.box_w, wanted(box)) if box.nodes[0] in self.ends else self.box_w)


def _hidden(node: Node) -> bool:
    return isinstance(node.op, Fill) or (isinstance(node.op, Leaf) and node.op.kind != "batch")


def _parameter(node: Node) -> bool:
    return isinstance(node.op, Leaf) and node.op.kind == "param"


def _behind(graph: Graph, values: Iterable[tuple[int, int]]) -> set[int]:
    """The nodes that lead to these values."""
    out: set[int] = set()
    todo = [i for i, _ in values]
    while todo:
        i = todo.pop()
        if i not in out:
            out.add(i)
            todo += [j for j, _ in graph.nodes[i].inputs]
    return out


def _parameters(graph: Graph) -> dict[int, int]:
    """Number of parameters that each node is the first to read."""
    out: dict[int, int] = {}
    seen: set[int] = set()
    for i, node in enumerate(graph.nodes):
        for j in dict.fromkeys(j for j, _ in node.inputs):
            if _parameter(graph.nodes[j]) and j not in seen:
                seen.add(j)
                out[i] = out.get(i, 0) + graph.nodes[j].specs[0].size
    return out


def _kind(op: Op) -> str:
    """By the file that an op is defined in; a fused op is what its anchor is."""
    op = getattr(op, "anchor", op)
    file = "collective" if op.collective else type(op).__module__.rsplit(".", 1)[-1]
    return next((kind for kind, (_, _, files) in KINDS.items() if file in files), OTHER)


def _specs(node: Node) -> str:
    """Output specs; equal ones are counted."""
    each = [(spec, len(list(run))) for spec, run in groupby(map(str, node.specs))]
    return ", ".join(f"{spec} {TIMES}{count}" if count > 1 else spec for spec, count in each)


# how it is laid out ------------------------------------------------------------------------------------


def _newspaper(drawing: _Drawing, pen: Pen) -> tuple[float, float]:
    """A network, in one column or several."""
    items = drawing.items([*drawing.nodes, *drawing.ends])
    whole = arrange("", items, drawing.reads)
    columns = _cut(whole, drawing.reads) if whole.h > TALL else [whole]
    x, height = 0.0, max(column.h for column in columns)
    for a, b in pairwise([*columns, None]):
        assert a is not None
        pen.frame(a, x, 0.0)
        if b is not None:
            (source,) = [p for p, leaving in b.ports if not leaving]
            out, into, middle = x + a.ports[source, True], x + a.w + GUTTER / 2 + b.ports[source, False], x + a.w
            pen.turn(out, a.h, middle + GUTTER / 4, into)
        x += a.w + GUTTER / 2
    return x - GUTTER / 2, height + (PAD if len(columns) > 1 else 0.0)


def _cut(whole: Frame, reads: dict[int, list[int]]) -> list[Frame]:
    """Columns of about the same height, cut at layers where one value crosses."""
    layer = {i: whole.layers[k] for k, item in enumerate(whole.items) for i in item.nodes}
    last = max(whole.layers)
    crossing: list[set[int]] = [set() for _ in range(last + 2)]
    for i, sources in reads.items():
        for p in sources:
            for between in range(layer[p] + 1, layer[i] + 1):
                crossing[between].add(p)
    top = [min(y for y, at in zip(whole.y, whole.layers, strict=True) if at == k) for k in range(last + 1)]
    count = min(ceil(whole.h / COLUMN), max(1, round(sqrt(1.4 * whole.h / (whole.w + GUTTER / 2)))))
    cuts = [0]
    for k in range(1, last + 1):
        far = top[k] - top[cuts[-1]] + (top[k + 1] - top[k] if k < last else 0.0) / 2
        if len(crossing[k]) == 1 and far >= whole.h / count and len(cuts) < count:
            cuts.append(k)
    parts = [[k for k, at in enumerate(whole.layers) if a <= at < b] for a, b in pairwise([*cuts, last + 1])]
    return [arrange("", [whole.items[k] for k in part], reads) for part in parts]


def _grid(drawing: _Drawing, pen: Pen) -> tuple[float, float]:
    """A training step: three columns with rows in common."""
    column = [[i for i in [*drawing.nodes, *drawing.ends] if drawing.column[i] == c] for c in range(3)]
    network = drawing.items(column[0])
    rows = arrange("", network, drawing.down(column[0])).layers
    row = _rows(drawing, column, {i: at for item, at in zip(network, rows, strict=True) for i in item.nodes})
    gradients, updates = (_cells(drawing, column[c], row) for c in (1, 2))
    count = max(row.values()) + 1
    heights = [0.0] * count
    for item, r in [
        *zip(network, rows, strict=True),
        *((f, r) for way in (gradients, updates) for r, f in way.items()),
    ]:
        heights[r] = max(heights[r], item.h)
    down, up = drawing.down(column[0]), drawing.down(column[1])
    ways = [
        arrange("", network, down, layers=rows, heights=heights),
        arrange("", [*gradients.values()], up, layers=[count - 1 - r for r in gradients], heights=heights[::-1]),
        arrange("", [*updates.values()], {}, layers=[*updates], heights=heights),
    ]
    x, bounds = 0.0, []
    for c, frame in enumerate(ways):
        if frame.items:
            pen.frame(frame, x, 0.0, up=c == 1)
            pen.heading(("network", "gradients", "updates")[c], x + frame.w / 2)
        bounds.append((x, x + frame.w))
        x += frame.w + GUTTER if frame.items else 0.0
    for i, sources in drawing.reads.items():
        for p in sources:
            a, b = drawing.column[p], drawing.column[i]
            if a < b:
                pen.across(p, i, bounds[a][1], bounds[b][0], kept=a == 0)
            elif a > b:
                pen.across(p, i, bounds[a][0], bounds[b][1], kept=False)
            elif b == 2 or (b == 1 and row[p] < row[i]):  # the other lines are in the columns
                pen.around(p, i, bounds[b][1])
    return x - GUTTER + GUTTER / 4, ways[0].h


def _rows(drawing: _Drawing, column: list[list[int]], row: dict[int, int]) -> dict[int, int]:
    """The row of every node: a gradient or an update is beside its layer, else beside what it reads."""
    names = {drawing.graph.nodes[i].name: row[i] for i in reversed(column[0]) if i not in drawing.ends}
    scopes = {drawing.path[i][0]: row[i] for i in reversed(column[0]) if drawing.path[i]}
    at = 0
    for i in [*column[1], *column[2]]:
        near = [row[p] for p in drawing.reads[i] if drawing.column[p] == 1]
        known = scopes.get(drawing.path[i][0]) if drawing.path[i] else None
        if known is None and i not in drawing.ends:
            known = names.get("/".join(drawing.graph.nodes[i].name.split("/")[1:-1]))
        if known is None:
            known = near[-1] if near else at if drawing.column[i] == 1 else 0
        row[i] = at = known
    return row


def _cells(drawing: _Drawing, nodes: list[int], row: dict[int, int]) -> dict[int, Frame]:
    """What is in each row of a column, in the order in which values flow."""
    cells: dict[int, list[int]] = {}
    for i in nodes:
        cells.setdefault(row[i], []).append(i)
    out = {}
    for r in sorted(cells, key=lambda r: -r if drawing.column[cells[r][0]] == 1 else r):
        inner = drawing.items(cells[r])
        stacked = range(len(inner)) if drawing.column[cells[r][0]] == 2 else None
        out[r] = arrange("", inner, drawing.down(cells[r]), layers=stacked)
    return out
