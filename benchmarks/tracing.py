"""What happens before anything is compiled: the import, and ResNet-50 from a function to a program.

    python benchmarks/tracing.py [--rounds 5]

Each round is a new process, so that nothing is warm but the disk. A program is planned, its kernels are not compiled.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from statistics import median

from common import table, write

BATCH = 32


def once() -> dict[str, float]:
    """Seconds of each part, in this process."""
    clock = time.perf_counter
    marks = [("", clock())]
    import rapydli_flow as rf

    marks.append(("import rapydli_flow", clock()))
    heavy = [name for name in ("cupy", "bokeh", "numba", "distributed") if name in sys.modules]
    assert not heavy, heavy
    from rapydli_flow import nn, optim, zoo
    from rapydli_flow.runtime import tuning
    from rapydli_flow.scheduler import compile_program

    known, resnet50 = tuning.known(tuning.host()), zoo.find("resnet50")
    marks.append(("import numba, dask, distributed", clock()))
    graph = resnet50.trace(BATCH)
    assert graph.parameters == resnet50.parameters, graph.parameters
    marks.append(("trace", clock()))
    step = rf.train_step(graph, loss=nn.cross_entropy, optimizer=optim.sgd(0.1, momentum=0.9))
    marks.append(("train_step", clock()))
    (whole,) = rf.Plan(1, 2).rank_graphs(step)
    marks.append(("passes, 1 rank", clock()))
    compile_program(whole, known)
    marks.append(("arena and program, 1 rank", clock()))
    rf.plan(step, ranks=4, threads=1).rank_graphs(step)
    marks.append(("split and passes, 4 ranks", clock()))
    return {name: now - before for (_, before), (name, now) in pairwise(marks)}


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--once", action="store_true", help="One round in this process, as JSON.")
    arguments = parser.parse_args()
    if arguments.once:
        print(json.dumps(once()))
        return
    command = [sys.executable, str(Path(__file__).resolve()), "--once"]
    rounds = [
        json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        for _ in range(arguments.rounds + 1)
    ][1:]
    rows = [{"what": name, "seconds": median(r[name] for r in rounds)} for name in rounds[0]]
    together = ("trace", "train_step", "passes, 1 rank")
    rows.append({"what": " + ".join(together), "seconds": median(sum(r[n] for n in together) for r in rounds)})
    print(table(rows))
    print(write("tracing", rows, rounds=arguments.rounds, batch=BATCH))


if __name__ == "__main__":
    main()
