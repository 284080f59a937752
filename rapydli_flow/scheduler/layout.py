"""Where arrays are, and how the work of a node is divided, for each place: a rank, or a micro-batch on a rank.

place 0       1       2       3              2 ranks, 2 micro-batches
rank  0       0       1       1
      rows 0  rows 2  rows 4  rows 6         a batch of 8: each rank has neighbours, in both of its micro-batches
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise, product
from math import prod

from ..errors import ShapeError
from ..graph import Node
from ..index import Axis, Index, Operand
from ..ops import Leaf
from ..spec import Block, Spec, even_bounds

Layout = tuple[Block | None, ...]  # a block for each place, or for each rank; None: it has nothing
Cell = Mapping[str, tuple[int, int]]  # ranges of letters; letters that are not named are whole
Cells = tuple[Cell | None, ...]  # what each place does of a node; None: nothing
MARK = "@"  # in names of rank graphs, before the number of a micro-batch
Parts = int | tuple[int, ...]  # equal parts, or boundaries: (0, 5, 12)


@dataclass(frozen=True)
class Split:
    """How a layer is divided: into how many parts along which axes of its output, and which ranks compute it.

    ``channels`` are those of the input, ``filters`` those of the output; each number of parts may be a tuple of
    boundaries, ``(0, 5, 12)``, instead. Ranks take the parts row by row, the last axis fastest; where there are more
    ranks than parts, neighbours compute the same. No ranks: all of the plan.
    """

    samples: Parts = 1
    depth: Parts = 1
    height: Parts = 1
    width: Parts = 1
    channels: Parts = 1
    filters: Parts = 1
    ranks: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name, parts in self.axes.items():
            if count(parts) < 1:
                raise ShapeError(f"Split: {name}={parts} is not 1 part or more, or boundaries such as (0, 5, 12).")

    @property
    def axes(self) -> dict[str, Parts]:
        """The axes that are divided."""
        named = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "ranks"}
        return {name: parts for name, parts in named.items() if parts != 1}

    @property
    def count(self) -> int:
        """The number of parts of all axes together."""
        return prod(count(parts) for parts in self.axes.values())

    def __str__(self) -> str:
        axes = [f"{name} in {count(parts)}" for name, parts in self.axes.items()]
        ranks = f"on ranks {','.join(map(str, self.ranks))}" if self.ranks else ""
        return " ".join(filter(None, (", ".join(axes), ranks))) or "whole"


def count(parts: Parts) -> int:
    return parts if isinstance(parts, int) else len(parts) - 1


def bounds_of(what: str, parts: Parts, size: int) -> tuple[int, ...]:
    """Boundaries of parts of an axis; ShapeError where a part would be empty, or they are no boundaries."""
    if isinstance(parts, int):
        if not 1 <= parts <= size:
            raise ShapeError(f"{what}: {size} cannot be divided into {parts} parts. Use fewer ranks.")
        return even_bounds(size, parts)
    if parts[:1] != (0,) or parts[-1] != size or any(a >= b for a, b in pairwise(parts)):
        raise ShapeError(f"{what}: {parts} are no boundaries of {size}; they rise from 0 to {size}.")
    return parts


def along_longest(shape: tuple[int, ...], ranks: int) -> Layout | None:
    """An array in even parts along its longest axis; None where that is too short, or there is one rank."""
    axis = max(range(len(shape)), key=shape.__getitem__, default=None)
    if axis is None or not shape[axis] >= ranks > 1:
        return None
    return Block.along(shape, axis, even_bounds(shape[axis], ranks))


@dataclass(frozen=True)
class Places:
    """The places of a plan: number ``rank * micro_batches + m`` is micro-batch m on a rank."""

    ranks: int
    micro_batches: int = 1

    def __len__(self) -> int:
        return self.ranks * self.micro_batches

    def rank(self, place: int) -> int:
        return place // self.micro_batches

    def micro(self, place: int) -> int:
        return place % self.micro_batches

    def mark(self, name: str, place: int) -> str:
        """The name of a node that belongs to a micro-batch."""
        return name if self.micro_batches == 1 else f"{name}{MARK}{self.micro(place)}"

    def of(self, rank: int) -> slice:
        """The places of a rank."""
        return slice(rank * self.micro_batches, (rank + 1) * self.micro_batches)

    def same(self, values: Sequence[object]) -> list[bool]:
        """For each place, whether all micro-batches of its rank have the same value."""
        each = [values[self.of(rank)] for rank in range(self.ranks)]
        return [all(v == mine[0] for v in mine) for mine in each for _ in mine]

    def spread(self, layout: Layout) -> Layout:
        """The layout of places where all micro-batches of a rank see the same block."""
        return tuple(layout[self.rank(place)] for place in range(len(self)))


def present(layout: Layout) -> list[Block]:
    """The blocks of the places that have something."""
    return [block for block in layout if block is not None]


def hull(layout: Layout) -> Block | None:
    """The smallest block that holds all of these."""
    some = present(layout)
    if not some:
        return None
    lo = tuple(min(each) for each in zip(*(b.lo for b in some), strict=True))
    hi = tuple(max(each) for each in zip(*(b.hi for b in some), strict=True))
    return Block(lo, hi, some[0].whole)


def intervals(layout: Layout, axis: int) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Where places differ along an axis: boundaries, and the number of its interval for each place (-1: it has
    nothing). None where all that have something have the same."""
    some = present(layout)
    spans = sorted({(b.lo[axis], b.hi[axis]) for b in some})
    if len(spans) < 2 or len({lo for lo, _ in spans}) < len(spans):
        return None
    number = {span: i for i, span in enumerate(spans)}
    at = tuple(-1 if b is None else number[b.lo[axis], b.hi[axis]] for b in layout)
    return (*(lo for lo, _ in spans), some[0].whole[axis]), at


def cells_along(layout: Layout, operand: Operand, index: Index, sizes: Mapping[str, int]) -> Cells | None:
    """What places do of a node if an operand of it stays where it is; None where that divides nothing.

    The letter of an axis is cut where the operand is cut; of a compound axis, as 'h*2+r-1', the letter that it has
    in common with an output is cut in proportion.
    """
    cells: list[dict[str, tuple[int, int]] | None] = [None if block is None else {} for block in layout]
    for axis, form in enumerate(operand):
        cut = intervals(layout, axis)
        if cut is None or form is None:
            continue
        bounds, at = cut
        letter = form.letter
        if bounds[0] != 0:
            continue
        if letter is None:
            letter = leading(form, index)
            if letter is None or sizes[letter] < len(bounds) - 1:
                continue
            bounds = scaled(bounds, sizes[letter])
        if not divisible(letter, index) or any(letter in cell for cell in cells if cell is not None):
            continue
        for cell, i in zip(cells, at, strict=True):
            if cell is not None:
                cell[letter] = (bounds[i], bounds[i + 1])
    return tuple(cells) if any(cells) else None


def scaled(bounds: tuple[int, ...], size: int) -> tuple[int, ...]:
    """Boundaries of another size in proportion, or even ones where a part would be empty."""
    found = tuple(-(-bound * size // bounds[-1]) for bound in bounds)
    return found if all(a < b for a, b in pairwise(found)) else even_bounds(size, len(bounds) - 1)


def leading(axis: Axis, index: Index) -> str | None:
    """The letter of a compound axis that stands alone in an output: h in 'h*2+r-1'."""
    alone = {a.letter for operand in index.outputs for a in operand if a}
    return next((letter for letter in axis.letters if letter in alone), None)


def divisible(letter: str, index: Index) -> bool:
    """Can work be divided along a letter: do its values make different elements of every output that has it?

    It stands alone there, or beside letters that fill its steps, as a in 'a*4+b | b=4'.
    """
    axes = [axis for operand in index.outputs for axis in operand if axis and letter in axis.letters]
    return letter in index.splittable() and all(_apart(letter, axis, dict(index.given)) for axis in axes)


def _apart(letter: str, axis: Axis, given: Mapping[str, int]) -> bool:
    if axis.letter == letter:
        return True
    rest = [(other, by) for other, by in axis.terms if other != letter]
    filled = 1 + sum(by * (given.get(other, 0) - 1) for other, by in rest)
    return dict(axis.terms)[letter] == filled and axis.divisor == 1


def cells_of(what: str, split: Split, index: Index, sizes: Mapping[str, int], places: Places, batched: bool) -> Cells:
    """What places do of a node that is divided as a split says; ShapeError where it cannot be.

    ``batched``: the first axis of the output is that of the batch, which micro-batches divide further.
    """
    ranks = split.ranks or tuple(range(places.ranks))
    if not set(ranks) <= set(range(places.ranks)) or len(set(ranks)) < len(ranks):
        raise ShapeError(f"{what}: ranks {ranks} are not different ones of the plan's {places.ranks}.")
    if len(ranks) % split.count:
        raise ShapeError(f"{what}: {split.count} parts do not go evenly on {len(ranks)} ranks ({split}).")
    named: list[tuple[str, tuple[int, ...]]] = []
    for name, parts in split.axes.items():
        letter = letter_of(name, index)
        if letter is None or not divisible(letter, index) or (name == "samples" and not batched):
            raise ShapeError(f"{what}: {index.formula} has no {name} to divide.")
        named.append((letter, bounds_of(f"{what}: {name}", parts, sizes[letter])))
    copies = len(ranks) // split.count
    grid = list(product(*(range(len(bounds) - 1) for _, bounds in named)))
    samples, micro = letter_of("samples", index) if batched else None, places.micro_batches
    cells: list[Cell | None] = [None] * len(places)
    for i, rank in enumerate(ranks):
        cell = {letter: (b[at], b[at + 1]) for (letter, b), at in zip(named, grid[i // copies], strict=True)}
        for m in range(micro):
            cells[rank * micro + m] = cell
            if samples is not None and micro > 1:
                lo, hi = cell.get(samples, (0, sizes[samples]))
                if hi - lo < micro:
                    raise ShapeError(
                        f"{what}: {hi - lo} records of a rank cannot be divided into {micro} micro-batches. "
                        "Use fewer, or a larger batch."
                    )
                within = even_bounds(hi - lo, micro)
                cells[rank * micro + m] = {**cell, samples: (lo + within[m], lo + within[m + 1])}
    return tuple(cells)


def letter_of(name: str, index: Index) -> str | None:
    """The letter that an axis has in a formula."""
    out, first = index.outputs[0], index.inputs[0] if index.inputs else ()
    spatial = out[1:-1]
    where: dict[str, Axis | None] = {"samples": out[0] if out else None}
    if len(out) > 1:
        where["filters"] = out[-1]
    if len(first) > 1:
        where["channels"] = first[-1]
    where |= dict(zip(("width", "height", "depth"), reversed(spatial), strict=False))
    axis = where.get(name)
    if axis is None:
        return None
    return axis.letter or next((letter for letter in axis.letters if divisible(letter, index)), None)  # a of 'a*4+b'


def blocks_of(
    index: Index, cells: Cells, ins: Sequence[Spec], outs: Sequence[Spec]
) -> tuple[list[Layout], list[Layout]]:
    """Layouts of the inputs that cells need, and of the outputs that they give."""
    none = (None,) * len(ins), (None,) * len(outs)
    known: dict[tuple[tuple[str, tuple[int, int]], ...], tuple[tuple[Block, ...], tuple[Block, ...]]] = {}
    each: list[tuple[Layout, Layout]] = []
    for cell in cells:
        if cell is None:
            each.append(none)
            continue
        key = tuple(cell.items())
        if key not in known:
            known[key] = index.blocks(ins, outs, cell)
        each.append(known[key])
    need = [tuple(a[j] for a, _ in each) for j in range(len(ins))]
    give = [tuple(b[k] for _, b in each) for k in range(len(outs))]
    return need, give


def no_empty(name: str, layout: Layout) -> None:
    """ShapeError where a place would take part with nothing."""
    for place, block in enumerate(layout):
        if block is not None and block.empty and 0 not in block.whole:
            raise ShapeError(
                f"split: place {place} of {len(layout)} would hold nothing of {name} {block.whole}. Use fewer ranks."
            )


def check_layout(name: str, node: Node, layout: Layout, ranks: int) -> None:
    """ShapeError unless this is a layout of a leaf: a grid of blocks, one for each rank."""
    if len(layout) != ranks:
        raise ShapeError(f"split: the layout of {name} has {len(layout)} blocks for {ranks} ranks.")
    spec = node.specs[0]
    if not isinstance(node.op, Leaf):
        raise ShapeError(f"split: {name} is not a leaf; only leaves are given a layout.")
    some = present(layout)
    if any(block.whole != spec.shape for block in some):
        raise ShapeError(f"split: the layout of {name} is for {some[0].whole}, but it is {spec}.")
    for rank, block in enumerate(layout):
        if block is not None and block.empty and 0 not in block.whole:
            raise ShapeError(
                f"split: rank {rank} of {ranks} would hold nothing of {name} {block.whole}. Use fewer ranks."
            )
    if not _is_grid(some):
        blocks = " ".join(map(str, some))
        raise ShapeError(
            f"split: the blocks {blocks} are not a grid of {name} {spec}. Make them with Block.along or Block.grid."
        )


def _is_grid(layout: Sequence[Block]) -> bool:
    """Do the blocks, each maybe several times, tile the whole array: every interval of an axis with every other?"""
    if not layout:
        return False
    whole = layout[0].whole
    cuts = [sorted({(b.lo[axis], b.hi[axis]) for b in layout}) for axis in range(len(whole))]
    for spans, size in zip(cuts, whole, strict=True):
        ends = [lo for lo, _ in spans] + [size]
        if ends[0] != 0 or any(hi != nxt for (_, hi), nxt in zip(spans, ends[1:], strict=True)):
            return False
    cells = 1
    for spans in cuts:
        cells *= len(spans)
    return len(set(layout)) == cells
