"""Update rules and learning rates against plain loops; their op formulas are held to by test_ops."""

from math import cos, exp, pi
from typing import Any

import numpy as np
import pytest
from networks import batch, perceptron, record, step_of, traced

from rapydli_flow import optim
from rapydli_flow.errors import GraphError, SettingError
from rapydli_flow.graph import Graph
from rapydli_flow.ops import Cast
from rapydli_flow.spec import Spec
from rapydli_flow.testing.interpret import interpret, start

X = Spec((6, 4), "float64")
STEPS = 6


def trajectory(optimizer: Any) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """For each step: gradients, and the values of all leaves before it; last, the values at the end."""

    def both(graph: Graph, pairs: Any, step: Any) -> None:
        record(graph, pairs, step)
        optimizer(graph, pairs, step)

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


def test_nesterov_momentum() -> None:
    def loop(w: Any, gradients: Any) -> Any:
        m = np.zeros_like(w)
        for g in gradients:
            g = g + 0.01 * w
            m = 0.7 * m + g
            w = w - 0.3 * (g + 0.7 * m)
            yield w

    check(optim.sgd(0.3, momentum=0.7, nesterov=True, weight_decay=0.01), loop)


@pytest.mark.parametrize("decay", [0.0, 0.01])
def test_adagrad(decay: float) -> None:
    def loop(w: Any, gradients: Any) -> Any:
        v = np.zeros_like(w)
        for g in gradients:
            g = g + decay * w
            v = v + g**2
            w = w - 0.1 * g / (np.sqrt(v) + 1e-3)
            yield w

    check(optim.adagrad(0.1, eps=1e-3, weight_decay=decay), loop)


@pytest.mark.parametrize("momentum", [0.0, 0.6])
def test_rmsprop(momentum: float) -> None:
    def loop(w: Any, gradients: Any) -> Any:
        v, m = np.zeros_like(w), np.zeros_like(w)
        for g in gradients:
            g = g + 0.01 * w
            v = 0.9 * v + 0.1 * g**2
            m = momentum * m + g / (np.sqrt(v) + 1e-4)
            w = w - 0.02 * m
            yield w

    check(optim.rmsprop(0.02, alpha=0.9, eps=1e-4, momentum=momentum, weight_decay=0.01), loop)


def test_adadelta() -> None:
    def loop(w: Any, gradients: Any) -> Any:
        v, d = np.zeros_like(w), np.zeros_like(w)
        for g in gradients:
            g = g + 0.01 * w
            v = 0.8 * v + 0.2 * g**2
            s = np.sqrt(d + 1e-4) / np.sqrt(v + 1e-4) * g
            d = 0.8 * d + 0.2 * s**2
            w = w - 0.5 * s
            yield w

    check(optim.adadelta(0.5, rho=0.8, eps=1e-4, weight_decay=0.01), loop)


def test_adamw_shrinks_parameters_apart_from_the_gradient() -> None:
    def loop(w: Any, gradients: Any) -> Any:
        m, v = np.zeros_like(w), np.zeros_like(w)
        for t, g in enumerate(gradients, start=1):
            w = w * (1 - 0.1 * 0.05)
            m = 0.8 * m + 0.2 * g
            v = 0.95 * v + 0.05 * g**2
            w = w - 0.1 * (m / (1 - 0.8**t)) / (np.sqrt(v / (1 - 0.95**t)) + 1e-6)
            yield w

    check(optim.adamw(0.1, beta_1=0.8, beta_2=0.95, eps=1e-6, weight_decay=0.05), loop)


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


def test_multistep() -> None:
    got = rates(optim.multistep(0.8, steps=[3, 7], factor=0.5), (0, 2, 3, 6, 7, 100))
    assert got == pytest.approx([0.8, 0.8, 0.4, 0.4, 0.2, 0.2])


def test_exponential_inverse_and_sigmoid() -> None:
    steps = (0, 1, 10, 50)
    assert rates(optim.exponential(0.2, factor=0.9), steps) == pytest.approx([0.2 * 0.9**i for i in steps])
    inverse = optim.inverse(0.2, gamma=0.1, power=0.75)
    assert rates(inverse, steps) == pytest.approx([0.2 * (1 + 0.1 * i) ** -0.75 for i in steps])
    falling = optim.sigmoid(0.2, gamma=-0.3, middle=10)
    assert rates(falling, steps) == pytest.approx([0.2 / (1 + exp(0.3 * (i - 10))) for i in steps])
    assert rates(falling, (10,)) == [0.1]
    assert 0.0 < rates(falling, (10**6,), "float32")[0] < 1e-30  # and no overflow on the way


def test_polynomial_ends_at_zero_and_stays() -> None:
    got = rates(optim.polynomial(0.2, steps=20, power=2.0), (0, 10, 20, 30))
    assert got == pytest.approx([0.2, 0.05, 0.0, 0.0])


def test_warmup_of_any_rate() -> None:
    assert rates(optim.warmup(0.4, 4), (0, 1, 3, 4, 9)) == pytest.approx([0.0, 0.1, 0.3, 0.4, 0.4])
    rising = optim.warmup(optim.step_decay(0.4, factor=0.5, every=6), 4, start=0.5)
    assert rates(rising, (0, 2, 4, 6), "float32") == pytest.approx([0.2, 0.3, 0.4, 0.2])


def test_a_rate_of_your_own() -> None:
    def mine(step: Any, dtype: str) -> Any:
        return 0.3 / (1.0 + Cast(to=dtype)(step))

    def loop(w: Any, gradients: Any) -> Any:
        for i, g in enumerate(gradients):
            w = w - 0.3 / (1 + i) * g
            yield w

    check(optim.sgd(mine), loop)
    with pytest.raises(GraphError, match=r"learning rate: .* gave f32\[\] but the parameters need f64\[\]"):
        step_of(traced(perceptron, X), optim.sgd(lambda step, dtype: mine(step, "float32")))
    with pytest.raises(GraphError, match=r"learning rate: .* gave float, not a tensor"):
        step_of(traced(perceptron, X), optim.sgd(lambda step, dtype: 0.1))


def test_an_adjustable_rate_has_one_clock_that_is_1_until_it_is_set() -> None:
    rate = optim.adjustable(optim.constant(0.4))
    step = step_of(traced(perceptron, X), optim.groups({"dense_1": optim.sgd(rate)}, optim.adam(rate)))
    (clock,) = [leaf for leaf in step.leaves("clock") if leaf.name == "rate_factor"]
    assert clock.spec == Spec((), "float64")
    feeds = {**start(step), **batch(X, 3)}
    one, half = (interpret(step, {**feeds, **more}).updates for more in ({}, {"rate_factor": np.float64(0.5)}))
    for name in ("dense_1/w", "dense_2/b"):
        assert one[name] - feeds[name] == pytest.approx(2 * (half[name] - feeds[name]))
    assert np.abs(one["dense_1/w"] - feeds["dense_1/w"]).max() > 0.01


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: optim.sgd(-0.1), "learning rate: rate=-0.1 is not a positive"),
        (lambda: optim.sgd(0.1, momentum=1.0), r"sgd: momentum=1.0 is not a number in \[0, 1\)"),
        (lambda: optim.adam(0.1, beta_1=1.5), r"adam: beta_1=1.5 is not a number in \[0, 1\)"),
        (lambda: optim.adam(0.1, beta_2=-0.5), r"adam: beta_2=-0.5 is not a number in \[0, 1\)"),
        (lambda: optim.constant(0.0), "learning rate: rate=0.0 is not a positive"),
        (lambda: optim.cosine(float("nan"), steps=3), "learning rate: rate=nan is not a positive"),
        (lambda: optim.sgd(0.1, nesterov=True), "sgd: nesterov looks ahead along the momentum"),
        (lambda: optim.sgd(0.1, weight_decay=-1.0), "sgd: weight_decay=-1.0 is not a finite number, 0 or more"),
        (lambda: optim.rmsprop(0.1, alpha=1.0), r"rmsprop: alpha=1.0 is not a number in \[0, 1\)"),
        (lambda: optim.multistep(0.1, steps=[7, 3]), r"learning rate: steps=\[7, 3\] are not .*rising"),
        (lambda: optim.sigmoid(0.1, gamma=0.0, middle=3), "learning rate: gamma=0.0 is not a finite number other"),
        (lambda: optim.warmup(0.1, 10, start=1.0), r"warmup: start=1.0 is not a number in \[0, 1\)"),
        (lambda: optim.cosine(0.1, steps=9, warmup=-1), "learning rate: warmup=-1 is not a whole number of steps"),
        (lambda: optim.step_decay(0.1, every=0), "learning rate: every=0 is not a positive"),
        (
            lambda: optim.step_decay(0.1, factor=float("inf"), every=2),
            "learning rate: factor=inf is not a positive, f",
        ),
        (lambda: optim.sgd(True), "learning rate: True is not a number, or a rule"),
        (lambda: optim.sgd(0.1, momentum=False), r"sgd: momentum=False is not a number in \[0, 1\)"),
        (lambda: optim.adam(0.1, beta_1="0.9"), r"adam: beta_1='0.9' is not a number in \[0, 1\)"),
        (lambda: optim.adagrad(0.1, eps=True), "adagrad: eps=True is not a finite number, 0 or more"),
        (lambda: optim.step_decay(0.1, every=True), "learning rate: every=True is not a positive, finite number"),
        (lambda: optim.cosine(0.1, steps=9, warmup=True), "learning rate: warmup=True is not a whole number of steps"),
        (lambda: optim.sigmoid(0.1, gamma=True, middle=3), "learning rate: gamma=True is not a finite number"),
        (lambda: optim.warmup(0.1, 10, start=False), r"warmup: start=False is not a number in \[0, 1\)"),
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
