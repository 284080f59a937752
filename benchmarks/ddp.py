"""A training step of two workers with one thread each beside PyTorch's DistributedDataParallel (gloo) in two processes.

Both sides run in the same two processes and take turns: ranks of a plan that divides the records, over shared memory,
as the workers of `rapydli_flow.fit` run them inside a segment, with their batch fed; and DDP in both of PyTorch's
layouts, of which the faster counts. A third side is ours with one rank of two threads, in the first of the processes.
AlexNet has 95 % of its parameters in dense layers: a plan for it is hybrid, and divides those by filters. Its plan that
divides records only is measured, too.

All begin with the same state and see the same batches, half of each on either process. Losses of the first steps are
compared before anything is timed, without dropout; there PyTorch's batch norm is made to see the whole batch, as ours
does. What is timed has PyTorch's own, which sees half a batch and sends nothing.
"""

from __future__ import annotations

from argparse import Namespace
from functools import partial
from statistics import median
from typing import Any

from common import beside_torch
from networks import batches, traced
from ours import SEED, Part, Step, halves, programs, training
from pair import End, on_both, slower
from pytorch import torch
from theirs import LAYOUTS, DistributedStep, with_state
from torch import distributed, nn
from train_step import APART

import rapydli_flow as rf
from cpu_kernels.compile import host
from rapydli_flow.runtime import tuning
from rapydli_flow.runtime.warm import warm
from rapydli_flow.zoo import Network, find

NETWORKS = "alexnet,cifar10_quick,resnet18"
STRATEGIES = {"alexnet": ("hybrid", "data")}  # of the others: data
COMPARED = 10  # steps
TARGETS = {"target": 1.5, "target_of_alone": 0.95}


def measure(given: Namespace) -> list[dict[str, Any]]:
    """A row for each network and strategy."""
    names = (given.networks or NETWORKS).split(",")
    return [row(find(name), kind, given.seconds) for name in names for kind in STRATEGIES.get(name, ("data",))]


def row(case: Network, strategy: str, seconds: float) -> dict[str, Any]:
    """Ours and DDP's milliseconds, how many times as fast ours is, and its share of the speed of one rank alone."""
    ready(case, strategy)
    found = on_both(in_both, case.name, strategy, seconds)
    times = slower([times for _, times in found])
    alone = times.pop("alone")
    shares = sorted(one / two for one, two in zip(alone, times["ours"], strict=True))
    quarters = [shares[len(shares) // 4], shares[3 * len(shares) // 4]]
    return {
        "network": case.name,
        "batch": case.batch,
        "strategy": strategy,
        "loss_apart": max(apart for apart, _ in found),
        **beside_torch(times),
        "alone_ms": median(alone) * 1e3,
        "of_alone": median(alone) / median(times["ours"]),
        "of_alone_range": quarters,
        **TARGETS,
    }


def ready(case: Network, strategy: str) -> None:
    """Compile here what either process needs, so that they do not both do it."""
    known = tuning.known(host())
    needed = []
    for dropout in (True, False):
        network = traced(case, case.batch, dropout=dropout)
        needed += [*halves(network, strategy, known), *programs(training(network), rf.Plan(1, 2), known)]
    print(f"{case.name}: {warm([pair for each in needed for pair in each.requests], known.device)}", flush=True)


def in_both(end: End, name: str, strategy: str, seconds: float) -> tuple[float, dict[str, list[float]]]:
    """How far losses are apart, at most; and this process's times of a step of each side."""
    end.gloo()
    case = find(name)
    apart = Sides(end, case, strategy, dropout=False).apart()
    sides = Sides(end, case, strategy, dropout=True)
    times = end.turns({name: partial(sides.turn, name) for name in sides.steps}, seconds=seconds)
    distributed.destroy_process_group()
    return apart, times


class Sides:
    """Ours, DDP in each layout, and one rank alone, from the same state, each fed with the same batches in turn."""

    def __init__(self, end: End, case: Network, strategy: str, *, dropout: bool) -> None:
        self.end, self.case = end, case
        data = batches(case, case.batch)
        mine = Part(case, case.batch, strategy, end.rank, end.shared, dropout=dropout)
        state, half = rf.init(mine.network, seed=SEED), [(x[mine.rows], label[mine.rows]) for x, label in data]
        self.steps: dict[str, Any] = {"ours": mine, "alone": _elsewhere}
        self._data: dict[str, list[Any]] = {"ours": data, "alone": data}
        if end.rank == 0:
            self.steps["alone"] = Step(case, case.batch, 2, dropout=dropout)
        for layout in LAYOUTS:
            module = with_state(case, mine.network, state, dropout=dropout)
            side = DistributedStep(module if dropout else over_all(module), layout)
            self.steps[layout], self._data[layout] = side, [side.tensors(*each) for each in half]
        self._count = dict.fromkeys(self.steps, 0)

    def turn(self, name: str) -> float:
        """One step of a side on its next batch."""
        self._count[name] += 1
        return self.steps[name](*self._data[name][self._count[name] % len(self._data[name])])

    def apart(self) -> float:
        """How far our losses are from DDP's nearer layout, relatively, at most; SystemExit where it is too much.

        The bound is that of train_step.py: a network that amplifies rounding errors departs from itself, too.
        """
        worst = own = 0.0
        for _ in range(COMPARED):
            mine = [self.turn("ours"), *([self.turn("alone")] if self.end.rank == 0 else [])]
            others = [_mean(self.turn(layout)) for layout in LAYOUTS]
            worst = max(worst, *(min(abs(one / other - 1.0) for other in others) for one in mine))
            own = max(own, max(others) / min(others) - 1.0)
        worst, own = self.end.most(worst), self.end.most(own)
        if not worst < max(APART, 3 * own):
            raise SystemExit(
                f"{self.case.name}: losses are apart by {worst:.1e}, those of DDP's layouts by {own:.1e}: "
                "not the same work"
            )
        return worst


def _elsewhere(*_: Any) -> float:
    """The other process runs this side, and this one waits."""
    return 0.0


def _mean(loss: float) -> float:
    """The loss of the whole batch, from that of each half."""
    total = torch.tensor(loss, dtype=torch.float64)
    distributed.all_reduce(total)
    return float(total) / distributed.get_world_size()


class _Sum(torch.autograd.Function):
    """Sums over all processes, of gradients, too: each process's loss depends on what all of them gave."""

    @staticmethod
    def forward(_: Any, x: Any) -> Any:
        total = x.clone()
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(_: Any, dy: Any) -> Any:
        return _Sum.forward(None, dy)


class _OverAll(nn.BatchNorm2d):
    """Batch norm over the batches of all processes: PyTorch's SyncBatchNorm, which is for GPUs only."""

    def forward(self, x: Any) -> Any:
        moments = torch.stack([x.mean((0, 2, 3)), (x * x).mean((0, 2, 3))])
        mean, square = _Sum.apply(moments) / distributed.get_world_size()
        scale = self.weight * torch.rsqrt(square - mean * mean + self.eps)
        return x * scale[:, None, None] + (self.bias - mean * scale)[:, None, None]


def over_all(module: nn.Module) -> nn.Module:
    """A network whose batch norms see the batches of all processes."""
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.__class__ = _OverAll
    return module
