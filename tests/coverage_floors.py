"""Read the coverage of the last test run: each of floors 0 to 5 must have 90 % of its branches and lines."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

FLOORS = {
    "0-1": ("errors.py", "spec.py", "index.py", "config.py", "random.py", "template.py", "space/"),
    "2": ("ops/",),
    "3": ("graph/", "nn/", "optim/"),
    "4": ("tuner/",),
    "5": ("scheduler/", "data/"),
}
LEAST = 90.0


def main() -> int:
    """Print a table; 1 if a floor has too little."""
    report = Path(".coverage.json")
    subprocess.run([sys.executable, "-m", "coverage", "json", "-q", "-o", str(report)], check=True)
    files = json.loads(report.read_text())["files"]
    report.unlink()
    failed = 0
    for floor, parts in FLOORS.items():
        wanted = [f"rapydli_flow/{part}" for part in parts]
        chosen = [v["summary"] for k, v in files.items() if any(k.startswith(w) for w in wanted)]
        seen = sum(s["covered_lines"] + s["covered_branches"] for s in chosen)
        all_ = sum(s["num_statements"] + s["num_branches"] for s in chosen)
        share = 100.0 * seen / all_
        failed += share < LEAST
        print(f"floor {floor:4} {share:6.2f} % of lines and branches{'' if share >= LEAST else '  TOO LITTLE'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
