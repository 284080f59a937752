"""Update rules: SGD, Adagrad, RMSprop, Adadelta, Adam, AdamW. Their formulas are PyTorch's; see `ops.update`.

An optimizer is a function of a graph, all pairs of a parameter w and its gradient g, and the step. For every
pair it says what becomes of w, and of the state that it keeps beside it. ``weight_decay`` adds
``weight_decay * w`` to the gradient (L2), but in `adamw`. ``rate`` is a number or a rule of `rates`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..errors import SettingError
from ..graph import Graph, Tensor
from ..graph.tracing import Optimizer, Pairs
from ..ops import Adadelta, Adagrad, Adam, BiasCorrection, Descent, Momentum, Op, Rmsprop, RmspropMomentum
from .rates import Rate, rate_of
from .slots import rates_now, replace, share, size, slot


def sgd(rate: float | Rate, *, momentum: float = 0.0, nesterov: bool = False, weight_decay: float = 0.0) -> Optimizer:
    """Stochastic gradient descent: g += weight_decay w; m = momentum m + g; w -= rate m.

    ``nesterov``: w -= rate (g + momentum m) instead.
    """
    share("sgd", momentum=momentum)
    size("sgd", weight_decay=weight_decay)
    if nesterov and momentum == 0.0:
        raise SettingError("sgd: nesterov looks ahead along the momentum; give momentum > 0, such as 0.9.")
    if momentum == 0.0:
        return _rule(rate, Descent(decay=weight_decay))
    return _rule(rate, Momentum(beta=momentum, decay=weight_decay, nesterov=nesterov), "momentum")


def adagrad(rate: float | Rate, *, eps: float = 1e-10, weight_decay: float = 0.0) -> Optimizer:
    """Adagrad (Duchi et al. 2011): v += g^2; w -= rate g / (sqrt(v) + eps)."""
    size("adagrad", eps=eps, weight_decay=weight_decay)
    return _rule(rate, Adagrad(eps=eps, decay=weight_decay), "square")


def rmsprop(
    rate: float | Rate, *, alpha: float = 0.99, eps: float = 1e-8, momentum: float = 0.0, weight_decay: float = 0.0
) -> Optimizer:
    """RMSprop (Tieleman, Hinton 2012): v = alpha v + (1 - alpha) g^2; w -= rate g / (sqrt(v) + eps).

    With ``momentum``: m = momentum m + g / (sqrt(v) + eps); w -= rate m.
    """
    share("rmsprop", alpha=alpha, momentum=momentum)
    size("rmsprop", eps=eps, weight_decay=weight_decay)
    if momentum == 0.0:
        return _rule(rate, Rmsprop(alpha=alpha, eps=eps, decay=weight_decay), "square")
    return _rule(rate, RmspropMomentum(alpha=alpha, eps=eps, decay=weight_decay, beta=momentum), "square", "momentum")


def adadelta(rate: float | Rate = 1.0, *, rho: float = 0.9, eps: float = 1e-6, weight_decay: float = 0.0) -> Optimizer:
    """Adadelta (Zeiler 2012): v = rho v + (1 - rho) g^2; s = g sqrt(d + eps) / sqrt(v + eps);
    d = rho d + (1 - rho) s^2; w -= rate s."""
    share("adadelta", rho=rho)
    size("adadelta", eps=eps, weight_decay=weight_decay)
    return _rule(rate, Adadelta(rho=rho, eps=eps, decay=weight_decay), "square", "delta")


def adam(
    rate: float | Rate, *, beta_1: float = 0.9, beta_2: float = 0.999, eps: float = 1e-8, weight_decay: float = 0.0
) -> Optimizer:
    """Adam (Kingma, Ba 2015), with bias correction; weight decay is added to the gradient.

    m = beta_1 m + (1 - beta_1) g; v = beta_2 v + (1 - beta_2) g^2; at the t-th step, t from 1:
    w -= rate (m / (1 - beta_1^t)) / (sqrt(v / (1 - beta_2^t)) + eps).
    """
    share("adam", beta_1=beta_1, beta_2=beta_2)
    size("adam", eps=eps, weight_decay=weight_decay)
    return _adam(rate, Adam(beta_1=beta_1, beta_2=beta_2, eps=eps, decay=weight_decay))


def adamw(
    rate: float | Rate, *, beta_1: float = 0.9, beta_2: float = 0.999, eps: float = 1e-8, weight_decay: float = 0.01
) -> Optimizer:
    """Adam with decoupled weight decay (Loshchilov, Hutter 2019): w -= rate weight_decay w, then as `adam`."""
    share("adamw", beta_1=beta_1, beta_2=beta_2)
    size("adamw", eps=eps, weight_decay=weight_decay)
    return _adam(rate, Adam(beta_1=beta_1, beta_2=beta_2, eps=eps, decay=weight_decay, decoupled=True))


def _adam(rate: float | Rate, op: Adam) -> Optimizer:
    def corrections(step: Tensor, dtype: str) -> tuple[Tensor, ...]:
        first, second = (BiasCorrection(beta=beta, to=dtype)(step) for beta in (op.beta_1, op.beta_2))
        return first, second

    return _rule(rate, op, "mean", "square", more=corrections)


def _rule(
    rate: float | Rate, op: Op, *labels: str, more: Callable[[Tensor, str], tuple[Tensor, ...]] = lambda *_: ()
) -> Optimizer:
    """``op`` of (w, its slots, g, rate, and ``more`` scalars of the step) gives (w, its slots)."""
    rule = rate_of(rate)

    def update(graph: Graph, pairs: Pairs, step: Tensor) -> None:
        now = rates_now(rule, pairs, step)
        extra = {dtype: more(step, dtype) for dtype in now}
        for w, g in pairs:
            slots = [slot(graph, w, label) for label in labels]
            made: Any = op(w, *slots, g, now[w.dtype], *extra[w.dtype])
            replace(graph, [w, *slots], made if labels else [made])

    return update
