"""Ranks at work together: sums, training steps, links, memory, and what Dask adds.

    python benchmarks/runtime.py [section ...] [--seconds 30] [--networks alexnet]

Sections: allreduce, ddp, links, overlap, spatial, scheduler, dask; without names all, one after the other. Each prints
a table and is merged into benchmarks/results/runtime.json with versions and hardware. Figures are ratios of medians of
turns, both sides warm, on the same threads; results are compared before anything is timed. What a section measures is
said where it stands.
"""

from __future__ import annotations

import argparse
from importlib import import_module
from pathlib import Path

from common import RESULTS, merge, shown, table

SECTIONS = {  # the module of each; imported when wanted: workers and processes that are started import this one, too
    "allreduce": "sums",
    "ddp": "ddp",
    "links": "links",
    "overlap": "overlap",
    "spatial": "spatial",
    "scheduler": "scheduler_load",
    "dask": "dask_step",
}


def main() -> None:
    """Measure the sections that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="section", help=f"{', '.join(SECTIONS)} (default: all)")
    parser.add_argument("--seconds", type=float, default=30.0, help="about how long the turns of a row may take")
    parser.add_argument("--networks", default="", help="networks of ddp, parted by commas (default: all three)")
    parser.add_argument("--results", default="", help="folder of the JSON file (default: benchmarks/results)")
    given = parser.parse_args()
    unknown = sorted(set(given.sections) - set(SECTIONS))
    if unknown:
        parser.error(f"no section {', '.join(unknown)}; there are {', '.join(SECTIONS)}")
    refused = []
    for name in given.sections or SECTIONS:
        print(f"\n{name}: {(import_module(SECTIONS[name]).__doc__ or '').splitlines()[0]}", flush=True)
        try:
            rows = import_module(SECTIONS[name]).measure(given)
        except PermissionError as error:
            refused.append(f"{name}: {error}")
            print(error)
            continue
        print(table([shown(row) for row in rows]))
        print(merge("runtime", name, rows, folder=Path(given.results or RESULTS), seconds=given.seconds), flush=True)
    if refused and given.sections:
        raise SystemExit("\n".join(refused))


if __name__ == "__main__":
    main()
