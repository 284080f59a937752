"""What the form of a stencil costs or gains: Jacobi's method as `rf.stencil`, in plain Numba, on flat arrays by hand.

All on one thread. The stencil is tuned first, and plain Numba gets the same constants; what is written by hand knows
its size, and has neither bands, strips nor axes. Run: ``python benchmarks/stencils.py``.
"""

import sys
from pathlib import Path
from statistics import median

import numba
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples" / "stencils"))
from common import interleaved
from jacobi2d import QUARTER, jacobi, reference

from cpu_kernels.stencil import specialised

OPTIONS = {"fastmath": {"nsz", "contract"}, "error_model": "numpy"}  # as kernels are compiled


def plain(size, config):
    """The body of the stencil under `numba.njit`, which knows its parameters but no shapes."""
    it = jacobi.definition
    body, tasks = numba.njit(**OPTIONS)(specialised(it.body, it.source, config)), -(-size // config["rows"])

    @numba.njit(**OPTIONS)
    def run(u, v):
        for task in range(tasks):
            body(task, u, v)

    return run


def flat(size):
    """Rows of the square one after the other, on arrays without axes; ``size`` is a constant."""

    @numba.njit(**OPTIONS)
    def run(u, v):
        v[:size] = u[:size]
        v[-size:] = u[-size:]
        for i in range(1, size - 1):
            v[i * size], v[i * size + size - 1] = u[i * size], u[i * size + size - 1]
            for j in range(1, size - 1):
                o = i * size + j
                v[o] = QUARTER * (u[o - size] + u[o + size] + u[o - 1] + u[o + 1])

    return run


def main():
    """Medians of a call, and ratios to the stencil."""
    for size in (256, 512, 1024, 2048):
        u = np.random.default_rng(0).random((size, size), dtype=np.float32)
        jacobi.tune(u, threads=1, budget_s=10)
        config = jacobi.config(u)
        v, numba_plain, by_hand = np.empty_like(u), plain(size, config), flat(size)
        runs = {
            "rf.stencil": lambda u=u, v=v: jacobi(u, out=v, threads=1),
            "numba.njit": lambda u=u, v=v, run=numba_plain: run(u, v),
            "flat": lambda u=u, v=v, run=by_hand: run(u.ravel(), v.ravel()),
            "numpy": lambda u=u: reference(u),
        }
        times = {name: median(values) for name, values in interleaved(runs, rounds=50).items()}
        first = times["rf.stencil"]
        cells = [f"{name} {t * 1e6:8.1f} us ({t / first:.2f}x)" for name, t in times.items()]
        print(f"{size:>5}  " + "   ".join(cells), config)


if __name__ == "__main__":
    main()
