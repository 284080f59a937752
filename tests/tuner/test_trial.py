"""Trials: medians with bounds, and times that are none."""

from math import inf, nan

import numpy as np
import pytest

from rapydli_flow.tuner import Choice, Trial
from rapydli_flow.tuner.trial import median_interval

CHOICE = Choice("t", (("a", 1),))


def test_a_trial_of_samples() -> None:
    trial = Trial.timed(CHOICE, [3.0, 1.0, 2.0, 5.0, 4.0, 7.0, 6.0])
    assert (trial.time_s, trial.low_s, trial.high_s, trial.rounds, trial.error) == (4.0, 1.0, 7.0, 7, "")
    assert Trial.timed(CHOICE, [1.0, 2.0]).time_s == 1.5
    assert trial.scaled(2.0).time_s == 8.0
    assert trial.scaled(2.0).high_s == 14.0


@pytest.mark.parametrize("wrong", [0.0, -1.0, inf, nan])
def test_what_is_no_time_is_a_failure(wrong: float) -> None:
    for trial in (Trial.timed(CHOICE, [1.0, wrong]), Trial(CHOICE, wrong).checked()):
        assert trial.time_s is None
        assert trial.stage == "time"
        assert trial.error == f"measured {wrong} s, which is no time"
    assert Trial.timed(CHOICE, []).error == "measured nothing"
    assert Trial.failed(CHOICE, "check", "x").scaled(2.0) == Trial.failed(CHOICE, "check", "x")


def test_the_bounds_hold_the_median_in_95_of_100_cases() -> None:
    rng = np.random.default_rng(0)
    for n in (7, 11, 21, 40):
        found = [median_interval(row.tolist()) for row in rng.exponential(size=(4000, n))]
        inside = np.mean([low <= np.log(2) <= high for low, high in found])
        assert 0.93 < inside < 0.995
