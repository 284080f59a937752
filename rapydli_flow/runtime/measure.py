"""Measuring kernels in this process: each checked against the reference, then timed in interleaved rounds.

    for each round:   against  A  B  C         all in turn, so that a busy moment of the machine meets all of them
                      against  A     C         what is clearly slower than the best `against` is not timed further

All choices work on the same memory, laid out as a rank's: where arrays lie decides how fast they are, by ten percent
and more. Samples are ratios to the geometric mean of `against` (or of all, where all stay) in the same round, times its
median: what changes the speed of the whole machine from round to round cancels out. `runtime.bench` runs this in a
process of its own.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import geometric_mean, median
from typing import Any

import numpy as np

from cpu_kernels.driver import CallList, address_of

from ..errors import RapydliError
from ..ops import Sample
from ..spec import Array, Block, Spec
from ..template import Device
from ..tuner import Choice, Request, Trial, Tuning
from .participant import at_array
from .rank import ALIGN, kernel_of, memory_of

TOLERANCE = {"float32": 1e-4, "float64": 1e-10, "bfloat16": 2e-2, "float16": 4e-3}
ROUNDS, THOROUGH = 20, 60
ROUND_S, LIST_S = 0.001, 0.0003  # many short samples: what disturbs one half of a round should disturb the other half
MOST_CALLS = 256
REJECT = {4: 1.30, 8: 1.15, 14: 1.06}  # after so many rounds: slower than this, even at its best, is out
OUT_OF_TIME_S = 2.0  # rounds of one choice take no longer, but for the first few
FEWEST = 5
Say = Callable[[int], None]


class Measuring(ABC):
    """The tuner's `Measure` of one device, without containment. What it draws and computes for a request it keeps.

    ``operands``: arrays to measure on, in place of random numbers.
    """

    contained = False  # is this a process that may end?

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
        self._take(request, everyone)
        trials: dict[int, Trial] = {}
        ready: dict[int, Callable[[], float]] = {}
        for i, choice in enumerate(everyone):
            say(i)
            try:
                run = self._prepare(request, choice)
            except Exception as failure:  # templates are open to all: whatever one does, the others are tried
                self._lost(failure)
                trials[i] = Trial.failed(choice, "compile", f"{type(failure).__name__}: {failure}")
                continue
            try:
                ready[i] = self._checked(request, run)
            except Exception as failure:
                self._lost(failure)
                trials[i] = Trial.failed(choice, "check", f"{type(failure).__name__}: {failure}")
                self._fill()  # what is wrong may have written where it should not
        say(-1)
        for i, samples in self._rounds(ready, len(against), thorough).items():
            trials[i] = replace(Trial.timed(everyone[i], samples), threads=self.threads)
        return [trials[i] for i in range(len(everyone))]

    @abstractmethod
    def _take(self, request: Request, choices: Sequence[Choice]) -> None:
        """Draw operands and compute what is right, once for a request; make room for the largest workspace."""

    @abstractmethod
    def _fill(self) -> None:
        """Put the operands where kernels read them."""

    @abstractmethod
    def _prepare(self, request: Request, choice: Choice) -> Any:
        """The kernel, run once."""

    @abstractmethod
    def _checked(self, request: Request, prepared: Any) -> Callable[[], float]:
        """Seconds of one call, as a function; raises if the first results were wrong."""

    def _lost(self, failure: Exception) -> None:  # noqa: B027 - most devices stay usable
        """Told of each failure."""

    # inputs and reference ---------------------------------------------------------------------------

    def _draw(self, request: Request) -> None:
        """Operands, and what is right."""
        rng = np.random.default_rng(self.seed)
        drawn = self.operands or Sample(request.op, request.ins, _ranges(request)).draw(rng)
        extras = request.epilogue.extras
        channels = {i: (0.5, 2.0) for i, s in enumerate(extras) if s.floating and len(s.shape) == 1}
        self._drawn = [*map(np.asarray, drawn), *Sample(request.op, extras, channels).draw(rng)]
        whole = request.whole or (request.op if request.epilogue.identity else None)
        self._wanted = whole.run(*self._drawn) if whole else None

    def _most_work(self, request: Request, choices: Sequence[Choice]) -> int:
        """Bytes of the largest workspace."""
        return max((sum(map(room, self._work(request, choice))) for choice in choices), default=0)

    def _work(self, request: Request, choice: Choice) -> tuple[Spec, ...]:
        try:
            return Tuning(self.device).workspace(request, choice)
        except Exception:  # its template's; `_prepare` will say so
            return ()

    # rounds -----------------------------------------------------------------------------------------

    def _rounds(self, ready: dict[int, Callable[[], float]], against: int, thorough: bool) -> dict[int, list[float]]:
        """Samples of each: in seconds, as ratios to what stays in all rounds, times its median."""
        if not ready:
            return {}
        stay = [i for i in ready if thorough or i < against] or [min(ready)]
        samples: dict[int, list[float]] = {i: [] for i in ready}
        spent = dict.fromkeys(ready, 0.0)
        running = list(ready)
        for r in range(THOROUGH if thorough else ROUNDS):
            for i in [*running[r % len(running) :], *running[: r % len(running)]]:
                begin = time.perf_counter()
                samples[i].append(ready[i]())
                spent[i] += time.perf_counter() - begin
            if r + 1 in REJECT and not thorough:
                limit = REJECT[r + 1] * min(median(samples[i]) for i in stay)
                running = [i for i in running if i in stay or min(samples[i]) <= limit]
            if r + 1 >= FEWEST and max(spent.values()) > OUT_OF_TIME_S * (4 if thorough else 1):
                break
        if len(ready) == 1:
            return samples
        base = [geometric_mean(each) for each in zip(*(samples[i] for i in stay), strict=True)]
        middle = median(base)
        return {i: [t / b * middle for t, b in zip(mine, base, strict=False)] for i, mine in samples.items()}


class Measure(Measuring):
    """On this machine's processor."""

    def __init__(self, device: Device, **how: Any) -> None:
        super().__init__(device, **how)
        self._memory = np.empty(0, np.uint8)

    def _take(self, request: Request, choices: Sequence[Choice]) -> None:
        if request != self._request:
            self._request = None
            self._draw(request)
            self._work_at = -1
        specs = [*request.ins, *request.outs, *request.epilogue.extras]
        needed = sum(map(room, specs)) + self._most_work(request, choices)
        if request != self._request or needed > len(self._memory):
            self._memory = memory_of(needed)
            self._arrays, self._work_at = self._laid(specs, 0)
            self._request = request
            self._fill()

    def _laid(self, specs: Sequence[Spec], at: int) -> tuple[list[Array], int]:
        """Arrays one behind the other, and where the next would be."""
        out = []
        for spec in specs:
            out.append(self._memory[at : at + spec.size_bytes].view(spec.dtype).reshape(spec.shape))
            at += room(spec)
        return out, at

    def _fill(self) -> None:
        assert self._request is not None
        first, last = len(self._request.ins), len(self._arrays) - len(self._request.epilogue.extras)
        for array, drawn in zip([*self._arrays[:first], *self._arrays[last:]], self._drawn, strict=True):
            array[...] = drawn

    def _prepare(self, request: Request, choice: Choice) -> tuple[CallList, list[Array], list[Array]]:
        kernel = kernel_of(request, choice, self.device)
        work, _ = self._laid(Tuning(self.device).workspace(request, choice), self._work_at)
        n_ins, n_outs = len(request.ins), len(request.outs)
        ins, outs, extras = self._arrays[:n_ins], self._arrays[n_ins:][:n_outs], self._arrays[n_ins + n_outs :]
        for out in outs:
            out.reshape(-1).view(np.uint8)[...] = (
                0xFF  # floats are NaN, so that an element that no kernel writes is found out
            )
        at = at_array(Block.all(request.outs[0].shape))
        buffers = [*ins, *outs, *work, *extras, at]
        call = (kernel, [address_of(b) for b in buffers])
        once = CallList([call])
        begin = time.perf_counter()
        once.run(threads=self.threads)
        spent = max(time.perf_counter() - begin, 1e-7)
        calls = 1 if spent > LIST_S else min(MOST_CALLS, round(LIST_S / spent) + 1)
        return (CallList([call] * calls) if calls > 1 else once), outs, buffers

    def _checked(self, request: Request, prepared: tuple[CallList, list[Array], list[Array]]) -> Callable[[], float]:
        calls, outs, buffers = prepared
        if self._wanted is not None:
            compare(outs, self._wanted)

        def seconds(buffers: list[Array] = buffers) -> float:  # the list knows addresses only: keep what they name
            begin, done = time.perf_counter(), 0
            while True:
                calls.run(threads=self.threads)
                done += 1
                spent = time.perf_counter() - begin
                if spent > ROUND_S:
                    return spent / (done * len(calls))

        return seconds


def _ranges(request: Request) -> dict[int, tuple[float, float]]:
    """Bounds of values drawn for integer operands: taps of a window, classes."""
    window = getattr(request.op, "window", ())
    most = int(np.prod(window)) if window else min((s.shape[-1] for s in request.ins if len(s.shape) > 1), default=2)
    out = {i: (0.0, float(max(1, most))) for i, s in enumerate(request.ins) if not s.floating}
    return out | {i: (0.5, 2.0) for i, s in enumerate(request.ins) if s.floating and len(s.shape) == 1}


def room(spec: Spec) -> int:
    """Bytes of an array, up to the next cache line."""
    return -(-spec.size_bytes // ALIGN) * ALIGN


def compare(outs: Sequence[Array], wanted: Sequence[Array]) -> None:
    """Raise RapydliError unless outputs are what the reference gives, up to a tolerance times its largest value."""
    for k, (out, want) in enumerate(zip(outs, wanted, strict=True)):
        scale = float(np.abs(want).max(initial=0.0)) or 1.0
        off = np.abs(out.astype(np.float64) - np.asarray(want, np.float64)) / scale
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
