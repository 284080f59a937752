"""Two processes of this host which do the same in turns, as two ranks of a plan do: PyTorch and our transports in both.

    results = on_both(function, *arguments)          function(end, *arguments) in each; what both gave

Turns are as in `common.interleaved`, but counted beforehand: both processes must call each side equally often, for
sides wait for each other inside. A turn begins when both are there; its time is that of the slower one.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import count
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import BrokenBarrierError
from typing import Any

from common import LEAST, SETTLE_S, TURN_S
from pytorch import torch
from torch import distributed

from rapydli_flow.runtime.shared import SharedMemory

LIMIT_S = 300.0  # the longest that one process waits for the other
MOST_CALLS, MOST_SETTLING = 100, 20  # of a turn: arrays that are summed in place double each time

_barrier: Any = None
_slots: Any = None


@dataclass
class End:
    """One of the two processes. ``folder`` is there for both, and goes with them."""

    rank: int
    folder: Path
    _names: Any = field(default_factory=count)

    def meet(self) -> None:
        """Wait for the other one, asleep: the other may have the cores."""
        _barrier.wait(LIMIT_S)

    def most(self, value: float) -> float:
        """The larger of both processes' values."""
        _slots[self.rank] = value
        self.meet()
        larger = max(_slots)
        self.meet()
        return larger

    def shared(self, capacity_bytes: int) -> SharedMemory:
        """Our transport between the two."""
        name = f"{self.folder.name}-{next(self._names)}"
        transport = SharedMemory(name, 0, 2, capacity_bytes) if self.rank == 0 else None
        self.meet()
        transport = transport or SharedMemory(name, 1, 2, capacity_bytes)
        self.meet()
        transport.joined()
        return transport

    def gloo(self) -> None:
        """PyTorch's default process group, on the loopback device; one thread for its kernels."""
        torch.set_num_threads(1)
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        where = {"init_method": f"file://{self.folder}/gloo", "timeout": timedelta(seconds=LIMIT_S)}
        distributed.init_process_group("gloo", rank=self.rank, world_size=2, **where)

    def turns(
        self,
        runs: Mapping[str, Callable[[], Any]],
        *,
        seconds: float,
        rounds: int = 60,
        before: Callable[[], None] = lambda: None,
    ) -> dict[str, list[float]]:
        """Seconds of a call of each run in this process, one value a turn. ``before``: done when a turn begins."""
        once = {}
        for name, run in runs.items():
            before()
            once[name] = self._once(run)
        calls = {name: min(MOST_CALLS, max(1, int(TURN_S / each))) for name, each in once.items()}
        settling = {name: min(MOST_SETTLING, math.ceil(SETTLE_S / each)) for name, each in once.items()}
        together = sum((settling[name] + calls[name]) * each for name, each in once.items())
        times: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(max(LEAST, int(min(rounds, seconds / together)))):
            for name, run in runs.items():
                before()
                self.meet()
                _seconds(run, settling[name])
                times[name].append(_seconds(run, calls[name]) / calls[name])
        return times

    def _once(self, run: Callable[[], Any]) -> float:
        """About how long a call takes, the same number in both processes."""
        run()
        for calls in (1, 10, 50):
            each = self.most(_seconds(run, calls) / calls)
            if each * calls > SETTLE_S / 10:
                break
        return each


def _seconds(run: Callable[[], Any], calls: int) -> float:
    begin = time.perf_counter()
    for _ in range(calls):
        run()
    return max(time.perf_counter() - begin, 1e-9)


def on_both(function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Run a function of a module in two new processes; what it returned in each, or the error of the first to fail."""
    context = get_context("spawn")
    barrier = context.Barrier(2)
    shared = (barrier, context.Array("d", 2, lock=False))
    with (
        TemporaryDirectory(prefix="bench-") as folder,
        ProcessPoolExecutor(2, mp_context=context, initializer=_begin, initargs=shared) as pool,
    ):
        futures = [pool.submit(_call, rank, folder, function, arguments) for rank in range(2)]
        done, _ = wait(futures, return_when=FIRST_EXCEPTION)
        if any(future.exception() for future in done):
            barrier.abort()
            errors = [error for future in futures if (error := future.exception())]
            raise next((error for error in errors if not isinstance(error, BrokenBarrierError)), errors[0])
        return [future.result() for future in futures]


def slower(times: list[dict[str, list[float]]]) -> dict[str, list[float]]:
    """Turn by turn the time of the process that took longer."""
    one, other = times
    return {name: list(map(max, one[name], other[name])) for name in one}


def _begin(barrier: Any, slots: Any) -> None:
    global _barrier, _slots
    _barrier, _slots = barrier, slots


def _call(rank: int, folder: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    return function(End(rank, Path(folder)), *arguments)
