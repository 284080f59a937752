"""What benchmarks share: interleaved timing, results as tables and JSON with versions and hardware."""

from __future__ import annotations

import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
LEAST = 3  # rounds that a median needs
SETTLE_S = 0.02  # OpenMP's threads spin for up to 8 ms when they have nothing to do
TURN_S = 0.005


def interleaved(
    runs: Mapping[str, Callable[[], Any]], *, rounds: int, turn_s: float = TURN_S, seconds: float = math.inf
) -> dict[str, list[float]]:
    """Seconds of a call of each run, one value for each of its turns, which they take so that all see the same machine.

    A turn begins with calls that are not timed, one at least, until `SETTLE_S` have passed: threads of another run
    spin for some milliseconds before they sleep, on cores that are needed now. It goes on for about ``turn_s``, one
    call at least. ``seconds`` bounds what all turns take together: there are fewer, but never fewer than `LEAST`.
    """
    once = {}
    for name, run in runs.items():
        run()
        once[name] = _settled(run)
    calls = {name: max(1, int(turn_s / each)) for name, each in once.items()}
    together = sum(max(SETTLE_S, each) + calls[name] * each for name, each in once.items())
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(max(LEAST, int(min(rounds, seconds / together)))):
        for name, run in runs.items():
            _settled(run)
            begin = time.perf_counter()
            for _ in range(calls[name]):
                run()
            times[name].append((time.perf_counter() - begin) / calls[name])
    return times


def _settled(run: Callable[[], Any]) -> float:
    """Calls until nothing of what ran before is left; seconds of the last one."""
    begin = time.perf_counter()
    while True:
        called = time.perf_counter()
        run()
        now = time.perf_counter()
        if now - begin >= SETTLE_S:
            return max(now - called, 1e-9)


def beside_torch(times: Mapping[str, list[float]]) -> dict[str, Any]:
    """Columns of a row: milliseconds of ours and of each side of PyTorch, and how many times as fast as its best.

    ``speedup_range`` is that ratio in the quarters of the rounds: its 25th and 75th percentile over rounds.
    """
    best = min((name for name in times if name != "ours"), key=lambda name: median(times[name]))
    ratios = sorted(theirs / ours for ours, theirs in zip(times["ours"], times[best], strict=True))
    columns = {("ours_ms" if name == "ours" else f"torch_{name}_ms"): ms(each) for name, each in times.items()}
    quarters = [ratios[len(ratios) // 4], ratios[(3 * len(ratios)) // 4]]
    speedup = ms(times[best]) / ms(times["ours"])
    return {**columns, "speedup": speedup, "speedup_range": quarters, "rounds": len(ratios)}


def shown(row: Mapping[str, Any]) -> dict[str, Any]:
    """What of a row goes into a printed table: numbers and words."""
    return {name: value for name, value in row.items() if not isinstance(value, dict | list)}


def environment() -> dict[str, str]:
    """For processes that import from this folder: Dask's unpickle what a benchmark sends them."""
    known = os.environ.get("PYTHONPATH")
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (str(RESULTS.parent), known)))}


def hardware() -> dict[str, Any]:
    """Where and with what this was measured."""
    model = platform.processor()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.split(":", 1)[1].strip()
            break
    packages = ("rapydli-flow", "numpy", "numba", "llvmlite", "dask", "distributed", "scikit-learn", "torch")
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],
        "python": sys.version.split()[0],
        "packages": {name: found for name in packages if (found := _version(name))},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def write(name: str, rows: list[dict[str, Any]], *, folder: Path = RESULTS, **more: Any) -> Path:
    """Results as ``<name>.json`` in a folder, by default ``benchmarks/results``."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps({"hardware": hardware(), **more, "rows": rows}, indent=1) + "\n")
    return path


def merge(name: str, section: str, rows: list[dict[str, Any]], *, folder: Path = RESULTS, **more: Any) -> Path:
    """Results as one section of ``<name>.json``, whose other sections stay as they are."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    known[section] = {"hardware": hardware(), **more, "rows": rows}
    path.write_text(json.dumps(known, indent=1) + "\n")
    return path


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as aligned text."""
    head = list(dict.fromkeys(name for row in rows for name in row))
    cells = [head, *([_text(row.get(k, "")) for k in head] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(head))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in cells)


def _text(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def geometric_mean(values: Sequence[float]) -> float:
    """The mean of ratios."""
    return math.exp(sum(map(math.log, values)) / len(values))


def ms(times: list[float]) -> float:
    """The median in milliseconds."""
    return median(times) * 1e3
