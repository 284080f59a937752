"""How to divide the work of a node for which nobody said it: so that it is done soonest, counting what must move.

Looked at are the ways in which one operand, or the value that an output is the gradient of, stays where it is; these
without the letters that make an output a part of a sum; the same on the ranks of the node's stage; and that all who
have the largest operand, or where an output is wanted, do everything.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from math import prod

from ..graph import Node
from ..index import Index
from ..spec import Block, Spec
from .cost import Machine, node_s
from .layout import Cells, Layout, Places, blocks_of, cells_along, hull, present
from .placed import Placed

STOP_S = 10.0  # what it costs if micro-batches have to wait for each other: to be avoided where that is possible
ELSEWHERE_S = 1e3  # and if a stage's work is done by the ranks of another


@dataclass(frozen=True)
class Known:
    """What is known of a node when it is divided.

    ``operands``: where they are, None if they can be had anywhere; ``copies``: further layouts that they have been
    moved to; ``likes``: where outputs are wanted, if that is known; ``ranks``: those that should do it, or all.
    """

    node: Node
    index: Index
    ins: tuple[Spec, ...]
    operands: Sequence[Placed | None]
    copies: Sequence[Collection[Layout]]
    likes: Sequence[Layout | None]
    places: Places
    machine: Machine
    ranks: Sequence[int] = ()


def choose(known: Known) -> Cells:
    """What each place does of a node."""
    best: tuple[float, Cells] | None = None
    for cells in _candidates(known):
        need, give = blocks_of(known.index, cells, known.ins, known.node.specs)
        if _leaves_nothing(need, give, (*known.ins, *known.node.specs)):
            continue
        found = _work_s(known, cells) + _moves_s(known, need) + _sums_s(known, cells, give)
        if known.ranks and any(c is not None and known.places.rank(p) not in known.ranks for p, c in enumerate(cells)):
            found += ELSEWHERE_S
        if best is None or found < best[0] * (1 - 1e-9):
            best = found, cells
    assert best is not None
    return best[1]


def _candidates(known: Known) -> Iterator[Cells]:
    index, sizes = known.index, known.index.sizes(known.ins, known.node.specs)
    pairs = [(layout, index.outputs[k]) for k, layout in enumerate(known.likes) if layout is not None]
    pairs += [(placed.layout, index.inputs[j]) for j, placed in enumerate(known.operands) if placed is not None]
    pairs += [(layout, index.inputs[j]) for j, copies in enumerate(known.copies) for layout in copies]
    if known.ranks:
        pairs += [(moved, operand) for layout, operand in list(pairs) if (moved := _on(known, layout)) is not None]
    seen: set[tuple[object, ...]] = set()
    for layout, operand in pairs:
        cells = cells_along(layout, operand, index, sizes)
        if cells is None:
            continue
        lost = {letter for cell in cells if cell for letter in cell if any(index.partial(letter))}
        fewer = tuple(None if c is None else {k: v for k, v in c.items() if k not in lost} for c in cells)
        for each in (cells, fewer):
            key = tuple(None if c is None else tuple(c.items()) for c in each)
            if any(each) and key not in seen:
                seen.add(key)
                yield each
    for here in (_holders(known), *([b is not None for b in layout] for layout in known.likes if layout is not None)):
        yield tuple({} if somewhere else None for somewhere in here)


def _on(known: Known, layout: Layout) -> Layout | None:
    """The layout on the ranks that should do the node, one for each rank that has it now; None if they are not as
    many."""
    places = known.places
    holders = sorted({places.rank(p) for p, block in enumerate(layout) if block is not None})
    if len(holders) != len(known.ranks):
        return None
    moved: list[Block | None] = [None] * len(places)
    for old, new in zip(holders, known.ranks, strict=True):
        moved[places.of(new)] = layout[places.of(old)]
    return tuple(moved)


def _holders(known: Known) -> list[bool]:
    """Which places have a part of the largest operand, or of what the output is like; all, if there is nothing."""
    layouts = [placed.layout for placed in known.operands if placed is not None]
    layouts = layouts or [layout for layout in known.likes if layout is not None]
    if not layouts:
        return [True] * len(known.places)
    largest = max(layouts, key=lambda layout: prod(present(layout)[0].whole))
    return [block is not None for block in largest]


def _leaves_nothing(need: Sequence[Layout], give: Sequence[Layout], specs: Sequence[Spec]) -> bool:
    """Would a place that takes part read or make nothing of some array?"""
    layouts = [layout for layout, spec in zip((*need, *give), specs, strict=True) if 0 not in spec.shape]
    return any(block is not None and block.empty for layout in layouts for block in layout)


def _work_s(known: Known, cells: Cells) -> float:
    """Seconds of the rank that has most to do; what its micro-batches have in common it does once."""
    places, sizes = known.places, known.index.sizes(known.ins, known.node.specs)
    whole_s = node_s(known.node.op, known.ins, known.node.specs, known.machine)
    work = [0.0] * places.ranks
    for rank, cell in {(places.rank(p), tuple(cell.items())) for p, cell in enumerate(cells) if cell is not None}:
        work[rank] += whole_s * prod((hi - lo) / max(1, sizes[letter]) for letter, (lo, hi) in cell)
    return max(work)


def _moves_s(known: Known, need: Sequence[Layout]) -> float:
    """Seconds in which operands come to where they are needed."""
    total = 0.0
    for spec, placed, copies, layout in zip(known.ins, known.operands, known.copies, need, strict=True):
        if placed is not None and layout not in copies:
            total += known.machine.move_s(_moved_bytes(spec, placed.layout, layout, placed.count, known.places))
            total += STOP_S * _stops(placed.layout, layout, known.places)
    return total


def _sums_s(known: Known, cells: Cells, give: Sequence[Layout]) -> float:
    """Seconds in which outputs come to where they are wanted; sums over ranks go together."""
    total, summed = 0.0, 0.0
    for k, (spec, like) in enumerate(zip(known.node.specs, known.likes, strict=True)):
        letters = {letter for cell in cells if cell for letter in cell if known.index.partial(letter)[k]}
        parts = len({tuple(cell[letter] for letter in letters) for cell in cells if cell}) if letters else 1
        if parts > 1:
            wanted = like or tuple(None if b is None else Block.all(b.whole) for b in give[k])
            summed += _moved_bytes(spec, give[k], wanted, parts, known.places)
        elif like is not None:
            total += known.machine.move_s(_moved_bytes(spec, give[k], like, 1, known.places))
    return total + known.machine.move_s(summed)


def _stops(have: Layout, want: Layout, places: Places) -> bool:
    """Would a micro-batch need what others have?"""
    m = places.micro_batches
    if m == 1:
        return False
    for micro in range(m):
        held, wanted = (hull(layout[micro::m]) for layout in (have, want))
        if wanted is not None and (held is None or not wanted.within(held)):
            return True
    return False


def _moved_bytes(spec: Spec, have: Layout, want: Layout, parts: int, places: Places) -> float:
    """Bytes that the rank which lacks most gets from others, for an array or a sum of ``parts``."""
    item = spec.size_bytes / max(1, spec.size)
    lacking = [0.0] * places.ranks
    known: set[tuple[int, Block]] = set()
    mine: dict[int, list[Block]] = {}
    for p, block in enumerate(have):
        if block is not None:
            mine.setdefault(places.rank(p), []).append(block)
    for p, block in enumerate(want):
        rank = places.rank(p)
        if block is None or (rank, block) in known:
            continue
        known.add((rank, block))
        if parts > 1:  # reduce-scatter, and an all-gather unless that is all that is wanted
            times = 2.0 * (parts - 1) / parts if block in mine.get(rank, ()) else float(parts - 1)
            lacking[rank] += times * block.size * item
        elif block not in mine.get(rank, ()):
            has = max((both.size for held in mine.get(rank, ()) if (both := block.meet(held))), default=0)
            lacking[rank] += (block.size - has) * item
    return max(lacking)
