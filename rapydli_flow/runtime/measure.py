"""Measuring kernels in this process: each checked against the reference, then timed in interleaved rounds.

    for each round:   against  A  B  C         all in turn, so that a busy moment of the machine meets all of them
                      against  A     C         what is clearly slower than the best `against` is not timed further

Samples are ratios to the first of `against` (or of all that work) in the same round, times its median: what changes
the speed of the whole machine from round to round cancels out. `runtime.bench` runs this in a process of its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import median

import numpy as np

from cpu_kernels.driver import CallList, address_of

from ..errors import RapydliError
from ..ops import Sample
from ..spec import Array, Block, Spec
from ..template import Device
from ..tuner import Choice, Request, Trial, Tuning
from .rank import at_array, kernel_of

TOLERANCE = {"float32": 1e-4, "float64": 1e-10}
ROUNDS, THOROUGH = 7, 21
ROUND_S, LIST_S = 0.004, 0.0003
MOST_CALLS = 256
REJECT = {2: 1.30, 3: 1.15, 5: 1.06}  # after so many rounds: slower than this, even at its best, is out
OUT_OF_TIME_S = 2.0  # rounds of one choice take no longer, but for the first three
Say = Callable[[int], None]


class Measure:
    """The tuner's `Measure` for the CPU, without containment. What it draws and computes for a request it keeps.

    ``operands``: arrays to measure on, in place of random numbers.
    """

    def __init__(
        self,
        device: Device,
        *,
        threads: int,
        seed: int = 0,
        operands: Sequence[Array] | None = None,
    ) -> None:
        self.device, self.threads, self.seed, self.operands = device, threads, seed, operands
        self._request: Request | None = None

    def __call__(
        self,
        request: Request,
        choices: Sequence[Choice],
        *,
        against: Sequence[Choice] = (),
        thorough: bool = False,
        say: Say = lambda place: None,
    ) -> list[Trial]:
        """A trial for each choice, those of ``against`` first. ``say`` is told which one is run for the first time."""
        everyone = [*against, *choices]
        self._take(request)
        trials: dict[int, Trial] = {}
        ready: dict[int, Callable[[], float]] = {}
        for i, choice in enumerate(everyone):
            say(i)
            try:
                run = self._prepare(request, choice)
            except Exception as failure:  # templates are open to all: whatever one does, the others are tried
                trials[i] = Trial.failed(choice, "compile", f"{type(failure).__name__}: {failure}")
                continue
            try:
                ready[i] = self._checked(request, run)
            except Exception as failure:
                trials[i] = Trial.failed(choice, "check", f"{type(failure).__name__}: {failure}")
        say(-1)
        for i, samples in self._rounds(ready, len(against), thorough).items():
            trials[i] = replace(Trial.timed(everyone[i], samples), threads=self.threads)
        return [trials[i] for i in range(len(everyone))]

    # inputs and reference ---------------------------------------------------------------------------

    def _take(self, request: Request) -> None:
        """Draw operands and compute what is right, once for a request."""
        if request == self._request:
            return
        rng = np.random.default_rng(self.seed)
        drawn = self.operands or Sample(request.op, request.ins, _ranges(request)).draw(rng)
        self._ins = [np.asarray(a, order="C") for a in drawn]
        extras = request.epilogue.extras
        channels = {i: (0.5, 2.0) for i, s in enumerate(extras) if s.floating and len(s.shape) == 1}
        self._extras = [np.asarray(a, order="C") for a in Sample(request.op, extras, channels).draw(rng)]
        whole = request.whole or (request.op if request.epilogue.identity else None)
        self._wanted = whole.run(*self._ins, *self._extras) if whole else None
        self._request = request

    def _prepare(self, request: Request, choice: Choice) -> tuple[CallList, list[Array], list[Array]]:
        kernel = kernel_of(request, choice, self.device)
        outs = [_unwritten(s) for s in request.outs]
        work = [np.empty(s.shape, s.dtype) for s in Tuning(self.device).workspace(request, choice)]
        at = at_array(Block.all(request.outs[0].shape))
        buffers = [*self._ins, *outs, *work, *self._extras, at]
        call = (kernel, [address_of(b) for b in buffers])
        once = CallList([call])
        begin = time.perf_counter()
        once.run(threads=self.threads)
        spent = max(time.perf_counter() - begin, 1e-7)
        calls = 1 if spent > LIST_S else min(MOST_CALLS, round(LIST_S / spent) + 1)
        return (CallList([call] * calls) if calls > 1 else once), outs, buffers

    def _checked(self, request: Request, prepared: tuple[CallList, list[Array], list[Array]]) -> Callable[[], float]:
        """Seconds of one call, as a function; raises if the first results were wrong."""
        calls, outs, buffers = prepared
        if self._wanted is not None:
            _compare(outs, self._wanted)

        def seconds(buffers: list[Array] = buffers) -> float:  # the list knows addresses only: keep what they name
            begin, done = time.perf_counter(), 0
            while True:
                calls.run(threads=self.threads)
                done += 1
                spent = time.perf_counter() - begin
                if spent > ROUND_S:
                    return spent / (done * len(calls))

        return seconds

    # rounds -----------------------------------------------------------------------------------------

    def _rounds(self, ready: dict[int, Callable[[], float]], against: int, thorough: bool) -> dict[int, list[float]]:
        """Samples of each: in seconds, as ratios to the first in the same round, times its median."""
        if not ready:
            return {}
        base, samples = min(ready), {i: [] for i in ready}  # type: dict[int, list[float]]
        spent = dict.fromkeys(ready, 0.0)
        running = list(ready)
        for r in range(THOROUGH if thorough else ROUNDS):
            for i in [*running[r % len(running) :], *running[: r % len(running)]]:
                begin = time.perf_counter()
                samples[i].append(ready[i]())
                spent[i] += time.perf_counter() - begin
            if r + 1 in REJECT and not thorough:
                beside = [i for i in running if i < max(1, against)] or [base]
                limit = REJECT[r + 1] * min(median(samples[i]) for i in beside)
                running = [i for i in running if i == base or i in beside or min(samples[i]) <= limit]
            if r >= 2 and max(spent.values()) > OUT_OF_TIME_S * (4 if thorough else 1):
                break
        middle = median(samples[base])
        return {i: [t / b * middle for t, b in zip(mine, samples[base], strict=False)] for i, mine in samples.items()}


def _ranges(request: Request) -> dict[int, tuple[float, float]]:
    """Bounds of values drawn for integer operands: taps of a window, classes."""
    window = getattr(request.op, "window", ())
    most = int(np.prod(window)) if window else min((s.shape[-1] for s in request.ins if len(s.shape) > 1), default=2)
    out = {i: (0.0, float(max(1, most))) for i, s in enumerate(request.ins) if not s.floating}
    return out | {i: (0.5, 2.0) for i, s in enumerate(request.ins) if s.floating and len(s.shape) == 1}


def _unwritten(spec: Spec) -> Array:
    """Floats are NaN, so that an element that no kernel writes is found out."""
    return np.full(spec.size_bytes, 0xFF, np.uint8).view(spec.dtype).reshape(spec.shape)


def _compare(outs: Sequence[Array], wanted: Sequence[Array]) -> None:
    """Raise RapydliError unless outputs are what the reference gives, up to a tolerance times its largest value."""
    for k, (out, want) in enumerate(zip(outs, wanted, strict=True)):
        scale = float(np.abs(want).max(initial=0.0)) or 1.0
        off = np.abs(out.astype(np.float64) - want) / scale
        worst = float(off.max(initial=0.0))  # NaN if there is one
        tolerance = TOLERANCE.get(out.dtype.name, 0.0)
        if not worst <= tolerance:
            wrong = ~(off <= tolerance)
            first = tuple(map(int, np.argwhere(wrong)[0]))
            what = f"{out[first]:.6g}, not {want[first]:.6g}"
            if np.isnan(off[first]):
                what = "not written, or not a number"
            which = f" of output {k}" if len(outs) > 1 else ""
            raise RapydliError(
                f"deviates from the reference by {worst:.1e}: {wrong.sum():,} of {off.size:,} elements{which} are "
                f"wrong, the first at {first} is {what}"
            )


def distinct(requests: Sequence[Request], device: Device) -> list[Request]:
    """One request for each key, those with a template only."""
    found: dict[str, Request] = {}
    for request in requests:
        if request.templates(device):
            found.setdefault(request.key(device), request)
    return list(found.values())
