"""Times from several sets of rounds on one scale.

    log time of a choice in a set  =  what the choice takes  +  what the machine did in that set  +  noise

A set of rounds compares its choices well; the next one may meet another machine: what others do on it makes kernels
30 % slower, and not all by the same. Both terms are fitted to all measurements at once, in turns: the
machine's as the median over choices that were timed in other sets too, the choice's as the mean over its sets. Then no
single choice carries the scale from one set to the next: neither the default, which a neighbour slows down
differently from the good ones, nor the best so far, which was also lucky.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from math import exp, log, sqrt
from statistics import fmean, median

from .choice import Choice
from .trial import Trial

SWEEPS, STILL = 50, 1e-7


class Scale:
    """All that was measured of one request; choices are compared by `ratio`."""

    def __init__(self) -> None:
        self._sets: list[dict[Choice, float]] = []  # logarithms of seconds
        self._paces: list[float] = []
        self._values: dict[Choice, float] = {}
        self._trials: dict[Choice, list[Trial]] = {}

    def add(self, trials: Sequence[Trial]) -> None:
        """One set: trials that were timed in the same rounds."""
        for trial in trials:
            self._trials.setdefault(trial.choice, []).append(trial)
        self._sets.append({t.choice: log(t.time_s) for t in trials if t.time_s is not None})
        self._paces.append(0.0)
        self._fit()

    def __contains__(self, choice: Choice) -> bool:
        """Has it a time? A choice that failed once has none."""
        trials = self._trials.get(choice, ())
        return bool(trials) and all(t.time_s is not None for t in trials)

    def sets(self, choice: Choice) -> int:
        """How often it was measured."""
        return len(self._trials.get(choice, ()))

    def measured(self, choice: Choice) -> list[float]:
        """Seconds, as they were measured."""
        return [t.time_s for t in self._trials.get(choice, ()) if t.time_s is not None]

    def ratio(self, choice: Choice, to: Choice) -> float:
        """How many times as long ``choice`` takes."""
        return exp(self._values[choice] - self._values[to])

    def ranked(self, choices: Iterable[Choice]) -> list[Choice]:
        """Those of ``choices`` that have a time, the fastest first."""
        return sorted((c for c in choices if c in self), key=lambda c: self._values[c])

    def trial(self, choice: Choice, to: Choice | None, seconds: float) -> Trial:
        """All measurements of a choice as one, on the scale where ``to`` takes ``seconds``; a failure if one is.

        The interval is the mean of theirs, narrower by the root of their number. Without ``to``, the time is as it was
        measured.
        """
        trials = self._trials[choice]
        for trial in trials:
            if trial.time_s is None:
                return trial
        time_s = seconds * self.ratio(choice, to) if to else median(self.measured(choice))

        def side(name: str) -> float | None:
            bounds = [(getattr(t, name), t.seconds) for t in trials]
            known = [bound / middle for bound, middle in bounds if bound is not None]
            return time_s * (1.0 + (fmean(known) - 1.0) / sqrt(len(trials))) if known else None

        rounds = sum(t.rounds for t in trials)
        return replace(trials[-1], time_s=time_s, low_s=side("low_s"), high_s=side("high_s"), rounds=rounds)

    def _fit(self) -> None:
        where: dict[Choice, list[int]] = {}
        for j, logs in enumerate(self._sets):
            for choice in logs:
                where.setdefault(choice, []).append(j)
        for _ in range(SWEEPS):
            for j, logs in enumerate(self._sets):
                shared = [t - self._values[c] for c, t in logs.items() if c in self._values and len(where[c]) > 1]
                if shared:
                    self._paces[j] = median(shared)
            moved = 0.0
            for choice, places in where.items():
                value = fmean(self._sets[j][choice] - self._paces[j] for j in places)
                moved = max(moved, abs(value - self._values.get(choice, value)))
                self._values[choice] = value
            if moved < STILL:
                break
