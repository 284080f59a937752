"""Steps that are done together: any order that comes of it computes the same."""

import random

import pytest

from rapydli_flow.scheduler.together import Bytes, Step, together

UPDATE, OTHER = "update", "other"


def places(names):
    """Arrays of 16 bytes, by name."""
    numbers = [int.from_bytes(name.encode(), "little") for name in names.split()]
    return tuple((16 * number, 16 * number + 16) for number in numbers)


def step(key, reads, writes, size=1):
    return Step(key, places(reads), places(writes), size)


def test_updates_wait_for_each_other_but_not_for_what_needs_them():
    program = [
        step(None, "x w1", "y"),
        step(None, "y w2", "dy"),
        step(UPDATE, "w2 m2 g2", "w2 m2"),
        step(None, "dy", "g1"),
        step(UPDATE, "w1 m1 g1", "w1 m1"),
        step(None, "w2", "average"),
        step(UPDATE, "w3 m3 g3", "w3 m3"),
    ]
    assert together(program, most=100) == [(0,), (1,), (3,), (2, 4), (5,), (6,)]
    assert together(program, most=1) == [(i,) for i in range(7)]


def test_memory_that_is_used_again_is_not_waited_for():
    program = [step(UPDATE, "w1 m1 a", "w1 m1"), step(None, "x", "a"), step(UPDATE, "w2 m2 a", "w2 m2")]
    assert together(program, most=100) == [(0,), (1,), (2,)]


def test_a_byte_in_common_is_enough():
    """Two arrays that overlap, at different times: the second one is made where the first one ends."""
    first, second = Step(UPDATE, ((0, 40),), ((64, 104),), 10), Step(UPDATE, ((200, 240),), ((128, 168),), 10)
    for made, apart in (((40, 64), False), ((39, 41), True), ((100, 120), True), ((104, 128), False), ((0, 300), True)):
        order = together([first, Step(None, (), (made,)), second], most=100)
        assert order == ([(0,), (1,), (2,)] if apart else [(1,), (0, 2)])
    assert together([first, Step(None, ((0, 40),), ()), second], most=100) == [(1,), (0, 2)]  # it only reads, too


@pytest.mark.parametrize("seed", range(10))
def test_bytes_are_a_set(seed):
    draw, known, found = random.Random(seed), set(), Bytes()
    for _ in range(60):
        first = draw.randrange(200)
        one = first, first + draw.randrange(12)
        assert found.meets((one,)) == bool(known & set(range(*one)))
        if draw.random() < 0.5:
            found.add((one,))
            known |= set(range(*one))


@pytest.mark.parametrize("seed", range(30))
def test_any_program_computes_the_same_together(seed):
    draw = random.Random(seed)

    def some(count):
        """Ranges of 40 bytes, of which each is remembered."""
        starts = [draw.randrange(38) for _ in range(count)]
        return tuple((first, first + draw.randrange(1, 4)) for first in starts)

    program = [Step(draw.choice([None, UPDATE, OTHER]), some(2), some(1), 1) for _ in range(40)]

    def outcome(order):
        memory = {place: place for place in range(41)}
        for group in order:
            found = [
                (
                    [b for each in s.writes for b in range(*each)],
                    hash((i, *[memory[b] for r in s.reads for b in range(*r)])),
                )
                for i, s in group
            ]
            written = [b for writes, _ in found for b in writes]
            assert len(set(written)) == len(written)
            for writes, value in found:
                memory.update(dict.fromkeys(writes, value))
        return memory

    order = together(program, most=5)
    assert sorted(i for group in order for i in group) == list(range(40))
    assert any(len(group) > 1 for group in order)
    groups = [[(i, program[i]) for i in group] for group in order]
    assert outcome(groups) == outcome([[(i, s)] for i, s in enumerate(program)])
