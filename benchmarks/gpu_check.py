"""What `make gpu-check` runs on a machine with a GPU, without network: are the GPU kernels right, and how fast?

    here:  python benchmarks/gpu_check.py --rehearse      compile what is checked, stop at the first device call
    there: python benchmarks/gpu_check.py                 check, sanitise, time; into $OUT or --out

Parts, in this order (``--parts`` picks): ``devices``: what `rapydli devices` says; ``checks``: each template's
default and other configs against float64 references; ``launch``: what launches cost; ``runs``: small runs of every
kind beside the processor's; ``meetings``: what GPUs tell each other by NCCL, as far as there are several; ``train``,
``conv``, ``memory``, ``dense``: the benchmarks of those names beside PyTorch and a copy; ``tune``: the kernels of a
small network, and what was found, exported; ``sanitizer``: compute-sanitizer's memcheck and racecheck on every
family. Parts share ``--budget-s``. Needs the driver; numba-cuda, or kernels that a rehearsal compiled (``--cache``);
PyTorch for the benchmarks. What else is missing comes from a folder of wheels (``--wheels``), without network.
Exit code 0: all right; 1: wrong numbers; 2: no GPU.
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
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent


def take_wheels() -> None:
    """Install the wheels of a folder for this process and those that it starts."""
    folder, target = Path(sys.argv[sys.argv.index("--wheels") + 1]), tempfile.mkdtemp()
    wheels = [str(path) for path in sorted(folder.glob("*.whl"))]
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--target", target]
    subprocess.run([*command, *wheels], check=True)
    sys.path.insert(0, target)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (target, str(ROOT), os.environ.get("PYTHONPATH"))))


if "--wheels" in sys.argv:
    take_wheels()
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from gpu_asked import asked as asked_of_benchmarks  # noqa: E402
from gpu_cases import Case, to_check  # noqa: E402

from gpu_kernels.compile import Cubin, Request, compiler, cubins, kept, missing  # noqa: E402
from gpu_kernels.launch import Card, DeviceFault  # noqa: E402
from rapydli_flow.config import settings  # noqa: E402
from rapydli_flow.errors import MissingDependency  # noqa: E402
from rapydli_flow.template import Device  # noqa: E402
from rapydli_flow.testing.gpu import is_floating, tolerance, wanted  # noqa: E402

CARDS = {  # what a rehearsal compiles for
    "sm_90a": Device("cuda", "H100 or H200", target="sm_90a", cores=132, vector_bytes=16),
    "sm_80": Device("cuda", "A100", target="sm_80", cores=108, vector_bytes=16),
}
BENCHMARKS = {  # command, and its share of the time
    "train": (
        ["train_step.py", "--device", "cuda", "--networks", "alexnet,resnet50", "--arithmetic", "fp32,bf16"],
        0.2,
    ),
    "conv": (["conv.py", "--device", "cuda", "--untuned", "--arithmetic", "fp32,bf16"], 0.2),
    "memory": (["memory_cuda.py"], 0.08),
    "dense": (["dense.py", "--device", "cuda"], 0.1),
}
LONG_S = 900  # a budget from which on other configs than defaults are checked
CHECKS = {"runs": "gpu_runs.py", "meetings": "meetings_cuda.py"}  # of the runtime, by what checks it
PARTS = ("devices", "checks", "launch", *CHECKS, *BENCHMARKS, "tune", "sanitizer")


def versions() -> dict[str, str]:
    out = {"python": platform.python_version()}
    for name in (
        "numpy",
        "numba",
        "numba-cuda",
        "cuda-core",
        "torch",
        "cupy-cuda13x",
        "cupy-cuda12x",
        "nvidia-nccl-cu13",
        "nvidia-nccl-cu12",
    ):
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


def compile_all(requests: Sequence[Request], folder: Path, report: Report) -> dict[str, str]:
    """Compile in parallel what is not there yet; by key, why something cannot be compiled. MissingDependency where
    nothing is there, nor a compiler."""
    began, problems = time.monotonic(), {}
    absent = missing()
    if absent is None:
        compiler()
    elif not any(kept(request, folder) for request in requests):
        raise MissingDependency(f"none of {len(requests)} kernels is in {folder}, and {absent}")
    _asked[:] = requests  # templates are closures: processes that are forked have them
    with ProcessPoolExecutor(max(1, (os.cpu_count() or 2) - 1), mp_context=get_context("fork")) as pool:
        done = pool.map(_compile, range(len(requests)), [folder] * len(requests), chunksize=4)
        for request, problem in zip(requests, done, strict=True):
            if problem:
                problems[request.key] = problem
    report.say(f"{len(requests)} kernels ready in {time.monotonic() - began:.0f} s, {len(problems)} not")
    return problems


_asked: list[Request] = []


def _compile(number: int, folder: Path) -> str:
    try:
        cubins(_asked[number], folder)
    except Exception as problem:  # of the compiler, whatever its class: the kernel is left out, and told
        return f"{type(problem).__name__}: {problem}"
    return ""


def check(card: Card, case: Case, request: Request, code: tuple[Cubin, ...]) -> float:
    """Largest error over the largest value, against float64; infinite where something is not written, or not exact."""
    rng = np.random.default_rng(11)
    values = case.sample.draw(rng)
    extras = [rng.uniform(-2, 2, s.shape).astype(s.dtype) for s in request.epilogue.extras]
    want = wanted(case.sample.op, values)
    if case.fused:
        want = (np.maximum(want[0] + np.float64(extras[0]) + np.float64(extras[1]), 0),)
    poison = [_poison(s) for s in (*case.outs, *request.work)]
    shape = case.outs[0].shape
    at = np.asarray([*[0] * len(shape), *shape] or [0], np.int64)
    memory = [card.array(v) for v in (*values, *poison, *extras, at)]
    try:
        launch = card.load(code).bind([m.address for m in memory[:-1]], at=memory[-1].address)
        launch()
        got = [m.read() for m in memory[len(values) : len(values) + len(case.outs)]]
    finally:
        for m in memory:
            m.free()
    return max(_error(y, x) for y, x in zip(got, want, strict=True))


def _poison(spec: Any) -> Any:
    return np.full(spec.shape, np.nan if spec.floating else np.iinfo(spec.dtype).max, spec.dtype)


def _error(got: Any, want: Any) -> float:
    if not is_floating(got):
        return 0.0 if np.array_equal(got, want) else float("inf")
    got = got.astype(np.float64)
    if not np.array_equal(np.isfinite(got), np.isfinite(want)):
        return float("inf")
    if not got.size:
        return 0.0
    return float(
        np.abs(np.where(np.isfinite(got), got - want, 0)).max()
        / max(1.0, np.abs(want[np.isfinite(want)]).max(initial=0))
    )


def check_all(
    card: Card, device: Device, report: Report, *, folder: Path, which: tuple[str, str], few: bool, until: float
) -> bool:
    asked = [
        (case, request)
        for case, others in to_check(*which)
        for request in case.requests(device, others=0 if few else others)
    ]
    problems = compile_all([request for _, request in asked], folder, report)
    rows, failed, late = [], 0, 0
    by_template: dict[str, list[float]] = {}
    for case, request in asked:
        row: dict[str, Any] = {"case": case.name, "config": dict(request.config)}
        if time.monotonic() > until:
            late += 1
            continue
        if why := problems.get(request.key):
            report.say(f"NOT COMPILED {case.name} {dict(request.config)}: {why[:300]}")
            rows.append(row | {"right": None, "error": why})
            failed += "sm_90a" in device.target and "refuses" not in why
            continue
        try:
            code = cubins(request, folder)
            row |= {"registers": [c.registers for c in code], "spilled": sum(c.spill_bytes for c in code)}
            row["error"] = check(card, case, request, code)
            row["right"] = row["error"] < 4 * tolerance(case.sample)
        except DeviceFault as problem:  # the context is lost: nothing after this counts
            report.say(f"FAULT {case.name} {dict(request.config)}: {problem}")
            report.keep("checks", [*rows, row | {"right": False, "error": str(problem)}])
            return False
        rows.append(row)
        by_template.setdefault(f"{request.template.family}/{request.template.name}", []).append(row["error"])
        if row["right"] is False:
            failed += 1
            report.say(f"WRONG {case.name} {dict(request.config)}: error {row['error']:.2e}")
    for name, errors in by_template.items():
        report.say(f"  {name:44s} {len(errors):4d} checked, worst error {max(errors):.1e}")
    report.say(f"checks: {failed} of {len(rows)} wrong, {late} left out for want of time")
    report.keep("checks", rows)
    return failed == 0 and bool(rows)


def launch_costs(card: Card, report: Report) -> None:
    """What a launch costs the host, and the card: small kernels one after the other."""
    from rapydli_flow import ops
    from rapydli_flow.ops import Sample
    from rapydli_flow.spec import Spec
    from rapydli_flow.template import templates

    case = Case("relu", templates("pointwise", "cuda")[0], Sample(ops.Relu(), (Spec((1024,)),)))
    (request,) = case.requests(card.describe(), others=0)
    x, y = card.array(np.ones(1024, np.float32)), card.array(np.ones(1024, np.float32))
    go = card.load(cubins(request)).bind([x.address, y.address])
    found: dict[str, float] = {}
    times: dict[str, list[float]] = {"host": [], "end to end": []}
    for _ in range(20):
        card.wait()
        began = time.perf_counter()
        for _ in range(1000):
            go()
        times["host"].append((time.perf_counter() - began) / 1000)
        card.wait()
        times["end to end"].append((time.perf_counter() - began) / 1000)
    found = {name: statistics.median(values) * 1e6 for name, values in times.items()}
    report.say("a launch: " + ", ".join(f"{name} {us:.2f} us" for name, us in found.items()))
    report.keep("launch_us", found)


def benchmark(name: str, report: Report, *, limit_s: float) -> bool:
    """One of the benchmarks, its results in the report's folder."""
    words, _ = BENCHMARKS[name]
    command = [sys.executable, str(ROOT / "benchmarks" / words[0]), *words[1:], "--results", str(report.folder)]
    if name in ("train", "conv"):
        command += ["--budget-s", str(int(0.7 * limit_s))]
    return _run(name, command, report, limit_s)


def tune(report: Report, *, limit_s: float) -> bool:
    """Tune a small network's kernels, and export what is known of this card."""
    rapydli = [sys.executable, "-m", "rapydli_flow"]
    recipe = [str(ROOT / "examples" / "digits.py"), "--device", "cuda", "--budget", str(int(0.6 * limit_s))]
    done = _run("tune", [*rapydli, "tune", *recipe], report, limit_s)
    export = ["tune", "export", str(report.folder / "tuning.jsonl"), "--trials"]
    return _run("export", [*rapydli, *export], report, 60) and done


def _run(name: str, command: list[str], report: Report, limit_s: float) -> bool:
    """Run a command, its output into the report's folder; the end of it is told."""
    path = report.folder / f"{name}.txt"
    with path.open("w") as out:
        try:
            code = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, timeout=limit_s).returncode
        except subprocess.TimeoutExpired:
            code = -1
    lines = path.read_text().splitlines()[-6:]
    said = {0: "done", -1: f"out of time after {limit_s:.0f} s"}.get(code, f"exit code {code}")
    report.say("\n".join([f"{name}: {said}, {path.name}", *(f"    {line[:200]}" for line in lines)]))
    return code in (0, -1)


def sanitise(report: Report, *, folder: Path, which: tuple[str, str], until: float) -> bool:
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
        command = [
            tool,
            "--tool",
            kind,
            "--error-exitcode",
            "9",
            sys.executable,
            __file__,
            "--few",
            "--parts",
            "checks",
        ]
        command += ["--families", which[0], "--templates", which[1]]
        command += ["--cache", str(folder.parent), "--out", str(out), "--budget-s", str(int(left))]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=left)
            code, text = done.returncode, done.stdout + done.stderr
        except subprocess.TimeoutExpired as late:
            code, text = -1, str(late)
        results[kind] = {"code": code, "tail": text[-2000:]}
        report.say(f"{kind}: {'clean' if code == 0 else 'out of time' if code == -1 else f'exit code {code}'}")
    report.keep("sanitizer", results)
    return all(result["code"] in (0, -1) for result in results.values())


def rehearse(report: Report, folder: Path, targets: list[str], which: tuple[str, str], *, benchmarks: bool) -> None:
    """Compile everything that is checked, and go as far as the first device call."""
    for target in targets:
        device = CARDS[target]
        asked = [r for case, others in to_check(*which) for r in case.requests(device, others=others)]
        asked += list({request.key: request for request in asked_of_benchmarks(device)}.values()) if benchmarks else []
        for why in compile_all(asked, folder, report).values():
            report.say(f"NOT COMPILED for {target}: {why[:300]}")
        spilled = {r.key: r for r in asked if any(not c.clean for c in cubins(r, folder))}
        for request in spilled.values():
            report.say(f"not clean for {target}: {request.template.name} {request.op} {dict(request.config)}")
    size = sum(path.stat().st_size for path in folder.iterdir())
    report.say(f"{folder}: {size / 1e6:.1f} MB to carry")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or ROOT / "benchmarks/results/gpu"))
    parser.add_argument("--cache", type=Path, help="where compiled kernels are kept (default: RAPYDLI_CACHE_DIR)")
    parser.add_argument("--benchmarks", action="store_true", help="rehearse the benchmarks' kernels, too: thousands")
    parser.add_argument("--rehearse", action="store_true", help="stop where a device is needed")
    parser.add_argument("--targets", default="sm_90a", help="what a rehearsal compiles for: sm_90a,sm_80")
    parser.add_argument("--budget-s", type=float, default=440.0)
    parser.add_argument("--parts", default=",".join(PARTS), help=f"of {','.join(PARTS)}")
    parser.add_argument("--families", default="", help="of templates to check (default: all)")
    parser.add_argument("--templates", default="", help="names of templates to check (default: all)")
    parser.add_argument("--few", action="store_true", help="check default configs only, as where time is short")
    parser.add_argument("--wheels", help="folder of wheels to install first, without network")
    args = parser.parse_args()
    report = Report(args.out)
    report.keep("versions", versions())
    report.say(" ".join(f"{name} {version}" for name, version in report.found["versions"].items()))
    if args.cache:  # also that of the processes which this one starts
        os.environ["RAPYDLI_CACHE_DIR"] = str(args.cache.resolve())
    folder = (args.cache or settings().cache_dir) / "cubins"
    folder.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + args.budget_s
    parts, which = set(args.parts.split(",")), (args.families, args.templates)
    try:
        if args.rehearse:
            rehearse(report, folder, args.targets.split(","), which, benchmarks=args.benchmarks)
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
    right = True
    if "devices" in parts:
        right &= _run("devices", [sys.executable, "-m", "rapydli_flow", "devices"], report, 0.1 * args.budget_s)
    if "checks" in parts:
        right &= check_all(
            card,
            device,
            report,
            folder=folder,
            which=which,
            few=args.few or args.budget_s < LONG_S,
            until=end - 0.65 * args.budget_s,
        )
    if right and "launch" in parts:
        launch_costs(card, report)
    if missing() is not None and (left := parts & {*CHECKS, "tune"}):
        report.say(f"{', '.join(sorted(left))} left out, as they compile kernels of their own: {missing()}")
        parts -= left
    for name, script in CHECKS.items():
        if name in parts and time.monotonic() < end:
            command = [sys.executable, str(ROOT / "benchmarks" / script), "--results", str(report.folder)]
            right &= _run(name, command, report, 0.1 * args.budget_s)
    for name, (_, share) in BENCHMARKS.items():
        if name in parts and time.monotonic() < end:
            right &= benchmark(name, report, limit_s=min(share * args.budget_s, end - time.monotonic()))
    if "tune" in parts and time.monotonic() < end:
        right &= tune(report, limit_s=min(0.1 * args.budget_s, end - time.monotonic()))
    if "sanitizer" in parts:
        right &= sanitise(report, folder=folder, which=which, until=end)
    report.say("gpu-check: " + ("all right" if right else "SOMETHING IS WRONG, see above"))
    report.keep("right", right)
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
