"""Training through a link of 1 Gbit/s: gradients summed after the backward pass, behind it, and behind it in bfloat16.

Two workers with one thread each, in two network namespaces of this host that stand for two hosts, as in links.py. Runs
of a few steps take turns; a row has the median of their milliseconds a step. Losses are compared: the same bits behind
the backward pass and after it. GoogLeNet sums nothing but gradients; ResNet-18's batch norms sum within the backward
pass, too. Needs the rights to make namespaces (root).
"""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from typing import Any

import links
from distributed import Client
from through_dask import medians, records, training_step

import rapydli_flow as rf
from rapydli_flow.zoo import find

NETWORKS, BATCH, STEPS = ("googlenet", "resnet18"), 16, 8
AFTER, BEHIND = "after", "behind"
WAYS: dict[str, dict[str, Any]] = {
    AFTER: {"overlap": False},
    BEHIND: {"overlap": True},
    "behind, bfloat16": {"overlap": True, "wire": "bfloat16"},
}


def measure(given: Namespace) -> list[dict[str, Any]]:
    """A row for each network and way."""
    with links.link(1) as names, links.workers(names):
        found = links.inside(names[0], __file__, max(3, int(given.seconds / 8)))
    return [
        {"network": network, "batch": BATCH, "gradients": way, "step_ms": ms, "of_after": ms / times[AFTER]}
        for network, times in found.items()
        for way, ms in times.items()
    ]


def drive(rounds: int) -> dict[str, dict[str, float]]:
    """In the first namespace: milliseconds of a step of each network, each way."""
    with Client(links.SCHEDULER, timeout=60) as client:
        return {network: ways(client, network, rounds) for network in NETWORKS}


def ways(client: Client, network: str, rounds: int) -> dict[str, float]:
    """Milliseconds of a step, each way."""
    case = find(network)
    step = training_step(case, BATCH)
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    with records(case, count=8 * BATCH) as data:
        plans = {way: rf.plan(step, client, threads=1, **how) for way, how in WAYS.items()}
        losses = {}
        for _ in range(1 + rounds):
            for way, plan in plans.items():
                run = rf.fit(step, data, steps=STEPS, plan=plan, client=client, transport="comm")
                warm = run.segments[1:]
                times[way].append(sum(s.time_s for s in warm) / sum(s.steps for s in warm) * 1e3)
                losses[way] = run.scalars["loss"]
    if losses[AFTER] != losses[BEHIND]:
        raise ValueError(f"{network}: gradients that are summed behind the backward pass have other sums")
    return medians({way: each[1:] for way, each in times.items()})


if __name__ == "__main__":
    print(json.dumps(drive(int(sys.argv[1]))))
