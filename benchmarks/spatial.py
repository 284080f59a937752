"""Memory of a rank where two divide one large image, beside one rank that has all of it. Nothing is run.

The network has six convolutions of window 3 on one record of 2048 x 2048 x 3; the step trains it by SGD. Bytes are
those of the arenas of programs: all arrays of a step, and workspaces of kernels.
"""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from networks import RATE
from ours import programs

import rapydli_flow as rf
from cpu_kernels.compile import host
from rapydli_flow import nn, optim
from rapydli_flow.runtime import tuning

RECORD = (2048, 2048, 3)
LAYERS = ((16, 1), (16, 1), (32, 2), (32, 1), (32, 1), (32, 1))  # filters, stride
TARGET = 0.6  # at most, of what one rank has


def network(x: Any) -> Any:
    """Scores of an image, from the means of its last map."""
    for filters, stride in LAYERS:
        x = nn.relu(nn.conv(x, filters, 3, stride=stride, padding=1))
    return nn.dense(nn.global_avg_pool(x), 10)


def measure(_: Namespace) -> list[dict[str, Any]]:
    """A row for the whole, and one for each rank of two."""
    step = rf.train_step(rf.trace(network, rf.Spec((1, *RECORD))), loss=nn.cross_entropy, optimizer=optim.sgd(RATE))
    known = tuning.known(host())
    plans = {"unsplit": rf.Plan(1, 1), "spatial": rf.plan(step, ranks=2, threads=1, strategy="spatial")}
    sizes = {name: [program.arena_bytes for program in programs(step, plan, known)] for name, plan in plans.items()}
    (whole,) = sizes["unsplit"]
    rows: list[dict[str, Any]] = [{"rank": "unsplit", "arena_bytes": whole, "of_unsplit": 1.0}]
    for rank, size in enumerate(sizes["spatial"]):
        rows.append({"rank": f"{rank} of 2", "arena_bytes": size, "of_unsplit": size / whole, "target": TARGET})
    return rows
