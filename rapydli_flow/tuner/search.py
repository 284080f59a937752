"""Searching for the fastest config of one request: strategies ask, a harness measures, budgets end it.

    candidates of each template -> strategy asks for a batch -> measured beside the default and the few best -> told
                        ... until the budget is spent, nothing is left, or nothing has improved for long
    the few best and the default -> measured once more, for longer -> ties -> one of them, by rule

The harness is given: a `Measure` compiles, checks and times choices, and times them *beside* others in the same
rounds; `Scale` makes one scale of many such sets. The few best are timed again with every batch: that is cheap next
to compiling, it averages out their luck, and new ones are compared with what behaves as they do.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf, sqrt
from statistics import median
from typing import Any, Protocol

import numpy as np

from ..errors import SettingError
from ..space import Rules, Space, as_rules
from ..template import Device, Template
from .choice import Choice, Request, Tuning
from .funnel import Funnel
from .scale import Scale
from .strategies import Strategy, named
from .trial import Trial

TIE = 0.02  # times this near to the best are ties
EQUAL = 0.01  # of those, these are chosen from by rule: the rest of the ties may well be slower by more than they look
BESIDE = 6  # of the best so far are timed again with each batch, if they are NEAR
FINALISTS, NEAR = 20, 0.12
FINALS, FINAL_SHARE = 10, 0.2  # how often finalists are measured at most, and which part of a budget that may take
UNSURE = 0.08  # two of these may be apart though they are equal, when each was measured once
PATIENCE = 0.3  # of the space, tried without an improvement: enough
LEAST_PATIENCE = 24
DROPPED = 1.5  # a template whose best is so much slower, after two batches, is not tried further


class Measure(Protocol):
    """What compiles, checks and times: a trial for each choice, in their order.

    Those of ``against`` are timed in the same rounds, and their trials come first; what is clearly slower than the
    fastest of them may leave the rounds early. ``thorough``: many rounds, and all stay in them.
    """

    def __call__(
        self, request: Request, choices: Sequence[Choice], *, against: Sequence[Choice] = (), thorough: bool = False
    ) -> list[Trial]: ...


@dataclass(frozen=True)
class Budget:
    """When to stop: seconds, or trials, or both."""

    seconds: float = inf
    trials: int | None = None

    def __post_init__(self) -> None:
        if not self.seconds >= 0 or (self.trials is not None and self.trials < 1):
            raise SettingError(f"tuning: a budget of {self.seconds} seconds and {self.trials} trials cannot be kept.")


@dataclass(frozen=True)
class Found:
    """What tuning one request found.

    ``best`` is the choice to use, ``ties`` those that are as fast within 2 %. ``history``: trials, seconds and
    the best time so far, whenever it improved. ``ended`` says why the search stopped, after ``elapsed_s`` seconds.
    """

    request: Request
    default: Trial
    best: Trial
    ties: tuple[Choice, ...]
    trials: tuple[Trial, ...]
    funnel: Funnel
    history: tuple[tuple[int, float, float], ...]
    ended: str
    elapsed_s: float
    strategy: str

    @property
    def gain(self) -> float:
        """How many times as fast as the default; 1 where one of them has no time."""
        return self.default.time_s / self.best.time_s if self.default.time_s and self.best.time_s else 1.0


Watch = Callable[[Request, Sequence[Trial]], None]


@dataclass
class _Race:
    """The search in one template's space."""

    template: Template
    space: Space
    search: Any
    waiting: list[Choice] | None = None  # what it asked for
    told: list[float] = field(default_factory=list)  # what is known of that, a few at a time
    best: float = inf
    batches: int = 0


@dataclass
class Tuner:
    """Searches one request. ``soft`` adds constraints of the user's own, where they name a template's parameters."""

    request: Request
    device: Device
    measure: Measure
    strategy: str | Strategy = "guided"
    budget: Budget = field(default_factory=Budget)
    soft: Rules = ()
    known: Sequence[Trial] = ()
    similar: Sequence[Choice] = ()
    batch: int = 4
    seed: int = 0
    watch: Watch = lambda request, trials: None

    def run(self) -> Found:
        """Search until the budget ends. An interrupt (Ctrl-C) ends it too; what was learnt is returned.

        Raises SpaceError if the constraints of ``soft`` leave no config.
        """
        self._begun = time.monotonic()
        self._tried: dict[Choice, tuple[int, float]] = {}  # with what number, and at which second, in their order
        self._scale, self._last = Scale(), Scale()  # of the search, and of the finalists
        self._improved, self._sure, self.interrupted = 0, inf, False  # at which trial, to which part of the default
        if self.known:
            self._scale.add([t.checked() for t in self.known])
        self._races = self._begin()
        self._first = first = Tuning(self.device).choose(self.request)  # the default
        self._allowed = any(  # to be chosen, by the constraints of `soft`
            race.template.name == first.template and dict(first.config) in race.space for race in self._races
        )
        try:
            self._time([first])
            ended = self._search()
        except KeyboardInterrupt:
            self.interrupted, ended = True, "interrupted"
        return self._found(ended)

    # spaces -----------------------------------------------------------------------------------------

    def spaces(self) -> list[tuple[Template, Space]]:
        """The space of each template that has a config for this request, with the user's constraints."""
        r, out = self.request, []
        for template in r.templates(self.device):
            space = template.space_of(r.op, r.ins, r.outs, self.device)
            out.append((template, space.restricted(_applying(self.soft, space))))
        return out

    def _begin(self) -> list[_Race]:
        r, strategy, races = self.request, self.strategy, []
        function = named(strategy) if isinstance(strategy, str) else strategy
        for template, space in self.spaces():
            default = template.default(r.op, r.ins, r.outs, self.device)
            start = [default, *(dict(c.config) for c in self.similar if c.template == template.name)]
            rng = np.random.default_rng(self.seed)
            search = function(space, [p for p in start if p is not None], rng, batch=self.batch)
            race = _Race(template, space, search)
            race.waiting = self._ask(race, None) if space.count() else None
            races.append(race)
        if all(race.waiting is None for race in races):
            for race in races:
                race.space.check()  # says which constraints leave nothing
            raise SettingError(f"tuning: no template serves {r} on {self.device.kind}.")
        return [race for race in races if race.waiting is not None]

    def _ask(self, race: _Race, told: list[float] | None) -> list[Choice] | None:
        try:
            points = next(race.search) if told is None else race.search.send(told)
        except StopIteration:
            return None
        return [Choice.of(race.template, point) for point in points]

    # searching --------------------------------------------------------------------------------------

    def _search(self) -> str:
        size = sum(race.space.count() for race in self._races)
        patience = max(LEAST_PATIENCE, round(PATIENCE * size))
        while True:
            race = self._next()
            if race is None:
                return "nothing left to try"
            if self._spent():
                return "budget spent"
            since = len(self._tried) - self._improved
            if since >= patience and self.strategy != "exhaustive" and not self._hopeful():
                return f"no improvement in {since} trials"
            assert race.waiting is not None
            room = self.batch if self.budget.trials is None else self.budget.trials - len(self._tried)
            asked = race.waiting[len(race.told) :][: max(1, min(self.batch, room))]
            self._time(asked)
            race.told += [self._ratio(c) if c in self._scale else inf for c in asked]
            race.best = min([race.best, *race.told])
            if len(race.told) == len(race.waiting):
                race.waiting, race.told, race.batches = self._ask(race, race.told), [], race.batches + 1

    def _next(self) -> _Race | None:
        """The template whose turn it is: in turns, without those that are far behind."""
        open_ = [race for race in self._races if race.waiting is not None]
        best = min((race.best for race in self._races), default=inf)
        fair = [race for race in open_ if race.batches < 2 or race.best <= DROPPED * best] or open_
        return min(fair, key=lambda race: race.batches, default=None)

    def _spent(self) -> bool:
        trials = self.budget.trials
        return time.monotonic() - self._begun >= (1 - FINAL_SHARE) * self.budget.seconds or (
            trials is not None and len(self._tried) >= trials
        )

    def _time(self, choices: Sequence[Choice]) -> None:
        """Measure those that are not known."""
        fresh = [c for c in choices if not self._scale.sets(c)]
        if fresh:
            measured = self.measure(self.request, fresh, against=self._beside())
            self._scale.add([t.checked() for t in measured])
        spent = time.monotonic() - self._begun
        for choice in choices:
            self._tried.setdefault(choice, (len(self._tried) + 1, spent))
        if (sure := next(filter(self._confirmed, self._ranked()), None)) is not None:
            ratio = self._ratio(sure)
            if ratio < (1 - TIE) * self._sure:
                self._improved, self._sure = self._tried[sure][0], ratio
        self.watch(self.request, list(self._told().values()))

    def _told(self) -> dict[Choice, Trial]:
        """All that were tried, on the scale of the anchor's usual time; finalists by their last measurements."""
        anchor = self._anchor()
        usual = median([*self._scale.measured(anchor), *self._last.measured(anchor)]) if anchor else 1.0

        def trial(choice: Choice) -> Trial:
            scale = self._last if self._last.sets(choice) else self._scale
            return scale.trial(choice, anchor if anchor and anchor in scale else None, usual)

        return {c: trial(c) for c in self._tried}

    def _beside(self) -> list[Choice]:
        """What a batch is timed beside: the anchor, and the best that are near one another."""
        anchor = self._anchor()
        if anchor is None:
            return []
        ranked = self._ranked()
        near = [c for c in ranked if self._scale.ratio(c, ranked[0]) <= 1 + NEAR][:BESIDE]
        return list(dict.fromkeys([anchor, *near]))

    def _ratio(self, choice: Choice) -> float:
        """How many times as long as the anchor it takes."""
        anchor = self._anchor()
        return self._scale.ratio(choice, anchor) if anchor else inf

    def _hopeful(self) -> bool:
        """Does the best look like an improvement that is not confirmed yet?"""
        best = next(iter(self._ranked()), None)
        return best is not None and not self._confirmed(best) and self._ratio(best) < (1 - TIE) * self._sure

    def _confirmed(self, choice: Choice) -> bool:
        """Is its time more than luck? The best are timed with every batch, and soon were three times."""
        return choice == self._anchor() or self._scale.sets(choice) > 2 or any(choice == t.choice for t in self.known)

    def _anchor(self) -> Choice | None:
        """What times are relative to: the default, or the first that has a time if that has none."""
        return next((c for c in self._tried if c in self._scale), None)

    def _ranked(self) -> list[Choice]:
        return self._scale.ranked(self._tried)

    # deciding ---------------------------------------------------------------------------------------

    def _found(self, ended: str) -> Found:
        ranked, scale = self._ranked(), self._scale
        if not self._allowed:
            ranked = [c for c in ranked if c != self._first] or ranked
        anchor = self._anchor()
        stayed: list[Choice] = []
        while ranked and not self.interrupted:
            near = [c for c in ranked if scale.ratio(c, ranked[0]) <= 1 + NEAR][:FINALISTS]
            final = list(dict.fromkeys([*([anchor] if anchor else []), *near]))
            if len(final) == 1:
                break
            stayed = [c for c in self._final(final) if c in ranked]
            if self.interrupted or any(c in self._last for c in near):
                break
            ranked = [c for c in ranked if c not in near]  # these failed now, all of them: the next best
        if stayed:
            ranked, scale = stayed, self._last
        else:
            ranked = ranked[:1]
        ties = sorted((c for c in ranked if scale.ratio(c, ranked[0]) <= 1 + TIE), key=str)
        equal = [c for c in ties if scale.ratio(c, ranked[0]) <= 1 + EQUAL] or [self._first]
        told, never = self._told(), Trial.failed(self._first, "time", "interrupted")
        default, best = (told.get(c, never) for c in (self._first, min(equal, key=lambda c: c != self._first)))
        names = [race.template.name for race in self._races]
        tried = {name: [t for t in told.values() if t.choice.template == name] for name in names}
        funnel = sum((Funnel.of(race.space, tried[race.template.name]) for race in self._races), Funnel.empty())
        return Found(
            self.request,
            default,
            best,
            tuple(ties) or (best.choice,),
            tuple(told.values()),
            funnel,
            self._history(told),
            ended,
            time.monotonic() - self._begun,
            self.strategy if isinstance(self.strategy, str) else getattr(self.strategy, "__name__", "own"),
        )

    def _history(self, told: Mapping[Choice, Trial]) -> tuple[tuple[int, float, float], ...]:
        """When the best time improved, as times are known at the end."""
        out: list[tuple[int, float, float]] = []
        for choice, (number, spent) in self._tried.items():
            if told[choice].seconds < (out[-1][2] if out else inf):
                out.append((number, spent, told[choice].seconds))
        return tuple(out)

    def _final(self, final: Sequence[Choice]) -> list[Choice]:
        """Measure the few best for longer, those that stay near the best again and again: these, the fastest first.

        Only they are compared, for they met the same machine. The first of ``final`` stays in any case.
        """
        allowed_s = FINAL_SHARE / (1 - FINAL_SHARE) * (time.monotonic() - self._begun)
        if self.budget.seconds == inf:
            allowed_s = inf
        begun, left, last = time.monotonic(), list(final), self._last
        for n in range(1, FINALS + 1):
            try:
                last.add([t.checked() for t in self.measure(self.request, left, thorough=True)])
            except KeyboardInterrupt:
                self.interrupted = True
                break
            good = last.ranked(left)
            rivals = [c for c in good if self._allowed or c != self._first]
            most = 1 + TIE + UNSURE / sqrt(n)
            close = [c for c in rivals if last.ratio(c, rivals[0]) <= most]
            left = [c for c in good if c in close or c == final[0]]
            if len(close) < 2 or time.monotonic() - begun > allowed_s:
                break
        return last.ranked(left)


def _applying(soft: Rules, space: Space) -> Mapping[str, Any]:
    """The user's constraints that name nothing but what this space has."""
    names = space.vocabulary
    return {name: rule for name, rule in as_rules(soft).items() if rule.names <= names}
