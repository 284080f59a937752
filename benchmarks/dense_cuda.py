"""Matrix products beside cuBLAS', through PyTorch, on one GPU; `dense.py --device cuda` runs this.

Dense layers at batches of training, and squares; forward and both gradients, in ``fp32``, ``tf32`` and ``bf16``, as
`conv_cuda.py` says. Every template's default is timed, whether it would be chosen or not; results are compared with
float64 first.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import RESULTS, geometric_mean, write
from conv_cuda import ARITHMETIC, LIMIT
from gpu_asked import LAYERS, STORED, compile_all, products, requests
from gpu_timing import COLD_BYTES, ceilings, medians
from pytorch import torch

from gpu_kernels.compile import Request, cubins
from gpu_kernels.launch import Card
from rapydli_flow.spec import Spec


def measure(op: Any, ins: tuple[Spec, ...], asked: list[Request], card: Card, arithmetic: str) -> dict[str, Any]:
    """Check, then time, everything that computes a product."""
    dtype, (out,) = ARITHMETIC[arithmetic], op.out_specs(*ins)
    torch.backends.cuda.matmul.allow_tf32 = arithmetic == "tf32"
    count = max(2, min(12, int(COLD_BYTES / sum(s.size_bytes for s in (*ins, out))) + 1))
    sets = [[torch.rand(s.shape, device="cuda").sub_(0.5).to(dtype) for s in ins] for _ in range(count)]
    outs = [torch.empty(out.shape, device="cuda", dtype=dtype) for _ in sets]
    turned = [(a.T if op.ta else a, b.T if op.tb else b) for a, b in sets]
    want = torch.mm(turned[0][0].double(), turned[0][1].double())
    scale, stream = float(want.abs().max()), torch.cuda.current_stream().cuda_stream
    calls: dict[str, Callable[[int], Any]] = {"torch": lambda i: torch.mm(*turned[i % count], out=outs[i % count])}
    errors, kept = {"torch": float((torch.mm(*turned[0]).double() - want).abs().max()) / scale}, []
    for request in asked:
        kernel = card.load(cubins(request))
        work = [torch.full((max(16, s.size_bytes),), 255, device="cuda", dtype=torch.uint8) for s in request.work]
        launches = [
            kernel.bind([*(t.data_ptr() for t in (*operands, result, *work))], stream=stream)
            for operands, result in zip(sets, outs, strict=True)
        ]
        outs[0].fill_(float("nan"))
        launches[0]()
        torch.cuda.synchronize()
        name = request.template.name
        errors[name] = float((outs[0].double() - want).abs().max()) / scale
        kept.append((kernel, launches, work))
        if errors[name] < LIMIT[arithmetic]:
            calls[name] = lambda i, launches=launches: launches[i % len(launches)]()
    times = medians(torch, calls, rounds=9)
    flops = op.flops(*ins)
    rate = {name: round(flops / time_s / 1e12, 1) for name, time_s in times.items()}
    ratio = {f"{name} / torch": round(times["torch"] / times[name], 3) for name in times if name != "torch"}
    return {"tflops": rate, "ratios": ratio, "errors": {name: float(f"{e:.1e}") for name, e in errors.items()}}


def main() -> None:
    """Measure every layer in every direction and arithmetic, print it, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda"])
    parser.add_argument("--only", default="", help="layers whose names contain this")
    parser.add_argument("--arithmetic", default=",".join(ARITHMETIC))
    parser.add_argument("--results", type=Path, default=RESULTS)
    given = parser.parse_args()
    card = Card()
    card.use()
    device = card.describe()
    asked = []
    for arithmetic in given.arithmetic.split(","):
        for name, *sizes in LAYERS:
            for direction, (op, a, b) in products(*sizes).items():
                if given.only in name:
                    specs = tuple(Spec(shape, STORED[arithmetic]) for shape in (a, b))
                    op = replace(op, tf32=arithmetic == "tf32")
                    asked.append(((name, direction, arithmetic), op, specs, requests(op, specs, device)))
    problems = compile_all([request for *_, found in asked for _, request in found])
    peak, rows = ceilings(torch), []
    for (name, direction, arithmetic), op, specs, found in asked:
        ready = [request for _, request in found if request.key not in problems]
        row = {"layer": name, "direction": direction, "arithmetic": arithmetic}
        row["untuned"] = next((request.template.name for request in ready), None)
        rows.append(row | measure(op, specs, ready, card, arithmetic))
        print(*rows[-1].values(), flush=True)
        torch.cuda.empty_cache()
    means = {}
    for arithmetic in ARITHMETIC:
        best = [max(row["ratios"].values()) for row in rows if row["arithmetic"] == arithmetic and row["ratios"]]
        if best:
            means[arithmetic] = round(geometric_mean(best), 3)
    print("best template beside cuBLAS, geometric means:", means)
    print(write("dense_cuda", rows, folder=given.results, gpu={"device": device.name}, peak=peak, means=means))


if __name__ == "__main__":
    main()
