"""Search: what is tried, in which order, for how long, and what is kept."""

import time
from collections.abc import Sequence
from itertools import product
from typing import Any

import pytest

from rapydli_flow.ops import Op
from rapydli_flow.spec import Spec
from rapydli_flow.template import Device, Epilogue, Loop, template
from rapydli_flow.tuner import Choice, Request, Trial, exhaustive, tune

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


def fits(op: Any, ins: Any, outs: Any, device: Any, *, rows: int, wide: bool) -> bool:
    return rows <= 4 or not wide


@template("test_searched", "cpu", space={"rows": (2, 4, 8), "wide": (False, True)}, fits=fits)
def plain(op: Any, ins: Any, outs: Any, epilogue: Any, *, rows: int, wide: bool) -> Loop:
    raise NotImplementedError


@template("test_searched", "cpu", space={"n": tuple(range(6))}, prefer=lambda *_: {"n": 3})
def fancy(op: Any, ins: Any, outs: Any, epilogue: Any, *, n: int) -> Loop:
    raise NotImplementedError


@template("test_searched", "cpu", space={"n": (1,)}, fits=lambda *_, **__: False)
def never(op: Any, ins: Any, outs: Any, epilogue: Any, *, n: int) -> Loop:
    raise NotImplementedError


X = Spec((8,))


def request(by: int = 1, op: type[Op] = Searched) -> Request:
    return Request(op(by=by), (X,), Epilogue.none(X))  # type: ignore[call-arg]


DEFAULT = Choice("plain", (("rows", 2), ("wide", False)))
OTHER = Choice("fancy", (("n", 3),))


def test_every_config_is_tried_once_and_the_defaults_first() -> None:
    found = list(exhaustive(request(), DEVICE))
    assert found[:2] == [DEFAULT, OTHER]
    assert len(found) == len(set(found))
    want = {Choice("fancy", (("n", n),)) for n in range(6)}
    points = product((2, 4, 8), (False, True))
    want |= {Choice("plain", (("rows", r), ("wide", w))) for r, w in points if r <= 4 or not w}
    assert set(found) == want
    assert list(exhaustive(request(op=Unserved), DEVICE)) == []


class Clock:
    """A measure that takes its numbers from a table, and remembers what it was asked."""

    def __init__(self, times: dict[Choice, float | str], otherwise: float | str = 1.0) -> None:
        self.times, self.otherwise = times, otherwise
        self.asked: list[tuple[Request, list[Choice]]] = []

    def __call__(self, request: Request, choices: Sequence[Choice]) -> list[Trial]:
        self.asked.append((request, list(choices)))
        out = []
        for choice in choices:
            value = self.times.get(choice, self.otherwise)
            out.append(Trial(choice, error=value) if isinstance(value, str) else Trial(choice, value))
        return out


def tuned(measure: Clock, requests: Sequence[Request] = (), **options: Any) -> Any:
    return tune(list(requests) or [request()], DEVICE, measure, budget_s=options.pop("budget_s", 60.0), **options)


def test_the_fastest_is_kept() -> None:
    best = Choice("fancy", (("n", 5),))
    clock = Clock({best: 0.5})
    assert tuned(clock) == [(request(), Trial(best, 0.5), Trial(DEFAULT, 1.0))]
    assert [len(choices) for _, choices in clock.asked] == [8, 3]
    assert clock.asked[0][1][:2] == [DEFAULT, OTHER]


@pytest.mark.parametrize(("time_s", "kept"), [(0.99, DEFAULT), (0.9801, DEFAULT), (0.9799, OTHER), (0.5, OTHER)])
def test_the_default_stays_unless_another_is_2_percent_faster(time_s: float, kept: Choice) -> None:
    ((_, best, default),) = tuned(Clock({OTHER: time_s}))
    assert best.choice == kept
    assert default == Trial(DEFAULT, 1.0)


def test_a_default_that_fails_is_replaced_and_shown() -> None:
    ((_, best, default),) = tuned(Clock({DEFAULT: "TemplateError: no", OTHER: 2.0}, 3.0))
    assert best == Trial(OTHER, 2.0)
    assert default == Trial(DEFAULT, error="TemplateError: no")


def test_a_request_of_which_everything_fails_is_left_out_but_told() -> None:
    seen: list[Any] = []
    clock = Clock({}, "TemplateError: no")
    assert tuned(clock, watch=lambda *event: seen.append(event)) == []
    assert seen == [(request(), Trial(DEFAULT, error="TemplateError: no"), 11)]
    assert tuned(clock, [request(op=Unserved)], watch=lambda *event: seen.append(event)) == []
    assert len(seen) == 1


def test_requests_are_tuned_in_order_and_watched() -> None:
    seen: list[Any] = []
    requests = [request(3), request(1), request(2)]
    found = tuned(Clock({OTHER: 0.25}), requests, watch=lambda *event: seen.append(event))
    assert [r for r, *_ in found] == requests
    assert seen == [(r, Trial(OTHER, 0.25), 11) for r in requests]


def test_the_budget_ends_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    class Slow(Clock):
        def __call__(self, request: Request, choices: Sequence[Choice]) -> list[Trial]:
            now[0] += 4.0
            return super().__call__(request, choices)

    slow = Slow({})
    requests = [request(n) for n in range(5)]
    found = tuned(slow, requests, budget_s=10.0)
    assert [r for r, *_ in found] == requests[:2]  # 2 calls, then 1, and the time is over
    assert [len(choices) for _, choices in slow.asked] == [8, 3, 8]
    found = tuned(Slow({}), requests, budget_s=1.0)
    assert [best.choice for _, best, _ in found] == [DEFAULT]  # the first chunk is always measured
    assert tuned(Slow({}), requests, budget_s=-1.0) == []
