"""Training through a link of 1 Gbit/s: gradients summed after the backward pass, behind it, and behind it in bfloat16.

Two workers with one thread each, in two network namespaces of this host that stand for two hosts, as in links.py. Runs
of a few steps take turns; a row has the median of their milliseconds a step. Losses are compared: the same bits behind
the backward pass and after it. Needs the rights to make namespaces (root).
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

NETWORK, BATCH, STEPS = "googlenet", 16, 8
AFTER, BEHIND = "after", "behind"
WAYS: dict[str, dict[str, Any]] = {
    AFTER: {"overlap": False},
    BEHIND: {"overlap": True},
    "behind, bfloat16": {"overlap": True, "wire": "bfloat16"},
}


def measure(given: Namespace) -> list[dict[str, Any]]:
    """A row for each way."""
    with links.link(1) as names, links.workers(names):
        found = links.inside(names[0], __file__, max(3, int(given.seconds / 8)))
    return [
        {"network": NETWORK, "batch": BATCH, "gradients": way, "step_ms": ms, "of_after": ms / found[AFTER]}
        for way, ms in found.items()
    ]


def drive(rounds: int) -> dict[str, float]:
    """In the first namespace: milliseconds of a step, each way."""
    case = find(NETWORK)
    step = training_step(case, BATCH)
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    with Client(links.SCHEDULER, timeout=60) as client, records(case, count=8 * BATCH) as data:
        plans = {way: rf.plan(step, client, threads=1, **how) for way, how in WAYS.items()}
        losses = {}
        for _ in range(1 + rounds):
            for way, plan in plans.items():
                run = rf.fit(step, data, steps=STEPS, plan=plan, client=client, transport="comm")
                warm = run.segments[1:]
                times[way].append(sum(s.time_s for s in warm) / sum(s.steps for s in warm) * 1e3)
                losses[way] = run.scalars["loss"]
    if losses[AFTER] != losses[BEHIND]:
        raise ValueError("gradients that are summed behind the backward pass have other sums")
    return medians({way: each[1:] for way, each in times.items()})


if __name__ == "__main__":
    print(json.dumps(drive(int(sys.argv[1]))))
