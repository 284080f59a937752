"""Reverse mode on whole networks, against finite differences."""

from typing import Any

import numpy as np
import pytest
from networks import batch, record, small, step_of, traced

from rapydli_flow import nn
from rapydli_flow.errors import GraphError, NotDifferentiable
from rapydli_flow.graph import Graph, gradients, train_step
from rapydli_flow.ops import Correct, Divide, Fill, Multiply, Softmax, Sum
from rapydli_flow.spec import Spec
from rapydli_flow.testing.interpret import interpret, start


def slope(graph: Graph, feeds: dict[str, Any], name: str, u: Any, h: float = 1e-5) -> float:
    def loss(way: float) -> float:
        return float(interpret(graph, {**feeds, name: feeds[name] + way * u}, 3, 1).outputs["loss"])

    return (loss(h) - loss(-h)) / (2 * h)


def test_every_parameter_of_a_network_against_finite_differences() -> None:
    graph = step_of(traced(small))
    feeds = {**start(graph, seed=1), **batch()}
    found = interpret(graph, feeds, 3, 1).outputs
    rng = np.random.default_rng(0)
    names = [leaf.name for leaf in graph.leaves("param")]
    assert len(names) == 18
    for name in names:
        told = found[f"d {name}"]
        assert told.shape == feeds[name].shape
        if name.endswith("b") and name.startswith("residual") and "conv_1" in name:
            assert np.abs(told).max() < 1e-12  # a bias before a batch norm changes nothing
        u = rng.normal(size=told.shape)
        assert slope(graph, feeds, name, u) == pytest.approx(float((told * u).sum()), rel=1e-6, abs=1e-8), name


def test_a_value_that_is_read_twice_gets_the_sum() -> None:
    graph = Graph()
    x = graph.leaf("param", "x", Spec((3,), "float64"))
    loss = Sum(axes=(0,))(x * x + x / 2.0 - x)
    (dx,) = gradients(graph, loss, [x])
    graph.outputs = {"dx": dx.id, "loss": loss.id}
    value = np.array([1.0, -2.0, 3.0])
    assert interpret(graph, {"x": value}).outputs["dx"] == pytest.approx(2 * value - 0.5)
    assert graph.like[dx.id] == x.id


@pytest.mark.parametrize("op", [Multiply(), Divide()])
def test_gradients_of_broadcast_operands_are_summed(op: Any) -> None:
    graph = Graph()
    a = graph.leaf("param", "a", Spec((3, 4), "float64"))
    b = graph.leaf("param", "b", Spec((3, 1), "float64"))
    loss = Sum(axes=(0, 1))(op(a, b))
    graph.outputs = {"loss": loss.id}
    for x, dx in zip((a, b), gradients(graph, loss, [a, b]), strict=True):
        assert dx.spec == x.spec
        graph.outputs[f"d {x.name}"] = dx.id
    rng = np.random.default_rng(1)
    feeds = {"a": rng.normal(size=(3, 4)), "b": rng.uniform(1, 2, (3, 1))}
    found = interpret(graph, feeds).outputs
    for name in feeds:
        u = rng.normal(size=feeds[name].shape)
        assert slope(graph, feeds, name, u) == pytest.approx(float((found[f"d {name}"] * u).sum()), rel=1e-7)


def test_a_softmax_in_the_middle() -> None:
    graph = Graph()
    x = graph.leaf("param", "x", Spec((2, 3), "float64"))
    w = graph.leaf("batch", "w", Spec((2, 3), "float64"))
    loss = Sum(axes=(0, 1))(Softmax()(x) * w)
    (dx,) = gradients(graph, loss, [x])
    graph.outputs = {"loss": loss.id, "dx": dx.id}
    rng = np.random.default_rng(2)
    feeds = {"x": rng.normal(size=(2, 3)), "w": rng.normal(size=(2, 3))}
    u = rng.normal(size=(2, 3))
    told = float((interpret(graph, feeds).outputs["dx"] * u).sum())
    assert slope(graph, feeds, "x", u) == pytest.approx(told, rel=1e-7)


def test_only_a_scalar_has_gradients() -> None:
    graph = Graph()
    x = graph.leaf("param", "x", Spec((3,)))
    with pytest.raises(GraphError, match=r"gradients: the loss x is f32\[3\], not a scalar. Sum or average it."):
        gradients(graph, x, [x])


def test_a_loss_through_an_op_without_gradient_is_refused() -> None:
    with pytest.raises(NotDifferentiable, match="correct_1: correct has no gradient, but the loss is reached through"):
        train_step(traced(small), loss=nn.accuracy, optimizer=lambda *_: None)


def test_an_op_without_gradient_beside_the_loss_is_no_matter() -> None:
    graph = step_of(traced(small), metrics={"accuracy": nn.accuracy})
    assert any(isinstance(node.op, Correct) for node in graph)


def test_a_parameter_that_the_loss_does_not_read_is_refused() -> None:
    def network(x: Any) -> Any:
        nn.dense(x, 3)
        return nn.dense(x, 2)

    graph = traced(network, Spec((4, 3)))
    assert "dense_1/w" not in graph  # clean has dropped it
    graph.leaf("param", "lonely", Spec((2,)), Fill(value=0.0, shape=(2,)))
    lone = graph.find("lonely")
    graph.outputs["lonely"] = lone.id
    with pytest.raises(GraphError, match="gradients: the loss scale_1 does not depend on lonely"):
        train_step(graph, loss=lambda out, label: nn.cross_entropy(out["y"], label), optimizer=record)
