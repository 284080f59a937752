"""Softmax and its logarithm: one row of class scores at a time, rows divided over tasks.

    softmax           y[n] = exp(x[n] - m) / sum,      m = max of x[n], sum = sum of exp(x[n] - m)
    softmax_grad      dx[n] = y[n] (dy[n] - dy[n].y[n])
    log_softmax       y[n] = x[n] - m - log(sum)
    log_softmax_grad  dx[n] = dy[n] - exp(y[n]) sum of dy[n]

Rows are those of the last axis, whatever axes come before.
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

SPACE = {"tasks": (8, 16, 4, 1)}
MOST_CLASSES = 1 << 17  # exponentials of so many classes fit on a thread's stack


def fits(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device, **config: Any) -> bool:
    return max(spec.shape[-1] for spec in ins) <= MOST_CLASSES


def largest(x, first, classes):  # type: ignore[no-untyped-def]
    best = x[first]
    for j in range(1, classes):
        best = x[first + j] if not x[first + j] <= best else best
    return best


def exponentials(e, x, first, classes):  # type: ignore[no-untyped-def]
    """e = exp(x - max); the sum of e."""
    m = largest(x, first, classes)
    for j in range(classes):
        e[j] = math.exp(x[first + j] - m)
    total = e[0]
    for j in range(1, classes):
        total += e[j]
    return total


@template("softmax", "cpu", space=SPACE, fits=fits)
def shares(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], epilogue: Epilogue, *, tasks: int) -> Loop:
    """``tasks``: how many."""
    N, K = prod(ins[0].shape[:-1]), ins[0].shape[-1]
    count = max(1, min(tasks, N))
    T = np.dtype(outs[0].dtype).type

    def body(task, x, y, extras, at):  # type: ignore[no-untyped-def]
        e = local(K, x)
        for n in range(task * N // count, (task + 1) * N // count):
            each = T(1) / exponentials(e, x, n * K, K)
            for j in range(K):
                y[n * K + j] = epilogue(e[j] * each, extras, n * K + j, j, at)

    return Loop(body, count)


@template("softmax_grad", "cpu", space=SPACE, fits=fits)
def share_gradients(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], epilogue: Epilogue, *, tasks: int) -> Loop:
    """``tasks``: how many."""
    N, K = prod(ins[1].shape[:-1]), ins[1].shape[-1]
    count = max(1, min(tasks, N))
    T = np.dtype(outs[0].dtype).type

    def body(task, dy, y, dx, extras, at):  # type: ignore[no-untyped-def]
        for n in range(task * N // count, (task + 1) * N // count):
            dot = T(0)
            for j in range(n * K, (n + 1) * K):
                dot += dy[j] * y[j]
            for j in range(K):
                o = n * K + j
                dx[o] = epilogue(y[o] * (dy[o] - dot), extras, o, j, at)

    return Loop(body, count)


@template("log_softmax", "cpu", space=SPACE, fits=fits)
def log_shares(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], epilogue: Epilogue, *, tasks: int) -> Loop:
    """``tasks``: how many."""
    N, K = prod(ins[0].shape[:-1]), ins[0].shape[-1]
    count = max(1, min(tasks, N))

    def body(task, x, y, extras, at):  # type: ignore[no-untyped-def]
        e = local(K, x)
        for n in range(task * N // count, (task + 1) * N // count):
            less, m = math.log(exponentials(e, x, n * K, K)), largest(x, n * K, K)
            for j in range(K):
                o = n * K + j
                y[o] = epilogue(x[o] - m - less, extras, o, j, at)

    return Loop(body, count)


@template("log_softmax_grad", "cpu", space=SPACE, fits=fits)
def log_share_gradients(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], epilogue: Epilogue, *, tasks: int) -> Loop:
    """``tasks``: how many."""
    N, K = prod(ins[1].shape[:-1]), ins[1].shape[-1]
    count = max(1, min(tasks, N))
    T = np.dtype(outs[0].dtype).type

    def body(task, dy, y, dx, extras, at):  # type: ignore[no-untyped-def]
        for n in range(task * N // count, (task + 1) * N // count):
            total = T(0)
            for j in range(n * K, (n + 1) * K):
                total += dy[j]
            for j in range(K):
                o = n * K + j
                dx[o] = epilogue(dy[o] - math.exp(y[o]) * total, extras, o, j, at)

    return Loop(body, count)
