"""A 3x3 convolution without padding, direct, blocked by hand: images N,H,W,C, filters 3,3,C,K.

    y[n, h, j, k] = sum over r, s, c of x[n, h+r, j+s, c] * w[r, s, c, k]

Arithmetic is the limit, if operands come from registers. The innermost loop runs along k, as vectors. Four channels are
added in one go, so that a vector of y is loaded and stored once for four multiply-adds; with `pair`, two neighbouring
columns share the four vectors of w, which on processors with few registers costs more than it saves: tuning finds out.
`columns` of a line stay in the first cache until all channels and taps are added.

The convolution of this package does better: it keeps a tile of y in registers throughout (cpu_kernels/tile.py).

Run: `python examples/stencils/convolution.py`
"""

import numpy as np

import rapydli_flow as rf


def reference(x, w):
    """Nine matrix products."""
    H, W = x.shape[1] - 2, x.shape[2] - 2
    return sum(x[:, r : r + H, s : s + W] @ w[r, s] for r in range(3) for s in range(3))


def one(a, b, c, d, w, q, y):
    """y += four channels of one column, times four rows of w that begin at q."""
    for k in range(y.shape[0]):
        y[k] += a * w[q, k] + b * w[q + 1, k] + c * w[q + 2, k] + d * w[q + 3, k]


def two(a, b, c, d, e, f, g, h, w, q, y, z):
    """The same for two columns."""
    for k in range(y.shape[0]):
        w0, w1, w2, w3 = w[q, k], w[q + 1, k], w[q + 2, k], w[q + 3, k]
        y[k] += a * w0 + b * w1 + c * w2 + d * w3
        z[k] += e * w0 + f * w1 + g * w2 + h * w3


@rf.stencil(
    reference=reference,
    out=lambda x, w: rf.Spec((x.shape[0], x.shape[1] - 2, x.shape[2] - 2, w.shape[3]), x.dtype),
    space={"lines": (4, 1, 16), "columns": (8, 4, 16, 32), "pair": (False, True)},
    rules={"channels come in fours": lambda x: x.shape[3] % 4 == 0, "windows are 3x3": lambda w: w.shape[:2] == (3, 3)},
    tasks=lambda x, lines: -(-x.shape[0] * (x.shape[1] - 2) // lines),
)
def convolution(task, x, w, y, *, lines, columns, pair):
    """Some lines of y, `columns` of each at a time."""
    N, H, W, _ = y.shape
    C = x.shape[3]
    for line in range(task * lines, min((task + 1) * lines, N * H)):
        n, h = line // H, line % H
        for first in range(0, W, columns):
            last = min(first + columns, W)
            y[n, h, first:last] = 0
            for tap in range(9):
                r, s = tap // 3, tap % 3
                for q in range(0, C, 4):
                    j = first
                    while pair and j + 1 < last:
                        p, o = x[n, h + r, j + s], x[n, h + r, j + s + 1]
                        a, b, c, d = p[q], p[q + 1], p[q + 2], p[q + 3]
                        two(a, b, c, d, o[q], o[q + 1], o[q + 2], o[q + 3], w[r, s], q, y[n, h, j], y[n, h, j + 1])
                        j += 2
                    while j < last:
                        p = x[n, h + r, j + s]
                        one(p[q], p[q + 1], p[q + 2], p[q + 3], w[r, s], q, y[n, h, j])
                        j += 1


def main(size=64, budget_s=10.0, channels=32, filters=32):
    """Two images of size x size."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, size, size, channels), dtype=np.float32)
    w = rng.standard_normal((3, 3, channels, filters), dtype=np.float32)
    np.testing.assert_allclose(convolution(x, w), reference(x, w), rtol=1e-4, atol=1e-3)
    print(f"the convolution of {x.shape} with {w.shape} agrees with its reference")
    report = convolution.tune(x, w, budget_s=budget_s)
    (found,) = report.found
    best, default = found.best, found.default
    print(
        f"default {default.time_s * 1e3:.3f} ms, tuned {best.time_s * 1e3:.3f} ms: {default.time_s / best.time_s:.2f}x"
    )
    operations = 2 * 2 * (size - 2) ** 2 * w.size
    print(f"with {convolution.config(x, w)}: {operations / best.time_s / 1e9:.1f} GFLOP/s")
    return report


if __name__ == "__main__":
    main()
