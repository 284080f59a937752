"""Arithmetic, activations, reductions, shapes and losses, beside PyTorch's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from agree import TOLERANCE, Case, check

from rapydli_flow import nn
from rapydli_flow.ops import Cast, Copy, Equal

X, Y, C = (3, 5, 4), (3, 5, 4), (4,)
POSITIVE = {0: (0.5, 2.0)}
SCORES, LABELS = (6, 9), {1: (0, 9)}
MAP = {1: (0, 5)}


def one(name, ours, theirs, shape=X, draws=None, **how):
    return Case(name, ours, theirs, [shape], draws or {}, **how)


def two(name, ours, theirs, shapes=(X, Y), draws=None, **how):
    return Case(name, ours, theirs, list(shapes), draws or {}, **how)


ARITHMETIC = [
    two("add, broadcast", lambda a, b: a + b, lambda a, b: a + b, (X, C)),
    two("subtract", lambda a, b: a - b, lambda a, b: a - b),
    two("multiply", lambda a, b: a * b, lambda a, b: a * b, (X, (5, 1))),
    two("divide", lambda a, b: a / b, lambda a, b: a / b, draws={1: (0.5, 2.0)}),
    one("scale", lambda x: 3.0 - 2.5 * x, lambda x: 3.0 - 2.5 * x),
    one("power 2", lambda x: x**2, lambda x: x**2),
    one("power 3", lambda x: x**3, lambda x: x**3),
    one("power -1.5", lambda x: x**-1.5, lambda x: x**-1.5, draws=POSITIVE),
    one("exp", nn.exp, torch.exp),
    one("log", nn.log, torch.log, draws=POSITIVE),
    one("sqrt", nn.sqrt, torch.sqrt, draws=POSITIVE),
    one("abs", abs, torch.abs),
    two("maximum", nn.maximum, torch.maximum),
    two("minimum", nn.minimum, torch.minimum, (X, C)),
    one("clip", lambda x: nn.clip(x, -0.5, 0.7), lambda x: torch.clip(x, -0.5, 0.7)),
    two("where", lambda a, b: nn.where(a > 0.2, a, b), lambda a, b: torch.where(a > 0.2, a, b)),
    two("where, less", lambda a, b: nn.where(a < b, a, b * 2.0), lambda a, b: torch.where(a < b, a, b * 2.0)),
    two("equal", Equal(), lambda a, b: (a == b).to(a.dtype), draws={0: (0, 3), 1: (0, 3)}, differentiable=False),
    one("copy", Copy(), lambda x: x.clone()),
    one(
        "cast", lambda x: Cast(to="float64")(x), lambda x: x.to(torch.float64), draws={0: (0, 9)}, differentiable=False
    ),
    two("greater", lambda a, b: a > b, lambda a, b: (a > b).to(a.dtype), differentiable=False),
    two("matmul", lambda a, b: a @ b, lambda a, b: a @ b, ((5, 7), (7, 3))),
]

ACTIVATIONS = [
    one("relu", nn.relu, F.relu),
    one("leaky_relu", lambda x: nn.leaky_relu(x, 0.2), lambda x: F.leaky_relu(x, 0.2)),
    one("prelu", nn.prelu, lambda x, slope: F.prelu(x.movedim(-1, 1), slope).movedim(1, -1)),
    one("elu", lambda x: nn.elu(x, 0.7), lambda x: F.elu(x, 0.7)),
    one("sigmoid", nn.sigmoid, torch.sigmoid),
    one("tanh", nn.tanh, torch.tanh),
    one("gelu", nn.gelu, F.gelu),
    one("gelu, tanh", lambda x: nn.gelu(x, approximate="tanh"), lambda x: F.gelu(x, approximate="tanh")),
    one("swish", nn.swish, F.silu),
    one("softplus", nn.softplus, F.softplus),
    one("softmax", nn.softmax, lambda x: F.softmax(x, -1), SCORES),
    one("softmax, map", nn.softmax, lambda x: F.softmax(x, -1)),
    one("log_softmax", nn.log_softmax, lambda x: F.log_softmax(x, -1)),
]

REDUCTIONS = [
    one("sum", lambda x: nn.sum(x, (0, 2)), lambda x: x.sum((0, 2))),
    one("mean", lambda x: nn.mean(x, -1), lambda x: x.mean(-1)),
    one("max", lambda x: nn.max(x, (1, 2)), lambda x: x.amax((1, 2))),
    one("min", lambda x: nn.min(x, 1), lambda x: x.amin(1)),
    one("argmin", lambda x: nn.argmin(x, -1), lambda x: x.argmin(-1), differentiable=False),
    one("argmax", lambda x: nn.argmax(x, 1), lambda x: x.argmax(1), differentiable=False),
]

SHAPES = [
    one("reshape", lambda x: nn.reshape(x, (2, -1)), lambda x: x.reshape(3, 2, -1)),
    one("flatten", nn.flatten, lambda x: x.flatten(1)),
    one("transpose", lambda x: nn.transpose(x, (0, 2, 1)), lambda x: x.permute(0, 2, 1)),
    two("concatenate", lambda a, b: nn.concatenate([a, b, a], 1), lambda a, b: torch.cat([a, b, a], 1), (X, (3, 2, 4))),
    one(
        "split",
        lambda x: nn.split(x, (2, 3), axis=1)[0] * 2.0 + nn.split(x, (2, 3), axis=1)[1][:, 1:],
        lambda x: torch.split(x, (2, 3), 1)[0] * 2.0 + torch.split(x, (2, 3), 1)[1][:, 1:],
    ),
    one("slice", lambda x: x[:, 1:5:2, -2:], lambda x: x[:, 1:5:2, -2:]),
    one("index", lambda x: x[:, 2], lambda x: x[:, 2]),
    one("pad", lambda x: nn.pad(x, ((1, 2), (0, 1)), 0.5, axes=(1, 2)), lambda x: F.pad(x, (0, 1, 1, 2), value=0.5)),
    two("gather", lambda x, i: nn.gather(x, i, 1), lambda x, i: torch.gather(x, 1, i), (X, (3, 7, 4)), MAP),
]

LOSSES = [
    two("cross_entropy", nn.cross_entropy, F.cross_entropy, (SCORES, (6,)), LABELS),
    two(
        "cross_entropy, map",
        nn.cross_entropy,
        lambda x, t: F.cross_entropy(x.movedim(-1, 1), t),
        ((2, 3, 4, 9), (2, 3, 4)),
        LABELS,
    ),
    two(
        "negative_log_likelihood",
        lambda x, t: nn.negative_log_likelihood(nn.log_softmax(x), t),
        lambda x, t: F.nll_loss(F.log_softmax(x, -1), t),
        (SCORES, (6,)),
        LABELS,
    ),
    two("mean_squared_error", nn.mean_squared_error, F.mse_loss),
    two("mean_absolute_error", nn.mean_absolute_error, F.l1_loss),
    two("smooth_l1", lambda y, t: nn.smooth_l1(y, t, beta=0.6), lambda y, t: F.smooth_l1_loss(y, t, beta=0.6)),
    two(
        "sigmoid_cross_entropy",
        nn.sigmoid_cross_entropy,
        F.binary_cross_entropy_with_logits,
        draws={1: (0.0, 1.0)},
    ),
    two(
        "cross_entropy, smoothing",
        lambda x, t: nn.cross_entropy(x, t, smoothing=0.2),
        lambda x, t: F.cross_entropy(x, t, label_smoothing=0.2),
        (SCORES, (6,)),
        LABELS,
    ),
    two(
        "hinge, power 2",
        lambda x, t: nn.hinge(x, t, power=2),
        lambda x, t: F.multi_margin_loss(x, t, p=2),
        (SCORES, (6,)),
        LABELS,
    ),
    two("hinge", nn.hinge, F.multi_margin_loss, (SCORES, (6,)), LABELS),
    two(
        "accuracy",
        nn.accuracy,
        lambda x, t: (x.argmax(1) == t).to(x.dtype).mean(),
        (SCORES, (6,)),
        LABELS,
        differentiable=False,
    ),
    two(
        "top_k",
        nn.top_k(3),
        lambda x, t: (x.topk(3).indices == t[:, None]).any(1).to(x.dtype).mean(),
        (SCORES, (6,)),
        LABELS,
        differentiable=False,
    ),
]

CASES = [*ARITHMETIC, *ACTIVATIONS, *REDUCTIONS, *SHAPES, *LOSSES]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_agrees_with_pytorch(case: Case, dtype: str) -> None:
    check(case, dtype)
