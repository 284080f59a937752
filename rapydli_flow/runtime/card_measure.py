"""Measuring kernels on a card: each checked against the reference, then timed by the card's own clock.

set 0: inputs, outputs, workspace    set 1: ...    set 2: ...        together more than the card's cache holds
a sample: mark, kernel on set 0, kernel on set 1, ..., mark          one CUDA graph, so that launches cost nothing
"""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gpu_kernels.card import Accelerator
from gpu_kernels.compile import cubins

from ..errors import DeviceFault, TemplateError
from ..spec import Array, Block, Spec
from ..template import Device
from ..tuner import Choice, Request, Tuning
from .building import card_request
from .card_rank import let_go
from .devices import card_of
from .measure import Measuring, compare, room
from .participant import at_array

CACHE_BYTES = 192 << 20  # several times the last cache of a large card
SETS = 16  # at most
SAMPLE_S = 0.001
MOST_CALLS = 512
LOST = 70  # exit status of a process whose card failed


class CardMeasure(Measuring):
    """On a card."""

    def __init__(self, device: Device, **how: Any) -> None:
        super().__init__(device, **how)
        self.card: Accelerator = card_of(device)
        self._memory: list[int] = []
        weakref.finalize(self, let_go, (self.card,), self._memory).atexit = False
        self._size, self._sets = 0, 1

    def _take(self, request: Request, choices: Sequence[Choice]) -> None:
        if request != self._request:
            self._request = None
            self._draw(request)
            self._size = 0
        specs = [*request.ins, *request.outs, *request.epilogue.extras]
        needed = sum(map(room, specs)) + self._most_work(request, choices)
        self.card.use()
        if needed > self._size:
            while self._memory:
                self.card.wait()
                self.card.free(self._memory.pop())
            least = CACHE_BYTES if not self.device.emulated else 0
            self._sets, self._size = max(1, min(SETS, -(-least // needed))), needed
            self._at_size = room(Spec((2 * len(request.outs[0].shape) + 1,), "int64"))
            self._memory.append(self.card.reserve(self._sets * needed + self._at_size))
            self._request = request
            self._fill()

    def _addresses(self, specs: Sequence[Spec], number: int) -> list[int]:
        """Where arrays lie in a set, one behind the other."""
        out, at = [], self._memory[0] + number * self._size
        for spec in specs:
            out.append(at)
            at += room(spec)
        return out

    def _specs(self, request: Request) -> list[Spec]:
        return [*request.ins, *request.outs, *request.epilogue.extras]

    def _fill(self) -> None:
        assert self._request is not None
        request = self._request
        specs, n, m = self._specs(request), len(request.ins), len(request.outs)
        read = (*specs[:n], *specs[n + m :])
        sent = [np.ascontiguousarray(x, spec.dtype) for x, spec in zip(self._drawn, read, strict=True)]
        for number in range(self._sets):
            places = self._addresses(specs, number)
            for address, array in zip((*places[:n], *places[n + m :]), sent, strict=True):
                self.card.upload(address, array)
        self._at = self._memory[0] + self._sets * self._size
        block = at_array(Block.all(request.outs[0].shape))
        self.card.upload(self._at, block)
        self.card.wait()

    def _lost(self, failure: Exception) -> None:
        """Nothing works any more in a process whose card failed: what contains this one starts another."""
        if self.contained and isinstance(failure, DeviceFault) and failure.sticky:
            os._exit(LOST)

    def _prepare(self, request: Request, choice: Choice) -> tuple[list[Callable[[], None]], list[Array]]:
        asked = card_request(request, choice, self.device)
        if not self.device.emulated and (spilled := [one for one in cubins(asked) if not one.clean]):
            told = spilled[0]
            raise TemplateError(f"pruned: {told.spill_bytes} bytes of registers are spilled {' '.join(told.warnings)}")
        self.card.use()
        kernel, specs = self.card.prepare(asked), self._specs(request)
        work = Tuning(self.device).workspace(request, choice)
        n, m = len(request.ins), len(request.outs)
        launches = []
        for number in range(self._sets):
            places = self._addresses([*specs, *work], number)
            ordered = [*places[: n + m], *places[len(specs) :], *places[n + m : len(specs)]]
            launches.append(kernel.bind(ordered, at=self._at))
        first, outs = self._addresses(specs, 0)[n : n + m], [np.empty(s.shape, s.dtype) for s in request.outs]
        for address, out in zip(first, outs, strict=True):  # floats are NaN, so that what is not written is found out
            self.card.fill(address, out.nbytes, 0xFF)
        launches[0]()
        for address, out in zip(first, outs, strict=True):
            self.card.download(out, address)
        self.card.wait()
        return launches, outs

    def _checked(self, request: Request, prepared: tuple[list[Callable[[], None]], list[Array]]) -> Callable[[], float]:
        launches, outs = prepared
        if self._wanted is not None:
            compare(outs, self._wanted)
        begin = time.perf_counter()
        for launch in launches:
            launch()
        self.card.wait()
        spent = max((time.perf_counter() - begin) / len(launches), 1e-7)
        rounds = max(1, min(MOST_CALLS, round(SAMPLE_S / spent)) // len(launches))
        many = launches * rounds
        replay = self.card.capture(many)
        replay()
        before, after = self.card.mark(), self.card.mark()

        def seconds() -> float:
            before.set()
            replay()
            after.set()
            after.wait()
            return max(after.seconds_since(before), 1e-9) / len(many)

        return seconds


def seconds_of(request: Request, device: Device, *, rounds: int = 10) -> float:
    """The least time of a call of what serves a request untuned; its results are not checked."""
    choice = request.default(device)
    if choice.reference:
        raise TemplateError(f"no kernel for {device.name} serves {request}.")
    measure = _Unchecked(device, threads=1)
    measure._take(request, [choice])
    run = measure._checked(request, measure._prepare(request, choice))
    return min(run() for _ in range(rounds))


class _Unchecked(CardMeasure):
    """On random numbers, of which nobody asks what is right."""

    def _draw(self, request: Request) -> None:
        rng = np.random.default_rng(self.seed)
        specs = (*request.ins, *request.epilogue.extras)
        self._drawn = [np.asarray(rng.random(spec.shape, np.float32), spec.dtype) for spec in specs]
        self._wanted = None
