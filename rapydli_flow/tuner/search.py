"""Search: which config of which template is fastest for a request. First form: every one of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence

from ..template import Device
from .choice import Choice, Request
from .trial import Trial

Measure = Callable[[Request, Sequence[Choice]], list[Trial]]


def exhaustive(request: Request, device: Device) -> Iterator[Choice]:
    """Every config of every template, the defaults first."""
    found = request.templates(device)
    configs = [t.configs(request.op, request.ins, request.outs, device) for t in found]
    firsts = [Choice.of(t, next(c)) for t, c in zip(found, configs, strict=True)]
    yield from firsts
    for template, rest in zip(found, configs, strict=True):
        for config in rest:
            yield Choice.of(template, config)


def tune(
    requests: Iterable[Request],
    device: Device,
    measure: Measure,
    *,
    budget_s: float,
    watch: Callable[[Request, Trial, int], None] = lambda request, best, trials: None,
) -> list[tuple[Request, Trial, Trial]]:
    """(request, best trial, trial of the default) for each request that the budget reaches.

    ``measure`` checks every choice against the reference before it times it, and answers with a
    reason where a choice fails. The default stays unless another is faster by more than 2 %. A request
    of which every choice fails is left out; ``watch`` gets its default's trial, without a time.
    """
    end = time.monotonic() + budget_s
    out = []
    for request in requests:
        if time.monotonic() > end:
            break
        trials: list[Trial] = []
        pending = list(exhaustive(request, device))
        while pending and (not trials or time.monotonic() < end):
            trials += [trial.checked() for trial in measure(request, pending[:8])]
            pending = pending[8:]
        good = [t for t in trials if t.time_s is not None]
        if not good:
            if trials:
                watch(request, trials[0], len(trials))
            continue
        default = trials[0]
        best = min(good, key=lambda t: t.time_s or 0.0)
        if default.time_s is not None and best.time_s is not None and best.time_s > 0.98 * default.time_s:
            best = default
        watch(request, best, len(trials))
        out.append((request, best, default))
    return out
