"""Products of dense layers beside NumPy's BLAS and PyTorch's, forward and with both gradients.

    .peers/bin/python benchmarks/dense.py [--seconds 2] [--only fc]
    python benchmarks/dense.py --device cuda ...    see dense_cuda.py

float32, random data, the same threads, results compared first. NumPy calls the BLAS that it brings, of which threads
are as many as the machine has cores; PyTorch calls its own. OpenBLAS' threads wait for more work on cores that the next
side needs, for longer than any of its calls here; they are told to sleep at once.
"""

from __future__ import annotations

import argparse
import os
import sys
from functools import partial
from typing import Any

os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")  # read when NumPy is imported; of 4 to 30, a power of 2 cycles

import numpy as np
from common import geometric_mean, interleaved, ms, table, write
from pytorch import torch

from rapydli_flow import kernels

LAYERS = [  # name, batch, inputs, outputs
    ("lenet fc1", 64, 800, 500),
    ("alexnet fc6", 32, 9216, 4096),
    ("alexnet fc7", 32, 4096, 4096),
    ("alexnet fc8", 32, 4096, 1000),
    ("vgg-a fc6", 8, 25088, 4096),
    ("resnet fc", 16, 2048, 1000),
    ("square 1024", 1024, 1024, 1024),
    ("odd", 101, 333, 777),
]


def products(batch: int, inputs: int, outputs: int) -> dict[str, tuple[tuple[int, int], tuple[int, int], bool, bool]]:
    """Shapes of both operands, and which of them are transposed, by direction."""
    x, w, y = (batch, inputs), (inputs, outputs), (batch, outputs)
    return {
        "forward": (x, w, False, False),
        "input": (y, w, False, True),
        "filter": (x, y, True, False),
    }


def measure(a: Any, b: Any, ta: bool, tb: bool, *, seconds: float, threads: int) -> dict[str, Any]:
    """GFLOP/s of all sides."""
    left, right = a.T if ta else a, b.T if tb else b
    made = np.empty((left.shape[0], right.shape[1]), np.float32)
    into = torch.empty(made.shape)
    operands = [torch.from_numpy(one) for one in (a, b)]
    turned = [one.T if turn else one for one, turn in zip(operands, (ta, tb), strict=True)]
    sides = {
        "ours": partial(kernels.matmul, a, b, ta=ta, tb=tb, out=np.empty_like(made), threads=threads),
        "numpy": partial(np.matmul, left, right, out=made),
        "torch": partial(torch.mm, *turned, out=into),
    }
    found = [np.asarray(run()) for run in sides.values()]
    apart = max(float(np.abs(one - found[0]).max() / np.abs(found[0]).max()) for one in found)
    if not apart < 1e-4:
        raise SystemExit(f"results are apart by {apart:.1e} of the largest element.")
    times = interleaved(sides, rounds=40, seconds=seconds)
    rate = {name: 2e-6 * made.size * left.shape[1] / ms(each) for name, each in times.items()}
    ratios = {f"ours / {name}": round(rate["ours"] / rate[name], 3) for name in ("numpy", "torch")}
    return {**{name: round(value, 1) for name, value in rate.items()}, **ratios}


def main() -> None:
    """Measure every layer in every direction, print a table, write JSON."""
    if "cuda" in sys.argv:
        from dense_cuda import main as on_a_gpu

        on_a_gpu()
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="layers whose names contain this")
    parser.add_argument("--seconds", type=float, default=2.0, help="of timing for each row, about")
    given = parser.parse_args()
    threads = len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    rng = np.random.default_rng(0)
    rows = []
    with torch.no_grad():
        for name, *sizes in LAYERS:
            if given.only not in name:
                continue
            for direction, (*shapes, ta, tb) in products(*sizes).items():
                a, b = (rng.standard_normal(shape, np.float32) for shape in shapes)
                row = {"layer": name, "direction": direction}
                rows.append(row | measure(a, b, ta, tb, seconds=given.seconds, threads=threads))
                print(" ".join(map(str, rows[-1].values())), flush=True)
    if not rows:
        raise SystemExit(f"no layer is called {given.only!r}.")
    means = {name: round(geometric_mean([r[f"ours / {name}"] for r in rows]), 3) for name in ("numpy", "torch")}
    print(table(rows), means, sep="\n")
    print(write("dense", rows, threads=threads, means=means))


if __name__ == "__main__":
    main()
