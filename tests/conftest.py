"""Long tests run only where they are asked for by name: ``pytest -m slow``, ``-m papers``, ``-m exhaustive``.

Nothing is known beforehand: results that ship with the package are of some machines and not of others.

Coverage does not look into the compiler: Numba under a trace function takes twice as long, and none of what it
runs is ours.

Kernels are compiled by the process that tests them: others would not be seen by coverage, and pytest's own processes
use the cores. Tests of children ask for them.
"""

import os
import sys
import tempfile
from typing import Any

import pytest

import cpu_kernels.compile


def pytest_configure(config: pytest.Config) -> None:
    os.environ.setdefault("RAPYDLI_COMPILERS", "1")
    if "RAPYDLI_KNOWN_DIR" not in os.environ:  # else a process of xdist, or the user's own
        nothing = tempfile.TemporaryDirectory(prefix="rapydli-known-")
        os.environ["RAPYDLI_KNOWN_DIR"] = nothing.name
        config.add_cleanup(nothing.cleanup)
    load = cpu_kernels.compile._load

    def untraced(*args: Any) -> Any:
        trace = sys.gettrace()
        sys.settrace(None)
        try:
            return load(*args)
        finally:
            sys.settrace(trace)

    cpu_kernels.compile._load = untraced


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    left_out = [mark for mark in ("exhaustive", "papers", "slow") if mark not in config.getoption("markexpr")]
    dropped = [item for item in items if any(item.get_closest_marker(mark) for mark in left_out)]
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = [item for item in items if item not in dropped]
