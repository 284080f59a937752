"""Update rules and learning rates against plain loops."""

from math import cos, pi
from typing import Any

import numpy as np
import pytest
from networks import batch, perceptron, record, step_of, traced

from rapydli_flow import optim
from rapydli_flow.errors import SettingError
from rapydli_flow.graph import Graph
from rapydli_flow.spec import Spec
from rapydli_flow.testing.interpret import interpret, start

X = Spec((6, 4), "float64")
STEPS = 6


def trajectory(optimizer: Any) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """For each step: gradients, and the values of all leaves before it; last, the values at the end."""

    def both(graph: Graph, w: Any, g: Any) -> None:
        record(graph, w, g)
        optimizer(graph, w, g)

    step = step_of(traced(perceptron, X), both)
    state, out = start(step, 3), []
    for i in range(STEPS):
        values = interpret(step, {**state, **batch(X, 3, seed=i)}, step=i)
        out.append((values.outputs, state))
        state = {**state, **values.updates}
    return [*out, ({}, state)]


def check(optimizer: Any, loop: Any) -> None:
    """``loop(w, gradients)`` gives the parameters after each step."""
    path = trajectory(optimizer)
    for name in ("dense_1/w", "dense_1/b", "dense_2/w", "dense_2/b"):
        gradients = [values[f"d {name}"] for values, _ in path[:-1]]
        for got, want in zip(path[1:], loop(path[0][1][name], gradients), strict=True):
            assert got[1][name] == pytest.approx(want, rel=1e-11, abs=1e-13)


@pytest.mark.parametrize("decay", [0.0, 0.01])
def test_descent(decay: float) -> None:
    def loop(w: Any, gradients: Any) -> Any:
        for g in gradients:
            w = w - 0.3 * (g + decay * w)
            yield w

    check(optim.sgd(0.3, weight_decay=decay), loop)


@pytest.mark.parametrize("decay", [0.0, 0.01])
def test_momentum(decay: float) -> None:
    def loop(w: Any, gradients: Any) -> Any:
        m = np.zeros_like(w)
        for g in gradients:
            m = 0.7 * m + g + decay * w
            w = w - 0.3 * m
            yield w

    check(optim.sgd(0.3, momentum=0.7, weight_decay=decay), loop)


@pytest.mark.parametrize("decay", [0.0, 0.01])
def test_adam(decay: float) -> None:
    def loop(w: Any, gradients: Any) -> Any:
        m, v = np.zeros_like(w), np.zeros_like(w)
        for t, g in enumerate(gradients, start=1):
            g = g + decay * w
            m = 0.8 * m + 0.2 * g
            v = 0.95 * v + 0.05 * g**2
            m_hat, v_hat = m / (1 - 0.8**t), v / (1 - 0.95**t)
            w = w - 0.1 * m_hat / (np.sqrt(v_hat) + 1e-6)
            yield w

    check(optim.adam(0.1, beta_1=0.8, beta_2=0.95, eps=1e-6, weight_decay=decay), loop)


def test_a_rate_that_changes_is_used() -> None:
    def loop(w: Any, gradients: Any) -> Any:
        for i, g in enumerate(gradients):
            w = w - 0.4 * 0.5 ** (i // 2) * g
            yield w

    check(optim.sgd(optim.step_decay(0.4, factor=0.5, every=2)), loop)


def rates(rate: Any, steps: Any, dtype: str = "float64") -> list[float]:
    graph = Graph()
    graph.outputs["rate"] = rate(graph.leaf("clock", "step", Spec((), "int64")), dtype).id
    assert graph.spec(graph.outputs["rate"]) == Spec((), dtype)
    return [float(interpret(graph, {}, step=i).outputs["rate"]) for i in steps]


def test_constant() -> None:
    assert rates(optim.constant(0.25), (0, 1, 10**6)) == [0.25] * 3
    assert rates(optim.constant(0.1), (0,), "float32") == [float(np.float32(0.1))]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("every", [1, 3, 10, 49])
def test_step_decay(dtype: str, every: int) -> None:
    steps = range(0, 4 * every + 1)
    want = [0.8 * 0.5 ** (i // every) for i in steps]
    assert rates(optim.step_decay(0.8, factor=0.5, every=every), steps, dtype) == pytest.approx(want, rel=1e-6)


def test_cosine() -> None:
    steps = (0, 5, 10, 15, 20, 25)
    want = [0.5 * 0.5 * (1 + cos(pi * min(i, 20) / 20)) for i in steps]
    got = rates(optim.cosine(0.5, steps=20), steps)
    assert got == pytest.approx(want, abs=1e-15)
    assert got[0] == 0.5
    assert got[2] == pytest.approx(0.25)
    assert got[4] == pytest.approx(0.0, abs=1e-15)


def test_cosine_with_warmup() -> None:
    got = rates(optim.cosine(1.0, steps=14, warmup=4), (0, 1, 2, 3, 4, 9, 14))
    assert got == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 0.5, 0.0], abs=1e-15)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: optim.sgd(-0.1), "learning rate: rate=-0.1 is not positive"),
        (lambda: optim.sgd(0.1, momentum=1.0), r"sgd: momentum=1.0 is not in \[0, 1\)"),
        (lambda: optim.adam(0.1, beta_1=1.5), r"adam: beta_1=1.5 is not in \[0, 1\)"),
        (lambda: optim.adam(0.1, beta_2=-0.5), r"adam: beta_2=-0.5 is not in \[0, 1\)"),
        (lambda: optim.constant(0.0), "learning rate: rate=0.0 is not positive"),
        (lambda: optim.cosine(float("nan"), steps=3), "learning rate: rate=nan is not positive"),
        (lambda: optim.step_decay(0.1, every=0), "learning rate: every=0 is not positive"),
        (lambda: optim.step_decay(0.1, factor=float("inf"), every=2), "learning rate: factor=inf is not positive and"),
    ],
)
def test_what_is_refused(make: Any, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        make()


def test_slots_are_state_beside_their_parameter() -> None:
    step = step_of(traced(perceptron, X), optim.adam(0.1))
    state = {leaf.name: leaf.spec for leaf in step.leaves("state")}
    for leaf in step.leaves("param"):
        assert state[f"{leaf.name}/mean"] == state[f"{leaf.name}/square"] == leaf.spec
    assert len(state) == 2 * len(step.leaves("param"))
    moved = {step.nodes[a[0]].op.name: step.value_name(b) for a, b in step.like.items()}
    assert moved["adam"].endswith("/square")
