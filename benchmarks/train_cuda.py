"""A whole training step (forward, loss, backward, SGD with momentum) beside PyTorch's on one GPU.

    python benchmarks/train_step.py --device cuda [--networks alexnet] [--arithmetic fp32,tf32,bf16] [--compile]

Batches are those of convnet-benchmarks. Arithmetic: ``fp32`` (PyTorch without TF32), ``tf32``, and ``bf16`` (mixed
precision: ours by `precision=`, PyTorch's by autocast; master weights are float32 on both sides). All sides start from
the same parameters; their first losses are compared without dropout before anything is timed. PyTorch runs eagerly in
both of its layouts, and by torch.compile if asked; the ratio is to the fastest eager one. The batch stays on the card;
a turn is many steps, then one look at the loss.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from common import RESULTS, geometric_mean, write
from gpu_asked import NETWORKS, PRECISION, networks, training
from networks import MOMENTUM, RATE, batches, dropout_of, traced
from pytorch import torch
from theirs import LAYOUTS
from torch import nn as torch_nn
from twins import twin

from rapydli_flow.runtime.devices import device_of
from rapydli_flow.runtime.remembered import known
from rapydli_flow.runtime.stale import rank_on
from rapydli_flow.runtime.warm import warm
from rapydli_flow.scheduler import make_plan
from rapydli_flow.zoo import Network

APART = {"fp32": 1e-3, "tf32": 5e-3, "bf16": 5e-2}  # how far first losses may be apart, relatively
SEED, TURN_S, ROUNDS, FIRST = 0, 0.25, 7, 3


class Ours:
    """Our step on a card, its batch resident."""

    def __init__(self, case: Network, batch: Any, arithmetic: str, *, dropout: bool) -> None:
        self.network = traced(case, case.batch, dropout=dropout)
        step = training(self.network, arithmetic)
        device = device_of("cuda")
        (program,) = make_plan(step, 1).programs(step, known(device))
        warmed = warm(program.requests, device)
        print(f"{case.name} {arithmetic}: {warmed}", flush=True)
        for (request, choice), why in warmed.failed:
            print(f"NOT COMPILED {request} {choice}: {why[-300:]}", flush=True)
        self.program, self.count = program, 0
        self.rank = rank_on(program, device)
        self.rank.start(SEED)
        self.rank.feed(dict(zip(("x", "label"), batch, strict=True)))

    def state(self) -> dict[str, Any]:
        return self.rank.state()

    def steps(self, count: int) -> float:
        """So many steps; the last one's loss."""
        for _ in range(count):
            self.count += 1
            self.rank.advance(SEED, self.count)
        return self.rank.taken()[-1]["loss"]

    def profile(self) -> dict[str, float]:
        """Milliseconds of a step by op, the longest first."""
        found: list[dict[str, float]] = []
        for _ in range(5):
            spent: dict[str, float] = {}
            for took in self.rank.step_timed(SEED, 0)[1]:
                spent[took.title] = spent.get(took.title, 0.0) + took.time_s * 1e3
            found.append(spent)
        means = {name: median(one[name] for one in found) for name in found[0]}
        return {name: round(ms, 3) for name, ms in sorted(means.items(), key=lambda pair: -pair[1])}

    def close(self) -> None:
        self.rank.close()


class Theirs:
    """PyTorch's step on the card, its batch resident."""

    def __init__(self, module: Any, batch: Any, layout: str, arithmetic: str, *, compiled: bool = False) -> None:
        how = LAYOUTS[layout]
        self.module = module.cuda().to(memory_format=how).train()
        self.call = torch.compile(self.module, dynamic=False) if compiled else self.module
        self.optimizer = torch.optim.SGD(self.module.parameters(), lr=RATE, momentum=MOMENTUM)
        self.loss = torch_nn.CrossEntropyLoss()
        x, label = batch
        self.x = torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2))).cuda().contiguous(memory_format=how)
        self.label = torch.from_numpy(label).cuda()
        half = arithmetic == "bf16"
        self.context: Callable[[], Any] = partial(torch.autocast, "cuda", torch.bfloat16) if half else nullcontext

    def steps(self, count: int) -> float:
        """So many steps; the last one's loss."""
        for _ in range(count):
            self.optimizer.zero_grad()
            with self.context():
                loss = self.loss(self.call(self.x), self.label)
            loss.backward()
            self.optimizer.step()
        return float(loss.detach())


def sides(case: Network, batch: Any, arithmetic: str, *, dropout: bool, compiled: bool) -> dict[str, Any]:
    """Ours and PyTorch's, from the same parameters."""
    mine = Ours(case, batch, arithmetic, dropout=dropout)
    state, rate = mine.state(), dropout_of(case) if dropout else 0.0
    made: dict[str, Any] = {"ours": mine}
    for layout in LAYOUTS:
        made[layout] = Theirs(twin(case.name, mine.network, state, dropout=rate), batch, layout, arithmetic)
    if compiled:
        module = twin(case.name, mine.network, state, dropout=rate)
        made["compile"] = Theirs(module, batch, "channels_last", arithmetic, compiled=True)
    return made


def interleaved(runs: dict[str, Any]) -> dict[str, float]:
    """Seconds of a step of each side, in turns of many steps."""
    counts, times = {}, {name: [] for name in runs}
    for name, side in runs.items():
        side.steps(3)
        begin = time.perf_counter()
        side.steps(3)
        counts[name] = max(3, int(TURN_S / ((time.perf_counter() - begin) / 3)))
    for _ in range(ROUNDS):
        for name, side in runs.items():
            begin = time.perf_counter()
            side.steps(counts[name])
            times[name].append((time.perf_counter() - begin) / counts[name])
    return {name: median(each) for name, each in times.items()}


def measure(case: Network, arithmetic: str, *, compiled: bool) -> dict[str, Any]:
    """Compare first losses, then time."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = arithmetic == "tf32"
    (batch,) = batches(case, case.batch, count=1)
    proof = sides(case, batch, arithmetic, dropout=False, compiled=False)
    losses = {name: [side.steps(1) for _ in range(FIRST)] for name, side in proof.items()}
    apart = max(abs(a / b - 1) for a, b in zip(losses["ours"], losses["channels_last"], strict=True))
    own = max(abs(a / b - 1) for a, b in zip(losses["nchw"], losses["channels_last"], strict=True))
    if not apart < max(APART[arithmetic], 3 * own):
        raise SystemExit(f"{case.name} {arithmetic}: losses {losses}: not the same work")
    proof["ours"].close()
    del proof
    torch.cuda.empty_cache()
    runs = sides(case, batch, arithmetic, dropout=True, compiled=compiled)
    times = interleaved(runs)
    mine = runs["ours"]
    best = min(times["nchw"], times["channels_last"])
    row = {"network": case.name, "batch": case.batch, "arithmetic": arithmetic}
    row |= {f"{name}_ms": round(t * 1e3, 3) for name, t in times.items()}
    row |= {"ratio": round(best / times["ours"], 3), "losses_apart": apart, "torch_apart": own}
    if compiled:
        row["ratio to compile"] = round(times["compile"] / times["ours"], 3)
    row |= {"arena_mb": round(mine.program.arena_bytes / 1e6), "ops_ms": mine.profile()}
    mine.close()
    return row


def main() -> None:
    """Measure every network in every arithmetic, print, write JSON after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda"])
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--arithmetic", default=",".join(PRECISION))
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--budget-s", type=float, default=500.0, help="networks after this are left out")
    parser.add_argument("--results", type=Path, default=RESULTS)
    given = parser.parse_args()
    until = time.monotonic() + given.budget_s
    torch.backends.cudnn.benchmark = True
    rows: list[dict[str, Any]] = []
    for case in networks(given.networks):
        for arithmetic in given.arithmetic.split(","):
            if time.monotonic() > until:
                print("out of time: the rest is left out")
                break
            try:
                rows.append(measure(case, arithmetic, compiled=given.compile))
            except Exception as error:  # of a network: it is told, the others are measured
                print(f"{case.name} {arithmetic}: {type(error).__name__}: {str(error)[:800]}", flush=True)
                continue
            torch.cuda.empty_cache()
            row = rows[-1]
            print({key: value for key, value in row.items() if key != "ops_ms"}, flush=True)
            print("   ", dict(list(row["ops_ms"].items())[:16]), flush=True)
            gpu = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
            means = {a: _mean(rows, a) for a in PRECISION if any(r["arithmetic"] == a for r in rows)}
            write("train_cuda", rows, folder=given.results, gpu=gpu, geometric_mean=means)
    print({a: _mean(rows, a) for a in PRECISION if any(r["arithmetic"] == a for r in rows)})


def _mean(rows: list[dict[str, Any]], arithmetic: str) -> float:
    return round(geometric_mean([row["ratio"] for row in rows if row["arithmetic"] == arithmetic]), 3)


if __name__ == "__main__":
    main()
