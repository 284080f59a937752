"""Split a graph over ranks: Graph + how leaves lie + how layers are divided -> one Graph a rank.

A layout is a block for each place: a rank, or one of its micro-batches. For each node, letters of its index formula
are divided: as the plan says, or so that it is done soonest; the formula then tells which block of every operand each
place needs, and which block of the outputs it makes:

      x: rows 0-5 | 5-9             letter h of  n h*2+r-1 ... -> n h ...
      |           \\                 is cut where x is: each rank needs a halo row more,
      need 0-6      need 5-9        so x is exchanged before the node
      |             |
      y: rows 0-3 | 3-5             an output without the letter is a part of a sum: it is added when read

No rule knows about convolution, or about samples. A leaf that has no layout lies where it is first needed. What does
not depend on the micro-batch is there once for all of a rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from ..errors import ShapeError
from ..graph import Graph, Node, Tensor, Value
from ..ops import Add, Leaf, Op, Slice
from ..spec import Block
from .collective import AllReduce, Exchange
from .cost import Machine
from .cut import Known, choose
from .layout import (
    MARK,
    Cells,
    Layout,
    Places,
    Split,
    blocks_of,
    cells_along,
    cells_of,
    check_layout,
    hull,
    no_empty,
    present,
)
from .naming import GRADIENTS, batched
from .placed import Placed
from .reshard import Summand, exchanges, groups

Made = tuple[Tensor, ...]
T = TypeVar("T")


def split(
    graph: Graph,
    ranks: int,
    layouts: Mapping[str, Layout],
    splits: Mapping[str, Split] | None = None,
    *,
    micro_batches: int = 1,
    machine: Machine | None = None,
) -> tuple[Graph, ...]:
    """One graph a rank. ``layouts`` says for each rank how leaves lie, ``splits`` how nodes are divided, by name."""
    for name, layout in layouts.items():
        if name not in graph:
            raise ShapeError(
                f"plan: it says where {name!r} lies, but this graph has no such leaf. Make the plan for the training "
                "step that is trained."
            )
        check_layout(name, graph[name], layout, ranks)
    places = Places(ranks, micro_batches)
    return _Splitter(graph, places, layouts, splits or {}, machine or Machine()).run()


class _Splitter:
    def __init__(
        self,
        graph: Graph,
        places: Places,
        layouts: Mapping[str, Layout],
        splits: Mapping[str, Split],
        machine: Machine,
    ) -> None:
        self.graph, self.places, self.layouts, self.splits, self.machine = graph, places, layouts, splits, machine
        self.out = tuple(Graph(counts=dict(graph.counts)) for _ in range(places.ranks))
        self.placed: dict[Value, Placed] = {}
        self.sources: dict[Value, Node] = {}  # leaves that lie where they are needed first, and constants
        self.moved: dict[Value, dict[Layout, tuple[Tensor | None, ...]]] = {}
        self.meetings: dict[str, int] = {}
        self.made: dict[tuple[Any, ...], Made] = {}
        self.batched = batched(graph)
        self.homes = {value: graph.find(name).id for name, value in graph.updates.items()}
        self.beside = self.operands_of_updates()

    def run(self) -> tuple[Graph, ...]:
        for i, node in enumerate(self.graph.nodes):
            for new in self.out:
                new.where = node.where
            if not node.inputs:
                self.source(i, node)
            else:
                self.node(i, node)
        self.finish()
        for new in self.out:
            new.where = None
        return self.out

    def operands_of_updates(self) -> dict[Value, Layout]:
        """How a leaf that the plan divides lies, for what its update reads of the same shape: gradients are wanted as
        optimizer state lies."""
        found: dict[Value, Layout] = {}
        for (i, _), leaf in self.homes.items():
            name, shape = self.graph.nodes[leaf[0]].name, self.graph.spec(leaf).shape
            if name in self.layouts:
                layout = self.places.spread(self.layouts[name])
                found |= {v: layout for v in self.graph.nodes[i].inputs if self.graph.spec(v).shape == shape}
        return found

    def finish(self) -> None:
        """Outputs are whole on every rank; updates lie as what they replace."""
        for name, value in self.graph.outputs.items():
            everywhere = (Block.all(self.graph.spec(value).shape),) * len(self.places)
            for p, y in enumerate(self.move(value, everywhere)):
                assert y is not None
                self.out[self.places.rank(p)].outputs[name] = y.id
        for name, value in self.graph.updates.items():
            leaf = self.graph.find(name)
            if leaf.id in self.sources:  # nothing has read it
                self.move(leaf.id, (Block.all(leaf.spec.shape),) * len(self.places))
            for p, y in enumerate(self.move(value, self.placed[leaf.id].layout)):
                if y is not None:
                    self.out[self.places.rank(p)].updates[name] = y.id

    # nodes ------------------------------------------------------------------------------------------

    def source(self, i: int, node: Node) -> None:
        """A leaf or a constant: placed as it was given, else when it is read."""
        self.sources[i, 0] = node
        if node.name in self.layouts:
            layout = self.places.spread(self.layouts[node.name])
            no_empty(node.name, layout)
            self.place_leaf((i, 0), node, layout)

    def place_leaf(self, value: Value, node: Node, layout: Layout) -> None:
        """Put a leaf on ranks: on each the smallest block that holds those of its places."""
        hulls = [hull(layout[self.places.of(rank)]) for rank in range(self.places.ranks)]
        tensors: list[Tensor | None] = []
        for p in range(len(self.places)):
            rank = self.places.rank(p)
            block = hulls[rank]
            made = block and self.add(rank, node.op.local((), (block,)), (), node.name, block)
            tensors.append(made[0] if made else None)
        del self.sources[value]
        self.placed[value] = Placed(self.places.spread(tuple(hulls)), (0,) * len(layout), tuple(tensors))

    def node(self, i: int, node: Node) -> None:
        ins = tuple(self.graph.spec(v) for v in node.inputs)
        index = node.op.indexing(*ins)
        kept = self.kept(node)
        cells = kept or self.cells(i, node)
        need, give = blocks_of(index, cells, ins, node.specs)
        operands: list[Sequence[Tensor | None]] = []
        for j, v in enumerate(node.inputs):
            no_empty(node.name, need[j])
            operands.append(self.placed[v].tensors if kept else self.move(v, need[j]))
        made: list[Made | None] = []
        shared = self.places.same([(cell, [x[p] for x in operands]) for p, cell in enumerate(cells)])
        for p, cell in enumerate(cells):
            if cell is None:
                made.append(None)
                continue
            a, b = _at(need, p), _at(give, p)
            op = node.op.local(a, b) if cell else node.op
            at = b[0] if op.indexed else None
            name = node.name if shared[p] else self.places.mark(node.name, p)
            made.append(self.add(self.places.rank(p), op, _at(operands, p), name, at))
        for k in range(len(node.specs)):
            no_empty(node.name, give[k])
            self.check(node, k, made, give[k])
            parts = self.placed[node.inputs[0]].parts if kept else _parts(cells, index.partial, k)
            tensors = tuple(None if ys is None else ys[k] for ys in made)
            self.placed[i, k] = Placed(give[k], parts, tensors)

    def kept(self, node: Node) -> Cells | None:
        """The cells of an op that can be applied to the parts of sums as they are, and added later."""
        if not node.op.linear or any(v in self.sources or not self.placed[v].partial for v in node.inputs):
            return None
        first, *others = (self.placed[v] for v in node.inputs)
        if any((x.layout, x.parts) != (first.layout, first.parts) for x in others):
            return None
        ins = tuple(self.graph.spec(v) for v in node.inputs)
        index = node.op.indexing(*ins)
        whole: Cells = tuple(None if block is None else {} for block in first.layout)
        cells = cells_along(first.layout, index.inputs[0], index, index.sizes(ins, node.specs)) or whole
        need, _ = blocks_of(index, cells, ins, node.specs)
        letters = {letter for cell in cells if cell for letter in cell}
        if any(layout != first.layout for layout in need) or any(any(index.partial(letter)) for letter in letters):
            return None
        return cells

    def cells(self, i: int, node: Node) -> Cells:
        """What each place does of a node."""
        ins = tuple(self.graph.spec(v) for v in node.inputs)
        index = node.op.indexing(*ins)
        if node.name in self.splits:
            sizes = index.sizes(ins, node.specs)
            return cells_of(node.name, self.splits[node.name], index, sizes, self.places, (i, 0) in self.batched)
        likes: list[Layout | None] = []
        for k in range(len(node.specs)):
            like = self.graph.like.get((i, k), self.homes.get((i, k)))
            lies = self.placed[like].layout if like in self.placed else None
            likes.append(self.beside.get((i, k), lies))
        return choose(
            Known(
                node,
                index,
                ins,
                operands=[self.placed.get(v) for v in node.inputs],
                copies=[self.moved.get(v, {}).keys() for v in node.inputs],
                likes=likes,
                places=self.places,
                machine=self.machine,
                ranks=self.stage(node),
            )
        )

    def stage(self, node: Node) -> tuple[int, ...]:
        """The ranks that a gradient is computed on: those of its layer, if it was given some."""
        layer = node.name.removeprefix(GRADIENTS).rpartition("/")[0]
        given = self.splits.get(layer) if node.name.startswith(GRADIENTS) else None
        return given.ranks if given is not None else ()

    def check(self, node: Node, k: int, made: Sequence[Made | None], give: Layout) -> None:
        for p, ys in enumerate(made):
            block = give[p]
            if ys is not None and block is not None and ys[k].shape != block.shape:
                raise ShapeError(
                    f"split: {node.name} on rank {self.places.rank(p)} makes {ys[k].spec} but its index formula says "
                    f"{block.shape}. Correct local or index of {node.op.name}."
                )

    # moves ------------------------------------------------------------------------------------------

    def move(self, value: Value, want: Layout) -> tuple[Tensor | None, ...]:
        """The value as each place wants it: summed over ranks if partial, exchanged if blocks differ."""
        if value in self.sources:
            node = self.sources[value]
            if isinstance(node.op, Leaf) and node.op.kind != "clock":
                self.place_leaf(value, node, want)
            else:
                return self.constant(node, want)
        placed = self.placed[value]
        if placed.partial and self.summable(placed, want):
            placed = self.placed[value] = self.sum(value, placed)
        if not placed.partial and all(b is None or b == a for a, b in zip(placed.layout, want, strict=True)):
            return tuple(None if b is None else y for y, b in zip(placed.tensors, want, strict=True))
        copies = self.moved.setdefault(value, {})
        if want not in copies:
            copies[want] = self.exchange(value, placed, want)
        return copies[want]

    def constant(self, node: Node, want: Layout) -> tuple[Tensor | None, ...]:
        """A clock or a constant: every place makes its own."""
        made = []
        for p, (block, shared) in enumerate(zip(want, self.places.same(want), strict=True)):
            name = node.name if shared else self.places.mark(node.name, p)
            made.append(block and self.add(self.places.rank(p), node.op.local((), (block,)), (), name, block))
        return tuple(ys[0] if ys else None for ys in made)

    def added(self, value: Value, placed: Placed) -> list[tuple[Summand, Tensor]]:
        """What ranks have of a value, with the parts of a sum that are on the same rank added up."""
        found: dict[tuple[int, Block], list[tuple[int, Tensor, int]]] = {}
        for p in placed.holders:
            tensor, block = placed.tensors[p], placed.layout[p]
            assert tensor is not None
            assert block is not None
            mine = found.setdefault((self.places.rank(p), block), [])
            if placed.parts[p] not in [part for part, *_ in mine]:
                mine.append((placed.parts[p], tensor, p))
        out = []
        for (rank, block), mine in found.items():
            mine.sort(key=lambda each: each[0])
            total = mine[0][1]
            for _, tensor, p in mine[1:]:
                name = self.places.mark(f"{self.graph.value_name(value)}/added", p)
                total = self.add(rank, Add(), (tensor, total), name, None)[0]  # fused into what makes the last part
            out.append((Summand(rank, block, frozenset(part for part, *_ in mine)), total))
        return out

    def summable(self, placed: Placed, want: Layout) -> bool:
        """Is an all-reduce of what ranks hold the way to what is wanted, rather than an exchange of parts?"""
        blocks, parts = set(present(placed.layout)), placed.count
        direct = max((block.size for block in present(want)), default=0) * (parts - 1)
        reduced = max(block.size for block in blocks) * 2 * (parts - 1) / parts
        return direct >= reduced and all(
            groups([held for held in self.held(placed) if held.block == block]) is not None for block in blocks
        )

    def held(self, placed: Placed) -> list[Summand]:
        """What ranks have of a sum, as `added` gives it."""
        found: dict[tuple[int, Block], set[int]] = {}
        for p in placed.holders:
            block = placed.layout[p]
            assert block is not None
            found.setdefault((self.places.rank(p), block), set()).add(placed.parts[p])
        return [Summand(rank, block, frozenset(parts)) for (rank, block), parts in found.items()]

    def sum(self, value: Value, placed: Placed) -> Placed:
        """The sum, on all that have parts of it."""
        added = self.added(value, placed)
        totals: dict[tuple[int, Block], Tensor] = {(held.rank, held.block): y for held, y in added}
        for block in dict.fromkeys(held.block for held, _ in added):
            for ranks in groups([held for held, _ in added if held.block == block]) or ():
                name = self.meeting(f"{self.graph.value_name(value)}/sum")
                for rank in ranks if len(ranks) > 1 else ():
                    op = AllReduce(ranks=ranks)
                    totals[rank, block] = self.collective(rank, op, (totals[rank, block],), name)[0]
        tensors = tuple(b if b is None else totals[self.places.rank(p), b] for p, b in enumerate(placed.layout))
        return Placed(placed.layout, (0,) * len(self.places), tensors)

    def exchange(self, value: Value, placed: Placed, want: Layout) -> tuple[Tensor | None, ...]:
        """The value in other blocks. What a rank has itself it cuts out."""
        name, dtype = self.graph.value_name(value), self.graph.spec(value).dtype
        added = self.added(value, placed)
        got: dict[tuple[int, Block], Tensor] = {}
        asked: dict[tuple[int, Block], list[int]] = {}  # who wants what, and for which of its micro-batches
        for p, block in enumerate(want):
            if block is None:
                continue
            key = self.places.rank(p), block
            if key in got:
                continue
            mine = next(
                ((h, y) for h, y in added if h.rank == key[0] and not placed.partial and block.within(h.block)), None
            )
            if mine is None:
                asked.setdefault(key, []).append(self.places.micro(p))
            else:
                held, y = mine
                got[key] = y if block == held.block else self.cut_out(key[0], y, block, held.block, f"{name}/cut", p)
        where = {(held.rank, held.block): y for held, y in added}
        for each in exchanges([held for held, _ in added], list(asked), dtype):
            title = self.meeting(f"{name}/move")
            if any(len(asked[key]) < self.places.micro_batches for key in each.want):
                title = self.places.mark(title, min(asked[key][0] for key in each.want))
            for rank in each.ranks:
                op = replace(each, rank=rank)
                xs = [where[rank, op.have[i].block] for i in op.held]
                for i, y in zip(op.wanted, self.collective(rank, op, xs, title), strict=False):
                    got[op.want[i]] = y
        return tuple(b if b is None else got[self.places.rank(p), b] for p, b in enumerate(want))

    def cut_out(self, rank: int, x: Tensor, block: Block, outer: Block, name: str, place: int) -> Tensor:
        """A region of what the rank has."""
        cuts = block.inside(outer)
        whole = [(c.start, c.stop) == (0, size) for c, size in zip(cuts, x.shape, strict=True)]
        op = Slice(
            starts=tuple(c.start for c in cuts),
            stops=tuple(None if all_of_it else c.stop for c, all_of_it in zip(cuts, whole, strict=True)),
            steps=(1,) * len(cuts),
        )
        return self.add(rank, op, (x,), self.places.mark(name, place), None)[0]

    # rank graphs ------------------------------------------------------------------------------------

    def add(self, rank: int, op: Op, xs: Sequence[Tensor], name: str, at: Block | None) -> Made:
        """A node of a place on its rank; where another micro-batch has made the same it is not made again."""
        key = (rank, name, op, tuple(x.id for x in xs), at)
        if key not in self.made:
            new = self.out[rank]
            made = new.add(op, xs, name if name not in new else self.meeting(name), at)
            self.made[key] = made if isinstance(made, tuple) else (made,)
        return self.made[key]

    def meeting(self, name: str) -> str:
        """A name that no other node has, on any rank."""
        self.meetings[name] = self.meetings.get(name, 0) + 1
        base, mark, micro = name.partition(MARK)
        return f"{base}_{self.meetings[name]}{mark}{micro}"

    def collective(self, rank: int, op: AllReduce | Exchange, xs: Sequence[Tensor], name: str) -> Made:
        made = self.out[rank].add(op, xs, name)
        return made if isinstance(made, tuple) else (made,)


def _parts(cells: Cells, partial: Any, k: int) -> tuple[int, ...]:
    """For each place, the number of the part of a sum that it makes of output k."""
    letters = sorted({letter for cell in cells if cell for letter in cell if partial(letter)[k]})
    keys = [None if cell is None else tuple(cell[letter] for letter in letters if letter in cell) for cell in cells]
    order = sorted({key for key in keys if key is not None})
    return tuple(0 if key is None else order.index(key) for key in keys)


def _at(layouts: Sequence[Sequence[T | None]], place: int) -> list[T]:
    """What a place has of each; it takes part, so it has something."""
    found = [x for layout in layouts if (x := layout[place]) is not None]
    assert len(found) == len(layouts)
    return found
