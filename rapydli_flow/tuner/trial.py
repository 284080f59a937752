"""Trial: one measurement of a choice, or the reason why there is none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import comb, isfinite

from .choice import Choice

STAGES = ("compile", "check", "time")  # where a trial can fail
SURE = 0.95


@dataclass(frozen=True)
class Trial:
    """Seconds of one call: the median, and bounds between which it lies in 95 of 100 cases; or an error.

    ``stage`` says where a trial failed: 'compile', 'check' (against the reference) or 'time'. ``rounds``: samples.
    """

    choice: Choice
    time_s: float | None = None
    low_s: float | None = None
    high_s: float | None = None
    rounds: int = 0
    error: str = ""
    stage: str = ""

    @classmethod
    def timed(cls, choice: Choice, seconds: Sequence[float]) -> Trial:
        """From samples. What is no time, such as zero or less, fails the trial."""
        wrong = [s for s in seconds if not (isfinite(s) and s > 0)]
        if wrong or not seconds:
            said = f"measured {wrong[0]!r} s, which is no time" if wrong else "was not measured"
            return cls(choice, error=said, stage="time")
        ranked, (low, high) = sorted(seconds), bounds(len(seconds))
        middle = len(ranked) // 2
        median = ranked[middle] if len(ranked) % 2 else (ranked[middle - 1] + ranked[middle]) / 2
        return cls(choice, median, ranked[low], ranked[high], len(ranked))

    @classmethod
    def failed(cls, choice: Choice, stage: str, error: str) -> Trial:
        return cls(choice, error=error, stage=stage)

    def checked(self) -> Trial:
        """This trial; a failure if what it has is no time."""
        if self.time_s is None or (isfinite(self.time_s) and self.time_s > 0):
            return self
        return Trial.failed(self.choice, "time", f"measured {self.time_s!r} s, which is no time")

    def scaled(self, factor: float) -> Trial:
        """The same measurement on a clock that runs ``factor`` times as fast."""
        if self.time_s is None:
            return self
        low, high = (None if b is None else b * factor for b in (self.low_s, self.high_s))
        return replace(self, time_s=self.time_s * factor, low_s=low, high_s=high)


def bounds(n: int) -> tuple[int, int]:
    """Places of the samples that enclose the median with 95 % confidence: order statistics of a binomial count.

    Of fewer than 6 samples the least and the greatest, which is less sure.
    """
    inside, low = 1.0 - 2.0 * 0.5**n, 0
    while low + 1 < n // 2:
        fewer = inside - 2.0 * comb(n, low + 1) * 0.5**n
        if fewer < SURE:
            break
        inside, low = fewer, low + 1
    return low, n - 1 - low
