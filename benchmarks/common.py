"""What benchmarks share: interleaved timing, results as tables and JSON with versions and hardware."""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"


def interleaved(
    runs: Mapping[str, Callable[[], Any]], *, rounds: int, turn: int = 1, warm: int = 3
) -> dict[str, list[float]]:
    """Seconds of a call of each run, in each of its turns of ``turn`` calls, so that all see the same machine.

    The first call of a turn, in which the threads of the run before may still spin, is not timed if there
    are several.
    """
    for run in runs.values():
        for _ in range(warm):
            run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            if turn > 1:
                run()
            begin = time.perf_counter()
            for _ in range(turn):
                run()
            times[name].append((time.perf_counter() - begin) / turn)
    return times


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


def write(name: str, rows: list[dict[str, Any]], **more: Any) -> Path:
    """Results as ``benchmarks/results/<name>.json``."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"hardware": hardware(), **more, "rows": rows}, indent=1) + "\n")
    return path


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as aligned text."""
    head = list(rows[0])
    cells = [head, *([_text(row[k]) for k in head] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(head))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in cells)


def _text(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def ms(times: list[float]) -> float:
    """The median in milliseconds."""
    return median(times) * 1e3
