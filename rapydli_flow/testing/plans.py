"""The promise: any plan computes the training run of one worker, up to rounding.

`train` runs all ranks of a plan as threads, in arenas that hold NaN at first, with the kernels of a device or, faster
to begin with, each op's `reference`; everything else is what a real run uses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from ..errors import RunLost
from ..graph import Graph
from ..runtime.rank import Rank
from ..runtime.transport import Threads
from ..scheduler import Plan, Program
from ..spec import Array, Block
from ..template import Device
from ..tuner import Choice, Request, Tuning
from ..tuner.choice import REFERENCE

SEED = 7


class InNumPy(Tuning):
    """Every op runs as its `reference`: nothing is compiled."""

    def choose(self, request: Request) -> Choice:
        return REFERENCE


NUMPY = InNumPy(Device("cpu", "any"))


@dataclass(frozen=True)
class Trained:
    """What training gave: losses of all steps, outputs of the last one, and whole parameters and state."""

    losses: Array
    outputs: Mapping[str, Array]
    state: Mapping[str, Array]


def programs(graph: Graph, plan: Plan, tuning: Tuning = NUMPY) -> tuple[Program, ...]:
    """The programs of all ranks."""
    return plan.programs(graph, tuning)


def batches(graph: Graph, count: int, classes: int, seed: int = 0) -> list[dict[str, Array]]:
    """Random batches for everything that is fed: normal values, and labels below ``classes``."""
    rng = np.random.default_rng(seed)
    out = []
    for _ in range(count):
        fed = {}
        for leaf in graph.leaves("batch"):
            floating = leaf.spec.floating
            value = rng.normal(size=leaf.shape) if floating else rng.integers(0, classes, leaf.shape)
            fed[leaf.name] = np.asarray(value, leaf.dtype)
        out.append(fed)
    return out


def train(
    made: Sequence[Program],
    fed: Sequence[Mapping[str, Array]],
    steps: int,
    *,
    device: Device = NUMPY.device,
    threads: int = 1,
    timeout_s: float = 60.0,
) -> Trained:
    """Train all ranks, each in a thread of its own, on the batches in turn."""
    transports = Threads.of(len(made), timeout_s=timeout_s)
    ranks = [
        Rank(program, device, threads=threads, transport=transport, poison=True)
        for program, transport in zip(made, transports, strict=True)
    ]

    def run(rank: Rank) -> list[float]:
        try:
            rank.start(SEED)
            losses = []
            for n in range(steps):
                held = rank.program.layout
                rank.feed({k: x[held[k].slices] for k, x in fed[n % len(fed)].items() if k in held})
                losses.append(rank.step(SEED, n)["loss"])
            return losses
        except BaseException:
            rank.close()
            raise

    with ThreadPoolExecutor(len(ranks)) as pool:
        futures = [pool.submit(run, rank) for rank in ranks]
        errors = [error for error in (future.exception() for future in futures) if error is not None]
    if errors:
        raise next((error for error in errors if not isinstance(error, RunLost)), errors[0])
    losses = [future.result() for future in futures]
    outputs = {name: ranks[0].output(name) for name in made[0].outputs}
    for rank, curve in zip(ranks, losses, strict=True):
        assert np.array_equal(curve, losses[0], equal_nan=True), "ranks do not agree on the loss"
        for name, value in outputs.items():
            assert np.array_equal(rank.output(name), value), f"ranks do not agree on {name}"
    return Trained(np.array(losses[0]), outputs, _whole(made, [rank.state() for rank in ranks]))


def _whole(made: Sequence[Program], states: Sequence[Mapping[str, Array]]) -> dict[str, Array]:
    """Whole arrays; what is on several ranks has the same bits there, and everything is somewhere."""
    known: dict[str, Array] = {}
    found: dict[str, Array] = {}
    for program, state in zip(made, states, strict=True):
        for name, value in state.items():
            at: Block = program.layout[name]
            whole = known.setdefault(name, np.zeros(at.whole, value.dtype))
            there = found.setdefault(name, np.zeros(at.whole, bool))
            assert (~there[at.slices] | (whole[at.slices] == value)).all(), f"copies of {name} differ"
            whole[at.slices], there[at.slices] = value, True
    for name, whole in known.items():
        assert found[name].all(), f"a part of {name} is nowhere"
        assert not np.isnan(whole).any(), f"a part of {name} is NaN"
    return known


def deviation(run: Trained, want: Trained) -> float:
    """The largest relative deviation of losses, and of parameters and state by their largest element (at least 1)."""
    found = [float(np.abs(run.losses / want.losses - 1).max())]
    for name, value in want.state.items():
        found.append(float(np.abs(run.state[name] - value).max(initial=0.0) / max(1.0, np.abs(value).max(initial=0.0))))
    return max(found)
