"""Trial: what one measurement of a choice gave: seconds of a call, or the reason why there are none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import comb, inf, isfinite
from statistics import median

from .choice import Choice

STAGES = ("compile", "check", "time")  # where a trial can fail


@dataclass(frozen=True)
class Trial:
    """One measurement. A trial without a time is a failure: ``error`` says why, ``stage`` where it was.

    ``time_s``: median seconds of a call; ``low_s``, ``high_s``: the interval that holds the true median in 95 %
    of cases; ``rounds``: samples taken, with so many ``threads``
    (0: not told). ``stage``: 'compile', 'check' or 'time', and '' for a success.
    """

    choice: Choice
    time_s: float | None = None
    low_s: float | None = None
    high_s: float | None = None
    rounds: int = 0
    threads: int = 0
    error: str = ""
    stage: str = ""

    @classmethod
    def timed(cls, choice: Choice, seconds: Sequence[float]) -> Trial:
        """The trial that samples make: their median and its interval. A sample that is no time makes it a failure."""
        if not seconds:
            return cls(choice, error="measured nothing", stage="time")
        for value in seconds:
            if not _is_time(value):
                return cls(choice, rounds=len(seconds), error=_no_time(value), stage="time")
        low, high = median_interval(seconds)
        return cls(choice, median(seconds), low, high, len(seconds))

    @classmethod
    def failed(cls, choice: Choice, stage: str, error: str) -> Trial:
        """A trial that ended at a stage."""
        return cls(choice, error=error, stage=stage)

    def scaled(self, factor: float) -> Trial:
        """The same measurement on a clock that runs ``factor`` times as fast."""
        if self.time_s is None:
            return self
        low, high = (None if b is None else b * factor for b in (self.low_s, self.high_s))
        return replace(self, time_s=self.time_s * factor, low_s=low, high_s=high)

    @property
    def seconds(self) -> float:
        """Its time; infinite for a failure, so that it sorts last."""
        return inf if self.time_s is None else self.time_s

    def checked(self) -> Trial:
        """This trial, or the failure that it is if its time is none: negative, zero or not finite."""
        if self.time_s is None or _is_time(self.time_s):
            return self
        return replace(self, time_s=None, low_s=None, high_s=None, error=_no_time(self.time_s), stage="time")


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """The narrowest two samples, as far from one end as from the other, with the median between them in 95 % of cases.

    The number of samples below the median is binomial, whatever their distribution. Fewer than 6 samples give
    less: their smallest and largest then hold it in 1 - 2**(1 - n) of cases.
    """
    ordered, n = sorted(values), len(values)
    cut, missed = 0, 2.0 / 2**n  # the chance that the median lies outside ordered[cut], ordered[-1 - cut]
    while cut + 1 < n - 1 - cut and missed + 2.0 * comb(n, cut + 1) / 2**n <= 0.05:
        cut += 1
        missed += 2.0 * comb(n, cut) / 2**n
    return ordered[cut], ordered[-1 - cut]


def time_text(time_s: float | None) -> str:
    """A kernel's time for people: ``1.234 ms``, ``4.56 µs``; ``failed`` without one."""
    if time_s is None:
        return "failed"
    return f"{time_s * 1e3:.3f} ms" if time_s >= 1e-5 else f"{time_s * 1e6:.2f} µs"


def _is_time(seconds: float) -> bool:
    return isfinite(seconds) and seconds > 0


def _no_time(seconds: float) -> str:
    return f"measured {seconds} s, which is no time"
