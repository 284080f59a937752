"""Mixed precision: numbers near those of float32, casts where they belong, loss scaling as PyTorch's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import rapydli_flow as rf
from rapydli_flow import nn, optim, zoo
from rapydli_flow.errors import GraphError, SettingError
from rapydli_flow.graph import Graph, from_json, to_json
from rapydli_flow.ops import Cast, Conv, ConvFilterGrad, Leaf, Matmul, Sum
from rapydli_flow.spec import HALVES, Spec
from rapydli_flow.testing.interpret import interpret, run_nodes, start

pytestmark = pytest.mark.filterwarnings("ignore:NumPy computes with")
RNG = np.random.default_rng(0)
X, LABEL = RNG.standard_normal((8, 6, 6, 3)).astype(np.float32), RNG.integers(0, 5, 8)


def network(x: Any) -> Any:
    y = nn.relu(nn.batch_norm(nn.conv(x, 8, 3, padding=1, bias=False)))
    y = nn.relu(nn.conv(nn.max_pool(y, 2), 8, 3, padding=1))
    return nn.dense(y, 5)


def step_of(precision: str, **more: Any) -> Graph:
    graph = rf.trace(network, Spec(X.shape))
    how = {"optimizer": optim.sgd(0.05, momentum=0.9), **more}
    return rf.train_step(graph, loss=nn.cross_entropy, precision=precision, **how)


def trained(step: Graph, steps: int, state: dict[str, Any] | None = None, first: int = 0) -> tuple[list[float], Any]:
    state = state or start(step, 1)
    losses = []
    for i in range(first, first + steps):
        values = interpret(step, {**state, "x": X, "label": LABEL}, 1, i)
        state = {**state, **values.updates}
        losses.append(float(values.outputs["loss"]))
    return losses, state


@pytest.mark.parametrize(("precision", "near"), [("tf32", 0.0), ("bfloat16", 0.03), ("float16", 0.004)])
def test_training_stays_near_float32(precision: str, near: float) -> None:
    wanted, _ = trained(step_of("float32"), 6)
    losses, state = trained(step_of(precision), 6)
    np.testing.assert_allclose(losses, wanted, rtol=near)
    assert not {x.dtype.name for x in state.values()} & set(HALVES)
    assert losses[-1] < 0.7 * losses[0]


def gradients_of(step: Graph, fed: dict[str, Any]) -> dict[str, Any]:
    every = run_nodes(step, fed, 1)
    return {name: every[i][k] for name, (i, k) in step.gradients.items()}


@pytest.mark.parametrize(("half", "near"), [("bfloat16", 0.06), ("float16", 0.002)])
def test_gradients_are_those_of_float32_to_the_rounding_of_halves(half: str, near: float) -> None:
    """By their norms: where rounding moves an activation across zero or past another one, elements are others."""
    plain, mixed = step_of("float32"), step_of(half, loss_scale=64.0)
    fed = {"x": X, "label": LABEL}
    wanted, found = (gradients_of(step, {**start(step, 1), **fed}) for step in (plain, mixed))
    assert wanted.keys() == found.keys()
    for name, g in wanted.items():
        assert found[name].dtype == np.float32
        off = np.linalg.norm(found[name] - g) / np.linalg.norm(g)
        assert 0.0 < off < near, f"{name}: {off}"


@pytest.mark.parametrize(
    ("make", "casts", "of_weights"), [(zoo.alexnet, 10, 8), (zoo.resnet18, 25, 21)], ids=["alexnet", "resnet18"]
)
def test_the_casts_of_networks(make: Any, casts: int, of_weights: int) -> None:
    graph = rf.trace(make, Spec((2, 224, 224, 3)))
    step = rf.train_step(graph, loss=nn.cross_entropy, optimizer=optim.sgd(0.1), precision="bfloat16")
    read = [step.nodes[node.inputs[0][0]].op for node in step if isinstance(node.op, Cast)]
    assert len(read) == casts
    assert sum(isinstance(op, Leaf) and op.kind == "param" for op in read) == of_weights


@pytest.mark.parametrize("half", HALVES)
def test_what_is_stored_as_halves_and_what_as_float32(half: str) -> None:
    step = step_of(half)
    wide = {"conv_1/w", "batch_norm_1/moments_1", "dense_1/matmul_1", "dense_1/add_1", "conv_2/b"}
    assert {step[name].specs[0].dtype for name in wide} == {"float32"}
    narrow = ("conv_1/conv_1", "batch_norm_1/normalize_1", "relu_1", "max_pool_1", "conv_2/add_1", "relu_2")
    assert {step[name].specs[0].dtype for name in narrow} == {half}
    assert {step.spec(value).dtype for value in step.gradients.values()} == {"float32"}
    assert all(node.specs[0].dtype == "float32" for node in step if isinstance(node.op, ConvFilterGrad))
    assert all(step.spec(value).dtype not in HALVES for value in (*step.outputs.values(), *step.updates.values()))


def test_casts_are_one_for_each_weight_and_come_in_no_pairs() -> None:
    step = step_of("bfloat16")
    casts = [node for node in step if isinstance(node.op, Cast)]
    read = [step.nodes[node.inputs[0][0]] for node in casts]
    weights = [x.name for x in read if isinstance(x.op, Leaf) and x.op.kind == "param"]
    assert sorted(weights) == ["conv_1/w", "conv_2/w", "dense_1/w"]
    assert not any(isinstance(x.op, Cast) for x in read)
    assert len(casts) == 5  # the weights, the pictures, and the gradient of the scores


def test_a_weight_that_is_used_twice_has_one_cast_and_adds_float32_gradients() -> None:
    def shared(x: Any) -> Any:
        w = x.graph.leaf("param", "w", Spec((4, 4)))
        return Matmul()(nn.relu(Matmul()(x, w)), w)

    graph = rf.trace(shared, Spec((3, 4)))
    step = rf.train_step(graph, loss=nn.mean_squared_error, optimizer=optim.sgd(0.1), label="x", precision="bfloat16")
    casts = [node for node in step if isinstance(node.op, Cast) and step.nodes[node.inputs[0][0]].name == "w"]
    assert len(casts) == 1
    total = step.nodes[step.gradients["w"][0]]
    assert [step.spec(v).dtype for v in total.inputs] == ["float32", "float32"]


def test_master_weights_keep_updates_that_halves_would_lose() -> None:
    rate = 1e-5
    _, state = trained(step_of("bfloat16", optimizer=optim.sgd(rate)), 3)
    first = start(step_of("bfloat16"), 1)
    name = "dense_1/w"
    moved = state[name] != first[name]
    assert moved.mean() > 0.9
    assert (state[name].astype("bfloat16") != first[name].astype("bfloat16")).mean() < 0.1


def test_an_overflow_skips_the_update_and_the_run_is_as_if_it_had_not_been() -> None:
    scale = rf.LossScale(start=1024.0, every=2)
    step = step_of("float16", optimizer=optim.adam(0.01), loss_scale=scale)
    _, before = trained(step, 1)
    bad = {**before, "x": np.full_like(X, 3e4), "label": LABEL}
    with np.errstate(invalid="ignore", over="ignore"):
        after = {**before, **interpret(step, bad, 1, 1).updates}
    assert after["loss_scale/scale"] == 512.0
    assert after["loss_scale/row"] == 0
    for name, value in before.items():
        if name not in ("loss_scale/scale", "loss_scale/row"):
            np.testing.assert_array_equal(after[name], value, err_msg=name)
    _, later = trained(step, 2, after, 2)
    assert later["loss_scale/scale"] == 1024.0
    assert later["loss_scale/updates"] == 3


def test_gradients_that_are_not_used_are_not_looked_at() -> None:
    step = step_of("float16", optimizer=optim.freeze(optim.sgd(0.1), "conv_1", "batch_norm_1"))
    assert set(step.gradients) == {"conv_2/w", "conv_2/b", "dense_1/w", "dense_1/b"}
    assert not any(node.name.startswith(("grad/conv_1", "grad/batch_norm")) for node in step)
    losses, state = trained(step, 3)
    assert state["loss_scale/updates"] == 3
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    "optimizer",
    [
        optim.clip_norm(optim.adamw(0.01), 1.0),
        optim.accumulate(optim.sgd(0.1), 2),
        optim.average(optim.rmsprop(0.01)),
    ],
    ids=["clip_norm", "accumulate", "average"],
)
def test_an_overflow_leaves_the_state_of_every_optimizer_as_it_is(optimizer: Any) -> None:
    step = step_of("float16", optimizer=optimizer, loss_scale=rf.LossScale(start=1024.0))
    _, before = trained(step, 1)
    with np.errstate(invalid="ignore", over="ignore"):
        after = interpret(step, {**before, "x": np.full_like(X, 1e30), "label": LABEL}, 1, 1).updates
    assert after.pop("loss_scale/scale") == 512.0
    assert after.pop("loss_scale/row") == 0.0
    for name, value in after.items():
        np.testing.assert_array_equal(value, before[name], err_msg=name)


def test_a_power_of_two_scale_changes_nothing_but_underflow() -> None:
    _, plain = trained(step_of("bfloat16"), 2)
    _, scaled = trained(step_of("bfloat16", loss_scale=256.0), 2)
    for name, value in plain.items():
        np.testing.assert_array_equal(scaled[name], value, err_msg=name)


def test_prediction_in_halves_gives_float32_near_that_of_float32() -> None:
    graph = rf.trace(network, Spec(X.shape))
    mixed = rf.precision(graph, "bfloat16")
    state = start(graph, 1)
    wanted, found = (interpret(g, {**state, "x": X}).outputs["y"] for g in (graph, mixed))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, wanted, atol=0.05)
    assert rf.precision(graph, "float32") is graph
    assert rf.precision(graph, "tf32")["conv_1/conv_1"].op == rf.tf32(graph)["conv_1/conv_1"].op


def test_a_mixed_step_goes_through_json() -> None:
    step = step_of("float16")
    again = from_json(to_json(step))
    assert [(n.name, n.op, n.specs) for n in again] == [(n.name, n.op, n.specs) for n in step]


def test_wide_sums_are_those_of_float32() -> None:
    a, b = (RNG.standard_normal(s).astype("bfloat16") for s in ((3, 70), (70, 4)))
    wide, rounded = Matmul(wide=True)(a, b), Matmul()(a, b)
    assert (wide.dtype, rounded.dtype) == ("float32", "bfloat16")
    np.testing.assert_array_equal(wide.astype("bfloat16"), rounded)
    assert Sum(axes=(0,), wide=True)(a).dtype == "float32"
    assert "wide" not in str(Matmul())
    assert Conv(stride=(1,), padding=((0, 0),), dilation=(1,), wide=True).infer(
        Spec((1, 4, 2), "float16"), Spec((1, 2, 3), "float16")
    ) == Spec((1, 4, 3))


@pytest.mark.parametrize(("name", "message"), [("bfloat", "Nearest: 'bfloat16'"), ("half", "is not one of float32")])
def test_an_unknown_precision_is_told_with_the_nearest(name: str, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        step_of(name)


@pytest.mark.parametrize(
    ("where", "change"),
    [
        ("precision", lambda given: rf.precision(given, "bfloat16")),
        ("tf32", rf.tf32),
        ("exact", rf.exact),
        ("train_step", lambda given: rf.train_step(given, loss=nn.cross_entropy, optimizer=optim.sgd(0.1))),
    ],
)
def test_a_network_that_was_not_traced_is_told_how(where: str, change: Callable[[Any], Any]) -> None:
    for given, name in ((network, "network"), (3, "3")):
        with pytest.raises(GraphError, match=rf"^{where}: {name} is not a graph\. Trace the network first: rf\.trace"):
            change(given)


def test_graphs_that_cannot_be_mixed_are_refused() -> None:
    graph = rf.trace(network, Spec(X.shape))
    with pytest.raises(GraphError, match="is in mixed precision already"):
        rf.precision(rf.precision(graph, "bfloat16"), "float16")
    with pytest.raises(GraphError, match="computes in float64"):
        rf.precision(rf.trace(network, Spec(X.shape, "float64")), "float16")
    with pytest.raises(GraphError, match="this is a training step"):
        rf.precision(step_of("float32"), "bfloat16")
    with pytest.raises(GraphError, match=r"train_step: this graph is a training step already.*step\.network"):
        rf.train_step(step_of("float32"), loss=nn.cross_entropy, optimizer=optim.sgd(0.1))
    with pytest.raises(SettingError, match=r"train_step: loss_scale=-1\.0 is not a positive, finite number"):
        step_of("float16", loss_scale=-1.0)
    for wrong in (True, "1024", float("nan")):  # Python counts with True
        with pytest.raises(SettingError, match=rf"train_step: loss_scale={wrong!r} is not a positive, finite number"):
            step_of("float16", loss_scale=wrong)
    fall = ({"start": 0.0}, {"growth": 0.5}, {"backoff": 1.0}, {"every": 0})  # a scale must be able to
    for wrong in (*fall, {"start": True}, {"growth": True}, {"every": True}, {"every": 2.5}, {"backoff": "0.5"}):
        with pytest.raises(SettingError, match=r"start is in .*, backoff between 0 and 1"):
            rf.LossScale(**wrong)
