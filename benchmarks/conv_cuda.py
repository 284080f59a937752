"""Convolutions beside cuDNN's, through PyTorch, on one GPU; `conv.py --device cuda` runs this.

The table of the CPU benchmark with eight times its batch, 128 at most; forward, both gradients, and forward with bias,
residual and ReLU. Arithmetic: ``fp32`` (PyTorch without TF32; ours by fused multiply-adds or by three products of TF32,
as `exact` forbids), ``tf32`` and ``bf16``. Results are compared with float64 before anything is timed; errors are
relative to the largest element. PyTorch runs in both of its layouts with cuDNN's own search on; the ratio is to the
faster one. ``ours`` is what runs untuned, ``best`` the fastest of the templates' defaults. Operands are rotated, so
that the L2 cache does not serve them. ``bound %``: of what the card's measured rates allow, whichever is less.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from common import RESULTS, geometric_mean, write
from conv_shape import DIRECTIONS, SHAPES
from gpu_asked import FUSED, Row, chosen, compile_all
from gpu_timing import COLD_BYTES, ceilings, medians
from pytorch import torch

from gpu_kernels.compile import Request, cubins
from gpu_kernels.launch import Card
from rapydli_flow.errors import TemplateError
from rapydli_flow.template import Device

ARITHMETIC = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16}
LIMIT = {"fp32": 2e-5, "tf32": 5e-3, "bf16": 2e-2}  # of errors


def operands(row: Row, dtype: Any) -> list[Any]:
    """x, w and y as they lie in our memory."""
    return [torch.rand(s.shape, device="cuda", dtype=torch.float32).sub_(0.5).to(dtype) for s in row.shape.specs]


def torch_call(row: Row, x: Any, w: Any, y: Any, extras: Sequence[Any], layout: str) -> Callable[[], Any]:
    """PyTorch's call on copies in a layout, or on views of ours where it is the same."""
    shape, axes = row.shape, len(row.shape.size)
    last = {2: torch.channels_last, 3: torch.channels_last_3d}.get(axes, torch.contiguous_format)
    how = last if layout == "channels_last" else torch.contiguous_format
    first = lambda a: a.movedim(-1, 1).contiguous(memory_format=how)  # noqa: E731
    a, b, c = first(x), w.movedim((-1, -2), (0, 1)).contiguous(memory_format=how), first(y)
    stride, padding, dilation = list(shape.stride), list(shape.padding), [shape.dilation] * axes
    if row.direction in ("forward", FUSED):
        forward = getattr(torch.nn.functional, f"conv{axes}d")
        if row.direction == "forward":
            return lambda: forward(a, b, None, stride, padding, dilation, shape.groups)
        bias, residual = extras[0], first(extras[1])
        return lambda: torch.relu_(forward(a, b, bias, stride, padding, dilation, shape.groups).add_(residual))
    wanted = [row.direction == "input", row.direction == "filter", False]
    geometry = (stride, padding, dilation, False, [0] * axes, shape.groups)
    return lambda: torch.ops.aten.convolution_backward(c, a, b, None, *geometry, wanted)[wanted.index(True)]


def as_ours(row: Row, result: Any) -> Any:
    """PyTorch's result in our layout."""
    return result.movedim((0, 1), (-1, -2)) if row.direction == "filter" else result.movedim(1, -1)


def exact(row: Row, x: Any, w: Any, y: Any, extras: Sequence[Any]) -> Any:
    """In float64: of the first records only, but for filter gradients."""
    few = x.shape[0] if row.direction == "filter" else min(4, x.shape[0])
    wide = [t.double() for t in (x[:few], w, y[:few])]
    more = [extras[0].double(), extras[1][:few].double()] if extras else []
    return as_ours(row, torch_call(row, *wide, more, "channels_last")())


def measure(row: Row, card: Card, requests: Sequence[Request], peak: dict[str, float]) -> dict[str, Any]:
    """Check, then time, everything that computes a row."""
    dtype = ARITHMETIC[row.arithmetic]
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = row.arithmetic == "tf32"
    op, ins, out = row.op()
    size_bytes = sum(spec.size_bytes for spec in (*ins, out))
    count = max(2, min(12, int(COLD_BYTES / size_bytes) + 1))
    sets = [operands(row, dtype) for _ in range(count)]
    extras: list[list[Any]] = [[] for _ in sets]
    if row.fused:
        extras = [[torch.rand(out.shape[-1], device="cuda").sub_(0.5).to(dtype), y.clone()] for _, _, y in sets]
    outs = [torch.empty(out.shape, device="cuda", dtype=dtype) for _ in sets]
    want = exact(row, *sets[0], extras[0])
    scale = float(want.abs().max())
    error = lambda got: float((got[: want.shape[0]].double() - want).abs().max()) / scale  # noqa: E731
    stream = torch.cuda.current_stream().cuda_stream
    calls: dict[str, Callable[[int], Any]] = {}
    errors: dict[str, float] = {}
    kept: list[Any] = []
    for request in requests:
        name = request.template.name
        kernel = card.load(cubins(request))
        work = [torch.full((max(16, s.size_bytes),), 255, device="cuda", dtype=torch.uint8) for s in request.work]
        launches = []
        for (x, w, y), more, result in zip(sets, extras, outs, strict=True):
            given = {"input": (y, w), "filter": (x, y)}.get(row.direction, (x, w))
            addresses = [t.data_ptr() for t in (*given, result, *work, *more)]
            launches.append(kernel.bind(addresses, stream=stream))
        outs[0].fill_(float("nan"))
        launches[0]()
        torch.cuda.synchronize()
        errors[name] = error(outs[0])
        kept.append((kernel, launches, work))
        if errors[name] < LIMIT[row.arithmetic]:
            calls[name] = lambda i, launches=launches: launches[i % len(launches)]()
    for layout in ("channels_last", "nchw"):
        theirs = [torch_call(row, *each, more, layout) for each, more in zip(sets, extras, strict=True)]
        errors[layout] = error(as_ours(row, theirs[0]()))
        calls[layout] = lambda i, theirs=theirs: theirs[i % len(theirs)]()
    times = medians(torch, calls, rounds=9)
    mine = {name: t for name, t in times.items() if name not in ("channels_last", "nchw")}
    best_of_torch = min(times["channels_last"], times["nchw"])
    flops = op.flops(*ins)
    size_bytes += outs[0].nbytes if row.fused else 0  # the residual
    bound = max(flops / peak[f"{row.arithmetic}_flops_s"], size_bytes / peak["copy_bytes_s"])
    untuned = next(iter(mine), None)  # requests are in the order of their costs
    best = min(mine, key=mine.get) if mine else None
    return {
        "shape": row.shape.name,
        "direction": row.direction,
        "arithmetic": row.arithmetic,
        "batch": row.shape.n,
        "gflop": round(flops / 1e9, 2),
        "ours_us": round(mine[untuned] * 1e6, 1) if untuned else None,
        "channels_last_us": round(times["channels_last"] * 1e6, 1),
        "nchw_us": round(times["nchw"] * 1e6, 1),
        "ratio": round(best_of_torch / mine[untuned], 3) if untuned else None,
        "best ratio": round(best_of_torch / mine[best], 3) if best else None,
        "bound %": round(100 * bound / mine[best], 1) if best else None,
        "torch bound %": round(100 * bound / best_of_torch, 1),
        "template": untuned,
        "best": best,
        "errors": {name: float(f"{value:.2e}") for name, value in errors.items()},
        "times_us": {name: round(t * 1e6, 1) for name, t in times.items()},
    }


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Geometric means of ratios by arithmetic and direction."""
    out: dict[str, Any] = {}
    for arithmetic in ARITHMETIC:
        mine = [row for row in rows if row["arithmetic"] == arithmetic and row["ratio"]]
        for direction in (*DIRECTIONS, FUSED, "all"):
            chosen = [
                r for r in mine if direction == r["direction"] or (direction == "all" and r["direction"] != FUSED)
            ]
            if chosen:
                means = [geometric_mean([r[name] for r in chosen]) for name in ("ratio", "best ratio")]
                out[f"{arithmetic} {direction}"] = [round(mean, 3) for mean in means]
    return out


def main() -> None:
    """Measure every row, print it and a summary, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda"])
    parser.add_argument("--shapes", type=Path, default=SHAPES)
    parser.add_argument("--only", default="", help="shapes whose names contain one of these, parted by commas")
    parser.add_argument("--directions", default=",".join((*DIRECTIONS, FUSED)))
    parser.add_argument("--arithmetic", default=",".join(ARITHMETIC))
    parser.add_argument("--templates", default="", help="names of templates, parted by commas (default: all)")
    parser.add_argument("--untuned", action="store_true", help="only the template that runs untuned")
    parser.add_argument("--budget-s", type=float, default=500.0, help="rows after this are left out")
    parser.add_argument("--results", type=Path, default=RESULTS)
    given = parser.parse_args()
    until = time.monotonic() + given.budget_s
    card = Card()
    card.use()
    torch.backends.cudnn.benchmark = True
    device = card.describe()
    rows = chosen(given.only, given.directions.split(","), given.arithmetic.split(","), given.shapes)
    wanted = set(given.templates.split(",")) - {""}
    asked = {row: [r for r in row.requests(device) if not wanted or r.template.name in wanted] for row in rows}
    asked = {row: found[:1] if given.untuned else found for row, found in asked.items()}
    began = time.monotonic()
    problems = compile_all([request for requests in asked.values() for request in requests])
    print(f"{sum(map(len, asked.values()))} kernels ready in {time.monotonic() - began:.0f} s", flush=True)
    for why in set(problems.values()):
        print("NOT COMPILED:", why[:400], flush=True)
    peak = ceilings(torch)
    print({name: f"{rate / 1e12:.1f}e12" for name, rate in peak.items()}, flush=True)
    found: list[dict[str, Any]] = []
    for row, requests in asked.items():
        if time.monotonic() > until:
            print("out of time: the rest is left out")
            break
        try:
            one = measure(row, card, [r for r in requests if r.key not in problems], peak)
        except (TemplateError, torch.cuda.OutOfMemoryError) as problem:
            print(f"{row.shape.name} {row.direction} {row.arithmetic}: {problem}", flush=True)
            continue
        found.append(one)
        names = ("ours_us", "channels_last_us", "nchw_us", "ratio", "best ratio", "bound %", "torch bound %", "best")
        print(
            f"{row.shape.name:20s} {row.direction:7s} {row.arithmetic}",
            *(one[n] for n in names),
            one["errors"],
            flush=True,
        )
        torch.cuda.empty_cache()
        if len(found) % 20 == 0:
            save(found, given.results, device, peak)
    means = summary(found)
    print(json.dumps(means))
    print(save(found, given.results, device, peak))


def save(rows: list[dict[str, Any]], folder: Path, device: Device, peak: dict[str, float]) -> Path:
    where = {
        "device": device.name,
        "target": device.target,
        "cudnn": torch.backends.cudnn.version(),
        "torch": torch.__version__,
    }
    return write("conv_cuda", rows, folder=folder, gpu=where, peak=peak, summary=summary(rows))


if __name__ == "__main__":
    main()
