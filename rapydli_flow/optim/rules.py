"""SGD with momentum and Adam, and learning rates as functions of the step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..errors import SettingError
from ..graph import Graph, Tensor
from ..graph.tracing import Optimizer
from ..ops import Adam, BiasCorrection, ConstantRate, CosineDecay, Descent, Fill, Momentum, StepDecay

Rate = Callable[[Tensor, str], Any]


def constant(rate: float) -> Rate:
    """The same rate at every step."""
    rate = _positive("rate", rate)
    return lambda step, dtype: ConstantRate(rate=rate, to=dtype)(step)


def step_decay(rate: float, *, factor: float = 0.1, every: int) -> Rate:
    """``rate * factor ** floor(step / every)``"""
    rate, factor, every = _positive("rate", rate), _positive("factor", factor), int(_positive("every", every))
    return lambda step, dtype: StepDecay(rate=rate, factor=factor, every=every, to=dtype)(step)


def cosine(rate: float, *, steps: int, warmup: int = 0) -> Rate:
    """Rise over ``warmup`` steps, then half a cosine down to 0 at ``steps``."""
    rate = _positive("rate", rate)
    return lambda step, dtype: CosineDecay(rate=rate, steps=steps, warmup=warmup, to=dtype)(step)


def sgd(rate: float | Rate, *, momentum: float = 0.0, weight_decay: float = 0.0) -> Optimizer:
    """Stochastic gradient descent: m = momentum m + g + weight_decay w; w = w - rate m."""
    rule = _rate(rate)
    if not 0.0 <= momentum < 1.0:
        raise SettingError(f"sgd: momentum={momentum} is not in [0, 1).")

    def update(graph: Graph, w: Tensor, g: Tensor) -> None:
        now = rule(graph.find("step"), w.dtype)
        if momentum == 0.0:
            graph.updates[w.name] = Descent(decay=weight_decay)(w, g, now).id
            return
        m = _slot(graph, w, "momentum")
        _replace(graph, (w, m), Momentum(beta=momentum, decay=weight_decay)(w, m, g, now))

    return update


def adam(
    rate: float | Rate, *, beta_1: float = 0.9, beta_2: float = 0.999, eps: float = 1e-8, weight_decay: float = 0.0
) -> Optimizer:
    """Adam (Kingma, Ba 2015), with bias correction; weight decay is added to the gradient."""
    rule = _rate(rate)
    for name, beta in (("beta_1", beta_1), ("beta_2", beta_2)):
        if not 0.0 <= beta < 1.0:
            raise SettingError(f"adam: {name}={beta} is not in [0, 1).")
    op = Adam(beta_1=beta_1, beta_2=beta_2, eps=eps, decay=weight_decay)

    def update(graph: Graph, w: Tensor, g: Tensor) -> None:
        step = graph.find("step")
        correct = (BiasCorrection(beta=beta, to=w.dtype)(step) for beta in (beta_1, beta_2))
        m, v = _slot(graph, w, "mean"), _slot(graph, w, "square")
        _replace(graph, (w, m, v), op(w, m, v, g, rule(step, w.dtype), *correct))

    return update


def _slot(graph: Graph, w: Tensor, label: str) -> Tensor:
    """A leaf of optimizer state beside a parameter, zero at first."""
    return graph.leaf("state", f"{w.name}/{label}", w.spec, Fill(value=0.0, shape=w.shape, dtype=w.dtype))


def _replace(graph: Graph, leaves: tuple[Tensor, ...], values: tuple[Tensor, ...]) -> None:
    for leaf, value in zip(leaves, values, strict=True):
        graph.updates[leaf.name] = value.id
        graph.like[value.id] = leaf.id


def _positive(name: str, value: float) -> float:
    if not 0.0 < value < float("inf"):
        raise SettingError(f"learning rate: {name}={value} is not positive and finite.")
    return float(value)


def _rate(rate: float | Rate) -> Rate:
    if isinstance(rate, int | float):
        return constant(rate)
    if not callable(rate):
        raise SettingError(f"learning rate: {rate!r} is not a number, or a rule such as optim.cosine(0.1, steps=1000).")
    return rate
