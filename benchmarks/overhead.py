"""What training through Dask costs over the same program in this process, how long the first step takes, and what a
call of a kernel costs besides the kernel.

    python benchmarks/overhead.py [--steps 200] [--rounds 5]

The network is cifar10_quick; its batch is chosen so that a step takes about 20 ms. One worker with all
threads runs the very program that runs in process; runs of both are taken in turns, warm.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from statistics import median
from typing import Any

import numpy as np
from common import table, write
from through_dask import HERE, clustered, in_turns, medians, records, sides, training_step

import rapydli_flow as rf
from cpu_kernels.compile import host
from rapydli_flow import nn
from rapydli_flow.runtime import tuning
from rapydli_flow.runtime.rank import Rank
from rapydli_flow.scheduler import compile_program

FIRST = """
import time; begin = time.perf_counter()
import numpy as np
import rapydli_flow as rf
from rapydli_flow import nn, optim
from cpu_kernels.compile import host
from rapydli_flow.runtime import tuning
from rapydli_flow.runtime.rank import Rank
from rapydli_flow.scheduler import compile_program
case = rf.zoo.find("lenet")
step = rf.train_step(case.trace(), loss=nn.cross_entropy,
                     optimizer=optim.sgd(0.01, momentum=0.9))
known = tuning.known(host())
(graph,) = rf.Plan(1, 2).rank_graphs(step)
rank = Rank(compile_program(graph, known), known.device, threads=2)
rank.start(0)
rank.feed({"x": np.zeros((case.batch, *case.record), np.float32), "label": np.zeros(case.batch, np.int64)})
rank.step(0, 0)
print(time.perf_counter() - begin)
"""


def step_us(calls: int, threads: int) -> float:
    """Microseconds of a step of so many calls of a kernel that does next to nothing."""

    def network(x: Any) -> Any:
        for _ in range(calls):
            x = nn.transpose(x, (0, 2, 1))
        return x

    known = tuning.known(host())
    (graph,) = rf.Plan(1, threads).rank_graphs(rf.trace(network, x=rf.Spec((4, 8, 8))))
    program = compile_program(graph, known)
    assert len(program.steps) == calls
    rank = Rank(program, known.device, threads=threads)
    rank.start(0)
    rank.feed({"x": np.zeros((4, 8, 8), np.float32)})
    times = []
    for i in range(500):
        begin = time.perf_counter()
        rank.step(0, i)
        times.append(time.perf_counter() - begin)
    return median(times[100:]) * 1e6


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=64)
    arguments = parser.parse_args()
    threads, case = rf.settings().threads, rf.zoo.find("cifar10_quick")
    step = training_step(case, arguments.batch)
    with records(case) as data:
        with clustered(1, threads) as client:
            times = in_turns(step, data, arguments.steps, arguments.rounds, sides(client, threads))
        with clustered(threads, 1) as client:
            many = f"dask, {threads} workers x 1 thread"
            times |= in_turns(step, data, arguments.steps, arguments.rounds, {many: {"client": client}})
    found = medians(times)
    rows = [{"what": name, "ms_a_step": each, "ratio": each / found[HERE]} for name, each in found.items()]
    first = [
        float(subprocess.run([sys.executable, "-c", FIRST], capture_output=True, text=True, check=True).stdout)
        for _ in range(4)
    ]
    rows.append(
        {"what": "first LeNet step from import, warm cache (s)", "ms_a_step": median(first[1:]) * 1e3, "ratio": 0.0}
    )
    few, many = step_us(10, threads), step_us(210, threads)
    call = (many - few) / 200
    calls = {"call_us": round(call, 3), "step_us": round(few - 10 * call, 2)}
    print(table(rows), calls, sep="\n")
    print(write("overhead", rows, steps=arguments.steps, batch=arguments.batch, threads=threads, **calls))


if __name__ == "__main__":
    main()
