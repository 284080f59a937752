"""Memory-bound operators on one GPU beside the rate at which the card copies.

    python benchmarks/memory_cuda.py [--only pool] [--dtypes float32,bfloat16]

A row has the bytes of an op's operands and results over its time, as a share of what a device-to-device copy moves in
the same run. Kernels are the templates' defaults, checked in NumPy against the reference on a few records first by
`gpu_check.py`. Operands are rotated, so that the L2 cache does not serve them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import RESULTS, geometric_mean, write
from gpu_asked import FLOAT32, cases, compile_all, request_of, stored
from gpu_timing import COLD_BYTES, ceilings, medians
from pytorch import torch

from gpu_kernels.compile import Request, cubins
from gpu_kernels.launch import Card
from rapydli_flow.spec import HALVES, Spec


def drawn(spec: Spec) -> Any:
    """Random operands, classes and places small enough for every window and row."""
    kind = getattr(torch, spec.dtype)
    if spec.floating:
        return torch.rand(spec.shape, device="cuda").to(kind)
    return torch.randint(0, 4, spec.shape, device="cuda").to(kind)


def measure(request: Request, card: Card, copy_bytes_s: float) -> tuple[float, float]:
    """Seconds, and the share of the copy rate."""
    size_bytes = sum(spec.size_bytes for spec in (*request.ins, *request.outs))
    count = max(2, min(12, int(COLD_BYTES / size_bytes) + 1))
    kernel, stream = card.load(cubins(request)), torch.cuda.current_stream().cuda_stream
    at = torch.tensor([*[0] * len(request.outs[0].shape), *request.outs[0].shape, 0], device="cuda")
    launches, kept = [], []
    for _ in range(count):
        arrays = [drawn(spec) for spec in request.ins]
        arrays += [torch.empty(s.shape, device="cuda", dtype=getattr(torch, s.dtype)) for s in request.outs]
        arrays += [torch.empty((max(16, s.size_bytes),), device="cuda", dtype=torch.uint8) for s in request.work]
        kept.append(arrays)
        launches.append(kernel.bind([a.data_ptr() for a in arrays], at=at.data_ptr(), stream=stream))
    call: Callable[[int], Any] = lambda i: launches[i % count]()  # noqa: E731
    time_s = medians(torch, {"ours": call}, rounds=9)["ours"]
    return time_s, size_bytes / time_s / copy_bytes_s


def main() -> None:
    """Measure every row, print it, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose names contain this")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--results", type=Path, default=RESULTS)
    given = parser.parse_args()
    card = Card()
    card.use()
    device = card.describe()
    asked: list[tuple[str, str, Request]] = []
    for dtype in given.dtypes.split(","):
        for name, op, ins in cases():
            if given.only not in name or (dtype in HALVES and name.startswith(FLOAT32)):
                continue
            request = request_of((name, op, stored(ins, dtype)), device)
            if request is None:
                print(f"{name} {dtype}: no template")
                continue
            asked.append((name, dtype, request))
    problems = compile_all([request for *_, request in asked])
    peak = ceilings(torch)
    rows: list[dict[str, Any]] = []
    for name, dtype, request in asked:
        if why := problems.get(request.key):
            print(f"{name} {dtype}: {why[:300]}")
            continue
        time_s, share = measure(request, card, peak["copy_bytes_s"])
        row = {"op": name, "dtype": dtype, "us": round(time_s * 1e6, 1), "of copy %": round(100 * share, 1)}
        rows.append(row | {"template": request.template.name, "config": dict(request.config)})
        print(f"{name:30s} {dtype:9s} {row['us']:9.1f} us {row['of copy %']:6.1f} %", dict(request.config), flush=True)
        torch.cuda.empty_cache()
    if rows:
        print(f"geometric mean {geometric_mean([row['of copy %'] for row in rows]):.1f} % of the copy rate")
        print(write("memory_cuda", rows, folder=given.results, gpu={"device": device.name}, peak=peak))


if __name__ == "__main__":
    main()
