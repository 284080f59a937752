"""Steps of a program that may be done together: those of one kind, as long as no other is between them that matters.

    program      a1   x   a2   y   b1   a3   z          a1, a2, a3 alike; b1, and x, y, z; z reads what a2 writes
    together     x   y   (a1, a2, a3)   z   (b1)

What a step reads and writes is told as ranges: of bytes, or of numbers that stand for values.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from operator import itemgetter

Range = tuple[int, int]  # the first byte, and the first one behind
MOST = 2**22  # elements that wait at most for others: on a card they are still in its cache then


@dataclass(frozen=True)
class Step:
    """A step of a program: what it may share a kernel with (None: nothing), and which bytes it touches."""

    key: Hashable | None
    reads: tuple[Range, ...]
    writes: tuple[Range, ...]
    size: int = 0  # elements


class Bytes:
    """A set of bytes, as ranges that do not touch each other."""

    def __init__(self) -> None:
        self._first: list[int] = []
        self._behind: list[int] = []

    def add(self, ranges: Sequence[Range]) -> None:
        for first, behind in ranges:
            if first == behind:
                continue
            low, high = bisect_left(self._behind, first), bisect_right(self._first, behind)
            if low < high:
                first, behind = min(first, self._first[low]), max(behind, self._behind[high - 1])
            self._first[low:high], self._behind[low:high] = [first], [behind]

    def meets(self, ranges: Sequence[Range]) -> bool:
        """Is any byte of these ranges in the set?"""
        for first, behind in ranges:
            at = bisect_right(self._behind, first)
            if first < behind and at < len(self._first) and self._first[at] < behind:
                return True
        return False


@dataclass
class _Waiting:
    """Steps of one key that may wait for one more; nothing since the first of them has touched what they do."""

    steps: list[int] = field(default_factory=list)
    reads: Bytes = field(default_factory=Bytes)
    writes: Bytes = field(default_factory=Bytes)
    size: int = 0

    def holds_up(self, step: Step) -> bool:
        """Must they run before this step?"""
        return self.writes.meets(step.reads) or self.writes.meets(step.writes) or self.reads.meets(step.writes)


def together(steps: Sequence[Step], *, most: int) -> list[tuple[int, ...]]:
    """Numbers of steps in an order that computes the same; those in one tuple go together.

    A step with a key waits for others like it, until one comes that needs what it writes, or would overwrite what it
    reads or writes, or until ``most`` elements wait. They all run where the last of them is, while what they read is
    still in the cache. What has no key keeps its order.
    """
    order: list[tuple[int, ...]] = []
    waiting: dict[Hashable, _Waiting] = {}
    for i, step in enumerate(steps):
        for key in [key for key, held_up in waiting.items() if held_up.holds_up(step)]:
            order.append(tuple(waiting.pop(key).steps))
        if step.key is None:
            order.append((i,))
            continue
        own = waiting.setdefault(step.key, _Waiting())
        own.steps.append(i)
        own.reads.add(step.reads)
        own.writes.add(step.writes)
        own.size += step.size
        if own.size >= most:
            order.append(tuple(waiting.pop(step.key).steps))
    return sorted([*order, *(tuple(left.steps) for left in waiting.values())], key=itemgetter(-1))
