"""Our side of the benchmarks beside PyTorch: a training step, of one rank or one of two, and a prediction.

Does not import PyTorch, so that the memory of a process which has only this side is its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from networks import MOMENTUM, RATE, traced

import rapydli_flow as rf
from cpu_kernels.compile import host
from rapydli_flow import nn, optim
from rapydli_flow.graph import Graph, predicting
from rapydli_flow.runtime import tuning
from rapydli_flow.runtime.evaluate import Predictor
from rapydli_flow.runtime.rank import Rank
from rapydli_flow.runtime.transport import CHUNK_BYTES, Alone, Transport, swap_bytes
from rapydli_flow.runtime.warm import warm
from rapydli_flow.scheduler import Program
from rapydli_flow.template import Device
from rapydli_flow.tuner import Tuning
from rapydli_flow.zoo import Network

SEED = 0
Join = Callable[[int], Transport]


class Step:
    """Forward, loss, gradients, SGD with momentum."""

    def __init__(self, case: Network, batch: int, threads: int, *, tune_s: float = 0.0, dropout: bool = True) -> None:
        self.network = traced(case, batch, dropout=dropout)
        step = training(self.network)
        plan = rf.Plan(1, threads)
        if tune_s:
            print(rf.autotune(step, budget_s=tune_s, plan=plan), flush=True)
        known = tuning.known(host())
        (program,) = programs(step, plan, known)
        print(f"{case.name}: {warm(program.requests, known.device)}", flush=True)
        self._begin(program, known.device, threads, Alone())

    def _begin(self, program: Program, device: Device, threads: int, transport: Transport) -> None:
        self.rank = Rank(program, device, threads=threads, transport=transport)
        self.rank.start(SEED)
        self.count = 0

    def state(self) -> dict[str, Any]:
        """Copies of parameters and running statistics."""
        return self.rank.state()

    def __call__(self, x: Any, label: Any) -> float:
        """The loss of a batch, before the update."""
        self.rank.feed({"x": x, "label": label})
        self.count += 1
        return self.rank.step(SEED, self.count)["loss"]

    def profile(self, data: list[tuple[Any, Any]], *, steps: int = 9) -> dict[str, float]:
        """Median milliseconds of a step by op, the longest first."""
        found: list[dict[str, float]] = []
        for i in range(steps):
            x, label = data[i % len(data)]
            self.rank.feed({"x": x, "label": label})
            spent: dict[str, float] = {}
            for took in self.rank.step_timed(SEED, 0)[1]:
                spent[took.title] = spent.get(took.title, 0.0) + took.time_s * 1e3
            found.append(spent)
        return _medians(found)


class Part(Step):
    """One rank of a step that two divide, with one thread each: records, by a strategy 'data' or 'hybrid'."""

    def __init__(
        self, case: Network, batch: int, strategy: str, number: int, join: Join, *, dropout: bool = True
    ) -> None:
        """``join``: from the most bytes that are handed over at once to the transport between the ranks."""
        self.network = traced(case, batch, dropout=dropout)
        known = tuning.known(host())
        both = halves(self.network, strategy, known)
        self._begin(both[number], known.device, 1, join(max(swap_bytes(program, 2, CHUNK_BYTES) for program in both)))

    @property
    def rows(self) -> slice:
        """Which records of a batch are this rank's."""
        return self.rank.block("x").slices[0]

    def __call__(self, x: Any, label: Any) -> float:
        """The loss of the whole batch, from this rank's records of it."""
        return super().__call__(x[self.rows], label[self.rows])


def training(network: Graph) -> Graph:
    """The step that is measured."""
    return rf.train_step(network, loss=nn.cross_entropy, optimizer=optim.sgd(RATE, momentum=MOMENTUM))


def programs(step: Graph, plan: rf.Plan, known: Tuning) -> list[Program]:
    """What each rank of a plan runs."""
    return list(plan.programs(step, known))


def halves(network: Graph, strategy: str, known: Tuning) -> list[Program]:
    """The programs of two ranks that divide a training step."""
    step = training(network)
    return programs(step, rf.plan(step, ranks=2, threads=1, strategy=strategy), known)


class Prediction:
    """Scores of a batch, by the compiled program that predicts."""

    def __init__(self, case: Network, batch: int, threads: int, *, tune_s: float = 0.0) -> None:
        self.network = traced(case, batch)
        if tune_s:
            print(rf.autotune(predicting(self.network), budget_s=tune_s, plan=rf.Plan(1, threads)), flush=True)
        self._state = state_for(self.network)
        known = tuning.known(host())
        program = Predictor(self.network, self._state, known, threads=threads).program(batch)
        warm(program.requests, known.device)
        self.rank = Rank(program, known.device, threads=threads)
        self.rank.load(self._state)

    def state(self) -> dict[str, Any]:
        """Parameters and running statistics that it predicts with."""
        return self._state

    def __call__(self, x: Any, _: Any = None) -> Any:
        """A copy of the scores, N,classes."""
        self.rank.feed({"x": x})
        self.rank.step(0, 0)
        return self.rank.output("y")


def state_for(graph: Graph) -> dict[str, Any]:
    """First values, but gains and variances around 1 and the other vectors around 0: an error in any of them shows."""
    state, rng = rf.init(graph), np.random.default_rng(1)
    for name, value in state.items():
        label = name.rpartition("/")[2]
        if label in ("gain", "var"):
            state[name] = rng.uniform(0.5, 1.5, value.shape).astype(value.dtype)
        elif label != "w":
            state[name] = rng.normal(0.0, 0.1, value.shape).astype(value.dtype)
    return state


def _medians(found: list[dict[str, float]]) -> dict[str, float]:
    names = sorted(found[0], key=lambda name: -found[0][name])
    return {name: round(float(np.median([one[name] for one in found])), 3) for name in names}
