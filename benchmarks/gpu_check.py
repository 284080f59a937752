"""What `make gpu-check` runs on a machine with a GPU, without network: are the GPU kernels right, and how fast?

    here:  python benchmarks/gpu_check.py --rehearse --cubins .cubins    compile all, stop at the first device call
    there: python benchmarks/gpu_check.py --cubins .cubins               check, time, sanitise; into $OUT or --out

Checks compare each template's default and a few other configs with float64 references. Timings are CUDA
events, this kernel and PyTorch's (cuBLAS, cuDNN in channels_last and NCHW, TF32 off) in turn, with inputs
rotated so that the L2 cache does not serve them; printed are medians and their ratios. Needs the driver;
numba-cuda or carried cubins; PyTorch for the timings. Exit code 0: all right; 1: wrong numbers; 2: no GPU.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from gpu_cases import Case, to_check, to_time, variants  # noqa: E402

from gpu_kernels.compile import Cubin, Request, cubins, missing  # noqa: E402
from gpu_kernels.launch import Card, DeviceFault  # noqa: E402
from rapydli_flow.config import settings  # noqa: E402
from rapydli_flow.errors import MissingDependency, RapydliError, TemplateError  # noqa: E402
from rapydli_flow.template import Device  # noqa: E402

CARDS = {  # what a rehearsal compiles for
    "sm_90a": Device("cuda", "H100 or H200", target="sm_90a", cores=132, vector_bytes=16),
    "sm_80": Device("cuda", "A100", target="sm_80", cores=108, vector_bytes=16),
}
COLD_BYTES = 300e6  # inputs of a timing together: more than any L2 cache
OTHERS = (  # configs to time beside the default, changes of it
    {"bm": 128, "bn": 128, "bk": 8, "resident": 2},
    {"bm": 128, "bn": 128, "bk": 16, "resident": 1},
    {"bm": 128, "bn": 64, "bk": 16, "resident": 2},
    {"bm": 128, "bn": 64, "bk": 8, "resident": 4},
    {"stages": 1},
    {"order": "rows"},
    {"pad": 0},
)


def versions() -> dict[str, str]:
    out = {"python": platform.python_version()}
    for name in ("numpy", "numba", "numba-cuda", "cuda-core", "torch", "cupy-cuda13x", "cupy-cuda12x"):
        try:
            out[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            out[name] = "not installed"
    return out


class Report:
    """Results as JSON, written after every part, and the lines that were printed."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.found, self.lines = folder, {}, []
        folder.mkdir(parents=True, exist_ok=True)

    def say(self, line: str) -> None:
        print(line, flush=True)
        self.lines.append(line)

    def keep(self, part: str, value: Any) -> None:
        self.found[part] = value
        (self.folder / "gpu_check.json").write_text(json.dumps(self.found, indent=1))
        (self.folder / "gpu_check.txt").write_text("\n".join(self.lines) + "\n")


def check(card: Card, case: Case, request: Request, code: tuple[Cubin, ...]) -> float:
    """Largest error over the largest value, against float64."""
    rng = np.random.default_rng(11)
    draw = [s for s in type(case.op).samples() if s.op == case.op and s.ins == case.ins]
    values = draw[0].draw(rng) if draw else [rng.uniform(-2, 2, s.shape).astype(s.dtype) for s in case.ins]
    extras = [rng.uniform(-2, 2, s.shape).astype(s.dtype) for s in request.epilogue.extras]
    doubled = [v.astype(np.float64) if v.dtype == np.float32 else v for v in values]
    want = case.op.run(*doubled)
    if case.fused:
        want = (np.maximum(want[0] + extras[0], 0),)
    poison = [np.full(s.shape, np.nan if s.floating else -1, s.dtype) for s in case.outs]
    shape = case.outs[0].shape
    at = np.asarray([*[0] * len(shape), *shape] or [0], np.int64)
    work = [np.full(s.shape, np.nan if s.floating else -1, s.dtype) for s in request.work]
    memory = [card.array(v) for v in (*values, *poison, *work, *extras, at)]
    try:
        card.load(code).bind([m.address for m in memory[:-1]], at=memory[-1].address)()
        got = [m.read() for m in memory[len(values) : len(values) + len(poison)]]
    finally:
        for m in memory:
            m.free()
    errors = [
        float(np.abs(y - x).max() / max(1.0, np.abs(x).max())) if np.all(np.isfinite(y)) else float("inf")
        for y, x in zip(got, want, strict=True)
    ]
    return max(errors)


def check_all(card: Card, device: Device, report: Report, *, folder: Path, count: int, until: float) -> bool:
    rows, failed = [], 0
    for case in to_check():
        for request in variants(case, device, count=count):
            if time.monotonic() > until:
                report.say("checks stopped: out of time")
                return failed == 0
            row: dict[str, Any] = {"case": case.name, "config": dict(request.config)}
            try:
                row["error"] = check(card, case, request, cubins(request, folder))
                row["right"] = row["error"] < 2e-5
            except (MissingDependency, TemplateError) as problem:
                row |= {"right": None, "error": str(problem)}
            except DeviceFault as problem:  # the context is lost: nothing after this counts
                report.say(f"FAULT {case.name} {dict(request.config)}: {problem}")
                report.keep("checks", [*rows, row | {"right": False, "error": str(problem)}])
                return False
            rows.append(row)
            if row["right"] is False:
                failed += 1
                report.say(f"WRONG {case.name} {dict(request.config)}: error {row['error']:.2e}")
    compared = [row for row in rows if row["right"] is not None]
    worst = max((row["error"] for row in compared), default=float("nan"))
    report.say(
        f"checks: {len(compared) - failed} of {len(compared)} right, worst error {worst:.1e}, "
        f"{len(rows) - len(compared)} not compiled"
    )
    report.keep("checks", rows)
    return failed == 0 and bool(compared)


def ceilings(torch: Any) -> dict[str, float]:
    """Measured fp32 multiply-add rate and copy rate of this card."""
    a, b = (torch.randn(8192, 8192, device="cuda") for _ in range(2))
    big = torch.randn(2**28, device="cuda")
    other = torch.empty_like(big)
    flops = medians(torch, {"matmul": lambda i: torch.mm(a, b)}, rounds=7)["matmul"]
    copy = medians(torch, {"copy": lambda i: other.copy_(big)}, rounds=7)["copy"]
    return {"fp32_flops_s": 2 * 8192**3 / flops, "copy_bytes_s": 2 * big.numel() * 4 / copy}


def medians(torch: Any, contenders: dict[str, Callable[[int], Any]], *, rounds: int = 15) -> dict[str, float]:
    """Seconds a call, contenders in turn, so that clocks and neighbours trouble all alike."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]

    def once(call: Callable[[int], Any], calls: int, first: int) -> float:
        events[0].record()
        for i in range(calls):
            call(first + i)
        events[1].record()
        events[1].synchronize()
        return float(events[0].elapsed_time(events[1])) / 1e3 / calls

    calls = {}
    for name, call in contenders.items():
        once(call, 3, 0)
        calls[name] = max(1, min(50, int(2e-3 / max(once(call, 3, 3), 1e-6))))
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for i in range(rounds):
        for name, call in contenders.items():
            times[name].append(once(call, calls[name], i * calls[name]))
    return {name: statistics.median(values) for name, values in times.items()}


def rivals(torch: Any, case: Case, sets: list[list[Any]], bias: Any) -> dict[str, Callable[[int], Any]]:
    """PyTorch's ways to compute the same."""
    relu, f = torch.relu_, torch.nn.functional
    n = len(sets)
    if case.family == "pointwise":
        call = {"add": torch.add, "relu": torch.relu}[case.op.name]
        return {"torch": lambda i: call(*sets[i % n])}
    if case.family == "matmul":
        if case.fused:
            return {"torch": lambda i: relu(torch.addmm(bias, *sets[i % n]))}
        return {"torch": lambda i: torch.mm(*sets[i % n])}
    step, pad = case.op.stride, tuple(low for low, _ in case.op.padding)
    tail = relu if case.fused else lambda y: y
    last = torch.channels_last
    there = [(x.permute(0, 3, 1, 2), w.permute(3, 2, 0, 1).contiguous(memory_format=last)) for x, w in sets]
    first = [(x.contiguous(), w.contiguous()) for x, w in there]
    b = bias if case.fused else None
    return {
        "channels_last": lambda i: tail(f.conv2d(*there[i % n], b, step, pad)),
        "nchw": lambda i: tail(f.conv2d(*first[i % n], b, step, pad)),
    }


def exact(torch: Any, case: Case, values: list[Any], bias: Any) -> Any:
    """float64, on the card."""
    doubled = [v.double() for v in values]
    call = rivals(torch, case, [doubled], bias.double())
    out = next(iter(call.values()))(0)
    return out.permute(0, 2, 3, 1) if case.family == "conv" else out


def time_case(torch: Any, card: Card, device: Device, case: Case, *, folder: Path, peak: dict[str, float]) -> Any:
    """Medians of this package's default and other configs, and of PyTorch, for one case."""
    sets_wanted = max(2, min(12, int(COLD_BYTES / case.size_bytes) + 1))
    sets = [[torch.rand(s.shape, device="cuda") - 0.5 for s in case.ins] for _ in range(sets_wanted)]
    outs = [torch.full(case.outs[0].shape, float("nan"), device="cuda") for _ in sets]
    bias = torch.rand(case.outs[0].shape[-1], device="cuda") - 0.5
    stream = torch.cuda.current_stream().cuda_stream
    want = exact(torch, case, sets[0], bias)
    changes = ({}, *(OTHERS if case.family != "pointwise" and not case.fused else ()))
    ours: dict[str, Callable[[int], Any]] = {}
    errors, kept, problems = {}, [], {}
    for change in changes:
        request = case.request(device, **change)
        label = " ".join(f"{k}={v}" for k, v in change.items()) or "default"
        if request is None:
            continue
        try:
            kernel = card.load(cubins(request, folder))
        except (MissingDependency, TemplateError) as problem:
            problems[label] = str(problem)
            continue
        extras = [bias.data_ptr()] if case.fused else []
        launches = [
            kernel.bind([*(x.data_ptr() for x in xs), y.data_ptr(), *extras], stream=stream)
            for xs, y in zip(sets, outs, strict=True)
        ]
        kept.append((kernel, launches))
        outs[0].fill_(float("nan"))
        launches[0]()
        torch.cuda.synchronize()
        errors[label] = float((outs[0].double() - want).abs().max() / want.abs().max().clamp(min=1))
        ours[label] = lambda i, launches=launches: launches[i % len(launches)]()
    found = medians(torch, {**ours, **rivals(torch, case, sets, bias)})
    theirs = {name: t for name, t in found.items() if name not in ours}
    flops = case.op.flops(*case.ins)
    bound = max(flops / peak["fp32_flops_s"], case.size_bytes / peak["copy_bytes_s"])
    return {
        "case": case.name,
        "ours_s": {name: t for name, t in found.items() if name in ours},
        "torch_s": theirs,
        "errors": errors,
        "not_compiled": problems,
        "bound_s": bound,
        "flops": flops,
        "bytes": case.size_bytes,
    }


def tell(row: dict[str, Any], report: Report) -> None:
    ours, best_of_torch = row["ours_s"], min(row["torch_s"].values())
    if "default" not in ours:
        report.say(f"{row['case']:34s} not compiled")
        return
    default = ours["default"]
    best = min(ours, key=ours.get)
    torch_times = " ".join(f"{name} {t * 1e6:8.1f}" for name, t in row["torch_s"].items())
    report.say(
        f"{row['case']:34s} ours {default * 1e6:8.1f} us  {torch_times}  ours/torch {default / best_of_torch:5.2f}  "
        f"best {ours[best] / best_of_torch:5.2f} ({best})  bound {row['bound_s'] * 1e6:7.1f} us  "
        f"error {max(row['errors'].values()):.0e}"
    )


def time_all(card: Card, device: Device, report: Report, *, folder: Path, until: float) -> bool:
    try:
        import torch
    except ImportError:
        report.say("no timings: PyTorch is not installed, and they are ratios to it")
        return True
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = True
    card.use()
    peak = ceilings(torch)
    report.say(f"measured: {peak['fp32_flops_s'] / 1e12:.1f} fp32 TFLOP/s, {peak['copy_bytes_s'] / 1e12:.2f} TB/s copy")
    report.keep("ceilings", peak)
    rows, right = [], True
    for case in to_time():
        if time.monotonic() > until:
            report.say("timings stopped: out of time")
            break
        row = time_case(torch, card, device, case, folder=folder, peak=peak)
        rows.append(row)
        tell(row, report)
        right &= all(error < 1e-4 for error in row["errors"].values())
        report.keep("timings", rows)
        torch.cuda.empty_cache()
    return right


def sanitise(report: Report, *, folder: Path, until: float) -> bool:
    """The checks under compute-sanitizer, default configs only: accesses, then races."""
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if tool is None:
        report.say("no memcheck: compute-sanitizer is not on the PATH")
        return True
    results = {}
    for kind in ("memcheck", "racecheck"):
        left = until - time.monotonic()
        if left < 20:
            report.say(f"{kind} left out: out of time")
            break
        out = report.folder / kind
        command = [tool, "--tool", kind, "--error-exitcode", "9", sys.executable, __file__, "--few", "--only-checks"]
        command += ["--cubins", str(folder), "--out", str(out), "--budget-s", str(int(left))]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=left)
            code, text = done.returncode, done.stdout + done.stderr
        except subprocess.TimeoutExpired as late:
            code, text = -1, str(late)
        results[kind] = {"code": code, "tail": text[-2000:]}
        report.say(f"{kind}: {'clean' if code == 0 else 'out of time' if code == -1 else f'exit code {code}'}")
    report.keep("sanitizer", results)
    return all(result["code"] in (0, -1) for result in results.values())


def rehearse(report: Report, folder: Path, targets: list[str]) -> None:
    """Compile everything that a run needs, and go as far as the first device call."""
    rows = []
    for target in targets:
        device = CARDS[target]
        wanted = [request for case in to_check() for request in variants(case, device, count=2)]
        for case in to_time():
            changes = ({}, *(OTHERS if case.family != "pointwise" and not case.fused else ()))
            wanted += [request for change in changes if (request := case.request(device, **change))]
        began = time.monotonic()
        for request in wanted:
            for made in cubins(request, folder):
                rows.append({"family": request.template.family, "config": dict(request.config), **made.report()})
                if not made.clean:
                    spilled = f"{made.spill_bytes} bytes spilled"
                    report.say(f"not clean: {request.op} {dict(request.config)} {target}: {spilled}")
        report.say(f"{target}: {len(wanted)} kernels ready in {time.monotonic() - began:.0f} s")
    size = sum(path.stat().st_size for path in folder.iterdir())
    report.say(f"{folder}: {size / 1e6:.1f} MB to carry")
    report.keep("compiled", rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or ROOT / "benchmarks/results/gpu"))
    parser.add_argument("--cubins", type=Path, default=None, help="folder of compiled kernels (default: the cache)")
    parser.add_argument("--rehearse", action="store_true", help="stop where a device is needed")
    parser.add_argument("--targets", default="sm_90a", help="what a rehearsal compiles for: sm_90a,sm_80")
    parser.add_argument("--budget-s", type=float, default=440.0)
    parser.add_argument("--only-checks", action="store_true")
    parser.add_argument("--few", action="store_true", help="check default configs only")
    args = parser.parse_args()
    report = Report(args.out)
    report.keep("versions", versions())
    report.say(" ".join(f"{name} {version}" for name, version in report.found["versions"].items()))
    folder = args.cubins or settings().cache_dir / "cubins"
    began = time.monotonic()
    try:
        if args.rehearse:
            rehearse(report, folder, args.targets.split(","))
            report.say("rehearsal done: the first device call comes next")
            return 0
        card = Card()
    except MissingDependency as problem:
        report.say(f"gpu-check stops here: {problem}")
        report.keep("stopped", str(problem))
        return 2
    device = card.describe()
    report.keep("device", {"name": device.name, "target": device.target, "cores": device.cores})
    report.say(f"{device.name}, {device.target}, {device.cores} multiprocessors; compiler: {missing() or 'here'}")
    end = began + args.budget_s
    right = check_all(card, device, report, folder=folder, count=0 if args.few else 2, until=began + args.budget_s / 3)
    if not args.only_checks:
        try:
            right &= time_all(card, device, report, folder=folder, until=began + args.budget_s * 0.7)
        except RapydliError as problem:
            report.say(f"timings stopped: {problem}")
            right = False
        right &= sanitise(report, folder=folder, until=end)
    report.say("gpu-check: " + ("all right" if right else "SOMETHING IS WRONG, see above"))
    report.keep("right", right)
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
