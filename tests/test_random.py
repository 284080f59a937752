"""Random numbers: their values are part of the file format, so they are written down here."""

import numpy as np
import pytest

from rapydli_flow import random
from rapydli_flow.spec import Block

u = np.uint64
BITS = [18223645552118757534, 13066661082960256804, 4474425215324007999, 5386631199792980582]
OTHER = [3746585686858627171, 8298845692851315074, 14212716340088575845, 522234680983588784]
UNIFORM = [0.624666587735203, 0.5450041620995701, 0.19903514077594853, 0.09078054233821808]
NORMAL = [-1.3869059454829777, 0.10021675007108966, 0.6139335761597497, 0.08610737355681874]


def test_mix_is_splitmix64() -> None:
    """The first numbers of the published generator (seed 1234567; Vigna's splitmix64.c)."""
    with np.errstate(over="ignore"):
        got = [int(random.mix(u(1234567) + random.GOLDEN * u(i))) for i in range(1, 6)]
    assert got == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


def test_known_bits() -> None:
    with np.errstate(over="ignore"):
        bits = [int(random.random_bits(u(1), u(2), u(3), u(i))) for i in range(4)]
        other = [
            int(random.random_bits(u(a), u(b), u(c), u(0))) for a, b, c in ((0, 0, 0), (2, 2, 3), (1, 3, 3), (1, 2, 4))
        ]
    assert bits == BITS
    assert other == OTHER


def test_known_uniform_and_normal() -> None:
    at = Block.all((4,))
    assert random.uniform(7, 0, 5, at).tolist() == pytest.approx(UNIFORM, rel=1e-15)
    assert random.normal(7, 5, at).tolist() == pytest.approx(NORMAL, rel=1e-12)
    assert random.stream_of("conv_1/w") == 1752069081


def test_indices_of_a_block() -> None:
    whole = np.arange(60, dtype=u).reshape(3, 4, 5)
    at = Block((1, 0, 2), (3, 3, 5), (3, 4, 5))
    assert np.array_equal(random.indices(at), whole[at.slices])
    assert random.indices(Block.all(())) == 0


@pytest.mark.parametrize("draw", [lambda at: random.uniform(3, 1, 9, at), lambda at: random.normal(3, 9, at)])
def test_a_block_is_the_part_of_the_whole(draw) -> None:
    whole = draw(Block.all((6, 7)))
    at = Block((2, 3), (5, 7), (6, 7))
    assert np.array_equal(draw(at), whole[at.slices])


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_keep_has_its_rate(rate: float) -> None:
    n = 100_000
    with np.errstate(over="ignore"):
        kept = random.keep(u(5), u(1), u(2), np.arange(n, dtype=u), u(round(rate * 2**24)))
    assert kept.mean() == pytest.approx(1 - rate, abs=4 * np.sqrt(rate * (1 - rate) / n))


def test_keep_differs_between_steps_streams_and_seeds() -> None:
    index = np.arange(10_000, dtype=u)
    with np.errstate(over="ignore"):
        fields = [
            random.keep(u(a), u(b), u(c), index, u(2**23)) for a, b, c in ((1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2))
        ]
    for i, a in enumerate(fields):
        for b in fields[:i]:
            assert (a == b).mean() == pytest.approx(0.5, abs=0.03)


def test_neighbours_are_independent() -> None:
    x = random.uniform(1, 1, 1, Block.all((100_000,)))
    assert abs(np.corrcoef(x[:-1], x[1:])[0, 1]) < 0.02
    assert x.min() >= 0.0
    assert x.max() < 1.0


def test_normal_has_mean_0_and_variance_1() -> None:
    x = random.normal(11, 4, Block.all((100_000,)))
    assert x.mean() == pytest.approx(0.0, abs=0.02)
    assert x.var() == pytest.approx(1.0, abs=0.03)
    assert (np.abs(x) < 1.0).mean() == pytest.approx(0.6827, abs=0.01)
