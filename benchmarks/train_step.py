"""A whole training step (forward, loss, backward, SGD with momentum) beside PyTorch's, on CPU.

    python benchmarks/train_step.py [--threads 2] [--rounds 60] [--tune 60]

Both sides start from the same parameters and see the same batches; their losses are compared before
anything is timed. PyTorch runs eagerly in both of its layouts; the ratio is to the faster one.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import torch
from common import interleaved, ms, table, write
from networks import CASES, FLATTENED, Case, copy_state, torch_twin

import rapydli_flow as rf
from cpu_kernels.compile import host
from rapydli_flow import nn, optim
from rapydli_flow.runtime import tuning
from rapydli_flow.runtime.rank import Rank
from rapydli_flow.scheduler import compile_program

RATE, MOMENTUM, SEED = 0.001, 0.9, 0


class Ours:
    """One rank of the training step in this process."""

    def __init__(self, case: Case, threads: int, tune_s: float) -> None:
        graph = rf.trace(case.network, rf.Spec((case.batch, *case.record)))
        step = rf.train_step(graph, loss=nn.cross_entropy, optimizer=optim.sgd(RATE, momentum=MOMENTUM))
        plan = rf.Plan(1, threads)
        if tune_s:
            print(rf.autotune(step, budget_s=tune_s, plan=plan))
        known = tuning.known(host())
        (graph,) = plan.rank_graphs(step)
        self.rank = Rank(compile_program(graph, known), known.device, threads=threads)
        self.rank.start(SEED)
        self.count = 0

    def step(self, x: Any, label: Any) -> float:
        self.rank.feed({"x": x, "label": label})
        self.count += 1
        return self.rank.step(SEED, self.count)["loss"]

    def profile(self, x: Any, label: Any) -> dict[str, float]:
        """Milliseconds by op of one step."""
        self.rank.feed({"x": x, "label": label})
        out: dict[str, float] = {}
        for _, title, time_s in self.rank.step_timed(SEED, 0)[1]:
            out[title] = out.get(title, 0.0) + time_s * 1e3
        return out


class Theirs:
    """The same step in PyTorch."""

    def __init__(self, case: Case, state: dict[str, Any], layout: Any) -> None:
        self.net = torch_twin(case.name)
        copy_state(state, self.net, FLATTENED[case.name])
        self.net = self.net.to(memory_format=layout)
        self.layout = layout
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=RATE, momentum=MOMENTUM)
        self.loss = torch.nn.CrossEntropyLoss()

    def tensors(self, x: Any, label: Any) -> tuple[Any, Any]:
        x = torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))
        return x.contiguous(memory_format=self.layout), torch.from_numpy(label)

    def step(self, x: Any, label: Any) -> float:
        self.optimizer.zero_grad()
        loss = self.loss(self.net(x), label)
        loss.backward()
        self.optimizer.step()
        return float(loss.detach())


def measure(case: Case, threads: int, rounds: int, tune_s: float) -> dict[str, Any]:
    """One row: milliseconds a step of both sides, and how far their losses are apart over 20 steps."""
    rng = np.random.default_rng(0)
    batches = [
        (rng.standard_normal((case.batch, *case.record), dtype=np.float32), rng.integers(0, 10, case.batch))
        for _ in range(4)
    ]
    ours = Ours(case, threads, tune_s)
    state = ours.rank.state()
    sides = {
        "nchw": Theirs(case, state, torch.contiguous_format),
        "channels_last": Theirs(case, state, torch.channels_last),
    }
    fed = {name: [side.tensors(*b) for b in batches] for name, side in sides.items()}
    apart = 0.0
    for i in range(20):
        mine = ours.step(*batches[i % 4])
        other = [side.step(*fed[name][i % 4]) for name, side in sides.items()]
        apart = max(apart, *(abs(mine / value - 1) for value in other))
    if not apart < 1e-3:
        raise SystemExit(f"{case.name}: losses are apart by {apart:.1e}: not the same work")
    counts = dict.fromkeys(["ours", *sides], 0)

    def turn(name: str) -> Any:
        counts[name] += 1
        i = counts[name] % 4
        return ours.step(*batches[i]) if name == "ours" else sides[name].step(*fed[name][i])

    times = interleaved({name: lambda name=name: turn(name) for name in counts}, rounds=rounds, turn=5)
    best = min(ms(times[name]) for name in sides)
    row = {
        "network": case.name,
        "batch": case.batch,
        "threads": threads,
        "ours_ms": ms(times["ours"]),
        "torch_nchw_ms": ms(times["nchw"]),
        "torch_channels_last_ms": ms(times["channels_last"]),
        "speedup": best / ms(times["ours"]),
        "loss_apart": apart,
    }
    profiles = [ours.profile(*batches[i % 4]) for i in range(9)]
    names = sorted(profiles[0], key=lambda k: -profiles[0][k])
    row["ops_ms"] = {k: round(float(np.median([p[k] for p in profiles])), 3) for k in names}
    return row


def main() -> None:
    """Measure every network, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--tune", type=float, default=0.0, help="seconds of tuning for each network first")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = [measure(case, arguments.threads, arguments.rounds, arguments.tune) for case in CASES]
    print(table([{k: v for k, v in row.items() if k != "ops_ms"} for row in rows]))
    for row in rows:
        print(row["network"], row["ops_ms"])
    print(write("train_step", rows, rate=RATE, momentum=MOMENTUM))


if __name__ == "__main__":
    main()
