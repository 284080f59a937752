"""Trials: what samples say, and what is no time."""

import random
from math import inf, log, nan

import pytest

from rapydli_flow.tuner import Choice, Trial, time_text
from rapydli_flow.tuner.trial import median_interval

CHOICE = Choice("rows", (("grain", 4096),))


def test_samples_make_a_median_and_an_interval() -> None:
    assert Trial.timed(CHOICE, [3.0, 1.0, 2.0]) == Trial(CHOICE, 2.0, 1.0, 3.0, 3)
    assert Trial.timed(CHOICE, [2.0]) == Trial(CHOICE, 2.0, 2.0, 2.0, 1)
    assert Trial.timed(CHOICE, [1.0, 2.0]) == Trial(CHOICE, 1.5, 1.0, 2.0, 2)


@pytest.mark.parametrize(
    ("n", "cut"),
    [(6, 0), (8, 0), (9, 1), (11, 1), (12, 2), (15, 3), (20, 5), (25, 7), (100, 39)],  # tables of the sign test
)
def test_the_interval_is_that_of_the_sign_test(n: int, cut: int) -> None:
    values = [float(i) for i in range(n)]
    random.Random(n).shuffle(values)
    assert median_interval(values) == (float(cut), float(n - 1 - cut))


def test_the_interval_holds_the_median_in_95_percent_of_cases() -> None:
    draw, hits, runs = random.Random(0), 0, 2000
    for _ in range(runs):
        low, high = median_interval([draw.expovariate(1.0) for _ in range(15)])
        hits += low <= log(2) <= high  # the median of what is drawn
    assert hits / runs > 0.94


@pytest.mark.parametrize("wrong", [-1.0, 0.0, nan, inf])
def test_what_is_no_time_is_a_failure(wrong: float) -> None:
    said = f"measured {wrong} s, which is no time"
    assert Trial.timed(CHOICE, [1.0, wrong, 2.0]) == Trial(CHOICE, rounds=3, error=said, stage="time")
    assert Trial(CHOICE, wrong, 0.5, 0.5, 7).checked() == Trial(CHOICE, rounds=7, error=said, stage="time")
    assert Trial.timed(CHOICE, []).error == "measured nothing"


def test_good_trials_and_failures_stay_what_they_are() -> None:
    for trial in (Trial(CHOICE, 1.0), Trial(CHOICE, error="deviates", stage="check")):
        assert trial.checked() is trial
    assert sorted([Trial(CHOICE, error="no"), Trial(CHOICE, 1.0)], key=lambda t: t.seconds)[0].time_s == 1.0


def test_times_for_people() -> None:
    assert [time_text(t) for t in (1.25, 0.0012346, 1e-5, 4.567e-6, 3.1e-7, None)] == [
        "1250.000 ms",
        "1.235 ms",
        "0.010 ms",
        "4.57 \N{MICRO SIGN}s",
        "0.31 \N{MICRO SIGN}s",
        "failed",
    ]
