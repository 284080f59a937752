"""What the tests of the runtime train: a small network with every kind of trouble, and its records.

Also a program, for the tests that kill it: ``python small_runs.py DATA RUN_DIR STEPS WORKERS [--resume]``.
"""

import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

import rapydli_flow as rf
from rapydli_flow import nn, optim
from rapydli_flow.runtime.events import Stepped

BATCH, CLASSES = 8, 5  # 8 over 3 ranks: 3, 3 and 2 records
SNAPSHOT_EVERY = 15


def network(x):
    """A convolution with batch norm, pooling, dropout and a dense layer.

    No bias before batch norm: its gradient is zero, so that all of it would be rounding.
    """
    x = nn.relu(nn.batch_norm(nn.conv(x, 4, 3, padding=1, bias=False)))
    x = nn.dropout(nn.max_pool(x, 2), 0.25)
    return nn.dense(x, CLASSES)


def make_step(rate=0.05, net=network, dtype="float64", label="label"):
    """Its training step; ``rate`` may be a schedule."""
    graph = rf.trace(net, rf.Spec((BATCH, 6, 6, 2), dtype))
    optimizer = optim.sgd(rate, momentum=0.9)
    metrics = {"accuracy": nn.accuracy}
    return rf.train_step(graph, loss=nn.cross_entropy, optimizer=optimizer, metrics=metrics, label=label)


def records(count=61, seed=0, dtype="float64"):
    """Random records and labels; 61 leave 5 over in an epoch of 7 steps."""
    rng = np.random.default_rng(seed)
    return {"x": rng.normal(size=(count, 6, 6, 2)).astype(dtype), "label": rng.integers(0, CLASSES, count)}


def many(step, ranks):
    """A plan with one thread a rank, the same wherever it is carried out."""
    return rf.plan(step, ranks=ranks, threads=1)


class Once(rf.Callback):
    """Does something to the run when it has passed a step."""

    def __init__(self, step, action):
        self.step, self.action, self.at = step, action, None

    def on_event(self, event):
        if self.at is None and isinstance(event, Stepped) and event.first > self.step:
            self.at = time.monotonic()
            self.action()


def in_threads(function, ranks):
    """What a function gives for each rank, all at once."""
    with ThreadPoolExecutor(len(ranks)) as pool:
        return list(pool.map(function, ranks))


def same_bits(one, other):
    """Have two states the same names, and every array the same bytes?"""
    return one.keys() == other.keys() and all(one[k].tobytes() == other[k].tobytes() for k in one)


def deviation(one, other):
    """The largest difference of two states, relative to the largest element of each array."""
    assert one.keys() == other.keys()
    return max(float(np.abs(one[k] - other[k]).max() / np.abs(one[k]).max()) for k in one)


def train(data, run_dir, steps, workers, *, resume=False, pause_s=0.0):
    """A run with snapshots, slow enough to be killed in the middle."""

    class Slow(rf.Callback):
        def on_event(self, event):
            if isinstance(event, Stepped):
                time.sleep(pause_s)

    step = make_step()
    options = {"run_dir": run_dir, "steps": steps, "snapshot_every": SNAPSHOT_EVERY, "resume": resume, "seed": 3}
    options |= {"callbacks": [Slow()], "validation": data["test"]}
    if workers == 0:
        return rf.fit(step, data["train"], plan=many(step, 1), **options)
    from distributed import Client, LocalCluster

    with (
        LocalCluster(n_workers=workers, threads_per_worker=1, dashboard_address=":0") as cluster,
        Client(cluster) as client,
    ):
        pids = client.run(os.getpid).values()
        (Path(run_dir).parent / "workers").write_text(" ".join(map(str, pids)))
        return rf.fit(step, data["train"], client=client, **options)


if __name__ == "__main__":
    train(rf.load(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), pause_s=0.05)
