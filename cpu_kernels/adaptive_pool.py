"""Pooling to a given size over 1 to 3 spatial axes, and its gradients; each task takes some rows of the result.

Both ways an element of the result gathers an interval of each axis of the source, by one formula (`begin`, `end`): a
bin its elements, and an element of the gradient the bins that hold it. Fewer axes are taken as 3 by putting axes
of size 1 in front. Channels are the inner loop, over arrays on the stack that nothing can alias.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from rapydli_flow.spec import Spec
from rapydli_flow.template import Epilogue, Loop, template

from .buffer import local

TASKS = {"tasks": (16, 8, 32, 4)}


def begin(i, count, length):  # type: ignore[no-untyped-def]
    """The first of ``length`` elements that bin i of ``count`` holds."""
    return i * length // count


def end(i, count, length):  # type: ignore[no-untyped-def]
    """Behind the last of ``length`` elements that bin i of ``count`` holds."""
    return -(-(i + 1) * length // count)


def _three(spec: Spec) -> tuple[int, int, int]:
    """The spatial axes."""
    a, b, c = (1,) * (5 - len(spec.shape)) + spec.shape[1:-1]
    return a, b, c


def _sums(source: Spec, out: Spec, epilogue: Epilogue, tasks: int, back: bool) -> Loop:
    """Averages of bins; ``back``: their gradient, to which each bin gives its share."""
    (D, H, W), (OD, OH, OW), C = _three(source), _three(out), out.shape[-1]
    lines = out.shape[0] * OD * OH
    count = max(1, min(tasks, lines))
    T = np.dtype(out.dtype).type

    def share(d, h, w):  # type: ignore[no-untyped-def]
        """One over the elements of a bin of the source."""
        depth, height = end(d, D, OD) - begin(d, D, OD), end(h, H, OH) - begin(h, H, OH)
        return T(1) / T(depth * height * (end(w, W, OW) - begin(w, W, OW)))

    def body(task, x, y, extras, at):  # type: ignore[no-untyped-def]
        total = local(C, y)
        for line in range(task * lines // count, (task + 1) * lines // count):
            n, p, q = line // (OD * OH), line // OH % OD, line % OH
            d0, d1, h0, h1 = begin(p, OD, D), end(p, OD, D), begin(q, OH, H), end(q, OH, H)
            for r in range(OW):
                w0, w1 = begin(r, OW, W), end(r, OW, W)
                for c in range(C):
                    total[c] = 0
                for d in range(d0, d1):
                    for h in range(h0, h1):
                        for w in range(w0, w1):
                            i = (((n * D + d) * H + h) * W + w) * C
                            part = share(d, h, w) if back else T(1)
                            for c in range(C):
                                total[c] += x[i + c] * part
                o = (line * OW + r) * C
                scale = T(1) if back else T(1) / T((d1 - d0) * (h1 - h0) * (w1 - w0))
                for c in range(C):
                    y[o + c] = epilogue(total[c] * scale, extras, o + c, c, at)

    return Loop(body, count)


@template("adaptive_avg_pool", "cpu", space=TASKS)
def averages(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], epilogue: Epilogue, *, tasks: int) -> Loop:
    """``tasks``: how many."""
    return _sums(ins[0], outs[0], epilogue, tasks, False)


@template("adaptive_avg_pool_grad", "cpu", space=TASKS)
def shares(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], epilogue: Epilogue, *, tasks: int) -> Loop:
    """``tasks``: how many."""
    return _sums(ins[0], outs[0], epilogue, tasks, True)


@template("adaptive_max_pool", "cpu", space=TASKS)
def maxima(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], epilogue: Epilogue, *, tasks: int) -> Loop:
    """Each output row in turn."""
    (D, H, W), (OD, OH, OW), C = _three(ins[0]), _three(outs[0]), outs[0].shape[-1]
    lines = outs[0].shape[0] * OD * OH
    count = max(1, min(tasks, lines))
    A = np.dtype(outs[1].dtype).type

    def body(task, x, y, argmax, extras, at):  # type: ignore[no-untyped-def]
        best, place = local(C, y), local(C, argmax)
        for line in range(task * lines // count, (task + 1) * lines // count):
            n, p, q = line // (OD * OH), line // OH % OD, line % OH
            d0, d1, h0, h1 = begin(p, OD, D), end(p, OD, D), begin(q, OH, H), end(q, OH, H)
            for r in range(OW):
                w0, w1 = begin(r, OW, W), end(r, OW, W)
                for c in range(C):
                    best[c] = -np.inf
                    place[c] = A((d0 * H + h0) * W + w0)
                for d in range(d0, d1):
                    for h in range(h0, h1):
                        for w in range(w0, w1):
                            inside = (d * H + h) * W + w
                            i = (n * D * H * W + inside) * C
                            for c in range(C):
                                v, b, a = x[i + c], best[c], place[c]
                                take = (not v <= b) & (b == b)  # a NaN wins, and the first one stays
                                best[c] = v if take else b
                                place[c] = A(inside) if take else a
                o = (line * OW + r) * C
                for c in range(C):
                    y[o + c] = best[c]
                for c in range(C):
                    argmax[o + c] = place[c]

    return Loop(body, count)


@template("adaptive_max_pool_grad", "cpu", space=TASKS)
def winners(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], epilogue: Epilogue, *, tasks: int) -> Loop:
    """Each row of dx in turn."""
    (D, H, W), (OD, OH, OW), C = _three(ins[0]), _three(outs[0]), outs[0].shape[-1]
    lines = outs[0].shape[0] * OD * OH
    count = max(1, min(tasks, lines))
    T = np.dtype(outs[0].dtype).type

    def body(task, dy, argmax, dx, extras, at):  # type: ignore[no-untyped-def]
        total = local(C, dx)
        for line in range(task * lines // count, (task + 1) * lines // count):
            n, p, q = line // (OD * OH), line // OH % OD, line % OH
            for r in range(OW):
                inside = (p * OH + q) * OW + r
                for c in range(C):
                    total[c] = 0
                for d in range(begin(p, OD, D), end(p, OD, D)):
                    for h in range(begin(q, OH, H), end(q, OH, H)):
                        for w in range(begin(r, OW, W), end(r, OW, W)):
                            i = (((n * D + d) * H + h) * W + w) * C
                            for c in range(C):
                                v = dy[i + c]  # read in any case: a select, not a branch
                                total[c] += v if argmax[i + c] == inside else T(0)
                o = (line * OW + r) * C
                for c in range(C):
                    dx[o + c] = epilogue(total[c], extras, o + c, c, at)

    return Loop(body, count)
