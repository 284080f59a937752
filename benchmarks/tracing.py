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
from typing import Any

from common import table, write

BATCH = 32
DEPTHS = (3, 4, 6, 3)  # residual blocks of each stage (He et al. 2015, table 1)


def resnet50(x: Any) -> Any:
    """ResNet-50 with the stride in the 3x3 convolution."""
    from rapydli_flow import nn

    def unit(x: Any, filters: int, window: int, stride: int = 1) -> Any:
        return nn.batch_norm(nn.conv(x, filters, window, stride=stride, padding=window // 2, bias=False))

    @nn.block
    def bottleneck(x: Any, filters: int, stride: int) -> Any:
        y = nn.relu(unit(nn.relu(unit(x, filters, 1)), filters, 3, stride))
        y = unit(y, 4 * filters, 1)
        return nn.relu(y + (x if x.shape == y.shape else unit(x, 4 * filters, 1, stride)))

    x = nn.max_pool(nn.relu(unit(x, 64, 7, 2)), 3, stride=2, padding=1)
    for stage, depth in enumerate(DEPTHS):
        for i in range(depth):
            x = bottleneck(x, 64 * 2**stage, 2 if stage and not i else 1)
    return nn.dense(nn.global_avg_pool(x), 1000)


def once() -> dict[str, float]:
    """Seconds of each part, in this process."""
    clock = time.perf_counter
    marks = [("", clock())]
    import rapydli_flow as rf

    marks.append(("import rapydli_flow", clock()))
    heavy = [name for name in ("cupy", "bokeh", "numba", "distributed") if name in sys.modules]
    assert not heavy, heavy
    from rapydli_flow import nn, optim
    from rapydli_flow.runtime import tuning
    from rapydli_flow.scheduler import compile_program

    known = tuning.known(tuning.host())
    marks.append(("import numba, dask, distributed", clock()))
    graph = rf.trace(resnet50, rf.Spec((BATCH, 224, 224, 3)))
    assert graph.parameters == 25_557_032, graph.parameters  # as torchvision counts them
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
