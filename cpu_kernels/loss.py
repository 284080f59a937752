"""Losses and scores: one row of class scores at a time, rows divided over tasks.

    cross_entropy       y[n] = log(sum of exp(x[n] - m)) - (x[n, label[n]] - m),   m = max of x[n]
    cross_entropy_grad  dx[n] = dy[n] (softmax(x[n]) - onehot(label[n]))
    softmax             y[n] = exp(x[n] - m) / sum
    softmax_grad        dx[n] = y[n] (dy[n] - dy[n].y[n])
    correct             y[n] = 1 where the first largest of x[n] is at label[n]

A label that is no class gives a loss that is not a number, instead of reading elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from rapydli_flow.spec import Spec
from rapydli_flow.template import Device, Epilogue, Loop, template

from .tile import local

SPACE = {"tasks": (8, 16, 4, 1)}
MOST_CLASSES = 1 << 17  # exponentials of so many classes fit on a thread's stack


def _fits(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device, **config: Any) -> bool:
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


@template("cross_entropy", "cpu", space=SPACE, fits=_fits)
def losses(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], epilogue: Epilogue, *, tasks: int) -> Loop:
    """``tasks``: how many."""
    N, K = ins[0].shape
    count = max(1, min(tasks, N))

    def body(task, x, label, y, extras, at):  # type: ignore[no-untyped-def]
        e = local(K, x)
        for n in range(task * N // count, (task + 1) * N // count):
            at_label = np.int64(label[n])
            total = exponentials(e, x, n * K, K)
            m = largest(x, n * K, K)
            score = x[n * K + at_label] - m if 0 <= at_label < K else total * np.nan
            y[n] = epilogue(math.log(total) - score, extras, n, n, at)

    return Loop(body, count)


@template("cross_entropy_grad", "cpu", space=SPACE, fits=_fits)
def loss_gradients(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], epilogue: Epilogue, *, tasks: int) -> Loop:
    """``tasks``: how many."""
    N, K = ins[1].shape
    count = max(1, min(tasks, N))
    T = np.dtype(outs[0].dtype).type

    def body(task, dy, x, label, dx, extras, at):  # type: ignore[no-untyped-def]
        e = local(K, x)
        for n in range(task * N // count, (task + 1) * N // count):
            at_label = np.int64(label[n])
            each = T(1) / exponentials(e, x, n * K, K)
            for j in range(K):
                e[j] *= each
            if 0 <= at_label < K:
                e[at_label] -= T(1)
            for j in range(K):
                dx[n * K + j] = epilogue(e[j] * dy[n], extras, n * K + j, j, at)

    return Loop(body, count)


@template("softmax", "cpu", space=SPACE, fits=_fits)
def shares(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], epilogue: Epilogue, *, tasks: int) -> Loop:
    """``tasks``: how many."""
    N, K = ins[0].shape
    count = max(1, min(tasks, N))
    T = np.dtype(outs[0].dtype).type

    def body(task, x, y, extras, at):  # type: ignore[no-untyped-def]
        e = local(K, x)
        for n in range(task * N // count, (task + 1) * N // count):
            each = T(1) / exponentials(e, x, n * K, K)
            for j in range(K):
                y[n * K + j] = epilogue(e[j] * each, extras, n * K + j, j, at)

    return Loop(body, count)


@template("softmax_grad", "cpu", space=SPACE, fits=_fits)
def share_gradients(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], epilogue: Epilogue, *, tasks: int) -> Loop:
    """``tasks``: how many."""
    N, K = ins[1].shape
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


@template("correct", "cpu", space=SPACE, fits=_fits)
def hits(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], epilogue: Epilogue, *, tasks: int) -> Loop:
    """``tasks``: how many."""
    N, K = ins[0].shape
    count = max(1, min(tasks, N))
    T = np.dtype(outs[0].dtype).type

    def body(task, x, label, y, extras, at):  # type: ignore[no-untyped-def]
        for n in range(task * N // count, (task + 1) * N // count):
            best, where = x[n * K], 0
            for j in range(1, K):
                v = x[n * K + j]
                if (not v <= best) & (best == best):  # the first NaN is the largest, as in NumPy
                    best, where = v, j
            y[n] = epilogue(T(1) if where == np.int64(label[n]) else T(0), extras, n, n, at)

    return Loop(body, count)
