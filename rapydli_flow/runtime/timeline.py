"""Where the time of one step of a rank went: what it loaded, computed, moved and waited for, as a few spans.

    rank 0  loading | compute          | waiting | communication | compute
    rank 1  loading | compute                    | communication | compute

Waiting is the part of a meeting in which what others send was not there yet; it is put at the beginning of the meeting,
wherever in it that was. Over connections the time on the way is in it, as nobody knows when the other one sent.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from ..scheduler.collective import TITLES

COMPUTE, COMMUNICATION, WAITING, LOADING = KINDS = ("compute", "communication", "waiting", "loading")
MOST = 64  # spans of a rank: they travel with the numbers of a segment
SHORTEST_S = 1e-6


class Took(NamedTuple):
    """A call or collective of a step. It began at ``begin_s`` of `time.perf_counter`; ``waited_s`` of ``time_s`` were
    spent waiting for others."""

    name: str
    title: str
    begin_s: float
    time_s: float
    waited_s: float = 0.0


class Span(NamedTuple):
    """What kind of thing a rank did, and from when to when."""

    kind: str
    begin_s: float
    end_s: float


def spans(loading: tuple[float, float], took: Iterable[Took]) -> tuple[Span, ...]:
    """The spans of a step, in seconds since the epoch by this host's clock; ``loading``: begin and end of that."""
    since = time.time() - time.perf_counter()
    return few([Span(kind, begin + since, end + since) for kind, begin, end in _all(loading, took)])


def few(found: Iterable[Span], most: int = MOST) -> tuple[Span, ...]:
    """Neighbours of a kind joined; where too many are left, without the shortest, and joined over these."""
    kept, shortest_s = _joined(found), SHORTEST_S
    while len(kept) > most:
        kept = _joined(span for span in kept if span.end_s - span.begin_s >= shortest_s)
        shortest_s *= 2
    return tuple(kept)


def aligned(ranks: Sequence[Sequence[Span]]) -> tuple[tuple[Span, ...], ...]:
    """The spans of all ranks, in seconds since the first one began: as exact as the clocks of hosts agree. () where
    those of a rank are not known."""
    if not all(ranks):
        return ()
    begin = min(found[0].begin_s for found in ranks)
    return tuple(tuple(Span(kind, a - begin, b - begin) for kind, a, b in found) for found in ranks)


def _all(loading: tuple[float, float], took: Iterable[Took]) -> Iterator[Span]:
    yield Span(LOADING, *loading)
    for each in took:
        end = each.begin_s + each.time_s
        if each.title in TITLES:
            came = each.begin_s + each.waited_s
            yield Span(WAITING, each.begin_s, came)
            yield Span(COMMUNICATION, came, end)
        else:
            yield Span(COMPUTE, each.begin_s, end)


def _joined(found: Iterable[Span]) -> list[Span]:
    """Neighbours of a kind as one; spans of no length are left out."""
    out: list[Span] = []
    for span in found:
        if span.end_s <= span.begin_s:
            continue
        if out and out[-1].kind == span.kind:
            out[-1] = out[-1]._replace(end_s=span.end_s)
        else:
            out.append(span)
    return out
