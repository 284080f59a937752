"""From where a value is to where it is wanted: the collectives that do it, and who takes part.

    all that hold a block want the sum of its parts       AllReduce, within each group that has all parts once
    a part of the sum, or only some want it               Exchange: the receivers add
    other blocks                                          Exchange
    a region of a block that the rank itself has          a slice, without the others

An exchange is cut into independent ones where ranks, or micro-batches, have nothing to do with each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..spec import Block
from .collective import Exchange, Shard


@dataclass(frozen=True)
class Summand:
    """A block on a rank, and the parts of the sum that are in it."""

    rank: int
    block: Block
    parts: frozenset[int]


def groups(held: Sequence[Summand]) -> list[tuple[int, ...]] | None:
    """Groups of ranks that together hold each part of one block once; None if there are none.

    Where parts are on several ranks, the first ones of each form a group, the second ones another.
    """
    by_parts: dict[frozenset[int], list[int]] = {}
    for each in held:
        by_parts.setdefault(each.parts, []).append(each.rank)
    kinds = sorted(by_parts, key=min)
    disjoint = sum(map(len, kinds)) == len(frozenset().union(*kinds))
    if not disjoint or len({len(ranks) for ranks in by_parts.values()}) > 1:
        return None
    return [tuple(sorted(ranks)) for ranks in zip(*(sorted(by_parts[kind]) for kind in kinds), strict=True)]


def exchanges(held: Sequence[Summand], want: Sequence[tuple[int, Block]], dtype: str) -> list[Exchange]:
    """Independent exchanges, as rank -1 sees them, that give everyone what it wants; only shards that are used."""
    kinds = sorted({each.parts for each in held}, key=min)
    shards = tuple(Shard(each.rank, each.block, kinds.index(each.parts)) for each in held)
    pieces = Exchange(rank=-1, have=shards, want=tuple(want), dtype=dtype).pieces
    of_target: dict[int, set[int]] = {}
    for source, target, _ in pieces:
        of_target.setdefault(target, set()).add(source)
    found: list[tuple[set[int], set[int]]] = []  # shards and wants that belong together
    for target, sources in sorted(of_target.items()):
        both = (set(sources), {target})
        for other in [each for each in found if each[0] & both[0]]:
            both[0].update(other[0])
            both[1].update(other[1])
            found.remove(other)
        found.append(both)
    return [
        Exchange(
            rank=-1,
            have=tuple(shards[i] for i in sorted(sources)),
            want=tuple(want[i] for i in sorted(targets)),
            dtype=dtype,
        )
        for sources, targets in sorted(found, key=lambda both: min(both[1]))
    ]
