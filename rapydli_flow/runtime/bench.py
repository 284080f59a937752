"""The tuner's harness on this host: compilers in processes of their own, then one process that times, compilers idle.

    choices --shared out--> compilers  (Numba's machine code lands in the kernel cache on disk)
            --those that compiled--> the timing process: loads them, checks each against the reference, times rounds

A choice that crashes or hangs its process is a failed trial; the process is started again and goes on with the
others. A lock in the cache's folder keeps tuning runs of this host from timing while another compiles or times.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from ..config import settings
from ..spec import Array
from ..template import Device
from ..tuner import Choice, Request, Trial
from .building import build
from .card_measure import CardMeasure
from .contained import Contained, Failed, Lost, share
from .measure import Measure, Measuring
from .own import carry, unpack

COMPILE_S = 120.0  # for compiling a kernel
LIMIT_S = 60.0  # for running a kernel the first time, and for all rounds of a batch


class Bench:
    """A `Measure` that nothing which a kernel does can hurt. Use it as a context, or close it."""

    def __init__(
        self,
        device: Device,
        *,
        threads: int,
        compilers: int | None = None,
        limit_s: float = LIMIT_S,
        seed: int = 0,
        operands: Sequence[Array] | None = None,
    ) -> None:
        self.device, self.limit_s = device, limit_s
        self._how: dict[str, Any] = {"threads": threads, "seed": seed, "operands": operands}
        self._compilers = [Contained() for _ in range(compilers or len(os.sched_getaffinity(0)))]
        self._timer = Contained()
        self._compiled: dict[tuple[str, Choice], str] = {}  # and what went wrong with it

    def __enter__(self) -> Bench:
        for child in (*self._compilers, self._timer):
            child.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for child in (*self._compilers, self._timer):
            child.stop()

    def __call__(
        self, request: Request, choices: Sequence[Choice], *, against: Sequence[Choice] = (), thorough: bool = False
    ) -> list[Trial]:
        """A trial for each choice, those of ``against`` first."""
        packed = carry(request, self.device)
        everyone = [*against, *choices]
        trials = self._compile(request, packed, everyone)
        ready = [i for i in range(len(everyone)) if i not in trials]
        with _alone(fcntl.LOCK_EX):
            first = sum(i < len(against) for i in ready)
            measured = self._time(packed, [everyone[i] for i in ready], first, thorough)
        trials.update(zip(ready, measured, strict=True))
        return [trials[i] for i in range(len(everyone))]

    # compiling --------------------------------------------------------------------------------------

    def compile(self, pairs: Sequence[tuple[Request, Choice]]) -> None:
        """Compile choices of several requests, so that the next calls find them."""
        packed: dict[str, bytes] = {}
        for request, _ in pairs:
            packed.setdefault(request.key(self.device), b"")
        packed = {request.key(self.device): carry(request, self.device) for request, _ in pairs}
        keys = [(request.key(self.device), choice) for request, choice in pairs]
        todo = [key for key in dict.fromkeys(keys) if key not in self._compiled]
        calls = [(compile_one, packed[key], choice, self.device) for key, choice in todo]
        with _alone(fcntl.LOCK_SH):
            answers = share(self._compilers, calls, COMPILE_S)
        for key, answer in zip(todo, answers, strict=True):
            self._compiled[key] = answer.why if isinstance(answer, Lost | Failed) else ""

    def _compile(self, request: Request, packed: bytes, choices: Sequence[Choice]) -> dict[int, Trial]:
        """The trials of those that do not compile, by place."""
        self.compile([(request, choice) for choice in choices])
        key = request.key(self.device)
        wrong = {i: self._compiled[key, choice] for i, choice in enumerate(choices)}
        return {i: Trial.failed(choices[i], "compile", why) for i, why in wrong.items() if why}

    # timing -----------------------------------------------------------------------------------------

    def _time(self, packed: bytes, choices: Sequence[Choice], first: int, thorough: bool) -> list[Trial]:
        """Trials of compiled choices, all in one set of rounds, but for those that the process did not survive.

        The ``first`` few are those that the others are timed against.
        """
        trials: dict[int, Trial] = {}
        left = list(range(len(choices)))
        while left:
            against = sum(i < first for i in left)
            answer = self._rounds(packed, [choices[i] for i in left], against, thorough)
            if not isinstance(answer, Lost | Failed):
                trials.update(zip(left, answer, strict=True))
                break
            stage = "check" if isinstance(answer, Failed) or _place(answer) >= 0 else "time"
            if isinstance(answer, Failed) or len(left) == 1:
                trials.update((i, Trial.failed(choices[i], stage, answer.why)) for i in left)
                break
            if _place(answer) >= 0:  # it was this one's first run
                lost = left.pop(_place(answer))
                trials[lost] = Trial.failed(choices[lost], stage, answer.why)
            else:  # one of them, in the rounds: each alone
                for i in left:
                    (trials[i],) = self._time(packed, [choices[i]], 0, thorough)
                break
        return [trials[i] for i in range(len(choices))]

    def _rounds(self, packed: bytes, choices: Sequence[Choice], against: int, thorough: bool) -> Any:
        asked = list(choices[:against]), list(choices[against:])
        self._timer.ask(measure_all, packed, *asked, self.device, thorough, self._how)
        return self._timer.answer(self.limit_s)


def _place(answer: Lost) -> int:
    return answer.said if isinstance(answer.said, int) else -1


@contextmanager
def _alone(kind: int) -> Iterator[None]:
    """Hold the host's tuning lock: shared to compile, alone to time. Without it where there is no such file system."""
    folder = settings().cache_dir
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "tuning.lock").open("a") as file:
        with suppress(OSError):
            fcntl.flock(file, kind)
        yield


# in the children -----------------------------------------------------------------------------------------

_measures: dict[str, Measuring] = {}
_requests: dict[bytes, Request] = {}


def _request(packed: bytes) -> Request:
    """Unpacked once; only the last few are kept."""
    if packed not in _requests:
        while len(_requests) > 8:
            _requests.pop(next(iter(_requests)))
        _requests[packed] = unpack(packed)
    return _requests[packed]


def compile_one(packed: bytes, choice: Choice, device: Device, *, say: Any) -> bool:
    """Compile a choice into the kernel cache."""
    build(_request(packed), choice, device)
    return True


def measure_all(
    packed: bytes,
    against: list[Choice],
    choices: list[Choice],
    device: Device,
    thorough: bool,
    how: dict[str, Any],
    *,
    say: Any,
) -> list[Trial]:
    """Check and time choices. The child belongs to one `Bench`, so that ``how`` is always the same."""
    if device.key not in _measures:
        made = Measure(device, **how) if device.kind == "cpu" else CardMeasure(device, **how)
        made.contained = True
        _measures[device.key] = made
    measure = _measures[device.key]
    return measure(_request(packed), choices, against=against, thorough=thorough, say=say)
