"""The funnel of a tuning run: how many points each stage left, and which rule or reason took the others.

Cartesian 1,536 -> hard 231 -> soft 231 -> tried 40 -> compiled 40 -> correct 39 -> timed 39
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from math import log10
from typing import Any

from .. import markup
from ..space import Space
from .trial import STAGES, Trial

NAMES = ("Cartesian", "hard", "soft", "tried", "compiled", "correct", "timed")
BAR, LEFT, WIDTH, LONGEST = 26.0, 78.0, 900.0, 250.0
MOST_REASONS = 3


@dataclass(frozen=True)
class Stage:
    """What is left after a stage, and how many each rule or reason took in it."""

    name: str
    left: int
    lost: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Funnel:
    """Stages in order. Funnels of several spaces add up."""

    stages: tuple[Stage, ...]

    @classmethod
    def of(cls, space: Space, trials: Sequence[Trial]) -> Funnel:
        """Of a space, counted without listing it, and of what was tried in it."""
        left = space.cartesian
        stages = [Stage("Cartesian", left)]
        kept = []
        for kind in ("hard", "soft"):
            lost = {}
            for rule in (r for r in space.rules if r.kind == kind):
                kept.append(rule)
                now = space.count(kept)
                if now < left:
                    lost[rule.name] = left - now
                left = now
            stages.append(Stage(kind, left, lost))
        left = len(trials)
        stages.append(Stage("tried", left))
        for name, stage in zip(NAMES[4:], STAGES, strict=True):
            reasons = Counter(_reason(t.error) for t in trials if t.stage == stage)
            left -= reasons.total()
            stages.append(Stage(name, left, dict(reasons.most_common())))
        return cls(tuple(stages))

    @classmethod
    def empty(cls) -> Funnel:
        """Of nothing."""
        return cls(tuple(Stage(name, 0) for name in NAMES))

    def __add__(self, other: Funnel) -> Funnel:
        out = []
        for a, b in zip(self.stages, other.stages, strict=True):
            lost = Counter(a.lost) + Counter(b.lost)
            out.append(Stage(a.name, a.left + b.left, dict(lost.most_common())))
        return Funnel(tuple(out))

    @classmethod
    def from_json(cls, form: Sequence[Mapping[str, Any]]) -> Funnel:
        return cls(tuple(Stage(row["stage"], row["left"], row["lost"]) for row in form))

    def to_json(self) -> list[dict[str, Any]]:
        return [{"stage": s.name, "left": s.left, "lost": dict(s.lost)} for s in self.stages]

    def __str__(self) -> str:
        rows = [("stage", "left", "taken by"), *((s.name, f"{s.left:,}", _words(s)) for s in self.stages)]
        widths = [max(len(row[i]) for row in rows) for i in range(2)]
        return "\n".join(f"{a.ljust(widths[0])}  {b.rjust(widths[1])}  {c}".rstrip() for a, b, c in rows)

    def svg(self) -> str:
        """A picture: a bar for each stage, as long as the number's logarithm."""
        most = max(1.0, log10(max(s.left for s in self.stages) + 1))
        parts = []
        for i, stage in enumerate(self.stages):
            y = i * BAR
            long = LONGEST * log10(stage.left + 1) / most
            shade = markup.TRAIN if i < 3 else markup.HELD_OUT
            parts.append(f'<rect x="{LEFT}" y="{y + 3}" width="{long:.1f}" height="{BAR - 8}" rx="3" fill="{shade}"/>')
            parts.append(_label(LEFT - 8, y, stage.name, "end"))
            words = f"{stage.left:,}" + (f"   {_words(stage)}" if stage.lost else "")
            parts.append(_label(LEFT + long + 8, y, words, "start"))
        high = BAR * len(self.stages)
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH:.0f} {high:.0f}" width="{WIDTH:.0f}" '
            f'height="{high:.0f}" style="max-width:100%;font-family:system-ui,sans-serif">{"".join(parts)}</svg>'
        )

    _repr_html_ = svg


def _words(stage: Stage) -> str:
    lost = list(stage.lost.items())
    more = len(lost) - MOST_REASONS
    said = [f"{name} {-n:,}" for name, n in lost[:MOST_REASONS]] + ([f"and {more} more"] if more > 0 else [])
    return ", ".join(said)


def _reason(error: str) -> str:
    """An error without its numbers, so that equal reasons are counted together."""
    return re.sub(r"-?\d[\d.e+-]*", "#", error.partition("\n")[0])[:70] or "unknown"


def _label(x: float, y: float, text: str, anchor: str) -> str:
    fill = markup.SOFT if anchor == "end" else "currentColor"
    place = f'x="{x:.1f}" y="{y + BAR / 2 + 3:.1f}" text-anchor="{anchor}"'
    return f'<text {place} font-size="12" fill="{fill}" xml:space="preserve">{escape(text)}</text>'
