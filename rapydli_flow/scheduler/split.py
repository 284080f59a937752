"""Split a graph over ranks: Graph + layouts of leaves -> one Graph a rank.

A layout is a block for each rank. For each node, one letter of its index formula is divided, chosen
by what its operands are divided along; the formula then tells which block of every operand each rank
needs, and which block of the outputs it makes:

      x: rows 0-5 | 5-9             letter h of  n h*2+r-1 ... -> n h ...
      |           \\                 is cut where x is: each rank needs a halo row more,
      need 0-6      need 5-9        so x becomes an Exchange(have, want) before the node
      |             |
      y: rows 0-3 | 3-5             an output without the letter is a part of a sum: AllReduce when read

No rule knows about convolution, or about samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..errors import ShapeError
from ..graph import Graph, Node, Tensor, Value
from ..index import Axis, Index, Operand
from ..ops import Leaf, Op
from ..spec import Block, Spec, even_bounds
from .collective import AllReduce, Exchange

Layout = tuple[Block, ...]


@dataclass(frozen=True)
class _Placed:
    """Where a value of the whole graph is: its blocks, whether they are parts of a sum, its tensors."""

    layout: Layout
    partial: bool
    tensors: tuple[Tensor, ...]


@dataclass(frozen=True)
class _Cut:
    """The letter of a node's formula that is divided, and where."""

    letter: str
    bounds: tuple[int, ...]


def split(graph: Graph, ranks: int, layouts: Mapping[str, Layout]) -> tuple[Graph, ...]:
    """One graph a rank. ``layouts`` says how leaves lie, by name; leaves not named are whole on every rank."""
    for name, layout in layouts.items():
        if len(layout) != ranks:
            raise ShapeError(f"split: the layout of {name} has {len(layout)} blocks for {ranks} ranks.")
        spec = graph.find(name).spec
        if not isinstance(graph[name].op, Leaf):
            raise ShapeError(f"split: {name} is not a leaf; only leaves are given a layout.")
        if any(block.whole != spec.shape for block in layout):
            raise ShapeError(f"split: the layout of {name} is for {layout[0].whole}, but it is {spec}.")
        if not _tiles(layout):
            blocks = " ".join(map(str, layout))
            raise ShapeError(
                f"split: the blocks {blocks} are not {name} {spec} cut along one axis in the order of the ranks. "
                "Make them with Block.along."
            )
    return _Split(graph, ranks, layouts).run()


class _Split:
    def __init__(self, graph: Graph, ranks: int, layouts: Mapping[str, Layout]) -> None:
        self.graph, self.ranks, self.layouts = graph, ranks, layouts
        self.out = tuple(Graph(counts=dict(graph.counts)) for _ in range(ranks))
        self.placed: dict[Value, _Placed] = {}
        self.moved: dict[tuple[Value, Layout | None], tuple[Tensor, ...]] = {}

    def run(self) -> tuple[Graph, ...]:
        for i, node in enumerate(self.graph.nodes):
            for new in self.out:
                new.where = node.where
            if isinstance(node.op, Leaf):
                self.place_leaf(i, node)
            else:
                self.place(i, node)
        for name, value in self.graph.outputs.items():
            for new, y in zip(self.out, self.move(value, self.whole(self.graph.spec(value))), strict=True):
                new.outputs[name] = y.id
        for name, value in self.graph.updates.items():
            home = self.placed[self.graph.find(name).id].layout
            for new, y in zip(self.out, self.move(value, home), strict=True):
                new.updates[name] = y.id
        for new in self.out:
            new.where = None
        return self.out

    def whole(self, spec: Spec) -> Layout:
        return (Block.all(spec.shape),) * self.ranks

    def place_leaf(self, i: int, node: Node) -> None:
        layout = self.layouts.get(node.name) or self.whole(node.specs[0])
        _no_empty(node.name, layout)
        tensors = tuple(
            new.add(node.op.local((), (block,)), (), node.name, block)
            for new, block in zip(self.out, layout, strict=True)
        )
        self.placed[i, 0] = _Placed(layout, False, tensors)

    def place(self, i: int, node: Node) -> None:
        ins = tuple(self.graph.spec(v) for v in node.inputs)
        index = node.op.indexing(*ins)
        cut = self.cut(i, node, index, ins)
        keep = bool(node.op.linear and node.inputs and cut is None and all(self.placed[v].partial for v in node.inputs))
        need: list[tuple[Block, ...]] = []
        give: list[tuple[Block, ...]] = []
        for rank in range(self.ranks):
            interval = (cut.letter, cut.bounds[rank], cut.bounds[rank + 1]) if cut else (None,)
            a, b = index.blocks(ins, node.specs, *interval)
            need.append(a)
            give.append(b)
        operands = []
        for j, v in enumerate(node.inputs):
            want = tuple(blocks[j] for blocks in need)
            _no_empty(node.name, want)
            operands.append(self.placed[v].tensors if keep else self.move(v, want))
        made: list[tuple[Tensor, ...]] = []
        for rank, new in enumerate(self.out):
            op = node.op.local(need[rank], give[rank]) if cut else node.op
            at = give[rank][0] if op.indexed else None
            ys = new.add(op, [x[rank] for x in operands], node.name, at)
            made.append(ys if isinstance(ys, tuple) else (ys,))
        for k in range(len(node.specs)):
            layout = tuple(blocks[k] for blocks in give)
            _no_empty(node.name, layout)
            for rank in range(self.ranks):
                if made[rank][k].shape != layout[rank].shape:
                    raise ShapeError(
                        f"split: {node.name} on rank {rank} makes {made[rank][k].spec} but its index formula says "
                        f"{layout[rank].shape}. Correct local or index of {node.op.name}."
                    )
            partial = keep or (cut is not None and index.partial(cut.letter)[k])
            self.placed[i, k] = _Placed(layout, partial, tuple(ys[k] for ys in made))

    def cut(self, i: int, node: Node, index: Index, ins: Sequence[Spec]) -> _Cut | None:
        """The letter to divide: as the value that this is the gradient of, else as the first divided operand."""
        like: list[tuple[Operand, Layout]] = [
            (index.outputs[k], self.placed[self.graph.like[i, k]].layout)
            for k in range(len(node.specs))
            if (i, k) in self.graph.like and self.graph.like[i, k] in self.placed
        ]
        divided = [*like, *((o, self.placed[v].layout) for o, v in zip(index.inputs, node.inputs, strict=True))]
        sizes = index.sizes(ins, node.specs)
        for exact in (True, False):
            for operand, layout in divided:
                where = _boundaries(layout)
                axis = operand[where[0]] if where else None
                if where is None or axis is None:
                    continue
                if axis.letter and exact:
                    return _Cut(axis.letter, where[1])
                if not exact and axis.letter is None:
                    letter = _leading(axis, index)
                    if letter and sizes[letter] >= self.ranks:
                        return _Cut(letter, even_bounds(sizes[letter], self.ranks))
        return None

    def move(self, value: Value, want: Layout) -> tuple[Tensor, ...]:
        """The value as ``want``: summed over ranks if partial, exchanged if its blocks differ."""
        placed, name = self.placed[value], self.graph.value_name(value)
        tensors = placed.tensors
        if placed.partial:
            if (value, None) not in self.moved:
                self.moved[value, None] = self.emit([AllReduce()] * self.ranks, tensors, f"{name}/sum")
            tensors = self.moved[value, None]
        if placed.layout == want:
            return tensors
        if (value, want) not in self.moved:
            ops = [Exchange(rank=r, have=placed.layout, want=want) for r in range(self.ranks)]
            count = sum(1 for v, w in self.moved if v == value and w is not None)
            self.moved[value, want] = self.emit(ops, tensors, f"{name}/move_{count + 1}")
        return self.moved[value, want]

    def emit(self, ops: Sequence[Op], tensors: Sequence[Tensor], name: str) -> tuple[Tensor, ...]:
        return tuple(new.add(op, (x,), name) for new, op, x in zip(self.out, ops, tensors, strict=True))


def _boundaries(layout: Layout) -> tuple[int, tuple[int, ...]] | None:
    """(axis, boundaries) of the axis along which ranks differ; None if they do not."""
    for axis in range(len(layout[0].whole)):
        if any((b.lo[axis], b.hi[axis]) != (layout[0].lo[axis], layout[0].hi[axis]) for b in layout):
            return axis, (*(b.lo[axis] for b in layout), layout[-1].hi[axis])
    return None


def _tiles(layout: Layout) -> bool:
    """Is this the whole array on every rank, or the array cut along one axis in the order of the ranks?"""
    whole = layout[0].whole
    if all(block == Block.all(whole) for block in layout):
        return True
    cut = _boundaries(layout)
    if cut is None:
        return False
    axis, bounds = cut
    ordered = bounds == tuple(sorted(bounds)) and (bounds[0], bounds[-1]) == (0, whole[axis])
    return ordered and layout == Block.along(whole, axis, bounds)


def _leading(axis: Axis, index: Index) -> str | None:
    """The letter of a compound axis that stands alone in the output: h in 'h*2+r-1'."""
    alone = {a.letter for operand in index.outputs for a in operand if a}
    return next((letter for letter in axis.letters if letter in alone), None)


def _no_empty(name: str, layout: Layout) -> None:
    for rank, block in enumerate(layout):
        if block.empty and 0 not in block.whole:
            raise ShapeError(
                f"split: rank {rank} of {len(layout)} would hold nothing of {name} {block.whole}. Use fewer ranks."
            )
