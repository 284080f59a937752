"""Search: what is tried, in which order, for how long, and what is kept."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from rapydli_flow.errors import SettingError, SpaceError
from rapydli_flow.ops import Op
from rapydli_flow.spec import Spec
from rapydli_flow.template import Device, Epilogue, Loop, template
from rapydli_flow.tuner import Budget, Choice, Found, Request, Trial, Tuner, Winner, nearest

DEVICE = Device("cpu", "a processor", target="tests-1")


class Searched(Op, abstract=True):
    family = "test_searched"
    by: int = 1

    def infer(self, x: Spec) -> Spec:
        return x

    def index(self, x: Spec) -> str:
        return "a -> a"

    def reference(self, x: Any) -> Any:
        return x * self.by


class Unserved(Searched, abstract=True):
    family = "test_unserved"


def narrow(op: Any, ins: Any, outs: Any, device: Any, *, rows: int, wide: bool) -> bool:
    return rows <= 4 or not wide


SPACE = {"rows": (2, 4, 8, 16), "wide": (False, True), "lanes": (4, 8, 16), "depth": (1, 2, 3, 4)}


@template("test_searched", "cpu", space=SPACE, fits={"narrow": narrow, "short": "rows * lanes <= 128"})
def plain(op: Any, ins: Any, outs: Any, epilogue: Any, **config: Any) -> Loop:
    raise NotImplementedError


@template("test_searched", "cpu", space={"n": tuple(range(6))}, prefer=lambda *_: {"n": 3})
def fancy(op: Any, ins: Any, outs: Any, epilogue: Any, *, n: int) -> Loop:
    raise NotImplementedError


@template("test_searched", "cpu", space={"n": (1,)}, fits=lambda *_, **__: False)
def never(op: Any, ins: Any, outs: Any, epilogue: Any, *, n: int) -> Loop:
    raise NotImplementedError


X = Spec((8,))
DEFAULT = Choice("plain", (("depth", 1), ("lanes", 4), ("rows", 2), ("wide", False)))
BEST = Choice("plain", (("depth", 3), ("lanes", 16), ("rows", 8), ("wide", False)))


def request(by: int = 1, op: type[Op] = Searched) -> Request:
    return Request(op(by=by), (X,), Epilogue.none(X))  # type: ignore[call-arg]


def landscape(choice: Choice) -> float:
    """Seconds: least at rows 8, lanes 16, depth 3; `fancy` is far behind."""
    c = dict(choice.config)
    if choice.template == "fancy":
        return 9.0 + c["n"]
    return (
        1.0
        + abs(np.log2(c["rows"]) - 3) / 3
        + abs(np.log2(c["lanes"]) - 4) / 3
        + abs(c["depth"] - 3) / 4
        + c["wide"] / 9
    )


class Bench:
    """A harness whose clock is a formula: with noise, with a machine that slows down, with failures, as told."""

    def __init__(self, time_of: Any = landscape, *, noise: float = 0.0, drift: float = 0.0, seed: int = 0) -> None:
        self.time_of, self.noise, self.drift = time_of, noise, drift
        self.rng = np.random.default_rng(seed)
        self.calls: list[tuple[list[Choice], list[Choice], bool]] = []

    def __call__(
        self, request: Request, choices: Sequence[Choice], *, against: Sequence[Choice] = (), thorough: bool = False
    ) -> list[Trial]:
        self.calls.append((list(choices), list(against), thorough))
        speed = 1.0 + self.drift * len(self.calls)
        out = []
        for choice in [*against, *choices]:
            found = self.time_of(choice)
            if isinstance(found, Trial):
                out.append(found)
                continue
            n = 21 if thorough else 7
            samples = found * speed * (1.0 + self.noise * np.abs(self.rng.standard_normal(n)))
            out.append(Trial.timed(choice, samples.tolist()) if found > 0 else Trial(choice, found))
        return out

    @property
    def tried(self) -> list[Choice]:
        return [choice for choices, _, thorough in self.calls if not thorough for choice in choices]


def tuned(bench: Bench, **options: Any) -> Found:
    return Tuner(request(), DEVICE, bench, **options).run()


def test_the_best_is_found_and_the_default_comes_first() -> None:
    bench = Bench()
    found = tuned(bench)
    assert found.best.choice == BEST
    assert found.default.choice == bench.tried[0] == DEFAULT
    assert found.ties == (BEST,)
    assert found.gain == pytest.approx(landscape(DEFAULT) / landscape(BEST))
    assert len(set(bench.tried)) == len(bench.tried) == len(found.trials)
    assert [n for n, *_ in found.history] == sorted(n for n, *_ in found.history)
    assert found.history[-1][2] == pytest.approx(landscape(BEST), rel=1e-6)
    assert found.strategy == "guided"
    assert bench.calls[-1][2]  # the last word is a thorough one
    assert DEFAULT in bench.calls[-1][0]


def test_every_batch_is_timed_beside_the_default_and_the_few_best_so_far() -> None:
    bench = Bench()
    tuned(bench, strategy="exhaustive")
    so_far: list[Choice] = []
    for choices, against, thorough in bench.calls:
        if not thorough:
            near = [c for c in so_far if landscape(c) <= 1.12 * landscape(so_far[0])][:6]
            assert against[:1] == ([DEFAULT] if so_far else [])
            assert {*against} == ({DEFAULT, *near} if so_far else set())
            so_far = sorted([*so_far, *choices], key=landscape)


def test_luck_does_not_add_up() -> None:
    """Times stay on the scale of the default's, however often another config was luckily the best."""
    found = tuned(Bench(noise=0.2), strategy="exhaustive")
    scale = {t.choice: (t.time_s or 0.0) / landscape(t.choice) for t in found.trials if t.time_s}
    ratio = np.median(list(scale.values())) / scale[DEFAULT]
    assert 0.85 < ratio < 1.15


def test_a_busy_moment_at_the_beginning_is_found_out() -> None:
    calls = []

    def time_of(choice: Choice) -> float:
        calls.append(choice)
        return landscape(choice) * (9.0 if len(calls) == 1 else 1.0)

    found = tuned(Bench(time_of))
    assert found.default.time_s == pytest.approx(landscape(DEFAULT), rel=1e-6)
    assert found.best.time_s == pytest.approx(landscape(BEST), rel=1e-6)
    assert found.history[-1][2] == pytest.approx(landscape(BEST), rel=1e-6)


@pytest.mark.parametrize("strategy", ["exhaustive", "guided", "greedy"])
def test_a_machine_that_slows_down_does_not_mislead(strategy: str) -> None:
    found = tuned(Bench(drift=0.2), strategy=strategy)
    assert found.best.choice == BEST


def test_the_whole_space_of_every_template_is_walked_if_asked() -> None:
    bench = Bench()
    found = tuned(bench, strategy="exhaustive")
    assert found.ended == "nothing left to try"
    names = [c.template for c in bench.tried]
    assert names.count("plain") == sum(
        1
        for r in (2, 4, 8, 16)
        for w in (0, 1)
        for la in (4, 8, 16)
        for _ in range(4)
        if (r <= 4 or not w) and r * la <= 128
    )
    assert names.count("fancy") in (6, 8)  # far behind: left after two batches, or done by then
    stages = {s.name: s.left for s in found.funnel.stages}
    assert stages["Cartesian"] == 96 + 6
    assert stages["hard"] == names.count("plain") + 6
    assert found.funnel.stages[1].lost == {"narrow": 24, "short": 4}


def test_a_template_that_is_far_behind_is_left() -> None:
    bench = Bench()
    tuned(bench, strategy="random", batch=1)
    assert [c.template for c in bench.tried].count("fancy") == 2


def test_budgets_end_it() -> None:
    bench = Bench()
    found = tuned(bench, budget=Budget(trials=7))
    assert (len(found.trials), found.ended) == (7, "budget spent")
    found = tuned(Bench(), budget=Budget(seconds=0.0))
    assert [t.choice for t in found.trials] == [DEFAULT]
    assert found.best.choice == DEFAULT
    assert found.ended == "budget spent"
    for wrong in ({"seconds": -1.0}, {"seconds": float("nan")}, {"trials": 0}):
        with pytest.raises(SettingError, match="cannot be kept"):
            Budget(**wrong)  # type: ignore[arg-type]


def test_it_ends_when_nothing_improves() -> None:
    bench = Bench(lambda choice: 1.0 if choice == DEFAULT else 2.0)
    found = tuned(bench, strategy="random")
    assert found.ended.startswith("no improvement in ")
    assert len(found.trials) < 40
    assert found.best.choice == DEFAULT


def test_what_is_known_is_not_measured_again() -> None:
    first = tuned(Bench(), budget=Budget(trials=20))
    bench = Bench()
    second = tuned(bench, known=first.trials)
    assert not set(bench.tried) & {t.choice for t in first.trials}
    assert second.best.choice == BEST
    assert Choice("plain", (("depth", 2), ("lanes", 16), ("rows", 8), ("wide", False))) in {
        t.choice for t in second.trials
    }


def test_similar_winners_are_tried_early() -> None:
    bench = Bench()
    tuned(bench, similar=[BEST, Choice("fancy", (("n", 5),))], strategy="transfer", budget=Budget(trials=8))
    assert BEST in bench.tried[:6]


# failures ----------------------------------------------------------------------------------------------


def test_failures_are_results_and_are_not_chosen() -> None:
    def time_of(choice: Choice) -> Any:
        config = dict(choice.config)
        if config.get("lanes") == 16:
            return Trial.failed(choice, "check", "deviates from the reference by 1.0e+00")
        return 0.0 if config.get("depth") == 3 else landscape(choice)

    found = tuned(Bench(time_of), strategy="exhaustive")
    config = dict(found.best.choice.config)
    assert (config["lanes"], config["rows"]) == (8, 8)
    assert config["depth"] in (2, 4)
    reasons = {s.name: dict(s.lost) for s in found.funnel.stages}
    assert reasons["correct"] == {
        "deviates from the reference by #": sum(dict(t.choice.config).get("lanes") == 16 for t in found.trials)
    }
    assert list(reasons["timed"]) == ["measured # s, which is no time"]


def test_a_space_whose_every_point_fails() -> None:
    found = tuned(
        Bench(lambda choice: Trial.failed(choice, "compile", f"no {dict(choice.config)}")), strategy="exhaustive"
    )
    assert found.best.time_s is None
    assert found.best.choice == DEFAULT
    assert found.gain == 1.0
    assert found.funnel.stages[4].left == 0
    assert sum(found.funnel.stages[4].lost.values()) == len(found.trials)


def test_a_default_that_fails_is_replaced() -> None:
    bench = Bench(lambda choice: Trial.failed(choice, "time", "hung") if choice == DEFAULT else landscape(choice))
    found = tuned(bench)
    assert found.default.error == "hung"
    assert found.best.choice == BEST


def test_requests_without_templates_are_refused() -> None:
    with pytest.raises(SettingError, match=r"no template serves test_unserved|no template serves unserved"):
        Tuner(request(op=Unserved), DEVICE, Bench()).run()


# constraints of the user -------------------------------------------------------------------------------


def test_soft_constraints_leave_out_and_may_leave_out_the_default() -> None:
    bench = Bench()
    found = tuned(bench, soft={"deep": lambda depth: depth in (2, 4), "not fancy": "n < 0"}, strategy="exhaustive")
    assert {dict(c.config)["depth"] for c in bench.tried[1:]} == {2, 4}
    assert {c.template for c in bench.tried} == {"plain"}
    assert dict(found.best.choice.config)["depth"] in (2, 4)
    assert found.default.choice == DEFAULT  # timed to compare with, not to be chosen
    slow = Bench(lambda choice: 0.1 if choice == DEFAULT else landscape(choice))
    assert tuned(slow, soft=["depth == 2", "n < 0"]).best.choice != DEFAULT


def test_constraints_that_contradict_each_other() -> None:
    with pytest.raises(SpaceError, match="no point keeps soft 'rows > 8'; soft 'rows < 4'"):
        tuned(Bench(), soft=["rows > 8", "rows < 4", "n < 0"])


# one winner --------------------------------------------------------------------------------------------


def test_of_ties_the_default_wins_else_the_first() -> None:
    found = tuned(
        Bench(lambda choice: 1.0 if dict(choice.config).get("depth", 1) <= 2 else 1.01), strategy="exhaustive"
    )
    assert found.best.choice == DEFAULT
    assert DEFAULT in found.ties
    near = {BEST, Choice("plain", (("depth", 3), ("lanes", 16), ("rows", 4), ("wide", False)))}
    found = tuned(Bench(lambda choice: 1.0 if choice in near else landscape(choice) + 1), strategy="exhaustive")
    assert set(found.ties) == near
    assert found.best.choice == min(near, key=str)


def test_the_winner_does_not_change_from_run_to_run() -> None:
    """A noisy clock: the same config, or one of a tie set, each time."""

    def time_of(choice: Choice) -> float:
        return landscape(choice) if dict(choice.config).get("rows") != 4 else landscape(choice) * 1.001

    winners = [tuned(Bench(time_of, noise=0.05, seed=seed), seed=seed) for seed in range(10)]
    best = min(time_of(found.best.choice) for found in winners)
    assert all(time_of(found.best.choice) <= 1.02 * best for found in winners)


@pytest.mark.parametrize("seed", range(6))
def test_a_neighbour_that_comes_and_goes_does_not_choose(seed: int) -> None:
    """Sets of rounds meet a machine that is a third slower, and the default by a tenth more than the others."""
    rng, busy = np.random.default_rng(seed), [False]

    class Shared(Bench):
        def __call__(self, *args: Any, **options: Any) -> list[Trial]:
            if rng.random() < 0.3:
                busy[0] = not busy[0]
            return super().__call__(*args, **options)

    def time_of(choice: Choice) -> float:
        return landscape(choice) * ((1.45 if choice == DEFAULT else 1.33) if busy[0] else 1.0)

    assert tuned(Shared(time_of, noise=0.03, seed=seed), seed=seed).best.choice == BEST


def test_finalists_that_fail_are_not_chosen() -> None:
    """What fails when it is measured for longer is out, and the rest is still chosen from."""

    class Late(Bench):
        def __call__(self, *args: Any, **options: Any) -> list[Trial]:
            trials = super().__call__(*args, **options)
            if not options.get("thorough"):
                return trials
            return [Trial.failed(t.choice, "time", "hung") if t.choice in lost else t for t in trials]

    lost = {BEST}
    found = tuned(Late())
    assert found.best.choice not in (BEST, DEFAULT)
    assert {t.choice: t.error for t in found.trials}[BEST] == "hung"
    lost = {t.choice for t in found.trials} - {DEFAULT}  # whatever gets that far
    assert tuned(Late()).best.choice == DEFAULT


def test_a_default_that_is_the_fastest_after_all_is_chosen() -> None:
    class Turned(Bench):
        def __call__(self, *args: Any, **options: Any) -> list[Trial]:
            trials = super().__call__(*args, **options)
            return [t.scaled(0.1) if options.get("thorough") and t.choice == DEFAULT else t for t in trials]

    bench = Turned()
    found = tuned(bench)
    assert found.best.choice == DEFAULT
    assert found.ties == (DEFAULT,)
    assert [thorough for *_, thorough in bench.calls].count(True) == 1


def test_an_interrupt_while_finalists_are_measured() -> None:
    class Stopped(Bench):
        def __call__(self, *args: Any, **options: Any) -> list[Trial]:
            if options.get("thorough"):
                raise KeyboardInterrupt
            return super().__call__(*args, **options)

    tuner = Tuner(request(), DEVICE, Stopped())
    assert tuner.run().best.choice == BEST
    assert tuner.interrupted


def test_an_interrupt_keeps_what_was_learnt() -> None:
    bench = Bench()

    def watch(request: Request, trials: Sequence[Trial]) -> None:
        if len(trials) >= 9:
            raise KeyboardInterrupt

    tuner = Tuner(request(), DEVICE, bench, watch=watch)
    found = tuner.run()
    assert tuner.interrupted
    assert found.ended == "interrupted"
    assert len(found.trials) >= 9
    assert found.best.time_s == min(t.time_s for t in found.trials if t.time_s)
    assert not any(thorough for *_, thorough in bench.calls)


def test_an_interrupt_before_anything_was_measured() -> None:
    def refuse(*_: Any, **__: Any) -> list[Trial]:
        raise KeyboardInterrupt

    found = Tuner(request(), DEVICE, refuse).run()
    assert (found.trials, found.best.choice, found.best.time_s) == ((), DEFAULT, None)


def test_the_nearest_shapes_come_first() -> None:
    op = str(request().op)
    a, b, c = (Choice("plain", (("rows", n),)) for n in (1, 2, 3))
    winners = [
        Winner([(64,)], op, a, 1.0),
        Winner([(9,)], op, b, 1.0),
        Winner([(8,)], "another", c, 1.0),
        Winner([(8, 8)], op, Choice("x"), 1.0),
    ]
    assert nearest(request(), winners) == (b, a, c)
