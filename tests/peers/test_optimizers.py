"""Update rules and learning rates beside PyTorch's, over some steps of one small network in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import rapydli_flow as rf
from rapydli_flow import nn, optim

STEPS, BATCH = 8, 6


RULES = {
    "sgd": (lambda: optim.sgd(0.1), lambda p: torch.optim.SGD(p, 0.1)),
    "momentum": (
        lambda: optim.sgd(0.1, momentum=0.9, weight_decay=0.01),
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.01),
    ),
    "nesterov": (
        lambda: optim.sgd(0.1, momentum=0.9, nesterov=True),
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True),
    ),
    "adagrad": (lambda: optim.adagrad(0.05), lambda p: torch.optim.Adagrad(p, 0.05)),
    "rmsprop": (lambda: optim.rmsprop(0.01), lambda p: torch.optim.RMSprop(p, 0.01)),
    "rmsprop, momentum": (
        lambda: optim.rmsprop(0.01, momentum=0.5),
        lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.5),
    ),
    "adadelta": (lambda: optim.adadelta(1.0), lambda p: torch.optim.Adadelta(p, 1.0)),
    "adam": (
        lambda: optim.adam(0.01, weight_decay=0.02),
        lambda p: torch.optim.Adam(p, 0.01, weight_decay=0.02),
    ),
    "adamw": (lambda: optim.adamw(0.01, weight_decay=0.1), lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1)),
}

RATES = {
    "step": (
        lambda: optim.step_decay(0.1, factor=0.5, every=3),
        lambda o: torch.optim.lr_scheduler.StepLR(o, 3, 0.5),
    ),
    "multistep": (
        lambda: optim.multistep(0.1, steps=(2, 5), factor=0.3),
        lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [2, 5], 0.3),
    ),
    "exponential": (
        lambda: optim.exponential(0.1, factor=0.8),
        lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.8),
    ),
    "polynomial": (
        lambda: optim.polynomial(0.1, steps=STEPS, power=2.0),
        lambda o: torch.optim.lr_scheduler.PolynomialLR(o, STEPS, 2.0),
    ),
    "cosine": (
        lambda: optim.cosine(0.1, steps=STEPS),
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, STEPS),
    ),
}


def compare(
    optimizer: Any, make: Callable[..., Any], schedule: Callable[..., Any] | None = None, clip: float = 0.0
) -> None:
    """The same parameters after every step."""
    rng = np.random.default_rng(3)
    graph = rf.trace(lambda x: nn.dense(nn.tanh(nn.dense(x, 5)), 4), rf.Spec((BATCH, 7), "float64"))
    step = rf.stepper(rf.train_step(graph, loss=nn.cross_entropy, optimizer=optimizer))
    state = step.init()
    names = [x.name for x in graph.leaves("param")]
    theirs = {name: torch.tensor(np.array(state[name]), requires_grad=True) for name in names}
    rule = make(list(theirs.values()))
    rate = schedule(rule) if schedule else None
    (w1, b1), (w2, b2) = ([theirs[f"dense_{i}/{part}"] for part in "wb"] for i in (1, 2))
    for _ in range(STEPS):
        x, label = rng.normal(size=(BATCH, 7)), rng.integers(0, 4, BATCH)
        state, metrics = step(state, {"x": x, "label": label})
        rule.zero_grad()
        loss = F.cross_entropy(torch.tanh(torch.as_tensor(x) @ w1 + b1) @ w2 + b2, torch.as_tensor(label))
        loss.backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(list(theirs.values()), clip)
        rule.step()
        if rate is not None:
            rate.step()
        assert metrics["loss"] == pytest.approx(float(loss.detach()), rel=1e-8)
        for name in names:
            np.testing.assert_allclose(state[name], theirs[name].detach().numpy(), rtol=1e-8, atol=1e-10, err_msg=name)
    step.close()


@pytest.mark.parametrize("name", RULES)
def test_rules(name: str) -> None:
    ours, theirs = RULES[name]
    compare(ours(), theirs)


@pytest.mark.parametrize("name", RATES)
def test_rates(name: str) -> None:
    ours, theirs = RATES[name]
    compare(optim.sgd(ours()), lambda p: torch.optim.SGD(p, 0.1), theirs)


def test_clipping_by_global_norm() -> None:
    compare(optim.clip_norm(optim.sgd(0.5), 0.3), lambda p: torch.optim.SGD(p, 0.5), clip=0.3)
