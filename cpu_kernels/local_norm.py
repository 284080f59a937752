"""Local response normalisation across channels: the channels of one place at a time, places divided over tasks.

    local_response        y  = x d^-beta,     d[c] = k + alpha / size * sum of x^2 over the window of c
    local_response_grad   dx = dy d^-beta - 2 alpha beta / size * x * sum of dy x d^(-beta-1) over the mirrored window

Terms lie between zeros as wide as the window reaches, so that sums are `size` vector additions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np

from rapydli_flow.spec import Spec
from rapydli_flow.template import Device, Epilogue, Loop, template

from .buffer import local

SPACE = {"tasks": (16, 8, 32, 4)}
MOST_CHANNELS = 1 << 15  # terms of so many channels fit on a thread's stack


def _fits(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device, **config: Any) -> bool:
    return 0 < outs[0].shape[-1] <= MOST_CHANNELS


def _reach(op: Any, channels: int) -> tuple[int, int]:
    """How far a window reaches below and above its channel, where there are channels."""
    return min(op.size // 2, channels - 1), min((op.size - 1) // 2, channels - 1)


def _power(beta: float, T: Any) -> Any:
    """d^-beta; that of the usual 0.75 is made of roots, which vectors have."""
    one, exponent = T(1), T(-beta)

    def three_quarters(d):  # type: ignore[no-untyped-def]
        root = math.sqrt(d)
        return one / (root * math.sqrt(root))

    def other(d):  # type: ignore[no-untyped-def]
        return d**exponent

    return three_quarters if beta == 0.75 else other


@template("local_response", "cpu", space=SPACE, fits=_fits)
def channels(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], epilogue: Epilogue, *, tasks: int) -> Loop:
    """``tasks``: how many."""
    C, places = outs[0].shape[-1], prod(outs[0].shape[:-1])
    low, high = _reach(op, C)
    window, terms = low + high + 1, low + C + high
    count = max(1, min(tasks, places))
    T = np.dtype(outs[0].dtype).type
    k, share, power = T(op.k), T(op.alpha / op.size), _power(op.beta, T)

    def body(task, x, y, extras, at):  # type: ignore[no-untyped-def]
        square, d = local(terms, x), local(C, x)
        for j in range(terms):
            square[j] = 0
        for i in range(task * places // count, (task + 1) * places // count):
            o = i * C
            for c in range(C):
                square[low + c] = x[o + c] * x[o + c]
                d[c] = 0
            for r in range(window):
                for c in range(C):
                    d[c] += square[c + r]
            for c in range(C):
                y[o + c] = epilogue(x[o + c] * power(k + share * d[c]), extras, o + c, c, at)

    return Loop(body, count)


@template("local_response_grad", "cpu", space=SPACE, fits=_fits)
def gradients(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], epilogue: Epilogue, *, tasks: int) -> Loop:
    """``tasks``: how many."""
    C, places = outs[0].shape[-1], prod(outs[0].shape[:-1])
    low, high = _reach(op, C)
    window, terms = low + high + 1, low + C + high
    count = max(1, min(tasks, places))
    T = np.dtype(outs[0].dtype).type
    k, share, power = T(op.k), T(op.alpha / op.size), _power(op.beta, T)
    slope = T(2.0 * op.alpha * op.beta / op.size)

    def body(task, dy, x, dx, extras, at):  # type: ignore[no-untyped-def]
        square, reached, d, p = local(terms, x), local(terms, x), local(C, x), local(C, x)
        for j in range(terms):
            square[j] = 0
            reached[j] = 0
        for i in range(task * places // count, (task + 1) * places // count):
            o = i * C
            for c in range(C):
                square[low + c] = x[o + c] * x[o + c]
                d[c] = 0
            for r in range(window):
                for c in range(C):
                    d[c] += square[c + r]
            for c in range(C):
                d[c] = k + share * d[c]
                p[c] = power(d[c])
                reached[high + c] = dy[o + c] * x[o + c] * p[c] / d[c]
                d[c] = 0
            for r in range(window):
                for c in range(C):
                    d[c] += reached[c + r]
            for c in range(C):
                dx[o + c] = epilogue(dy[o + c] * p[c] - slope * x[o + c] * d[c], extras, o + c, c, at)

    return Loop(body, count)
