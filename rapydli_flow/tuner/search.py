"""Searching for the fastest config of one request: strategies ask, a harness measures, budgets end it.

    candidates of each template -> strategy asks for a batch -> measured beside the default and the best so far -> told
                        ... until the budget is spent, nothing is left, or nothing has improved for long
    the few best and the default -> measured once more, for longer -> ties -> one of them, by rule

The harness is given: a `Measure` compiles, checks and times choices, and times them *against* others in the same
rounds. Times are relative to the default in the same rounds, brought to the scale of its first measurement: what the
whole machine does at the moment cancels out. (Not to the best so far: who looks best was also lucky, and luck on luck
adds up.) The best so far is timed again with every batch, so its luck is averaged out.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import inf, sqrt
from statistics import fmean, median
from typing import Any, Protocol

import numpy as np

from ..errors import SettingError
from ..space import Rules, Space, as_rules
from ..template import Device, Template
from .choice import Choice, Request, Tuning
from .funnel import Funnel
from .strategies import Strategy, named
from .trial import Trial

TIE = 0.02  # times this near to the best are ties
EQUAL = 0.01  # of those, these are chosen from by rule: the rest of the ties may well be slower by more than they look
FINALISTS, NEAR = 12, 0.12
FINALS, FINAL_SHARE = 10, 0.2  # how often finalists are measured at most, and which part of a budget that may take
UNSURE = 0.05  # two of these may be apart though they are equal, when each was measured once
PATIENCE = 0.25  # of the space, tried without an improvement: enough
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
    the best time so far, whenever it improved. ``ended`` says why the search stopped.
    """

    request: Request
    default: Trial
    best: Trial
    ties: tuple[Choice, ...]
    trials: tuple[Trial, ...]
    funnel: Funnel
    history: tuple[tuple[int, float, float], ...]
    ended: str
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
    waiting: list[Choice] | None = None
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
        self._trials: dict[Choice, Trial] = {}
        self._estimates: dict[Choice, list[Trial]] = {}
        self._history: list[tuple[int, float, float]] = []
        self._paces: list[float] = []  # the anchor's times, as they were measured
        self._since, self._sure, self.interrupted = 0, inf, False
        self._races = self._begin()
        first = Tuning(self.device).choose(self.request)
        self._allowed = any(
            race.template.name == first.template and dict(first.config) in race.space for race in self._races
        )
        self._default = Trial.failed(first, "time", "interrupted")
        try:
            self._default = self._time([first])[0]
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
            if self._since >= patience and isinstance(self.strategy, str) and self.strategy != "exhaustive":
                return f"no improvement in {self._since} trials"
            assert race.waiting is not None
            room = len(race.waiting) if self.budget.trials is None else self.budget.trials - len(self._trials)
            asked = race.waiting[: max(1, room)]
            told = [t.seconds for t in self._time(asked)]
            race.best, race.batches = min([race.best, *told]), race.batches + 1
            race.waiting = self._ask(race, [*told, *[inf] * (len(race.waiting) - len(asked))])

    def _next(self) -> _Race | None:
        """The template whose turn it is: in turns, without those that are far behind."""
        open_ = [race for race in self._races if race.waiting is not None]
        best = min((race.best for race in self._races), default=inf)
        fair = [race for race in open_ if race.batches < 2 or race.best <= DROPPED * best] or open_
        return min(fair, key=lambda race: race.batches, default=None)

    def _spent(self) -> bool:
        trials = self.budget.trials
        return time.monotonic() - self._begun >= (1 - FINAL_SHARE) * self.budget.seconds or (
            trials is not None and len(self._trials) >= trials
        )

    def _time(self, choices: Sequence[Choice]) -> list[Trial]:
        """Measure those that are not known, on the scale of the default's time."""
        known = {t.choice: t for t in self.known}
        fresh = [c for c in choices if c not in self._trials and c not in known]
        before, best = len(self._trials), self._best()
        for choice in choices:
            if choice in known and choice not in self._trials:
                self._trials[choice] = known[choice].checked()
        if fresh:
            beside = list(dict.fromkeys(c for c in (self._anchor(), best.choice if best else None) if c is not None))
            measured = [t.checked() for t in self.measure(self.request, fresh, against=beside)]
            for trial in self._to_scale(measured):
                self._estimates.setdefault(trial.choice, []).append(trial)
                self._trials[trial.choice] = _middle(self._estimates[trial.choice])
        self._since += len(self._trials) - before
        new = self._best()
        if new is not None:
            if best is None or new.seconds < best.seconds:
                self._history.append((len(self._trials), time.monotonic() - self._begun, new.seconds))
            if self._confirmed(new.choice) and new.seconds < (1 - TIE) * self._sure:
                self._since, self._sure = 0, new.seconds
        self.watch(self.request, list(self._trials.values()))
        return [self._trials[c] for c in choices]

    def _confirmed(self, choice: Choice) -> bool:
        """Is its time more than luck? The best is timed with every batch, and soon was three times."""
        return choice == self._anchor() or len(self._estimates.get(choice, ())) not in (1, 2)

    def _anchor(self) -> Choice | None:
        """What times are relative to: the default, or the first that has a time if that has none."""
        return next((c for c, t in self._trials.items() if t.time_s is not None), None)

    def _to_scale(self, measured: Sequence[Trial]) -> list[Trial]:
        """Trials on the scale of the anchor's first time; the anchor itself is left out but for the first time."""
        anchor = self._anchor()
        beside = next((t for t in measured if t.choice == anchor), None)
        if anchor is None or beside is None or not beside.time_s:
            return list(measured)
        self._paces.append(beside.time_s)
        factor = (self._trials[anchor].time_s or beside.time_s) / beside.time_s
        return [t.scaled(factor) for t in measured if t.choice != anchor]

    def _best(self) -> Trial | None:
        good = [t for t in self._trials.values() if t.time_s is not None]
        return min(good, key=lambda t: t.seconds, default=None)

    # deciding ---------------------------------------------------------------------------------------

    def _found(self, ended: str) -> Found:
        default, chosen = self._default, self._ranked()
        best = chosen[0] if chosen else default
        ties: tuple[Choice, ...] = (best.choice,)
        near = [t for t in chosen if t.seconds <= (1 + NEAR) * (best.seconds)][:FINALISTS]
        final = [t.choice for t in near]
        if (anchor := self._anchor()) is not None:
            final = [anchor, *(c for c in final if c != anchor)]
        if len(final) > 1 and not self.interrupted:
            best, ties = self._decide(final)
        pace = self._pace()
        self._trials = {c: t.scaled(pace) for c, t in self._trials.items()}
        best, history = best.scaled(pace), tuple((n, s, time_s * pace) for n, s, time_s in self._history)
        trials = tuple(self._trials.values())
        names = [race.template.name for race in self._races]
        tried = {name: [t for t in trials if t.choice.template == name] for name in names}
        funnel = sum((Funnel.of(race.space, tried[race.template.name]) for race in self._races), Funnel.empty())
        strategy = self.strategy if isinstance(self.strategy, str) else getattr(self.strategy, "__name__", "own")
        default = self._trials.get(default.choice, default)
        return Found(self.request, default, best, ties, trials, funnel, history, ended, strategy)

    def _pace(self) -> float:
        """All times are on the scale of the anchor's first, which may have met a busy machine: how far it was off."""
        anchor = self._anchor()
        first = None if anchor is None else self._trials[anchor].time_s
        return median([first, *self._paces]) / first if first else 1.0

    def _ranked(self) -> list[Trial]:
        """What may be chosen, the fastest first."""
        good = [t for t in self._trials.values() if t.time_s is not None]
        if not self._allowed and len(good) > 1:
            good = [t for t in good if t.choice != self._default.choice]
        return sorted(good, key=lambda t: t.seconds)

    def _decide(self, final: Sequence[Choice]) -> tuple[Trial, tuple[Choice, ...]]:
        """Measure the few best for longer, those that stay near the best again and again.

        Of those that are equal to the fastest the default, else the first by template and config.
        """
        allowed_s = FINAL_SHARE / (1 - FINAL_SHARE) * (time.monotonic() - self._begun)
        if self.budget.seconds == inf:
            allowed_s = inf
        begun, left, timed = time.monotonic(), list(final), {}  # type: float, list[Choice], dict[Choice, list[Trial]]
        for n in range(1, FINALS + 1):
            try:
                measured = [t.checked() for t in self.measure(self.request, left, thorough=True)]
            except KeyboardInterrupt:
                self.interrupted = True
                break
            for trial in self._to_scale(measured):
                timed.setdefault(trial.choice, []).append(trial)
                self._trials[trial.choice] = _pooled(timed[trial.choice])
            near = [t for t in self._ranked() if t.choice in left]
            if not near:
                break
            most = (1 + TIE + UNSURE / sqrt(n)) * near[0].seconds
            close = [t.choice for t in near if t.seconds <= most]
            left = list(dict.fromkeys([final[0], *close]))
            if len(close) < 2 or time.monotonic() - begun > allowed_s:
                break
        good = [t for t in self._ranked() if t.choice in final] or [self._ranked()[0]]
        ties = sorted((t for t in good if t.seconds <= (1 + TIE) * good[0].seconds), key=lambda t: str(t.choice))
        equal = [t for t in ties if t.seconds <= (1 + EQUAL) * good[0].seconds]
        chosen = min(equal, key=lambda t: t.choice != self._default.choice)
        return chosen, tuple(t.choice for t in ties)


def _middle(trials: Sequence[Trial]) -> Trial:
    """Of several measurements the one in the middle; the last if that failed."""
    if trials[-1].time_s is None:
        return trials[-1]
    good = sorted((t for t in trials if t.time_s is not None), key=lambda t: t.seconds)
    return good[len(good) // 2]


def _pooled(trials: Sequence[Trial]) -> Trial:
    """Several measurements of one choice as one: their mean, and its interval; a failure if one is."""
    for trial in trials:
        if trial.time_s is None:
            return trial
    time_s = fmean(t.seconds for t in trials)

    def side(bounds: list[float | None]) -> float | None:
        known = [b for b in bounds if b is not None]
        return time_s + (fmean(known) - time_s) / sqrt(len(trials)) if known else None

    low_s, high_s = side([t.low_s for t in trials]), side([t.high_s for t in trials])
    return replace(trials[-1], time_s=time_s, low_s=low_s, high_s=high_s, rounds=sum(t.rounds for t in trials))


def _applying(soft: Rules, space: Space) -> Mapping[str, Any]:
    """The user's constraints that name nothing but what this space has."""
    names = space.vocabulary
    return {name: rule for name, rule in as_rules(soft).items() if rule.names <= names}
