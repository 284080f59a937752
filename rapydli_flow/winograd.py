"""The transforms of Winograd convolution: sums of a window over a row become products of polynomials at points.

    y[i] = sum over t of x[i+t] * w[t]          m outputs of r taps read n = m + r - 1 inputs

    y = A [ (G w) * (B x) ]                     n multiplications instead of m * r; in two dimensions the square of it

    B[p] = coefficients of the product of (z - q) over the other points q;  of all points, for infinity
    G[p] = 1, p, p^2, ... over the product of (p - q) over the other points;  0, ..., 0, 1 for infinity
    A[:, p] = 1, p, p^2, ...;  0, ..., 0, 1 for infinity

The points are 0, pairs of plus and minus p, and infinity. A pair shares its sums: what it reads at even and at odd
places is added up once, then added and subtracted. Filters of 3 taps with n = 4 or 6 give F(2, 3) and F(4, 3); tiles of
dy as filters of 4 taps give F(3, 4), for gradients of filters.

Which points decides the rounding error. With 1/sqrt(2) and sqrt(2) the largest error of float32 sums of 256 channels
was 3e-6 of the largest output, with the usual 1 and 2 it was 17e-6: their powers are further apart.

Sources: Winograd, "Arithmetic complexity of computations" (1980); Lavin and Gray, "Fast algorithms for convolutional
neural networks" (2016); on points, Barabasz et al., "Error analysis and improving the accuracy of Winograd convolution"
(2020).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np

SQUARES: dict[int, tuple[float, ...]] = {4: (1.0,), 6: (0.5, 2.0)}  # by n: of the points besides 0 and infinity


def _power(square: float, i: int) -> float:
    """p^i, exact where i is even."""
    return float(square ** (i // 2) * (square**0.5 if i % 2 else 1.0))


def _product(squares: Sequence[float]) -> list[float]:
    """Coefficients of z^0, z^2, z^4, ... of the product of (z^2 - p^2)."""
    coefficients = [1.0]
    for square in squares:
        low = [-square * c for c in coefficients]
        coefficients = [a + b for a, b in zip([*low, 0.0], [0.0, *coefficients], strict=True)]
    return coefficients


def _sum(terms: Sequence[tuple[float, str]]) -> str:
    """Text of a sum of products, without factors of 1."""
    out = ""
    for factor, name in terms:
        size = name if abs(factor) == 1 else f"T({abs(factor)!r}) * {name}"
        sign = ("-" if factor < 0 else "") if not out else (" - " if factor < 0 else " + ")
        out += sign + size
    return out


def input_lines(n: int) -> list[str]:
    """r = B d, for n values d0, d1, ..."""
    squares = SQUARES[n]
    everything = _product(squares)
    lines = [f"r0 = {_sum([(c, f'd{2 * i}') for i, c in enumerate(everything)])}"]
    for j, square in enumerate(squares):
        rest = _product([other for other in squares if other != square])
        lines.append(f"even = {_sum([(c, f'd{2 * i + 2}') for i, c in enumerate(rest)])}")
        lines.append(f"odd = {_sum([(_power(square, 1) * c, f'd{2 * i + 1}') for i, c in enumerate(rest)])}")
        lines += [f"r{2 * j + 1} = even + odd", f"r{2 * j + 2} = even - odd"]
    return [*lines, f"r{n - 1} = {_sum([(c, f'd{2 * i + 1}') for i, c in enumerate(everything)])}"]


def filter_lines(n: int, taps: int) -> list[str]:
    """r = G d, for ``taps`` values d0, d1, ..."""
    squares = SQUARES[n]
    lines = [f"r0 = {_sum([(1 / prod(-square for square in squares), 'd0')])}"]
    for j, square in enumerate(squares):
        scale = 1 / (2 * square * prod(square - other for other in squares if other != square))
        for name, first in (("even", 0), ("odd", 1)):
            terms = [(scale * _power(square, i), f"d{i}") for i in range(first, taps, 2)]
            lines.append(f"{name} = {_sum(terms)}")
        lines += [f"r{2 * j + 1} = even + odd", f"r{2 * j + 2} = even - odd"]
    return [*lines, f"r{n - 1} = d{taps - 1}"]


def output_lines(n: int, outputs: int) -> list[str]:
    """r = A d, for n values d0, d1, ... and ``outputs`` results."""
    squares = SQUARES[n]
    lines = [
        f"{name}{j} = d{2 * j + 1} {sign} d{2 * j + 2}"
        for j in range(len(squares))
        for name, sign in (("even", "+"), ("odd", "-"))
    ]
    for i in range(outputs):
        terms = [(1.0, "d0")] if i == 0 else []
        terms += [(_power(square, i), f"{'odd' if i % 2 else 'even'}{j}") for j, square in enumerate(squares)]
        terms += [(1.0, f"d{n - 1}")] if i == outputs - 1 else []
        lines.append(f"r{i} = {_sum(terms)}")
    return lines


def evaluate(lines: Sequence[str], values: Sequence[Any]) -> list[Any]:
    """What lines make of d0, d1, ...: r0, r1, ... For tests, in float64."""
    names: dict[str, Any] = {"T": np.float64, **{f"d{i}": value for i, value in enumerate(values)}}
    exec("\n".join(lines), names)
    count = sum(name[0] == "r" and name[1:].isdigit() for name in names)
    return [names[f"r{i}"] for i in range(count)]
