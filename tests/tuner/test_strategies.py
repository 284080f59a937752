"""Search strategies: no point twice, the start first, and better than chance where there is something to learn."""

from collections.abc import Sequence
from math import inf, log2
from statistics import median
from typing import Any

import numpy as np
import pytest

from rapydli_flow.errors import SettingError
from rapydli_flow.space import Point, Space
from rapydli_flow.tuner.simulate import Recording, compare, evaluations, read_recordings, replay
from rapydli_flow.tuner.strategies import STRATEGIES, named
from rapydli_flow.tuner.strategies.guided import features
from rapydli_flow.tuner.strategies.transfer import nearest

SPACE = Space(
    {
        "rows": (14, 12, 10, 8, 6, 4, 2),
        "vectors": (2, 1, 3, 4),
        "lanes": (16, 8, 4),
        "split": (1, 2, 4, 8),
        "pack": (True, False),
    },
    hard={"registers": "rows * vectors + vectors + 1 <= 32"},
)
DEFAULT = {"rows": 14, "vectors": 2, "lanes": 16, "split": 1, "pack": True}


def seconds(p: Point) -> float:
    """A landscape like that of a kernel: smooth in logarithms, with an interaction and a region that fails."""
    if p["lanes"] == 4 and p["split"] == 8:
        return inf
    work = 1 + 0.35 * abs(log2(p["rows"] * p["vectors"]) - 4.2) + 0.5 * (4 - log2(p["lanes"]))
    return work * (1 + 0.1 * abs(log2(p["split"]) - 1) * (2 if p["pack"] else 1)) + (0.05 if p["pack"] else 0.0)


def run(
    name: str, seed: int, *, start: Sequence[Point] = (DEFAULT,), most: int = 10**9, space: Space = SPACE
) -> list[Point]:
    search = named(name)(space, list(start), np.random.default_rng(seed), batch=4)
    asked: list[Point] = []
    points = next(search)
    while True:
        assert points
        asked += points
        if len(asked) >= most:
            return asked
        try:
            points = search.send([seconds(p) for p in points])
        except StopIteration:
            return asked


@pytest.mark.parametrize("name", STRATEGIES)
def test_each_point_is_asked_once_and_the_start_comes_first(name: str) -> None:
    small = Space(
        {"rows": (14, 8, 4), "vectors": (2, 1), "lanes": (16, 4), "split": (1, 8), "pack": (True, False)},
        hard=["rows * vectors < 20"],
    )
    start = [{**DEFAULT, "rows": 8}, {**DEFAULT, "rows": 4, "split": 8}]
    asked = run(name, 0, start=start, space=small)
    assert asked[:2] == start
    numbers = small.numbers(asked)
    assert sorted(numbers) == list(range(small.count()))  # all of it, in the end


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_seed_gives_the_same_search(name: str) -> None:
    assert run(name, 3, most=40) == run(name, 3, most=40)


@pytest.mark.parametrize("name", ["guided", "greedy", "evolutionary"])
def test_strategies_beat_chance(name: str) -> None:
    best = min(map(seconds, SPACE))

    def found(strategy: str) -> float:
        return median(best / min(map(seconds, run(strategy, seed, most=SPACE.count() // 8))) for seed in range(3))

    assert found(name) >= found("random")
    assert found(name) > 0.95


def test_a_start_that_is_not_valid_is_not_asked() -> None:
    assert {**DEFAULT, "rows": 14, "vectors": 4} not in run("random", 0, start=[{**DEFAULT, "vectors": 4}], most=20)


def test_transfer_begins_near_what_won_elsewhere() -> None:
    elsewhere = {"rows": 14, "vectors": 4, "lanes": 16, "split": 2, "pack": False}  # breaks the rule here
    near = nearest(SPACE, elsewhere)
    assert near is not None
    assert near in SPACE
    assert sum(near[n] != elsewhere[n] for n in SPACE.names) == 1
    asked = run("transfer", 0, start=[DEFAULT, elsewhere], most=8)
    assert asked[:2] == [DEFAULT, near]
    assert nearest(SPACE, {"other": 1}) is None


def test_features_are_numbers() -> None:
    table = features(
        Space({"a": (1, 2, 8), "b": ("x", "y"), "c": (0, 3), "d": (False, True)}),
        [{"a": 8, "b": "y", "c": 0, "d": True}],
    )
    assert table.tolist() == [[3.0, 1.0, 0.0, 1.0, 4.0, 3.0, 4.0, 1.0, 2.0, 1.0]], "four columns, then sums of any two"


def test_unknown_strategies_are_named() -> None:
    with pytest.raises(SettingError, match="no search strategy 'annealing'; there are guided, greedy"):
        named("annealing")


# simulation --------------------------------------------------------------------------------------------


def recording() -> Recording:
    points = [DEFAULT, *(p for p in SPACE if p != DEFAULT)]
    return Recording("toy", tuple(tuple(sorted(p.items())) for p in points), tuple(map(seconds, points)))


def test_a_replay_is_the_search_itself(tmp_path: Any) -> None:
    one = recording()
    assert one.space.count() == SPACE.count()
    curve = replay(one, "guided", seed=3, trials=40)
    times = [seconds(p) for p in run("guided", 3, most=44, space=one.space)]
    assert curve == [min(times[: i + 1]) for i in range(40)]
    assert curve[0] == seconds(DEFAULT)
    assert replay(one, "exhaustive")[-1] == one.best_s
    assert evaluations([4.0, 3.0, 2.0], 2.0, 0.6) == 2
    assert evaluations([4.0], 2.0, 0.6) is None
    again = Recording.from_json(one.to_json())
    assert again == one


def test_a_comparison_says_how_much_of_the_optimum_comes_when(tmp_path: Any) -> None:
    report = compare(recording(), ("greedy", "random"), repeats=3)
    form = report.to_json()
    assert form["points"] == SPACE.count()
    assert set(form["strategies"]) == {"greedy", "random"}
    greedy = form["strategies"]["greedy"]
    assert 0 < greedy["share_of_evaluations_to_98"] <= 0.5
    fractions = list(greedy["fraction_of_optimum_after"].values())
    assert fractions == sorted(fractions)
    assert fractions[-1] <= 1.0
    assert "greedy" in str(report)
    assert report.svg().count("<polyline") == 2


def test_files_without_recordings(tmp_path: Any) -> None:
    with pytest.raises(SettingError, match="cannot be read"):
        read_recordings(tmp_path / "lost.json")
    (tmp_path / "other.json").write_text('{"a": 1}')
    with pytest.raises(SettingError, match="holds no recorded spaces: KeyError"):
        read_recordings(tmp_path / "other.json")
