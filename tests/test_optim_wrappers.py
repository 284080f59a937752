"""Optimizers made of optimizers: what is clipped, accumulated, averaged, grouped and frozen."""

from typing import Any

import numpy as np
import pytest
from networks import batch, perceptron, record, step_of, traced

import rapydli_flow as rf
from cpu_kernels.compile import host
from rapydli_flow import optim
from rapydli_flow.errors import GraphError, SettingError
from rapydli_flow.graph import Graph, from_json, to_json
from rapydli_flow.scheduler import compile_program, data_parallel
from rapydli_flow.spec import Spec
from rapydli_flow.testing.interpret import interpret, start
from rapydli_flow.tuner import Tuning

X = Spec((6, 4), "float64")
NAMES = ("dense_1/w", "dense_1/b", "dense_2/w", "dense_2/b")


def one_step(optimizer: Any, seed: int = 0) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """The gradients, the state before, and what the optimizer makes of it."""
    step = step_of(traced(perceptron, X), optimizer)
    step.outputs |= {f"d {name}": value for name, value in step.gradients.items()}
    feeds = {**start(step, 3), **batch(X, 3, seed=seed)}
    found = interpret(step, feeds)
    return {name: found.outputs.get(f"d {name}") for name in NAMES}, feeds, found.updates


def records(count: int) -> dict[str, Any]:
    rng = np.random.default_rng(5)
    return {"x": rng.normal(size=(count, 4)), "label": rng.integers(0, 3, count)}


def run(optimizer: Any, size: int, steps: int, ranks: int = 1) -> dict[str, Any]:
    """The state after a training run through the compiled kernels."""
    step = step_of(traced(perceptron, Spec((size, 4), "float64")), optimizer)
    return rf.fit(step, records(64), steps=steps, shuffle=False, plan=data_parallel(step, ranks)).state


def equal(one: Any, other: Any, names: Any = NAMES) -> None:
    for name in names:
        np.testing.assert_allclose(one[name], other[name], rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("share", [0.5, 2.0])
def test_clip_norm_is_of_all_gradients_together(share: float) -> None:
    d = one_step(record)[0]
    norm = float(np.sqrt(sum((g**2).sum() for g in d.values())))
    found, before, after = one_step(optim.clip_norm(optim.sgd(0.5), share * norm))
    for name in NAMES:
        np.testing.assert_array_equal(found[name], d[name])  # of the loss, not what came of them
        want = before[name] - 0.5 * min(1.0, share * norm / (norm + 1e-6)) * d[name]
        np.testing.assert_allclose(after[name], want, rtol=1e-12)


def test_clip_norm_in_a_network_of_two_dtypes() -> None:
    """The norm is in the wider one."""
    graph = Graph()
    w = {dtype: graph.leaf("param", dtype, Spec((2,), dtype)) for dtype in ("float32", "float64")}
    step = graph.leaf("clock", "step", Spec((), "int64"))
    optim.clip_norm(optim.sgd(1.0), 1.0)(graph, [(x, x * 1.0) for x in w.values()], step)
    feeds = {"float32": np.array([3.0, 0.0], np.float32), "float64": np.array([0.0, 4.0])}
    after = interpret(graph, feeds).updates
    assert after["float32"] == pytest.approx([2.4, 0.0], rel=1e-6)
    assert after["float64"] == pytest.approx([0.0, 3.2], rel=1e-6)
    assert after["float64"].dtype == np.float64


def test_clip_value() -> None:
    d = one_step(record)[0]
    limit = float(np.abs(d["dense_1/w"]).max()) / 3
    _, before, after = one_step(optim.clip_value(optim.sgd(0.5), limit))
    for name in NAMES:
        np.testing.assert_allclose(after[name], before[name] - 0.5 * np.clip(d[name], -limit, limit), rtol=1e-12)


@pytest.mark.parametrize(
    "inner",
    [optim.adam(optim.step_decay(0.1, factor=0.5, every=2)), pytest.param(optim.sgd(0.3), marks=pytest.mark.slow)],
)
def test_four_batches_of_8_are_one_of_32(inner: Any) -> None:
    whole = run(inner, 32, 4)
    parts = run(optim.accumulate(inner, 4), 8, 16)
    equal(whole, parts, whole)


def test_between_turns_the_inner_optimizer_stands_still() -> None:
    step = step_of(traced(perceptron, X), optim.accumulate(optim.adam(0.1), 3))
    state = start(step, 3)
    for i in range(6):
        found = interpret(step, {**state, **batch(X, 3, seed=i)}, step=i)
        moved = {name for name, value in found.updates.items() if (value != state[name]).any()}
        kept = {f"{name}/accumulated" for name in NAMES}
        assert kept <= moved
        assert moved - kept == (set(found.updates) - kept if i % 3 == 2 else set())
        state = {**state, **found.updates}
        assert all((state[name] == 0.0).all() == (i % 3 == 2) for name in kept)


def test_groups() -> None:
    d, before, after = one_step(
        optim.groups({"dense_1/*": optim.sgd(0.5), "*/b": optim.sgd(0.1)}, optim.sgd(0.2, momentum=0.9))
    )
    for name, rate in zip(NAMES, (0.5, 0.5, 0.2, 0.1), strict=True):
        np.testing.assert_allclose(after[name], before[name] - rate * d[name], rtol=1e-12)
    assert [name for name in after if name.endswith("/momentum")] == ["dense_2/w/momentum"]


def test_frozen_parameters_stay_and_cost_no_gradient() -> None:
    step = step_of(traced(perceptron, X), optim.freeze(optim.sgd(0.5), "dense_1"))
    assert set(step.updates) == set(step.gradients) == {"dense_2/w", "dense_2/b"}
    assert not any(node.name.startswith("grad/dense_1") for node in step)
    state = run(optim.freeze(optim.sgd(0.5), "dense_1"), 8, 3)
    first = rf.init(step_of(traced(perceptron, Spec((8, 4), "float64"))))
    np.testing.assert_array_equal(state["dense_1/w"], first["dense_1/w"])
    assert (state["dense_2/w"] != first["dense_2/w"]).any()


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (
            optim.groups({"dense_3/*": optim.sgd(0.1)}, optim.sgd(0.1)),
            r"groups: .dense_3.* matches no parameter. Near",
        ),
        (optim.freeze(optim.sgd(0.1), "dens_1/w"), r"freeze: 'dens_1/w' matches no parameter. Nearest: 'dense_1/w'"),
        (
            optim.groups({"dense_*": optim.sgd(0.1), "*/w": optim.sgd(0.1)}, optim.sgd(0.1)),
            r"groups: '\*/w' matches only parameters of the patterns before it",
        ),
        (optim.freeze(optim.sgd(0.1), "dense_1", "dense_2"), "freeze: dense_1, dense_2 match every parameter"),
    ],
)
def test_patterns_that_mean_nothing(optimizer: Any, message: str) -> None:
    with pytest.raises(GraphError, match=message):
        step_of(traced(perceptron, X), optimizer)


def test_what_is_refused() -> None:
    with pytest.raises(SettingError, match=r"clip_norm: max_norm=0\.0 is not a positive, finite number"):
        optim.clip_norm(optim.sgd(0.1), 0.0)
    with pytest.raises(SettingError, match=r"accumulate: every=2.5 is not a whole number"):
        optim.accumulate(optim.sgd(0.1), 2.5)  # type: ignore[arg-type]
    with pytest.raises(SettingError, match="clip_value: limit=True is not a positive"):
        optim.clip_value(optim.sgd(0.1), True)
    with pytest.raises(SettingError, match="accumulate: every=True is not a whole number"):
        optim.accumulate(optim.sgd(0.1), True)
    with pytest.raises(SettingError, match="freeze: name what is to be frozen"):
        optim.freeze(optim.sgd(0.1))
    with pytest.raises(SettingError, match=r"average: decay=1.0 is not a number in \[0, 1\)"):
        optim.average(optim.sgd(0.1), 1.0)
    with pytest.raises(SettingError, match="averaged: the state has no averages"):
        optim.averaged({"dense_1/w": np.zeros(3)})


def test_averages_follow_the_parameters() -> None:
    step = step_of(traced(perceptron, X), optim.average(optim.sgd(0.5), 0.75))
    state = start(step, 3)
    means = {name: state[name] for name in NAMES}
    for i in range(4):
        state |= interpret(step, {**state, **batch(X, 3, seed=i)}, step=i).updates
        means = {name: 0.75 * mean + 0.25 * state[name] for name, mean in means.items()}
    found = optim.averaged(state)
    assert found.keys() == state.keys()
    equal(found, means)
    assert (found["dense_1/w"] != state["dense_1/w"]).any()
    equal(optim.averaged(found), means)  # as good as once


def test_an_averaged_state_predicts() -> None:
    step = step_of(traced(perceptron, X), optim.average(optim.sgd(0.5), 0.5))
    done = rf.fit(step, records(12), steps=4)
    mean = optim.averaged(done.state)
    assert rf.evaluate(step, mean, records(12))["loss"] != rf.evaluate(step, done.state, records(12))["loss"]
    x = records(12)["x"]
    hidden = np.maximum(x @ mean["dense_1/w"] + mean["dense_1/b"], 0.0)
    want = hidden @ mean["dense_2/w"] + mean["dense_2/b"]
    np.testing.assert_allclose(rf.predict(done.graph, mean, x).compute(scheduler="sync"), want, rtol=1e-12)


EVERYTHING = optim.average(
    optim.clip_norm(
        optim.accumulate(
            optim.groups({"*/b": optim.sgd(optim.adjustable(0.2), momentum=0.9, nesterov=True)}, optim.adamw(0.05)), 2
        ),
        0.5,
    ),
    0.9,
)


@pytest.mark.slow
def test_wrappers_of_wrappers_give_the_same_on_any_number_of_ranks() -> None:
    """And through kernels as through references; and the graph goes through JSON."""
    step = step_of(traced(perceptron, Spec((8, 4), "float64")), EVERYTHING)
    assert to_json(from_json(to_json(step))) == to_json(step)
    state, data = start(step), records(64)
    for i in range(6):
        feeds = {name: array[8 * i : 8 * i + 8] for name, array in data.items()}
        state |= interpret(step, {**state, **feeds}, step=i).updates
    one, three = (run(EVERYTHING, 8, 6, ranks) for ranks in (1, 3))
    equal(state, one, state)
    equal(state, three, state)


def test_updates_go_straight_into_their_leaves() -> None:
    step = step_of(traced(perceptron, X), EVERYTHING)
    (graph,) = data_parallel(step, 1).rank_graphs(step)
    assert compile_program(graph, Tuning(host())).copied == 0
