"""How to divide the work of a node for which nobody said it: so that it is done soonest, counting what must move.

Looked at are the ways in which one operand, or the value that an output is the gradient of, stays where it is; these
without the letters that make an output a part of a sum; and that all who have the largest operand do everything.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import prod

from ..graph import Node
from ..index import Index
from ..spec import Block, Spec
from .cost import Machine, node_s
from .layout import Cells, Layout, Places, blocks_of, cells_along, present
from .placed import Placed


def choose(
    node: Node,
    index: Index,
    ins: Sequence[Spec],
    operands: Sequence[Placed | None],
    likes: Sequence[Layout | None],
    places: Places,
    machine: Machine,
) -> Cells:
    """What each place does of a node. ``operands`` that can be had anywhere are None; ``likes``: where outputs are
    wanted, if that is known."""
    sizes = index.sizes(ins, node.specs)
    best: tuple[float, Cells] | None = None
    for cells in _candidates(index, sizes, operands, likes, places):
        need, give = blocks_of(index, cells, ins, node.specs)
        if _leaves_nothing(need, give, (*ins, *node.specs)):
            continue
        found = _seconds(node, index, ins, cells, need, give, operands, likes, sizes, places, machine)
        if best is None or found < best[0] * (1 - 1e-9):
            best = found, cells
        if best[0] == 0.0:
            break
    assert best is not None
    return best[1]


def _candidates(
    index: Index,
    sizes: Mapping[str, int],
    operands: Sequence[Placed | None],
    likes: Sequence[Layout | None],
    places: Places,
) -> Iterator[Cells]:
    pairs = [(layout, index.outputs[k]) for k, layout in enumerate(likes) if layout is not None]
    pairs += [(placed.layout, index.inputs[j]) for j, placed in enumerate(operands) if placed is not None]
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
    yield tuple({} if somewhere else None for somewhere in _holders(operands, likes, places))


def _holders(operands: Sequence[Placed | None], likes: Sequence[Layout | None], places: Places) -> list[bool]:
    """Which places have a part of the largest operand, or of what the output is like; all, if there is nothing."""
    layouts = [placed.layout for placed in operands if placed is not None] or [x for x in likes if x is not None]
    if not layouts:
        return [True] * len(places)
    largest = max(layouts, key=lambda layout: prod(present(layout)[0].whole))
    return [block is not None for block in largest]


def _leaves_nothing(need: Sequence[Layout], give: Sequence[Layout], specs: Sequence[Spec]) -> bool:
    """Would a place that takes part read or make nothing of some array?"""
    layouts = [layout for layout, spec in zip((*need, *give), specs, strict=True) if 0 not in spec.shape]
    return any(block is not None and block.empty for layout in layouts for block in layout)


def _seconds(
    node: Node,
    index: Index,
    ins: Sequence[Spec],
    cells: Cells,
    need: Sequence[Layout],
    give: Sequence[Layout],
    operands: Sequence[Placed | None],
    likes: Sequence[Layout | None],
    sizes: Mapping[str, int],
    places: Places,
    machine: Machine,
) -> float:
    """Seconds of a node if it is divided so: the slowest rank's work, and what it gets from others."""
    whole_s = node_s(node.op, ins, node.specs, machine)
    work = [0.0] * places.ranks
    done: set[tuple[int, tuple[object, ...]]] = set()
    for p, cell in enumerate(cells):
        if cell is None or (places.rank(p), tuple(cell.items())) in done:
            continue
        done.add((places.rank(p), tuple(cell.items())))
        work[places.rank(p)] += whole_s * prod((hi - lo) / max(1, sizes[k]) for k, (lo, hi) in cell.items())
    moved_s, summed = 0.0, 0.0
    for spec, placed, layout in zip(ins, operands, need, strict=True):
        if placed is not None:
            moved_s += machine.move_s(_moved_bytes(spec, placed.layout, layout, placed.count, places))
    for k, (spec, like) in enumerate(zip(node.specs, likes, strict=True)):
        letters = {letter for cell in cells if cell for letter in cell if index.partial(letter)[k]}
        parts = len({tuple(cell[letter] for letter in letters) for cell in cells if cell}) if letters else 1
        if parts > 1:
            wanted = like or tuple(None if b is None else Block.all(b.whole) for b in give[k])
            summed += _moved_bytes(spec, give[k], wanted, parts, places)
        elif like is not None:
            moved_s += machine.move_s(_moved_bytes(spec, give[k], like, 1, places))
    return max(work) + moved_s + machine.move_s(summed)  # sums go together


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
