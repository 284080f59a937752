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

import torch
from common import RESULTS, geometric_mean, write
from conv_cuda import compile_all
from gpu_timing import COLD_BYTES, ceilings, medians

from gpu_kernels.compile import Request, cubins
from gpu_kernels.launch import Card
from rapydli_flow import ops
from rapydli_flow.spec import HALVES, Spec
from rapydli_flow.template import Device, Epilogue, templates

FLOAT32 = ("cast", "momentum")  # what is never stored as halves
Case = tuple[str, Any, tuple[Spec, ...]]


def cases() -> list[Case]:
    """What networks of the zoo contain, at their batches."""
    map56, map28, map14 = Spec((64, 56, 56, 256)), Spec((128, 28, 28, 256)), Spec((64, 14, 14, 1024))
    wide, channel = Spec((64, 112, 112, 64)), Spec((256,))
    flat, scalar = Spec((64_000_000,)), Spec(())
    labels, rows = Spec((8192,), "int64"), Spec((8192, 1000))
    window = {"window": (3, 3), "stride": (2, 2), "padding": ((1, 1), (1, 1))}
    pool = ops.MaxPool(**window)
    pooled = pool.out_specs(wide)
    two = {"window": (2, 2), "stride": (2, 2), "padding": ((0, 0), (0, 0))}
    lrn = ops.LocalResponse.samples()[0].op
    found: list[Case] = [
        ("relu", ops.Relu(), (map56,)),
        ("add", ops.Add(), (map56, map56)),
        ("add a channel's bias", ops.Add(), (map56, channel)),
        ("relu gradient", ops.ReluGrad(), (map56, map56)),
        ("normalize", ops.Normalize(eps=1e-5), (map56, *[channel] * 4)),
        ("momentum", ops.Momentum(beta=0.9), (*[flat] * 3, scalar)),
        ("dropout", ops.Dropout(rate=0.5, stream=1), (map28, Spec((), "int64"), Spec((), "int64"))),
        ("cast to bf16", ops.Cast(to="bfloat16"), (flat,)),
        ("cast from uint8", ops.Cast(), (Spec((128, 224, 224, 3), "uint8"),)),
        ("max pool 3x3/2", pool, (wide,)),
        ("max pool gradient", ops.MaxPoolGrad(size=(112, 112), **window), (pooled[0], pooled[1])),
        ("sum pool 2x2", ops.SumPool(**two), (wide,)),
        ("sum over records and pixels", ops.Sum(axes=(0, 1, 2)), (map56,)),
        ("sum of 64 M", ops.Sum(axes=(0,)), (flat,)),
        ("moments", ops.Moments(), (map56, channel)),
        ("moments 14", ops.Moments(), (map14, Spec((1024,)))),
        ("sums of batch norm's gradient", ops.NormalizeSums(eps=1e-5), (map56, map56, channel, channel)),
        ("softmax", ops.Softmax(), (rows,)),
        ("cross entropy", ops.CrossEntropy(), (rows, labels)),
        ("cross entropy gradient", ops.CrossEntropyGrad(), (Spec((8192,)), rows, labels)),
        ("layer norm", ops.Standardize.samples()[0].op, (Spec((8192, 1024)),)),
        ("local response", lrn, (Spec((128, 27, 27, 192)),)),
        ("concatenate", ops.Concatenate(axis=3), tuple(Spec((128, 28, 28, c)) for c in (64, 128, 32, 32))),
        ("transpose", ops.Transpose(order=(0, 2, 1)), (Spec((64, 1024, 1024)),)),
    ]
    return [case for case in found if _possible(case)]


def _possible(case: Case) -> bool:
    try:
        case[1].out_specs(*case[2])
    except Exception as error:  # a case that is written wrongly is told, the others are measured
        print(f"{case[0]}: {error}")
        return False
    return True


def stored(specs: tuple[Spec, ...], dtype: str) -> tuple[Spec, ...]:
    return tuple(Spec(s.shape, dtype) if s.dtype == "float32" and s.shape else s for s in specs)


def request_of(case: Case, card: Device) -> Request | None:
    """The cheapest default of the templates that fit."""
    _, op, ins = case
    outs = op.out_specs(*ins)
    found: list[tuple[float, Request]] = []
    for template in templates(op.family, "cuda"):
        config = template.default(op, ins, outs, card)
        if config is not None:
            cost = template.cost(op, ins, outs, card, config) if template.cost else float("inf")
            found.append((cost, Request(template, op, ins, outs, Epilogue.none(outs[0]), config, card.target)))
    return min(found, key=lambda pair: pair[0])[1] if found else None


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
