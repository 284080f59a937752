"""Predicting one record, and a batch of them, beside PyTorch's, on CPU.

    python benchmarks/inference.py [--networks lenet,resnet18] [--batches 1,32] [--threads 2] [--seconds 30] [--compile]

Ours is the compiled program that predicts, PyTorch's is eval() under inference_mode, in both of its layouts; all have
the same parameters and running statistics, and their scores are compared before anything is timed. The ratio is to
PyTorch's fastest side. Memory is the most that a process has which runs one side only.
"""

from __future__ import annotations

import argparse
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from common import RESULTS, beside_torch, geometric_mean, interleaved, shown, table, write
from memory import peaks
from networks import batches, chosen, options
from ours import Prediction
from pytorch import torch
from theirs import Prediction as TorchPrediction
from theirs import sides, with_state, without_compile

from rapydli_flow.zoo import Network

APART = 1e-3  # how far scores may be apart, in parts of the largest


def timed(case: Network, batch: int, given: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    """Columns with the milliseconds of a batch and how far scores are apart, and the names of the sides."""
    data = batches(case, batch, count=2)
    mine = Prediction(case, batch, given.threads, tune_s=given.tune)
    without = without_compile("predict", case, batch, given)
    made, reason = sides(TorchPrediction, lambda: with_state(case, mine.network, mine.state()), data, without=without)
    runs: dict[str, Any] = {"ours": mine, **made}
    fed = {name: data if name == "ours" else [run.tensors(*each) for each in data] for name, run in runs.items()}
    apart = 0.0
    for i in range(len(data)):
        want, *others = [run(*fed[name][i]) for name, run in runs.items()]
        apart = max(apart, *(float(np.abs(want - other).max() / np.abs(other).max()) for other in others))
    if not apart < APART:
        raise SystemExit(f"{case.name}: scores are apart by {apart:.1e}: not the same work")
    times = interleaved(
        {name: partial(run, *fed[name][0]) for name, run in runs.items()},
        rounds=given.rounds,
        seconds=given.seconds,
    )
    return beside_torch(times) | {"scores_apart": apart, "without_compile": reason}, list(runs)


def measure(case: Network, batch: int, given: argparse.Namespace) -> dict[str, Any]:
    """One row. What is timed is gone before memory is measured: networks are large."""
    row = {"network": case.name, "batch": batch, "threads": given.threads}
    columns, names = timed(case, batch, given)
    return row | columns | peaks("predict", names, case.name, batch=batch, threads=given.threads)


def main() -> None:
    """Measure every network, print a table, write JSON after each row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options(parser, rounds=30)
    parser.add_argument("--batches", default="1,32", help="sizes of a batch, parted by commas")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    rows: list[dict[str, Any]] = []
    for case, batch in product(chosen(given.networks), map(int, given.batches.split(","))):
        rows.append(measure(case, batch, given))
        path = write("inference", rows, folder=Path(given.results or RESULTS))
        print(f"{case.name}, {batch}: {rows[-1]['speedup']:.2f}", flush=True)
    print(table([shown(row) for row in rows]))
    print(f"geometric mean of speedups: {geometric_mean([row['speedup'] for row in rows]):.3f}")
    print(path)


if __name__ == "__main__":
    main()
