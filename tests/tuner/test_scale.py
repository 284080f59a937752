"""Scale: times of several sets of rounds are compared, whatever the machine did from set to set."""

import numpy as np
import pytest

from rapydli_flow.tuner import Choice, Trial
from rapydli_flow.tuner.scale import Scale


def choice(n: int) -> Choice:
    return Choice("plain", (("n", n),))


def one(n: int, seconds: float, spread: float = 0.0) -> Trial:
    return Trial(choice(n), seconds, seconds * (1 - spread), seconds * (1 + spread), 20, 2)


@pytest.mark.parametrize("seed", range(5))
def test_whatever_the_machine_did_ratios_are_those_of_the_choices(seed: int) -> None:
    rng = np.random.default_rng(seed)
    true = rng.uniform(1.0, 3.0, 30)
    scale = Scale()
    for k in range(10):
        beside = [0, *rng.choice(3 * k, min(4, 3 * k), replace=False)] if k else []
        pace = rng.uniform(0.5, 2.0)
        scale.add([one(n, true[n] * pace) for n in dict.fromkeys([*map(int, beside), *range(3 * k, 3 * k + 3)])])
    for n in range(30):
        assert scale.ratio(choice(n), choice(0)) == pytest.approx(true[n] / true[0], rel=1e-5)
    assert scale.ranked(map(choice, range(30))) == [choice(int(n)) for n in np.argsort(true)]


def test_one_that_a_neighbour_slows_down_alone_does_not_carry_the_scale() -> None:
    """In every other set the first takes 30 % longer: the others, timed in different sets, are compared as they are."""
    scale = Scale()
    for k in range(6):
        beside = [one(0, 1.3 if k % 2 else 1.0), one(1, 0.8), one(2, 0.82)]
        scale.add([*beside, one(10 + k, 0.9)])
    for k in range(6):
        assert scale.ratio(choice(10 + k), choice(1)) == pytest.approx(0.9 / 0.8, rel=1e-6)
    assert scale.ratio(choice(1), choice(0)) == pytest.approx(0.8 / np.sqrt(1.3))


def test_luck_is_averaged_out() -> None:
    scale = Scale()
    scale.add([one(0, 1.0), one(1, 0.7), one(2, 1.0)])
    for _ in range(9):
        scale.add([one(0, 1.0), one(1, 1.0), one(2, 1.0)])
    assert scale.ratio(choice(1), choice(0)) == pytest.approx(0.7**0.1)


def test_sets_that_share_nothing_are_as_they_were_measured() -> None:
    scale = Scale()
    scale.add([one(0, 1.0)])
    scale.add([one(1, 2.0), one(2, 3.0)])
    assert scale.ratio(choice(2), choice(0)) == pytest.approx(3.0)
    assert scale.sets(choice(7)) == 0
    assert choice(7) not in scale


def test_several_measurements_as_one() -> None:
    scale = Scale()
    for pace in (1.0, 2.0, 1.0, 4.0):
        scale.add([one(0, pace), one(1, 3 * pace, 0.1)])
    assert sorted(scale.measured(choice(0))) == [1.0, 1.0, 2.0, 4.0]
    trial = scale.trial(choice(1), choice(0), 5.0)
    assert trial.time_s == pytest.approx(15.0)
    assert (trial.low_s, trial.high_s) == (pytest.approx(15 * 0.95), pytest.approx(15 * 1.05))
    assert (trial.rounds, trial.threads) == (80, 2)
    assert scale.trial(choice(1), None, 5.0).time_s == pytest.approx(4.5)


def test_what_failed_once_has_no_time() -> None:
    scale = Scale()
    scale.add([one(0, 1.0), one(1, 0.5)])
    scale.add([one(0, 1.0), Trial.failed(choice(1), "time", "hung")])
    assert choice(1) not in scale
    assert scale.ranked([choice(1), choice(0)]) == [choice(0)]
    assert scale.trial(choice(1), choice(0), 1.0).error == "hung"
