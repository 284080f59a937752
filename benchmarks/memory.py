"""The most memory that one side takes: a process of its own, which runs nothing but that side a few times.

    python benchmarks/memory.py train|predict ours|nchw|channels_last|compile NETWORK BATCH THREADS

prints one line of JSON: ``peak_mb``, the most that the process ever had in memory, and ``before_mb``, what it had when
its packages were imported, before the network was made.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil

TIMES = 3


def in_memory(field: str) -> float:
    """VmRSS (now) or VmHWM (the most) of this process in MB, of 10^6 bytes.

    Not `resource`'s ru_maxrss: a child's begins with what its parent had.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024 / 1e6
    raise SystemExit(f"/proc/self/status has no {field}")


def peak(
    what: str, side: str, network: str, *, batch: int, threads: int, limit_s: float | None = None
) -> dict[str, Any]:
    """What a process of its own measures; an ``error`` instead where it does not get through, or not in time."""
    command = [sys.executable, str(Path(__file__).resolve()), what, side, network, str(batch), str(threads)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            said, wrong = process.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired:
            for one in (*psutil.Process(process.pid).children(recursive=True), process):  # its compilers too
                one.kill()
            return {"error": f"not through in {limit_s:g} s"}
    if process.returncode:
        return {"error": (wrong.strip().splitlines() or [f"exit code {process.returncode}"])[-1]}
    found: dict[str, Any] = json.loads(said.splitlines()[-1])
    return found


def peaks(what: str, sides: list[str], network: str, *, batch: int, threads: int) -> dict[str, Any]:
    """``ours_mb`` and so on for a row of results, and all that was measured as ``memory``."""
    found = {side: peak(what, side, network, batch=batch, threads=threads) for side in sides}
    short = {f"{side if side == 'ours' else f'torch_{side}'}_mb": one.get("peak_mb") for side, one in found.items()}
    return {**short, "memory": found}


def main(what: str, side: str, network: str, batch: str, threads: str) -> None:
    """Run one side; each imports its own packages only."""
    from networks import batches, find

    case = find(network)
    data = batches(case, int(batch), count=1)[0]
    if side == "ours":
        import ours

        before = in_memory("VmRSS")
        one = (ours.Step if what == "train" else ours.Prediction)(case, int(batch), int(threads))
    else:
        import theirs
        from pytorch import torch

        torch.set_num_threads(int(threads))
        before = in_memory("VmRSS")
        one = (theirs.Step if what == "train" else theirs.Prediction)(theirs.alone(case), side)
        data = one.tensors(*data)
    for _ in range(TIMES):
        one(*data)
    print(json.dumps({"peak_mb": round(in_memory("VmHWM"), 1), "before_mb": round(before, 1)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
