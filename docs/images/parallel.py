"""Draw how plans divide a training step: docs/images/parallel-*.svg, for docs/parallel.md.

    python docs/images/parallel.py [FOLDER]

Everything in the pictures is read from plans: blocks of leaves, what collectives move, the order of nodes, the costs of
`scheduler/cut.py`. So they show what is done, and a test fails when plans change and the pictures are not drawn again.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from drawing import EMPTY, MARGIN, PALE, WIDTH, Column, Picture, table

import rapydli_flow as rf
from rapydli_flow import nn, optim
from rapydli_flow.graph import Graph
from rapydli_flow.scheduler import cut
from rapydli_flow.scheduler.cost import Machine, node_s
from rapydli_flow.scheduler.layout import blocks_of
from rapydli_flow.scheduler.meetings import side_by_side
from rapydli_flow.scheduler.micro import micro_batch

HERE = Path(__file__).resolve().parent
WORK, MOVE, SUM = "#8b97a8", "#dd7420", "#8b6cd0"
FORWARD, BACKWARD = ("#dbe9fb", "#4a83cf"), ("#fdf0cd", "#cf9f28")  # fill, line


def network(x: Any) -> Any:
    """The network of the page."""
    x = nn.relu(nn.conv(x, 8, 3, padding=1))
    x = nn.relu(nn.conv(x, 12, 3, padding=1))
    x = nn.relu(nn.dense(nn.max_pool(x, 2), 16))
    return nn.dense(x, 4)


def tower(x: Any) -> Any:
    """Three equal layers, which become the stages of a pipeline."""
    for _ in range(3):
        x = nn.relu(nn.batch_norm(nn.conv(x, 64, 3, padding=1), group=4))
    return nn.dense(nn.avg_pool(x, 8), 10)


def step_of(net: Callable[[Any], Any], spec: rf.Spec) -> Graph:
    return rf.train_step(rf.trace(net, spec), loss=nn.cross_entropy, optimizer=optim.sgd(0.05, momentum=0.9))


def plan_of(ranks: int, **how: Any) -> tuple[rf.Plan, Graph]:
    """A plan of the page's network, and its training step."""
    step = step_of(network, rf.Spec((8, 12, 12, 4), "float64"))
    return rf.plan(step, ranks=ranks, threads=1, **how), step


def arrays(planned: tuple[rf.Plan, Graph], columns: Sequence[Column], *, across: int = 1) -> str:
    """A picture of what each rank has of some arrays."""
    plan, step = planned
    picture = Picture()
    table(picture, plan.rank_graphs(step), columns, across=across)
    picture.legend()
    return picture.svg()


# blocks of arrays --------------------------------------------------------------------------------------

DW_1, DW_2 = "grad/conv_1/conv_1/conv_filter_grad_1", "grad/conv_2/conv_1/conv_filter_grad_1"
DX_2, DY_2 = "grad/conv_2/conv_1/conv_input_grad_1", "grad/relu_2/relu_grad_1"
DX_DENSE, DW_DENSE = "grad/dense_1/reshape_1/reshape_1", "grad/dense_1/matmul_1/matmul_2"
CONV_W, DENSE_W = ((2, 3), "channels by filters"), ((0, 1), "inputs by filters")
RECORDS, PIXELS, PLANE = ((0, 1), "records by rows"), ((1, 2), "rows by columns"), ((0, 3), "records by channels")
FLAT = ((0, 1), "records by inputs")


def data() -> str:
    columns = (
        Column("x", "as fed", "x", *RECORDS),
        Column("w of conv_1", "all of it", "conv_1/w", *CONV_W),
        Column("w of dense_1", "all of it", "dense_1/w", *DENSE_W),
        Column("dw of conv_1", "all-reduce", DW_1, *CONV_W, phase="backward"),
        Column("dw of dense_1", "the same all-reduce", DW_DENSE, *DENSE_W, phase="backward"),
    )
    return arrays(plan_of(2), columns)


def rows() -> str:
    columns = (
        Column("x", "as fed", "x", *PIXELS),
        Column("into conv_1", "a row of each neighbour", "x/move", *PIXELS),
        Column("into conv_2", "a row of each neighbour", "relu_1/move", *PIXELS),
        Column("into dense_1", "gathered", "max_pool_1.y/move", *PIXELS),
        Column("dy of conv_2", "a row of each neighbour", f"{DY_2}/move", *PIXELS, phase="backward"),
        Column("dw of conv_2", "all-reduce", DW_2, *CONV_W, phase="backward"),
    )
    return arrays(plan_of(3, strategy="spatial"), columns)


def grid() -> str:
    size = (100.0, 100.0)
    columns = (
        Column("into conv_1", "borders and a corner", "x/move", *PIXELS, size=size),
        Column("into conv_2", "borders and a corner", "relu_1/move", *PIXELS, size=size),
        Column("dy of conv_2", "borders and a corner", f"{DY_2}/move", *PIXELS, size=size, phase="backward"),
    )
    return arrays(plan_of(4, strategy="spatial", grid=(2, 2)), columns, across=2)


def filters() -> str:
    columns = (
        Column("x", "as fed: all of it", "x", *PLANE),
        Column("w of conv_1", "some filters", "conv_1/w", *CONV_W),
        Column("into conv_2", "gathered", "relu_1/move", *PLANE),
        Column("w of conv_2", "some filters", "conv_2/w", *CONV_W),
        Column("into dense_1", "gathered", "max_pool_1.y/move", *PLANE),
        Column("dx of conv_2", "parts sent and added", f"{DX_2}/move", *PLANE, phase="backward"),
    )
    return arrays(plan_of(2, strategy="filters"), columns)


def channels() -> str:
    columns = (
        Column("x", "as fed", "x", *PLANE),
        Column("w of conv_1", "some channels", "conv_1/w", *CONV_W),
        Column("y of conv_1", "all-reduce", "conv_1/conv_1", *PLANE),
        Column("w of conv_2", "some channels", "conv_2/w", *CONV_W),
        Column("y of conv_2", "all-reduce", "conv_2/conv_1", *PLANE),
        Column("dy of conv_1", "gathered", "grad/relu_1/relu_grad_1/move", *PLANE, phase="backward"),
    )
    return arrays(plan_of(2, strategy="channels"), columns)


def hybrid() -> str:
    columns = (
        Column("x", "as fed", "x", *RECORDS),
        Column("w of conv_2", "all of it", "conv_2/w", *CONV_W),
        Column("into dense_1", "gathered", "dense_1/reshape_1/move", *FLAT),
        Column("w of dense_1", "some filters", "dense_1/w", *DENSE_W),
        Column("dx of dense_1", "parts sent and added", f"{DX_DENSE}/move", *PLANE, phase="backward"),
        Column("dw of conv_2", "all-reduce", DW_2, *CONV_W, phase="backward"),
    )
    return arrays(plan_of(2, strategy="hybrid"), columns)


def layers() -> str:
    columns = (
        Column("x", "as fed", "x", *RECORDS),
        Column("into conv_2", "a row of the neighbour", "relu_1/move", *RECORDS),
        Column("into dense_1", "gathered", "dense_1/reshape_1/move", *FLAT),
        Column("w of dense_1", "some filters", "dense_1/w", *DENSE_W),
        Column("dx of dense_1", "parts sent and added", f"{DX_DENSE}/move", *RECORDS, phase="backward"),
        Column("dw of conv_2", "all-reduce", DW_2, *CONV_W, phase="backward"),
    )
    return arrays(plan_of(4, splits={"conv_*": rf.Split(samples=2, height=2), "dense_*": rf.Split(filters=4)}), columns)


def shards() -> str:
    picture, size = Picture(), (96.0, 64.0)
    words = {"without shard": None, 'shard="state"': "state", 'shard="parameters"': "parameters"}
    for n, (title, shard) in enumerate(words.items()):
        dw = DW_2 if shard is None else f"{DW_2}/move"
        columns = (
            Column("w", "kept", "conv_2/w", *CONV_W, size=size),
            Column("w that is used", "gathered", "conv_2/w/move", *CONV_W, size=size),
            Column("dw", "summed", dw, *CONV_W, size=size, phase="backward"),
            Column("momentum", "kept", "conv_2/w/momentum", *CONV_W, size=size, phase="update"),
            Column("new w", "gathered", "momentum_3.w/move", *CONV_W, size=size, phase="update"),
        )
        plan, step = plan_of(2, shard=shard)
        picture.height += 16 * (n > 0)
        picture.text(MARGIN, picture.height + 11, title, bold=True)
        picture.height += 22
        table(picture, plan.rank_graphs(step), columns, headed=n == 0)
    picture.legend()
    return picture.svg()


# the timeline of a pipeline ----------------------------------------------------------------------------


@dataclass
class Span:
    """A time in which a rank works on one micro-batch in one direction."""

    micro: int
    backward: bool
    begin_s: float
    end_s: float


def pipeline() -> str:
    step = step_of(tower, rf.Spec((24, 32, 32, 64)))
    plan = rf.plan(step, ranks=3, threads=1, strategy="pipeline", micro_batches=6)
    graphs = plan.rank_graphs(step)
    spans, passed = timeline(graphs)
    picture, left, row = Picture(), MARGIN + 138, 58
    end_s = max(span.end_s for each in spans for span in each)
    scale, top = (WIDTH - MARGIN - 14 - left) / end_s, picture.height
    for first, last, at_s in passed:
        x = left + at_s * scale
        picture.line(x, top + first * row + 28, x, top + last * row, color=PALE, width=1.4)
    for rank, each in enumerate(spans):
        y = top + rank * row
        layers = dict.fromkeys(name.split("/")[0] for name, split in plan.splits.items() if split.ranks == (rank,))
        shown = [name for name in layers if name.startswith(("conv", "dense"))]
        picture.rank(rank, y)
        picture.text(MARGIN, y + 25, ", ".join(shown), size=10.5, room=134)
        picture.text(MARGIN, y + 38, f"at most {in_flight(graphs[rank])} in flight", size=10.5, fill=PALE)
        picture.rect(left, y, end_s * scale, 28, fill=EMPTY)
        for span in each:
            x, w = left + span.begin_s * scale, (span.end_s - span.begin_s) * scale
            fill, line = BACKWARD if span.backward else FORWARD
            picture.rect(x, y, w, 28, fill=fill, line=line)
            if w > 9:
                picture.text(x + w / 2, y + 18.5, str(span.micro), at="middle")
    y = top + 3 * row - 14
    for ms in range(0, int(end_s * 1e3) + 1, 20):
        x = left + ms / 1e3 * scale
        picture.line(x, y, x, y + 4, color=PALE)
        picture.text(x, y + 16, f"{ms} ms", size=10.5, fill=PALE, at="middle" if ms else "start")
    picture.height = y + 20
    picture.kinds = {
        "forward, number of the micro-batch": (*FORWARD, ""),
        "backward": (*BACKWARD, ""),
        "waits": (EMPTY, "#d9dee5", ""),
    }
    picture.legend()
    return picture.svg()


def timeline(graphs: Sequence[Graph]) -> tuple[list[list[Span]], list[tuple[int, int, float]]]:
    """Spans of each rank, and when an array goes from rank to rank: the first, the last, the time.

    Nodes of a rank graph run in its order, each as long as its roofline; a collective runs when all of its ranks are
    there.
    """
    clock, machine = [0.0] * len(graphs), Machine()
    spans: list[list[Span]] = [[] for _ in graphs]
    passed: list[tuple[int, int, float]] = []
    for at in side_by_side(graphs):
        nodes = {rank: graphs[rank].nodes[i] for rank, i in at.items()}
        begin_s = max(clock[rank] for rank in nodes)
        takes_s = 0.0
        for rank, node in nodes.items():
            ins = [graphs[rank].spec(v) for v in node.inputs]
            if node.op.collective:
                takes_s = max(takes_s, machine.move_s(sum(spec.size_bytes for spec in node.specs)))
            elif ins:
                takes_s = node_s(node.op, ins, node.specs, machine)
        if len(nodes) > 1:
            passed.append((min(nodes), max(nodes), begin_s + takes_s / 2))
        for rank, node in nodes.items():
            micro, backward = micro_batch(node.name), node.name.startswith("grad/")
            clock[rank] = begin_s + takes_s
            last = spans[rank][-1] if spans[rank] else None
            alike = last and (micro is None or (micro, backward) == (last.micro, last.backward))
            if last and alike and begin_s - last.end_s < 1e-6:
                last.end_s = begin_s + takes_s
            elif micro is not None and takes_s > 1e-6:
                spans[rank].append(Span(micro, backward, begin_s, begin_s + takes_s))
    return spans, passed


def in_flight(graph: Graph) -> int:
    """How many micro-batches are begun and not done at once, at most."""
    order = [micro for node in graph if node.inputs and (micro := micro_batch(node.name)) is not None]
    first = {micro: order.index(micro) for micro in order}
    last = {micro: i for i, micro in enumerate(order)}
    return max(sum(first[m] <= i <= last[m] for m in first) for i in range(len(order)))


# ranks that do not wait for each other -----------------------------------------------------------------

TAKES_S = ((1.0, 1.0, 1.0, 1.0, 1.7, 1.0, 1.0, 1.0), (1.0, 1.0, 1.9, 1.0, 1.0, 1.0, 1.0, 1.6))  # steps of two ranks
MEET_S = 0.3  # what a sum and an update take


def apart() -> str:
    """Two ranks, some of whose steps are slow: in step, averaging now and then, and ahead of updates."""
    picture, left, row = Picture(), MARGIN + 74, 34
    ways: tuple[dict[str, int], ...] = ({}, {"average_every": 4}, {"staleness": 2})
    every = [paced(plan_of(2, **how)[0]) for how in ways]
    scale = (WIDTH - MARGIN - left) / max(end for runs, meets in every for _, end in (*runs[0], *runs[1], *meets))
    for n, (how, (runs, meets)) in enumerate(zip(ways, every, strict=True)):
        words = ", ".join(f"{name}={value}" for name, value in how.items()) or "every step is one of all ranks"
        picture.height += 14 * (n > 0)
        picture.text(MARGIN, picture.height + 11, words, bold=True)
        top = picture.height + 22
        for rank, spans in enumerate(runs):
            y = top + rank * row
            picture.rank(rank, y + 6)
            picture.rect(left, y, spans[-1][1] * scale, 24, fill=EMPTY)
            for step, (begin, end) in enumerate(spans):
                picture.rect(left + begin * scale, y, (end - begin) * scale, 24, fill=FORWARD[0], line=FORWARD[1])
                picture.text(left + (begin + end) / 2 * scale, y + 16.5, str(step), at="middle")
        y = top + 2 * row
        for begin, end in meets:
            picture.rect(left + begin * scale, y, (end - begin) * scale, 9, fill=BACKWARD[0], line=BACKWARD[1])
        picture.height = y + 13
    picture.kinds = {
        "a step, by its number": (*FORWARD, ""),
        "sums of gradients and updates, or averages": (*BACKWARD, ""),
        "waits": (EMPTY, "#d9dee5", ""),
    }
    picture.height += 4
    picture.legend()
    return picture.svg()


Times = list[tuple[float, float]]


def paced(plan: rf.Plan) -> tuple[list[Times], Times]:
    """When the steps of two ranks begin and end, and their meetings, as far as a plan lets them run apart."""
    runs: list[Times] = [[], []]
    meets: Times = []
    for step in range(len(TAKES_S[0])):
        for rank, takes in enumerate(TAKES_S):
            begin = runs[rank][-1][1] if step else 0.0
            if plan.staleness is not None and step > plan.staleness:
                begin = max(begin, meets[step - 1 - plan.staleness][1])
            elif plan.staleness is None and meets:
                begin = max(begin, meets[-1][1])
            runs[rank].append((begin, begin + takes[step]))
        if plan.average_every == 0 or (step + 1) % plan.average_every == 0:
            begin = max(runs[0][-1][1], runs[1][-1][1], meets[-1][1] if meets else 0.0)
            meets.append((begin, begin + MEET_S))
    return runs, meets


# what a greedy choice weighs ---------------------------------------------------------------------------


def unsaid() -> str:
    """Ways to divide two gradients, and what each is thought to take."""
    picture = Picture()
    shown = (
        ("dx of conv_2, where filters are divided", "filters", DX_2),
        ("dw of conv_1, where channels are divided", "channels", DW_1),
    )
    for n, (title, strategy, name) in enumerate(shown):
        picture.height += 22 * (n > 0)
        formula, ways = candidates(strategy, name)
        y, left = picture.height, MARGIN + 172
        picture.text(MARGIN, y + 11, title, bold=True)
        picture.text(MARGIN, y + 27, formula, size=11, fill=PALE)
        longest = max(sum(seconds) for _, seconds in ways)
        for i, (words, seconds) in enumerate(ways):
            x, top = left, y + 40 + 26 * i
            picture.text(MARGIN, top + 13, words, room=168, bold=i == 0)
            for each, color in zip(seconds, (WORK, MOVE, SUM), strict=True):
                picture.rect(x, top, each / longest * 430, 17, fill=color)
                x += each / longest * 430
            total = f"{sum(seconds) * 1e6:.0f} us"
            picture.text(x + 8, top + 13, f"{total}, chosen" if i == 0 else total, size=11, bold=i == 0)
        picture.height = y + 40 + 26 * len(ways) - 4
    picture.height += 4
    picture.kinds = {
        "work": (WORK, WORK, ""),
        "operands come to where they are needed": (MOVE, MOVE, ""),
        "sums come to where they are wanted": (SUM, SUM, ""),
    }
    picture.legend()
    return picture.svg()


Way = tuple[str, tuple[float, float, float]]  # how a node is divided; seconds of work, of moves, of sums


def candidates(strategy: str, name: str) -> tuple[str, list[Way]]:
    """The formula of a node, and the ways to divide it that are looked at, the one that is chosen first."""
    found: dict[str, cut.Known] = {}
    module = importlib.import_module("rapydli_flow.scheduler.split")
    choose = module.choose

    def remembered(known: cut.Known) -> Any:
        found[known.node.name] = known
        return choose(known)

    plan, step = plan_of(2, strategy=strategy)
    with patch.object(module, "choose", remembered):
        plan.rank_graphs(step)
    known = found[name]
    chosen, ways = choose(known), []
    for cells in cut._candidates(known):
        need, give = blocks_of(known.index, cells, known.ins, known.node.specs)
        letters = sorted({letter for cell in cells if cell for letter in cell})
        sums = any(any(known.index.partial(letter)) for letter in letters)
        words = ", ".join(f"{letter} in 2" for letter in letters) + ": parts of a sum" * sums
        seconds = cut._work_s(known, cells), cut._moves_s(known, need), cut._sums_s(known, cells, give)
        ways.append((cells != chosen, words or "each rank does all of it", seconds))
    return known.index.formula, [
        (words, seconds) for _, words, seconds in sorted(ways, key=lambda w: (w[0], sum(w[2])))
    ]


PICTURES: dict[str, Callable[[], str]] = {
    "data": data,
    "rows": rows,
    "grid": grid,
    "filters": filters,
    "channels": channels,
    "hybrid": hybrid,
    "pipeline": pipeline,
    "layers": layers,
    "shards": shards,
    "apart": apart,
    "unsaid": unsaid,
}


def main(folder: Path) -> None:
    for name, draw in PICTURES.items():
        (folder / f"parallel-{name}.svg").write_text(draw(), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE)
