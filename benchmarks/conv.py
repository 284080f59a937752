"""Convolutions beside PyTorch's on CPU: forward, input gradient, filter gradient.

    python benchmarks/conv.py [--shapes FILE.json] [--only PART] [--directions forward,input,filter] [--threads 2]
                              [--tune SECONDS] [--scaling] [--name conv]
    python benchmarks/conv.py --device cuda ...    see conv_cuda.py

A shape is ``[name, N, C, [spatial], K, [window], [stride], [padding], groups, dilation]``, with 1 to 3 spatial axes.
PyTorch runs in both of its layouts, the ratio is to the faster one. GFLOP/s are effective: operations of the
direct convolution, whatever the algorithm. Results are compared with float64 at places drawn by chance, before anything
is timed; errors are relative to the largest element. ``exact`` leaves Winograd's algorithm out.

Somebody else may have a core of a shared machine for seconds. So the table is gone through several times, and a row has
the median of its speeds and of its ratios.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import geometric_mean, median
from typing import Any

import numpy as np
from common import interleaved, ms, table, write
from conv_shape import DIRECTIONS, SHAPES, Shape
from pytorch import torch

from cpu_kernels.compile import host
from cpu_kernels.driver import CallList, address_of
from rapydli_flow.ops import Op
from rapydli_flow.runtime.peak import in_registers, measured_peak
from rapydli_flow.runtime.rank import at_array, kernel_of, memory_of
from rapydli_flow.runtime.tuning import known, tune_one
from rapydli_flow.runtime.warm import warm
from rapydli_flow.spec import Array, Block, Spec
from rapydli_flow.template import Epilogue
from rapydli_flow.tuner import Choice, Request

PASSES = 3  # over the table
PLACES = 64  # where results are compared with float64


def array(spec: Spec) -> Array:
    """Memory as a rank has it."""
    return memory_of(spec.size_bytes).view(spec.dtype).reshape(spec.shape)


def request_of(op: Op, ins: tuple[Spec, ...], out: Spec) -> Request:
    return Request(op, ins, Epilogue.none(out), op.name, op)


def compile_all(shapes: list[Shape], directions: list[str]) -> None:
    """Compile what will be measured, on all cores."""
    tuning = known(host())
    pairs = []
    for shape in shapes:
        for direction in directions:
            op, ins, out = shape.op(direction)
            for each in (op, replace(op, exact=True)):
                request = request_of(each, ins, out)
                pairs.append((request, tuning.choose(request)))
    print(warm(pairs, host()), flush=True)


class Ours:
    """One of our kernels on the table's operands."""

    def __init__(self, op: Op, operands: list[Array], out: Array, *, threads: int, tune_s: float) -> None:
        ins = tuple(Spec(a.shape, a.dtype.name) for a in operands)
        request = request_of(op, ins, Spec(out.shape))
        if tune_s:
            tune_one(request, threads, budget_s=tune_s)
        tuning = known(host())
        self.threads, self.out = threads, out
        self.choice: Choice = tuning.choose(request)
        work = [array(spec) for spec in tuning.workspace(request, self.choice)]
        at = at_array(Block.all(out.shape))
        self.kept = (*operands, out, *work, at)
        self.calls = CallList([(kernel_of(request, self.choice, host()), [address_of(a) for a in self.kept])])

    def __call__(self) -> Array:
        self.calls.run(threads=self.threads)
        return self.out


def theirs(shape: Shape, direction: str, x: Array, w: Array, y: Array) -> dict[str, Callable[[], Any]]:
    """PyTorch's call in each layout."""
    axes = len(shape.size)
    first = lambda a: np.moveaxis(a, -1, 1)  # noqa: E731
    tensors = [torch.from_numpy(v) for v in (first(x), np.moveaxis(w, (-1, -2), (0, 1)), first(y))]
    layouts = {"nchw": torch.contiguous_format}
    if axes > 1:
        layouts["channels_last"] = torch.channels_last if axes == 2 else torch.channels_last_3d
    forward = getattr(torch.nn.functional, f"conv{axes}d")
    stride, padding, dilation = list(shape.stride), list(shape.padding), [shape.dilation] * axes
    geometry = (stride, padding, dilation, False, [0] * axes, shape.groups)

    def call(a: Any, b: Any, c: Any) -> Any:
        if direction == "forward":
            return forward(a, b, None, stride, padding, dilation, shape.groups)
        wanted = [direction == "input", direction == "filter", False]
        return torch.ops.aten.convolution_backward(c, a, b, None, *geometry, wanted)[wanted.index(True)]

    return {
        name: partial(call, *(t.contiguous(memory_format=layout) for t in tensors)) for name, layout in layouts.items()
    }


def ours_from(result: Any, direction: str) -> Array:
    """PyTorch's result in our layout."""
    given = result.numpy()
    return np.moveaxis(given, (0, 1), (-1, -2)) if direction == "filter" else np.moveaxis(given, 1, -1)


def error_of(shape: Shape, direction: str, x: Array, w: Array, y: Array, out: Array) -> float:
    """Largest error at places drawn by chance, against float64, relative to the largest element there."""
    rng, op = np.random.default_rng(1), shape.conv
    c_each, k_each = shape.channels // shape.groups, shape.filters // shape.groups
    padded = np.pad(x, [(0, 0), *((p, p + s + shape.dilation * r) for p, s, r in _room(shape)), (0, 0)])
    wanted, got = [], []
    for _ in range(PLACES):
        place = tuple(int(rng.integers(0, extent)) for extent in out.shape)
        if direction == "forward":
            n, *o, k = place
            g = k // k_each
            where = tuple(slice(i * s, i * s + r * shape.dilation, shape.dilation) for i, s, r in _taps(shape, o))
            patch = padded[(n, *where, slice(g * c_each, (g + 1) * c_each))]
            value = (patch.astype(np.float64) * w[..., k]).sum()
        elif direction == "filter":
            *t, c, k = place
            g = k // k_each
            where = tuple(
                slice(i * shape.dilation, i * shape.dilation + (e - 1) * s + 1, s)
                for i, e, s in zip(t, y.shape[1:-1], shape.stride, strict=True)
            )
            value = (padded[(slice(None), *where, g * c_each + c)].astype(np.float64) * y[..., k]).sum()
        else:
            n, *i, c = place
            g, value = c // c_each, 0.0
            for t in np.ndindex(*shape.window):
                at = [p + q - r * shape.dilation for p, q, r in zip(i, shape.padding, t, strict=True)]
                if all(a % s == 0 and 0 <= a // s < e for a, s, e in zip(at, op.stride, y.shape[1:-1], strict=True)):
                    o = tuple(a // s for a, s in zip(at, op.stride, strict=True))
                    ks = slice(g * k_each, (g + 1) * k_each)
                    value += float((y[(n, *o, ks)].astype(np.float64) * w[(*t, c % c_each, ks)]).sum())
        wanted.append(value)
        got.append(out[place])
    return float(np.abs(np.subtract(got, wanted)).max() / np.abs(wanted).max())


def _room(shape: Shape) -> Iterator[tuple[int, int, int]]:
    return zip(shape.padding, shape.stride, shape.window, strict=True)


def _taps(shape: Shape, o: list[int]) -> Iterator[tuple[int, int, int]]:
    return zip(o, shape.stride, shape.window, strict=True)


def measure(
    shape: Shape, direction: str, *, threads: int, tune_s: float, seconds: float, check: bool
) -> dict[str, Any]:
    """A row of the table, from one pass over it. ``check``: compare results before anything is timed."""
    rng = np.random.default_rng(0)
    arrays = [array(spec) for spec in shape.specs]
    for a in arrays:
        a[...] = rng.standard_normal(a.shape, dtype=np.float32)
    x, w, y = arrays
    op, ins, out = shape.op(direction)
    operands = {"forward": [x, w], "input": [y, w], "filter": [x, y]}[direction]
    sides: dict[str, Callable[[], Any]] = dict(theirs(shape, direction, x, w, y))
    ours = Ours(op, operands, array(out), threads=threads, tune_s=tune_s)
    exact = Ours(replace(op, exact=True), operands, array(out), threads=threads, tune_s=tune_s)
    twice = exact.choice == ours.choice
    sides |= {"ours": ours} if twice else {"ours": ours, "exact": exact}
    errors: dict[str, float] = {}
    if check:
        results = {name: ours_from(side(), direction) for name, side in sides.items() if name not in ("ours", "exact")}
        results |= {"ours": ours(), "exact": exact()}
        errors = {name: error_of(shape, direction, x, w, y, value) for name, value in results.items()}
        largest = max(float(np.abs(v).max()) for v in results.values())
        apart = max(float(np.abs(v - results["ours"]).max()) for v in results.values()) / largest
        if not apart < 1e-4:
            raise SystemExit(f"{shape.name}, {direction}: results are apart by {apart:.1e} of the largest element.")
    times = interleaved(sides, rounds=40, seconds=seconds)
    flops = op.flops(*ins)
    rate = {name: flops / ms(value) / 1e6 for name, value in times.items()}
    best = max(rate[name] for name in rate if name not in ("ours", "exact"))
    return {
        "shape": shape.name,
        "direction": direction,
        "gflop": round(flops / 1e9, 3),
        "ours": round(rate["ours"], 1),
        "nchw": round(rate["nchw"], 1),
        "channels_last": round(rate.get("channels_last", 0.0), 1),
        "ratio": round(rate["ours"] / best, 3),
        "exact ratio": round(rate.get("exact", rate["ours"]) / best, 3),
        "peak %": 0.0,  # when the peak is known for good
        "error": errors.get("ours"),
        "exact error": errors.get("exact"),
        "torch error": max((e for name, e in errors.items() if name not in ("ours", "exact")), default=None),
        "template": str(ours.choice),
        "exact template": str(exact.choice),
    }


def medians(passes: list[dict[str, Any]]) -> dict[str, Any]:
    """A row of several passes; what is no speed is the first's."""
    speeds = ("ours", "nchw", "channels_last", "ratio", "exact ratio")
    return passes[0] | {name: median(row[name] for row in passes) for name in speeds}


def scaling(shapes: list[Shape], directions: list[str], seconds: float) -> list[dict[str, Any]]:
    """How much faster two threads are than one, and at the same time those of a kernel that does multiply-adds in
    registers only: what the machine gives to two threads."""
    registers, _ = in_registers(host())
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for _ in range(PASSES):
        for shape in shapes:
            arrays = [array(spec) for spec in shape.specs]
            for a in arrays:
                a[...] = np.random.default_rng(0).standard_normal(a.shape, dtype=np.float32)
            x, w, y = arrays
            for direction in directions:
                op, _, out = shape.op(direction)
                operands = {"forward": [x, w], "input": [y, w], "filter": [x, y]}[direction]
                ours = {t: Ours(op, operands, array(out), threads=2, tune_s=0) for t in (1, 2)}
                ours[1].threads = 1
                sides: dict[str, Any] = {f"ours {t}": ours[t] for t in (1, 2)}
                sides |= {f"registers {t}": partial(registers, t) for t in (1, 2)}
                times = interleaved(sides, rounds=40, seconds=seconds / PASSES)
                gains = [ms(times[f"{name} 1"]) / ms(times[f"{name} 2"]) for name in ("ours", "registers")]
                found.setdefault((shape.name, direction), []).append((gains[0], gains[1]))
                print(shape.name, direction, *(f"{gain:.2f}" for gain in gains), flush=True)
    return [
        {
            "shape": name,
            "direction": direction,
            "2 threads / 1": round(median(ours for ours, _ in gains), 3),
            "registers": round(median(registers for _, registers in gains), 3),
        }
        for (name, direction), gains in found.items()
    ]


def summary(rows: list[dict[str, Any]], shapes: dict[str, Shape]) -> dict[str, float]:
    """Geometric means, and the worst row."""

    def winograd(row: dict[str, Any]) -> bool:
        shape = shapes[row["shape"]]
        square = shape.window == (3, 3) and shape.stride == (1, 1) and shape.groups == 1
        return square and min(shape.channels, shape.filters) >= 64

    out = {"geometric mean": geometric_mean(r["ratio"] for r in rows)}
    out["exact"] = geometric_mean(r["exact ratio"] for r in rows)
    for direction in DIRECTIONS:
        if chosen := [r["ratio"] for r in rows if r["direction"] == direction]:
            out[direction] = geometric_mean(chosen)
    if chosen := [r["ratio"] for r in rows if winograd(r)]:
        out["3x3, stride 1, 64 channels or more"] = geometric_mean(chosen)
    out["least"] = min(r["ratio"] for r in rows)
    return {name: round(value, 3) for name, value in out.items()}


def main() -> None:
    """Measure every shape in every direction, print a table, write JSON."""
    if "cuda" in sys.argv:
        from conv_cuda import main as on_a_gpu

        on_a_gpu()
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=SHAPES, help="a JSON file with a list of shapes")
    parser.add_argument("--only", default="", help="shapes whose names contain this")
    parser.add_argument("--directions", default=",".join(DIRECTIONS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tune", type=float, default=0.0, help="seconds of tuning for each kernel that is not known")
    parser.add_argument("--seconds", type=float, default=4.0, help="of timing for each row, about")
    parser.add_argument("--scaling", action="store_true", help="two threads beside one, instead of beside PyTorch")
    parser.add_argument("--name", default=None, help="of the results")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    shapes = [Shape.read(row) for row in json.loads(Path(arguments.shapes).read_text())]
    shapes = [shape for shape in shapes if arguments.only in shape.name]
    if not shapes:
        raise SystemExit(f"no shape of {arguments.shapes} is called {arguments.only!r}.")
    directions = arguments.directions.split(",")
    compile_all(shapes, directions)
    if arguments.scaling:
        rows = scaling(shapes, directions, arguments.seconds)
        mean, registers = (geometric_mean(r[name] for r in rows) for name in ("2 threads / 1", "registers"))
        path = write(arguments.name or "conv_scaling", rows, mean=round(mean, 3), registers=round(registers, 3))
        print(path, f"geometric mean {mean:.2f}, of multiply-adds in registers {registers:.2f}")
        return
    peak = measured_peak(host(), arguments.threads)
    how = {"threads": arguments.threads, "tune_s": arguments.tune, "seconds": arguments.seconds / PASSES}
    passes: dict[tuple[str, str], list[dict[str, Any]]] = {}
    with torch.no_grad():
        for i in range(PASSES):
            for shape in shapes:
                for direction in directions:
                    row = measure(shape, direction, **how, check=i == 0)
                    passes.setdefault((shape.name, direction), []).append(row)
                    print(i + 1, *row.values(), flush=True)
    rows = [medians(found) for found in passes.values()]
    peak = peak.better(measured_peak(host(), arguments.threads))
    for row in rows:
        row["peak %"] = round(100 * row["ours"] * 1e9 / peak.flops_s, 1)
    shown = ("shape", "direction", "ours", "nchw", "channels_last", "ratio", "exact ratio", "peak %", "error")
    print(table([{name: row[name] for name in shown} for row in rows]))
    means = summary(rows, {shape.name: shape for shape in shapes})
    print(means)
    where = {"threads": arguments.threads, "peak_gflops": round(peak.flops_s / 1e9, 1), "summary": means}
    print(write(arguments.name or "conv", rows, **where))


if __name__ == "__main__":
    main()
