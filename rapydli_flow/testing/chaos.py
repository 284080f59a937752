"""A training run whose workers are killed, stopped and slowed down while it goes on: it must end as if undisturbed.

`survive` is used by a short test and, with more faults and networks that are cut, by ``benchmarks/chaos.py``.
"""

from __future__ import annotations

import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from distributed import Client

from .. import nn, optim
from ..api import fit, ingest, plan
from ..graph import Graph, trace, train_step
from ..runtime.events import Callback, Recovered, Stepped
from ..runtime.workers import answering
from ..spec import Spec

LIMIT_S = 60.0  # by then a run must have gone on
SNAPSHOT_EVERY = 100  # no segment is longer
STEPS_A_FAULT = 350  # a fault comes 125 to 250 steps after the last one, when the next segment is done
CLASSES, BATCH, RECORDS = 5, 12, 240


@dataclass(frozen=True)
class Fault:
    """What happened to a worker at a step; ``after_s``: when the run had gone on, with so many ``ranks``.

    Some are not noticed: of a worker without a rank, or one that was slow for less time than silence takes.
    """

    kind: str
    step: int
    after_s: float | None = None
    ranks: int = 0


@dataclass(frozen=True)
class Outcome:
    """What became of a run. ``apart``: the largest deviation from an undisturbed one; ``left``: faults that it did not
    live to see."""

    faults: tuple[Fault, ...]
    left: int
    ranks: int
    same_bits: bool
    apart: float
    seconds: float

    @property
    def recoveries(self) -> list[Fault]:
        return [fault for fault in self.faults if fault.after_s is not None]

    @property
    def slowest_s(self) -> float:
        return max((fault.after_s for fault in self.recoveries if fault.after_s is not None), default=0.0)

    @property
    def good(self) -> bool:
        """The same bits, or the same up to rounding if it went on with fewer ranks in between; and never too late."""
        fewer = any(fault.ranks < self.ranks for fault in self.recoveries)
        same = self.same_bits or (fewer and self.apart < 1e-6)
        return same and self.slowest_s < LIMIT_S and not self.left

    def __str__(self) -> str:
        same = "the same bits" if self.same_bits else f"apart by {self.apart:.1e}"
        return (
            f"{len(self.faults)} faults, {len(self.recoveries)} recoveries, the slowest after {self.slowest_s:.1f} s; "
            f"{self.seconds:.0f} s; {same}: {'good' if self.good else 'BAD'}"
        )


def survive(
    client: Client,
    kinds: Sequence[str],
    *,
    ranks: int,
    seed: int = 0,
    transport: str = "auto",
    cut: Callable[[str], None] | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> Outcome:
    """Train on the workers of a client while faults strike them, one after the other, and then again in this process.

    ``kinds``: 'kill' (SIGKILL), 'stop' (SIGSTOP, for good), 'slow' (stopped and let go several times) or 'cut', which
    calls ``cut`` with a worker's address. Workers that die must be replaced by others.
    """
    rng = np.random.default_rng(seed)
    step, steps = _training_step(), STEPS_A_FAULT * (len(kinds) + 1)
    arrays = {"x": rng.normal(size=(RECORDS, 12, 12, 3)), "label": rng.integers(0, CLASSES, RECORDS)}
    how: dict[str, Any] = {"steps": steps, "plan": plan(step, ranks=ranks, threads=1), "seed": seed}
    with tempfile.TemporaryDirectory() as scratch:
        data = ingest(arrays, os.path.join(scratch, "data.zarr"))
        faults = _Faults(client, kinds, ranks, rng, cut, tell)
        begin = time.monotonic()
        struck: dict[str, Any] = {"min_workers": min(2, ranks), "patience_s": 10.0, "transport": transport}
        struck |= {"run_dir": os.path.join(scratch, "run"), "snapshot_every": SNAPSHOT_EVERY}
        try:
            run = fit(step, data, client=client, callbacks=[faults], **struck, **how)
        finally:
            faults.bury()
        seconds = time.monotonic() - begin
        want = fit(step, data, **how).state
    apart = max(float(np.abs(run.state[k] - v).max() / max(1.0, np.abs(v).max())) for k, v in want.items())
    same = all(run.state[name].tobytes() == value.tobytes() for name, value in want.items())
    return Outcome(tuple(faults.seen), len(faults.kinds), ranks, same, apart, seconds)


def _network(x: Any) -> Any:
    x = nn.relu(nn.batch_norm(nn.conv(x, 8, 3, padding=1, bias=False)))
    x = nn.dropout(nn.max_pool(nn.relu(nn.conv(x, 8, 3, padding=1)), 2), 0.25)
    return nn.dense(x, CLASSES)


def _training_step() -> Graph:
    graph = trace(_network, Spec((BATCH, 12, 12, 3), "float64"))
    return train_step(graph, loss=nn.cross_entropy, optimizer=optim.sgd(0.01, momentum=0.9))


class _Faults(Callback):
    """Strikes a worker of the run whenever it has gone some steps since the last time."""

    def __init__(
        self,
        client: Client,
        kinds: Sequence[str],
        ranks: int,
        rng: np.random.Generator,
        cut: Callable[[str], None] | None,
        tell: Callable[[str], None],
    ) -> None:
        self.client, self.kinds, self.rng, self.cut, self.tell = client, list(kinds), rng, cut, tell
        self.ranks, self.next_step, self.struck = ranks, 60, 0.0
        self.stopped: set[int] = set()
        self.seen: list[Fault] = []

    def on_event(self, event: Any) -> None:
        if isinstance(event, Recovered) and self.seen:
            after, last = time.monotonic() - self.struck, self.seen[-1]
            self.tell(f"    on again at step {event.step}, {event.ranks} ranks, after {after:.1f} s: {event.reason}")
            if event.ranks <= self.ranks:  # else it has only grown again
                fewest = min(event.ranks, last.ranks or event.ranks)
                self.seen[-1] = Fault(last.kind, last.step, after, fewest)
            self.ranks = event.ranks
            self.bury()
        if isinstance(event, Stepped) and event.first >= self.next_step and self.kinds:
            self.next_step = event.first + int(self.rng.integers(125, 250))
            self._strike(event.first)

    def _strike(self, step: int) -> None:
        self.bury()
        alive = sorted(answering(self.client, 2.0).items())
        if not alive:
            return
        address, worker = alive[int(self.rng.integers(len(alive)))]
        kind, pid = self.kinds.pop(0), worker["pid"]
        self.tell(f"  {len(self.seen) + 1:3}  {kind} {address} at step {step}")
        self.struck = time.monotonic()
        self.seen.append(Fault(kind, step))
        if kind == "kill":
            os.kill(pid, signal.SIGKILL)
        elif kind == "stop":
            os.kill(pid, signal.SIGSTOP)
            self.stopped.add(pid)
        elif kind == "slow":
            threading.Thread(target=_slow, args=(pid,), daemon=True).start()
        else:
            assert self.cut is not None
            threading.Thread(target=self.cut, args=(address,), daemon=True).start()

    def bury(self) -> None:
        """Kill what was stopped, so that its nanny starts another one."""
        for pid in self.stopped:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.stopped.clear()


def _slow(pid: int) -> None:
    for _ in range(10):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
            time.sleep(0.2)
            os.kill(pid, signal.SIGCONT)
        time.sleep(0.1)
