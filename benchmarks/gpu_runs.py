"""Does all that runs on a GPU compute what the processor computes? Small runs of every kind, one after the other.

    python benchmarks/gpu_runs.py [--device emulated]

Training by segments, by tasks of one kernel, on two ranks of one card, on a card and a processor; halves; a snapshot
that a run goes on from, also on the other device; validation, prediction, gradients, timing; and what is said when a
card's memory is too small. Each is compared with the processor, or with itself where bits must be the same.
``--device emulated`` goes through it without a GPU. Exit code 0: all right; 1: something is not; 2: no GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from common import RESULTS, table, write

import rapydli_flow as rf
from rapydli_flow import nn, optim
from rapydli_flow.errors import MissingDependency, TooLittleMemory
from rapydli_flow.runtime.devices import device_of
from rapydli_flow.spec import Array

STEPS, BATCH, RECORDS = 6, 16, 100
ROUNDING = 1e-4  # float32, of the largest element; sums are taken in another order
HALVES = {"bfloat16": 0.05, "float16": 0.02}  # of losses


def network(x: Any, width: int) -> Any:
    x = nn.relu(nn.batch_norm(nn.conv(x, width, 3, padding=1, bias=False)))
    x = nn.dropout(nn.max_pool(nn.relu(nn.conv(x, 2 * width, 3, padding=1)), 2), 0.25)
    return nn.dense(nn.relu(nn.dense(x, 4 * width)), 10)


class Runs:
    """The runs, with what they are compared with."""

    def __init__(self, device: str, size: int, width: int) -> None:
        self.device = device
        graph = rf.trace(lambda x: network(x, width), rf.Spec((BATCH, size, size, 4)))
        self.step = self.training(graph)
        self.halves = {name: self.training(graph, precision=name) for name in HALVES}
        rng = np.random.default_rng(0)
        label = rng.integers(0, 10, RECORDS)
        x = rng.normal(0.2 * label[:, None, None, None], 1.0, (RECORDS, size, size, 4)).astype(np.float32)
        self.data = {"x": x, "label": label}
        self.feeds = {name: array[:BATCH] for name, array in self.data.items()}
        self.cpu = self.fit(device="cpu")
        self.card = self.fit(device=device)

    @staticmethod
    def training(graph: Any, **how: Any) -> Any:
        how |= {"metrics": {"accuracy": nn.accuracy}}
        return rf.train_step(graph, loss=nn.cross_entropy, optimizer=optim.sgd(0.05, momentum=0.9), **how)

    def fit(self, step: Any = None, **how: Any) -> Any:
        return rf.fit(step or self.step, self.data, **{"steps": STEPS, "validation": self.feeds} | how)

    def plan(self, *devices: str, **how: Any) -> Any:
        return rf.plan(self.step, device=list(devices), threads=1, **how)

    def all(self) -> Iterator[tuple[str, Callable[[], bool]]]:
        card, cpu = self.device, self.cpu
        yield "segments", lambda: near(self.card, cpu)
        yield "again, the same bits", lambda: same(self.fit(device=card), self.card)
        for granularity in ("stage", "op"):
            yield f"tasks ({granularity}), the same bits", lambda g=granularity: same(self.tasks(g), self.card)
        yield "a graph as a Dask collection", self.compiled
        two = self.plan(card, card)
        yield "two ranks on one card", lambda: near(self.fit(plan=two), cpu)
        for how in ({"shard": "state"}, {"shard": "parameters"}, {"strategy": "pipeline", "stages": 2}):
            words = ", ".join(f"{k}={v}" for k, v in how.items())
            both = self.plan(card, "cpu", **how | ({"micro_batches": 1} if "stages" in how else {}))
            yield f"a card and a processor, {words}", lambda plan=both: near(self.fit(plan=plan), cpu)
        yield "gradients of the card, updates of the host", self.behind
        for name, step in self.halves.items():
            yield f"precision {name}", lambda s=step, n=name: self.half(s, HALVES[n])
        yield "resumed, the same bits", lambda: equal(self.resumed(card, card).state, self.card.state)
        yield "begun on the processor, resumed on the card", lambda: alike(self.resumed("cpu", card).state, cpu.state)
        yield "begun on the card, resumed on the processor", lambda: alike(self.resumed(card, "cpu").state, cpu.state)
        yield "prediction", self.predicted
        yield "gradients", self.gradients
        yield "timing", lambda: rf.time(self.step, device=card, iterations=3) is not None
        yield "kernels on arrays of the card", self.on_arrays
        if self.device == "cuda" and importlib.util.find_spec("torch"):
            yield "kernels on PyTorch's tensors", on_tensors
        yield "too little memory is said before anything is reserved", self.too_little

    def tasks(self, granularity: str) -> Any:
        return self.fit(device=self.device, granularity=granularity)

    def behind(self) -> bool:
        """An asynchronous plan that waits in each step; norms are those of each rank's own records."""
        here, there = (self.plan("cpu", other, staleness=0) for other in ("cpu", self.device))
        return near(self.fit(plan=there), self.fit(plan=here))

    def compiled(self) -> bool:
        here, there = (rf.compile(self.step, self.feeds, device=name).compute() for name in ("cpu", self.device))
        return alike(there, here)

    def half(self, step: Any, tolerance: float) -> bool:
        losses = self.fit(step, device=self.device).scalars["loss"]
        return bool(np.allclose(losses, self.cpu.scalars["loss"], rtol=tolerance))

    def resumed(self, first: str, then: str) -> Any:
        with tempfile.TemporaryDirectory() as folder:
            how = {"run_dir": Path(folder) / "run", "snapshot_every": 2}
            self.fit(device=first, **how, steps=STEPS - 2)
            return self.fit(device=then, **how, resume=True)

    def predicted(self) -> bool:
        asked = (rf.predict(self.cpu.graph, self.cpu.state, self.data["x"], device=d) for d in ("cpu", self.device))
        here, there = (lazy.compute(scheduler="sync") for lazy in asked)
        return close(there, here)

    def gradients(self) -> bool:
        here, there = (
            rf.gradients(self.step, self.feeds, state=self.cpu.state, device=name) for name in ("cpu", self.device)
        )
        return alike(there, here)

    def on_arrays(self) -> bool:
        rng = np.random.default_rng(1)
        x, w = (rng.normal(size=size).astype(np.float32) for size in ((4, 9, 9, 16), (3, 3, 16, 32)))
        how = {"padding": 1, "stride": 2}
        y = rf.kernels.conv(x, w, **how)
        there = [rf.kernels.to_device(array, self.device) for array in (x, w, y)]
        pairs = [
            (rf.kernels.conv(*there[:2], **how), y),
            (
                rf.kernels.conv_input_grad(*there[:0:-1], x.shape, **how),
                rf.kernels.conv_input_grad(y, w, x.shape, **how),
            ),
            (
                rf.kernels.conv_filter_grad(*there[::2], w.shape, **how),
                rf.kernels.conv_filter_grad(x, y, w.shape, **how),
            ),
        ]
        return all(close(np.asarray(found), wanted) for found, wanted in pairs)

    def too_little(self) -> bool:
        graph = rf.trace(lambda x: nn.dense(x, 1 << 20), rf.Spec((1, 1 << 20)))  # 4 TiB of weights
        record = {"x": np.zeros((1, 1 << 20), np.float32), "label": np.zeros(1, np.int64)}
        try:
            rf.fit(self.training(graph), record, steps=1, device=self.device)
        except TooLittleMemory:
            return True
        return False


def on_tensors() -> bool:
    """The layer of examples/kernels/torch_layer.py beside PyTorch's own, on a stream of its own as well."""
    from pytorch import torch

    sys.path.append(str(Path(__file__).parents[1] / "examples" / "kernels"))
    import torch_layer as layers

    torch.manual_seed(0)
    torch.backends.cudnn.allow_tf32 = False
    right = True
    for dtype, tolerance in ((torch.float32, ROUNDING), (torch.bfloat16, 0.03), (torch.float16, 0.01)):
        ours, theirs = (layer.to(dtype) for layer in layers.pair(16, 32, 3, padding=1, device="cuda"))
        for stream in (torch.cuda.default_stream(), torch.cuda.Stream()):
            with torch.cuda.stream(stream):
                x, dy = (torch.randn(8, n, 20, 20, device="cuda", dtype=dtype) for n in (16, 32))
                pairs = list(zip(layers.step(ours, x, dy), layers.step(theirs, x, dy), strict=True))
                right &= all(float((a - b).abs().max()) <= tolerance * float(b.abs().max()) for a, b in pairs)
    return right


def close(found: Array, wanted: Array) -> bool:
    scale = max(1e-6, float(np.abs(wanted).max(initial=0.0)))
    return bool(np.abs(np.asarray(found) - wanted).max(initial=0.0) <= ROUNDING * scale)


def alike(found: Mapping[str, Array], wanted: Mapping[str, Array]) -> bool:
    return found.keys() == wanted.keys() and all(close(found[name], value) for name, value in wanted.items())


def equal(found: Mapping[str, Array], wanted: Mapping[str, Array]) -> bool:
    bits = {name: value.tobytes() for name, value in wanted.items()}
    return {name: value.tobytes() for name, value in found.items()} == bits


def near(run: Any, wanted: Any) -> bool:
    """Losses, metrics and state up to rounding."""
    numbers = [(run.scalars["loss"], wanted.scalars["loss"]), (run.metrics["loss"], wanted.metrics["loss"])]
    return all(np.allclose(a, b, rtol=ROUNDING) for a, b in numbers) and alike(run.state, wanted.state)


def same(run: Any, wanted: Any) -> bool:
    """The same bits."""
    return (run.scalars, run.metrics) == (wanted.scalars, wanted.metrics) and equal(run.state, wanted.state)


def tried(name: str, work: Callable[[], bool]) -> dict[str, Any]:
    begin = time.perf_counter()
    try:
        said = "right" if work() else "WRONG"
    except Exception as error:
        traceback.print_exc()
        said = f"{type(error).__name__}: {error}"[:200]
    return {"run": name, "": said, "s": round(time.perf_counter() - begin, 2)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "emulated"), default="cuda")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    try:
        device = device_of(args.device)
    except MissingDependency as problem:
        print(problem)
        return 2
    begin = time.perf_counter()
    runs = Runs(args.device, *((8, 16) if args.device == "cuda" else (4, 2)))
    print(f"{device.name}: two runs to compare with took {time.perf_counter() - begin:.1f} s", flush=True)
    rows = []
    for name, work in runs.all():
        rows.append(tried(name, work))
        print(f"{rows[-1]['run']}: {rows[-1]['']}, {rows[-1]['s']} s", flush=True)
    print(table(rows))
    write("gpu_runs", rows, folder=args.results, device=args.device)
    return 0 if all(row[""] == "right" for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
