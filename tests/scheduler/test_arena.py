"""The arena: buffers that live at the same time never overlap."""

from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from rapydli_flow.scheduler.arena import ALIGN, Arena, aligned


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(st.lists(st.tuples(st.integers(0, 700), st.integers(0, 9)), max_size=60))
def test_live_buffers_never_overlap(actions: list[tuple[int, int]]) -> None:
    """Each action takes a buffer; one in two also gives one back."""
    arena, live, most = Arena(), [], 0
    for size, choice in actions:
        live.append((arena.take(size), size))
        places = sorted((offset, offset + aligned(n)) for offset, n in live)
        assert all(a[1] <= b[0] for a, b in pairwise(places))
        assert all(offset % ALIGN == 0 for offset, _ in live)
        assert places[-1][1] <= arena.size_bytes
        most += aligned(size)
        assert arena.size_bytes <= most
        if choice % 2:
            arena.give(*live.pop(choice * 7 % len(live)))
    for offset, size in live:
        arena.give(offset, size)
    if actions:  # one gap is left, the whole arena
        whole = arena.size_bytes
        assert arena.take(whole) == 0
        assert arena.size_bytes == whole


def test_sizes_are_aligned_and_never_none() -> None:
    assert [aligned(n) for n in (0, 1, 64, 65)] == [64, 64, 64, 128]


def taken(*sizes: int) -> tuple[Arena, list[int]]:
    arena = Arena()
    return arena, [arena.take(size) for size in sizes]


def test_the_best_gap_is_taken() -> None:
    arena, (a, _, c, _, e, _) = taken(256, 64, 64, 64, 128, 64)
    for offset, size in ((a, 256), (c, 64), (e, 128)):
        arena.give(offset, size)
    whole = arena.size_bytes
    assert [arena.take(100), arena.take(1), arena.take(200)] == [e, c, a]
    assert arena.size_bytes == whole


def test_the_rest_of_a_gap_is_kept() -> None:
    arena, (a, _) = taken(256, 64)
    arena.give(a, 256)
    assert [arena.take(64), arena.take(192)] == [0, 64]
    assert arena.size_bytes == 320


def test_neighbouring_gaps_are_joined() -> None:
    arena, (a, b, c, _) = taken(64, 64, 64, 64)
    for offset in (a, c, b):
        arena.give(offset, 64)
    assert arena.take(192) == 0
    assert arena.size_bytes == 256


def test_a_gap_at_the_end_grows() -> None:
    arena, (_, b) = taken(64, 64)
    arena.give(b, 64)
    assert arena.take(256) == 64
    assert arena.size_bytes == 64 + 256


def test_a_gap_inside_does_not_grow() -> None:
    arena, (a, _) = taken(64, 64)
    arena.give(a, 64)
    assert arena.take(128) == 128
    assert arena.size_bytes == 256
