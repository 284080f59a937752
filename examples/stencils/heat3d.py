"""Heat in a cube, a step at a time: each point moves towards the mean of its six neighbours; the faces are held.

    v[i, j, k] = (1 - 6 r) u[i, j, k] + r (sum of the six neighbours),    r = dt / dx^2 <= 1/6

`r` is an operand without axes: a number in the body, so that another step size needs no other kernel. A task is a block
of `planes` by `rows`; the third axis is never cut, for it is what vectors run along. Two arrays take turns: `out=`
writes into one that is there, for new memory would cost more than the step.

Run: `python examples/stencils/heat3d.py`
"""

import time

import numpy as np

import rapydli_flow as rf

ONE, SIX = np.float32(1), np.float32(6)


def reference(u, r):
    """The same on whole arrays."""
    v = u.copy()
    c = slice(1, -1)
    around = u[:-2, c, c] + u[2:, c, c] + u[c, :-2, c] + u[c, 2:, c] + u[c, c, :-2] + u[c, c, 2:]
    v[c, c, c] = (ONE - SIX * r) * u[c, c, c] + r * around
    return v


@rf.stencil(
    reference=reference,
    out=lambda u, r: u,
    space={"planes": (4, 1, 2, 8, 16), "rows": (16, 8, 32, 128)},
    rules={"a block is not larger than the cube": lambda u, planes, rows: planes <= u.shape[0] and rows <= u.shape[1]},
    tasks=lambda u, planes, rows: -(-u.shape[0] // planes) * -(-u.shape[1] // rows),
)
def heat(task, u, r, v, *, planes, rows):
    """One block of lines: those on a face stay, the inner points of the others move."""
    D, H, W = u.shape
    across = (H + rows - 1) // rows
    top, left = task // across * planes, task % across * rows
    keep = ONE - SIX * r
    for i in range(top, min(top + planes, D)):
        for j in range(left, min(left + rows, H)):
            if i == 0 or i == D - 1 or j == 0 or j == H - 1:
                for k in range(W):
                    v[i, j, k] = u[i, j, k]
            else:
                v[i, j, 0], v[i, j, W - 1] = u[i, j, 0], u[i, j, W - 1]
                for k in range(1, W - 1):
                    around = u[i - 1, j, k] + u[i + 1, j, k] + u[i, j - 1, k] + u[i, j + 1, k]
                    v[i, j, k] = keep * u[i, j, k] + r * (around + u[i, j, k - 1] + u[i, j, k + 1])


def steps(u, count, r):
    """So many steps; two arrays take turns."""
    u, v = u.copy(), np.empty_like(u)
    for _ in range(count):
        heat(u, r, out=v)
        u, v = v, u
    return u


def main(size=128, budget_s=8.0, count=50, r=0.15):
    """A hot corner, before and after tuning."""
    u = np.zeros((size, size, size), np.float32)
    u[: size // 2, : size // 2, : size // 2] = 1.0
    np.testing.assert_allclose(heat(u, r), reference(u, np.float32(r)), rtol=1e-5)
    print(f"a step of {size}^3 points agrees with its reference")
    report = heat.tune(u, r, budget_s=budget_s)
    (found,) = report.found
    best, default = found.best, found.default
    print(
        f"default {default.time_s * 1e3:.3f} ms, tuned {best.time_s * 1e3:.3f} ms: {default.time_s / best.time_s:.2f}x"
    )
    steps(u, 1, r)  # loads the kernel
    begin = time.perf_counter()
    end = steps(u, count, r)
    took_s = (time.perf_counter() - begin) / count
    print(f"with {heat.config(u, r)}: {took_s * 1e3:.3f} ms a step, {2 * u.nbytes / took_s / 1e9:.1f} GB/s")
    print(f"after {count} steps the middle is at {end[size // 2, size // 2, size // 2]:.3f}")
    return report


if __name__ == "__main__":
    main()
