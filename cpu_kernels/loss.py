"""Losses and scores: one row of class scores at a time, rows divided over tasks.

    cross_entropy       y[n] = log(sum of exp(x[n] - m)) - (score - m),    m = max of x[n]
                        score = (1 - s) x[n, label[n]] + s mean of x[n],   s = smoothing
    cross_entropy_grad  dx[n] = dy[n] (softmax(x[n]) - (1 - s) onehot(label[n]) - s / classes)
    hinge, hinge_grad   margins against the label's score, or of each class by itself; see `ops.loss.Hinge`
    at_label            y[n] = x[n, label[n]]
    at_label_grad       dx[n, j] = dy[n] where j is label[n], else 0
    correct             y[n] = 1 where the first largest of x[n] is at label[n]
    in_top              y[n] = 1 where fewer than k of x[n] come before x[n, label[n]]

A label that is no class gives a loss that is not a number, instead of reading elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from rapydli_flow.spec import Spec
from rapydli_flow.template import Epilogue, Loop, template

from .buffer import local
from .softmax import SPACE, exponentials, fits, largest


@template("cross_entropy", "cpu", space=SPACE, fits=fits)
def losses(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], epilogue: Epilogue, *, tasks: int) -> Loop:
    """``tasks``: how many."""
    N, K, C = outs[0].size, ins[0].shape[-1], outs[0].shape[-1]
    count = max(1, min(tasks, N))
    T = np.dtype(outs[0].dtype).type
    shared = op.smoothing > 0
    own, each = T(1.0 - op.smoothing), T(op.smoothing / K)

    def body(task, x, label, y, extras, at):  # type: ignore[no-untyped-def]
        e = local(K, x)
        for n in range(task * N // count, (task + 1) * N // count):
            at_label = np.int64(label[n])
            total = exponentials(e, x, n * K, K)
            m = largest(x, n * K, K)
            score = x[n * K + at_label] - m if 0 <= at_label < K else total * np.nan
            if shared:
                score *= own
                for j in range(n * K, (n + 1) * K):
                    score += (x[j] - m) * each
            y[n] = epilogue(math.log(total) - score, extras, n, n % C, at)

    return Loop(body, count)


@template("cross_entropy_grad", "cpu", space=SPACE, fits=fits)
def loss_gradients(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], epilogue: Epilogue, *, tasks: int) -> Loop:
    """``tasks``: how many."""
    N, K = ins[0].size, ins[1].shape[-1]
    count = max(1, min(tasks, N))
    T = np.dtype(outs[0].dtype).type
    own, other = T(1.0 - op.smoothing), T(op.smoothing / K)

    def body(task, dy, x, label, dx, extras, at):  # type: ignore[no-untyped-def]
        e = local(K, x)
        for n in range(task * N // count, (task + 1) * N // count):
            at_label = np.int64(label[n])
            each = T(1) / exponentials(e, x, n * K, K)
            for j in range(K):
                e[j] = e[j] * each - other
            if 0 <= at_label < K:
                e[at_label] -= own
            for j in range(K):
                dx[n * K + j] = epilogue(e[j] * dy[n], extras, n * K + j, j, at)

    return Loop(body, count)


@template("hinge", "cpu", space=SPACE)
def margins(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], epilogue: Epilogue, *, tasks: int) -> Loop:
    """``tasks``: how many."""
    N, K, C = outs[0].size, ins[0].shape[-1], outs[0].shape[-1]
    count = max(1, min(tasks, N))
    T = np.dtype(outs[0].dtype).type
    squared, alone = op.power == 2, op.one_against_all
    share = T(1.0 if alone else 1.0 / K)

    def body(task, x, label, y, extras, at):  # type: ignore[no-untyped-def]
        for n in range(task * N // count, (task + 1) * N // count):
            at_label = np.int64(label[n])
            known = 0 <= at_label < K
            score = x[n * K + at_label] if known else x[n * K] * np.nan
            total = score - score  # NaN for a label that is no class
            for j in range(K):
                v = x[n * K + j]
                margin = T(1) + v - score
                if alone:
                    margin = T(1) - v if j == at_label else T(1) + v
                elif j == at_label:
                    margin = T(0)
                margin = T(0) if margin <= T(0) else margin
                total += margin * margin if squared else margin
            y[n] = epilogue(total * share, extras, n, n % C, at)

    return Loop(body, count)


@template("hinge_grad", "cpu", space=SPACE)
def margin_gradients(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], epilogue: Epilogue, *, tasks: int) -> Loop:
    """``tasks``: how many."""
    N, K = ins[0].size, ins[1].shape[-1]
    count = max(1, min(tasks, N))
    T = np.dtype(outs[0].dtype).type
    squared, alone = op.power == 2, op.one_against_all
    share = T(1.0 if alone else 1.0 / K)

    def slope(margin):  # type: ignore[no-untyped-def]
        if squared:
            return T(0) if margin <= T(0) else margin + margin
        return T(0) if margin <= T(0) else T(1)

    def body(task, dy, x, label, dx, extras, at):  # type: ignore[no-untyped-def]
        for n in range(task * N // count, (task + 1) * N // count):
            at_label = np.int64(label[n])
            known = 0 <= at_label < K
            score = x[n * K + at_label] if known else x[n * K] * np.nan
            pulled = T(0)
            if not alone:
                for j in range(K):
                    pulled += slope(T(1) + x[n * K + j] - score) if j != at_label else T(0)
            for j in range(K):
                v = x[n * K + j]
                if alone:
                    g = -slope(T(1) - v) if j == at_label else slope(T(1) + v)
                else:
                    g = -pulled if j == at_label else slope(T(1) + v - score)
                dx[n * K + j] = epilogue(g * share * dy[n], extras, n * K + j, j, at)

    return Loop(body, count)


@template("at_label", "cpu", space=SPACE)
def picks(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], epilogue: Epilogue, *, tasks: int) -> Loop:
    """``tasks``: how many."""
    N, K, C = outs[0].size, ins[0].shape[-1], outs[0].shape[-1]
    count = max(1, min(tasks, N))

    def body(task, x, label, y, extras, at):  # type: ignore[no-untyped-def]
        for n in range(task * N // count, (task + 1) * N // count):
            at_label = np.int64(label[n])
            v = x[n * K + at_label] if 0 <= at_label < K else x[n * K] * np.nan
            y[n] = epilogue(v, extras, n, n % C, at)

    return Loop(body, count)


@template("at_label_grad", "cpu", space=SPACE)
def pick_gradients(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], epilogue: Epilogue, *, tasks: int) -> Loop:
    """``tasks``: how many."""
    N, K = ins[0].size, op.classes
    count = max(1, min(tasks, N))
    T = np.dtype(outs[0].dtype).type

    def body(task, dy, label, dx, extras, at):  # type: ignore[no-untyped-def]
        for n in range(task * N // count, (task + 1) * N // count):
            at_label = np.int64(label[n])
            for j in range(K):
                dx[n * K + j] = epilogue(dy[n] if j == at_label else T(0), extras, n * K + j, j, at)

    return Loop(body, count)


@template("correct", "cpu", space=SPACE)
def hits(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], epilogue: Epilogue, *, tasks: int) -> Loop:
    """``tasks``: how many."""
    N, K, C = outs[0].size, ins[0].shape[-1], outs[0].shape[-1]
    count = max(1, min(tasks, N))
    T = np.dtype(outs[0].dtype).type

    def body(task, x, label, y, extras, at):  # type: ignore[no-untyped-def]
        for n in range(task * N // count, (task + 1) * N // count):
            best, where = x[n * K], 0
            for j in range(1, K):
                v = x[n * K + j]
                if (not v <= best) & (best == best):  # the first NaN is the largest, as in NumPy
                    best, where = v, j
            y[n] = epilogue(T(1) if where == np.int64(label[n]) else T(0), extras, n, n % C, at)

    return Loop(body, count)


@template("in_top", "cpu", space=SPACE)
def near_hits(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], epilogue: Epilogue, *, tasks: int) -> Loop:
    """``tasks``: how many."""
    N, K, C, k = outs[0].size, ins[0].shape[-1], outs[0].shape[-1], op.k
    count = max(1, min(tasks, N))
    T = np.dtype(outs[0].dtype).type

    def body(task, x, label, y, extras, at):  # type: ignore[no-untyped-def]
        for n in range(task * N // count, (task + 1) * N // count):
            at_label = np.int64(label[n])
            known = 0 <= at_label < K
            score = x[n * K + at_label] if known else x[n * K]
            before = 0
            for j in range(K):
                v = x[n * K + j]
                larger = (v > score) | ((v != v) & (score == score))
                tie = (v == score) | ((v != v) & (score != score))
                before += larger | (tie & (j < at_label))
            y[n] = epilogue(T(1) if known & (before < k) else T(0), extras, n, n % C, at)

    return Loop(body, count)
