"""Jacobi's method on a square: each point becomes the mean of its four neighbours; the border stays.

    v[i, j] = (u[i-1, j] + u[i+1, j] + u[i, j-1] + u[i, j+1]) / 4

Memory is the limit: 8 bytes a point are read and written, 4 operations are done. What can be tuned is how the square
is cut: bands of `rows` rows are tasks, for different threads; inside, strips of `width` columns are walked downwards,
so that a row that was read for the point below it is still in the cache for the point above the next.

Run: `python examples/stencils/jacobi2d.py`
"""

import numpy as np

import rapydli_flow as rf

QUARTER = np.float32(0.25)  # to Numba, a plain 0.25 is float64, and so would be all that it is multiplied with


def reference(u):
    """The same on whole arrays."""
    v = u.copy()
    v[1:-1, 1:-1] = QUARTER * (u[:-2, 1:-1] + u[2:, 1:-1] + u[1:-1, :-2] + u[1:-1, 2:])
    return v


@rf.stencil(
    reference=reference,
    out=lambda u: u,
    space={"rows": (16, 4, 64, 256), "width": (128, 512, 4096)},
    rules={"a strip of the band fits a cache of 1 MiB": lambda rows, width: rows * width * 4 <= 2**20},
    tasks=lambda u, rows: -(-u.shape[0] // rows),
)
def jacobi(task, u, v, *, rows, width):
    """One band: its border, and its inner points strip by strip."""
    H, W = u.shape
    low, high = task * rows, min((task + 1) * rows, H)
    for i in range(low, high):
        v[i, 0], v[i, W - 1] = u[i, 0], u[i, W - 1]
        if i == 0 or i == H - 1:
            for j in range(W):
                v[i, j] = u[i, j]
    for first in range(1, W - 1, width):
        for i in range(max(low, 1), min(high, H - 1)):
            for j in range(first, min(first + width, W - 1)):
                v[i, j] = QUARTER * (u[i - 1, j] + u[i + 1, j] + u[i, j - 1] + u[i, j + 1])


def main(size=2048, budget_s=8.0):
    """Tune it for one square; what was found is used by every later call for this shape, in other processes too."""
    u = np.random.default_rng(0).random((size, size), dtype=np.float32)
    np.testing.assert_allclose(jacobi(u), reference(u), rtol=1e-6)
    print(f"jacobi of {size} x {size} agrees with its reference; {len(jacobi.configs(u))} configs are allowed")
    report = jacobi.tune(u, budget_s=budget_s)
    (found,) = report.found
    best, default = found.best, found.default
    print(
        f"default {default.time_s * 1e3:.3f} ms, tuned {best.time_s * 1e3:.3f} ms: {default.time_s / best.time_s:.2f}x"
    )
    print(f"with {jacobi.config(u)}: {2 * u.nbytes / best.time_s / 1e9:.1f} GB/s")
    return report


if __name__ == "__main__":
    main()
