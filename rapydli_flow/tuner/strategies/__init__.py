"""Search strategies: which points of a space to try next. One module with one function each; new ones are added here.

    def strategy(space, start, rng, *, batch):      a generator
        times = yield points                        asks for up to `batch` points, is told seconds (inf: no time)

A strategy never asks for a point twice, tries ``start`` first (the default config comes first there), and ends when it
has nothing more to ask. It knows neither kernels nor clocks: budgets are kept by `tuner.search`, which also
replays recorded results through the same functions (`tuner.simulate`). May import `rapydli_flow.space` and errors.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any

from ...errors import SettingError
from ...space import Point
from .evolutionary import evolutionary
from .exhaustive import exhaustive
from .greedy import greedy
from .guided import guided
from .random import random
from .transfer import transfer

Search = Generator[list[Point], Sequence[float], None]
Strategy = Callable[..., Search]
STRATEGIES: dict[str, Strategy] = {
    "guided": guided,
    "greedy": greedy,
    "evolutionary": evolutionary,
    "random": random,
    "transfer": transfer,
    "exhaustive": exhaustive,
}

__all__ = ["STRATEGIES", "Search", "Strategy", "named", *STRATEGIES]


def named(name: str) -> Any:
    """The strategy of this name. Raises SettingError with those that there are."""
    if name not in STRATEGIES:
        raise SettingError(f"no search strategy {name!r}; there are {', '.join(STRATEGIES)}.")
    return STRATEGIES[name]
