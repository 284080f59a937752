"""Optimizers made of optimizers: clipped, accumulated, averaged, for groups of parameters.

Patterns are those of a shell over names of parameters, such as 'conv_*/w'; the name of a layer or block
alone stands for all that is in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from functools import reduce
from typing import Any

from ..arguments import is_number, is_whole, nearest
from ..errors import GraphError, SettingError
from ..graph import Graph, Tensor
from ..graph.tracing import Optimizer, Pairs
from ..ops import Accumulate, Cast, ClipFactor, ClipValue, MovingAverage, Multiply, OnTurn, Sum, Turn, Turns
from ..spec import Array
from .slots import replace, share, slot

AVERAGE = "average"


def clip_norm(optimizer: Optimizer, max_norm: float) -> Optimizer:
    """Scale all gradients by min(1, max_norm / (norm + 1e-6)), where norm is that of all of them together.

    The L2 norm over every element of every gradient (Pascanu et al. 2013, as PyTorch's clip_grad_norm_).
    """
    op = ClipFactor(max_norm=_over_zero("clip_norm", "max_norm", max_norm))

    def update(graph: Graph, pairs: Pairs, step: Tensor) -> None:
        dtypes = sorted({g.dtype for _, g in pairs})
        squares = [Sum(axes=tuple(range(len(g.shape))))(Multiply()(g, g)) for _, g in pairs]
        factor = op(reduce(lambda a, b: a + b, (_in(dtypes[-1], s) for s in squares)))
        factors = {dtype: _in(dtype, factor) for dtype in dtypes}
        optimizer(graph, [(w, _like(w, Multiply()(g, factors[g.dtype]))) for w, g in pairs], step)

    return update


def clip_value(optimizer: Optimizer, limit: float) -> Optimizer:
    """Bring every element of every gradient into [-limit, limit]."""
    op = ClipValue(limit=_over_zero("clip_value", "limit", limit))

    def update(graph: Graph, pairs: Pairs, step: Tensor) -> None:
        optimizer(graph, [(w, _like(w, op(g))) for w, g in pairs], step)

    return update


def accumulate(optimizer: Optimizer, every: int) -> Optimizer:
    """Use the mean gradient of ``every`` training steps, once each; in between the optimizer and its step stand still.

    So a batch of ``every`` times the records costs the memory of one, but for batch norm, whose statistics
    are those of each training step. Gradients of an incomplete turn at the end of a run are not used.
    """
    if not is_whole(every) or every < 1:
        raise SettingError(f"accumulate: every={every!r} is not a whole number of training steps, 1 or more.")

    def update(graph: Graph, pairs: Pairs, step: Tensor) -> None:
        turn = {dtype: Turn(every=every, to=dtype)(step) for dtype in dict.fromkeys(w.dtype for w, _ in pairs)}
        means = []
        for w, g in pairs:
            total = slot(graph, w, "accumulated")
            after, mean = Accumulate(every=every)(total, g, turn[w.dtype])
            replace(graph, [total], [after])
            means.append((w, _like(w, mean)))
        before = dict(graph.updates)
        optimizer(graph, means, Turns(every=every)(step))
        for name in [name for name, value in graph.updates.items() if before.get(name) != value]:
            leaf = graph.find(name)
            replace(graph, [leaf], [OnTurn()(graph.tensor(graph.updates[name]), leaf, turn[leaf.dtype])])

    return update


def groups(optimizers: Mapping[str, Optimizer], default: Optimizer) -> Optimizer:
    """An optimizer for the parameters of each pattern, the first that matches; ``default`` for all others."""

    def update(graph: Graph, pairs: Pairs, step: Tensor) -> None:
        rest = list(pairs)
        for pattern, optimizer in optimizers.items():
            mine = _matching("groups", rest, pattern, pairs)
            rest = [pair for pair in rest if pair not in mine]
            optimizer(graph, mine, step)
        if rest:
            default(graph, rest, step)

    return update


def freeze(optimizer: Optimizer, *patterns: str) -> Optimizer:
    """Leave the parameters of these patterns as they are; no gradient is computed for them alone.

    Running statistics of batch norms are no parameters: they go on.
    """
    if not patterns:
        raise SettingError("freeze: name what is to be frozen, as in optim.freeze(optimizer, 'conv_*').")

    def update(graph: Graph, pairs: Pairs, step: Tensor) -> None:
        frozen = [pair for pattern in patterns for pair in _matching("freeze", pairs, pattern, pairs)]
        rest = [pair for pair in pairs if pair not in frozen]
        if not rest:
            raise GraphError(f"freeze: {', '.join(patterns)} match every parameter; nothing is left to train.")
        optimizer(graph, rest, step)

    return update


def average(optimizer: Optimizer, decay: float = 0.999) -> Optimizer:
    """Keep a moving average of every parameter: average = decay average + (1 - decay) w, after each step.

    It begins with what the parameter begins with. `averaged` gives the state to evaluate with.
    """
    share("average", decay=decay)

    def update(graph: Graph, pairs: Pairs, step: Tensor) -> None:
        optimizer(graph, pairs, step)
        for w, _ in pairs:
            if w.name in graph.updates:
                mean = slot(graph, w, AVERAGE, as_parameter=True)
                replace(graph, [mean], [MovingAverage(decay=decay)(mean, graph.tensor(graph.updates[w.name]))])

    return update


def averaged(state: Mapping[str, Array]) -> dict[str, Array]:
    """The state of a run with `average`, its parameters replaced by their averages: to evaluate, predict, save."""
    means = {name.removesuffix(f"/{AVERAGE}"): value for name, value in state.items() if name.endswith(f"/{AVERAGE}")}
    if not means.keys() & state.keys():
        raise SettingError("averaged: the state has no averages. Train with optim.average(optimizer).")
    return {name: means.get(name, value) for name, value in state.items()}


def _matching(title: str, pairs: Pairs, pattern: str, known: Pairs) -> list[tuple[Tensor, Tensor]]:
    """The pairs whose parameter matches; it is an error if none does."""
    found = [(w, g) for w, g in pairs if fnmatchcase(w.name, pattern) or fnmatchcase(w.name, f"{pattern}/*")]
    if not found:
        names = [w.name for w, _ in known]
        taken = any(fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}/*") for name in names)
        what = "only parameters of the patterns before it" if taken else f"no parameter.{nearest(pattern, names)}"
        raise GraphError(f"{title}: {pattern!r} matches {what}")
    return found


def _in(dtype: str, x: Tensor) -> Any:
    return x if x.dtype == dtype else Cast(to=dtype)(x)


def _like(w: Tensor, g: Any) -> Any:
    """The gradient, known to a split as that of ``w``."""
    w.graph.like[g.id] = w.id
    return g


def _over_zero(title: str, name: str, value: float) -> float:
    if not is_number(value) or not 0.0 < value < float("inf"):
        raise SettingError(f"{title}: {name}={value!r} is not a positive, finite number.")
    return float(value)
