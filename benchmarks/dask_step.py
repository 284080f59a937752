"""What one Dask worker adds to a training step, beside the same program with the same threads in process.

At about 100 ms a step (cifar10_quick with a larger batch), where a share of the time counts, and for LeNet, whose steps
are short: there the milliseconds that a step costs more, spread over all steps of a run.
"""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from through_dask import HERE, ONE, check_same, clustered, in_turns, medians, records, sides, step_ms, training_step

import rapydli_flow as rf
from rapydli_flow.zoo import Network, find

ROUNDS, LEAST_STEPS = 5, 20  # runs of each side, and steps of a run
BATCHES = {"cifar10_quick": 512, "lenet": 64}
TARGETS = {"cifar10_quick": {"target_percent": 3.0}, "lenet": {"target_ms": 1.0}}


def measure(given: Namespace) -> list[dict[str, Any]]:
    """A row for the long step and one for the short."""
    threads = rf.settings().threads
    with clustered(1, threads) as client:
        return [row(find(name), sides(client, threads), given.seconds) for name in BATCHES]


def row(case: Network, runs: Any, seconds: float) -> dict[str, Any]:
    """Milliseconds a step both ways, and what Dask adds to them."""
    step = training_step(case, BATCHES[case.name])
    with records(case) as data:
        check_same(step, data, runs)
        once = step_ms(step, data, 20, runs[HERE])
        steps = max(LEAST_STEPS, int(seconds * 1e3 / (2 * ROUNDS * once)))
        found = medians(in_turns(step, data, steps, ROUNDS, runs))
    more = found[ONE] - found[HERE]
    return {
        "network": case.name,
        "batch": BATCHES[case.name],
        "steps": steps,
        "here_ms": found[HERE],
        "dask_ms": found[ONE],
        "more_ms": more,
        "more_percent": 100 * more / found[HERE],
        **TARGETS[case.name],
    }
