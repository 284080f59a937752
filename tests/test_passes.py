"""Passes: clean, merge_equal, training, predicting, with_batch."""

from typing import Any

import numpy as np
import pytest
from networks import X, batch, perceptron, small, step_of, traced

from rapydli_flow import nn, optim
from rapydli_flow.errors import GraphError
from rapydli_flow.graph import (
    Graph,
    clean,
    merge_equal,
    predicting,
    rewrite,
    trace,
    training,
    verify,
    with_batch,
)
from rapydli_flow.ops import Copy, Dropout, Moments, Phase, Relu, Tanh
from rapydli_flow.spec import Spec
from rapydli_flow.testing.interpret import interpret, start


def ops(graph: Graph) -> list[str]:
    return [node.op.name for node in graph]


def test_clean_drops_what_nothing_needs_and_keeps_inputs() -> None:
    graph = Graph()
    x = graph.leaf("batch", "x", Spec((2,)))
    graph.leaf("batch", "unused", Spec((3,)))
    graph.leaf("param", "dead", Spec((3,)))
    graph.outputs["y"] = Relu()(x).id
    Tanh()(x)
    new = clean(graph)
    assert [node.name for node in new] == ["x", "unused", "relu_1"]
    assert len(graph) == 5  # a pass leaves its input alone


def test_clean_keeps_leaves_that_are_updated() -> None:
    graph = Graph()
    x = graph.leaf("batch", "x", Spec((2,)))
    graph.leaf("state", "last", Spec((2,)))
    graph.updates["last"] = x.id
    assert "last" in clean(graph)


def test_merge_equal_makes_one_of_equal_ops() -> None:
    graph = trace(lambda x: nn.relu(x) + nn.relu(x) + nn.tanh(x), Spec((2,), "float64"))
    merged = verify(merge_equal(graph))
    assert ops(graph).count("relu") == 2
    assert ops(merged).count("relu") == 1
    feeds = {"x": np.array([1.0, -2.0])}
    assert np.array_equal(interpret(graph, feeds).outputs["y"], interpret(merged, feeds).outputs["y"])


def test_merge_equal_merges_ops_of_several_outputs() -> None:
    def network(x: Any) -> Any:
        return nn.max_pool(x, 2) + nn.max_pool(x, 2)

    assert ops(merge_equal(trace(network, Spec((1, 4, 4, 1))))).count("max_pool") == 1


def test_merge_equal_keeps_leaves_and_different_dropouts() -> None:
    def network(x: Any) -> Any:
        return nn.dropout(x, 0.5) + nn.dropout(x, 0.5)

    merged = merge_equal(training(trace(network, Spec((4, 4)))))
    assert ops(merged).count("dropout") == 2  # their streams are those of dropout_1 and dropout_2


def test_a_training_step_has_no_equal_nodes() -> None:
    step = step_of(traced(small), optim.sgd(0.1))
    assert len(merge_equal(step)) == len(step)
    rates = [node for node in step if node.op.name == "constant_rate"]
    assert len(rates) == 1


def test_training_takes_batch_statistics_and_drops() -> None:
    graph = traced(small)
    assert any(isinstance(node.op, Phase) for node in graph)
    new = verify(training(graph))
    assert not any(isinstance(node.op, Phase) for node in new)
    assert any(isinstance(node.op, Dropout) for node in new)
    assert set(new.updates) == set(graph.updates)
    feeds = {**start(graph), **batch()}
    a, b = (interpret(g, feeds, 3, 4) for g in (graph, new))
    assert np.array_equal(a.outputs["y"], b.outputs["y"])
    other = interpret(new, feeds, 3, 5).outputs["y"]
    assert not np.array_equal(b.outputs["y"], other)  # another step drops others


def test_predicting_takes_running_statistics_and_drops_nothing() -> None:
    graph = traced(small)
    new = verify(predicting(graph))
    names = set(ops(new))
    assert not names & {"phase", "dropout", "moments", "statistics"}
    assert new.updates == {}
    assert graph.updates != {}
    feeds = {**start(graph), **batch()}
    a, b = (interpret(new, feeds, 3, i).outputs["y"] for i in (0, 1))
    assert np.array_equal(a, b)
    feeds["residual_1/batch_norm_1/var"] = feeds["residual_1/batch_norm_1/var"] * 4
    assert not np.array_equal(a, interpret(new, feeds).outputs["y"])


def test_batch_norm_with_running_statistics_of_the_batch_is_the_same_in_both_phases() -> None:
    graph = trace(nn.batch_norm, Spec((5, 3, 2), "float64"))
    x = np.random.default_rng(0).normal(2.0, 3.0, (5, 3, 2))
    feeds = {"x": x, "batch_norm_1/mean": x.mean((0, 1)), "batch_norm_1/var": x.var((0, 1))}
    a, b = (interpret(g, feeds).outputs["y"] for g in (training(graph), predicting(graph)))
    assert a == pytest.approx(b, abs=1e-12)
    assert a == pytest.approx((x - x.mean((0, 1))) / np.sqrt(x.var((0, 1)) + 1e-5), abs=1e-12)


def test_a_rule_may_replace_nodes() -> None:
    graph = trace(lambda x: nn.relu(nn.tanh(x)), Spec((3,)))
    new = rewrite(graph, lambda g, node, xs: g.add(Copy(), xs, node.name) if node.op.name == "tanh" else None)
    assert ops(clean(new)) == ["leaf", "leaf", "leaf", "copy", "relu"]
    assert ops(graph) == ["leaf", "leaf", "leaf", "tanh", "relu"]


def test_with_batch_gives_the_same_numbers_for_each_record() -> None:
    graph = predicting(traced(small))
    one = verify(with_batch(graph, 1))
    assert one.find("x").spec == Spec((1, *X.shape[1:]), X.dtype)
    feeds = {**start(graph), **batch()}
    whole = interpret(graph, feeds).outputs["y"]
    for i in range(4):
        part = interpret(one, {**feeds, "x": feeds["x"][i : i + 1]}).outputs["y"]
        assert part == pytest.approx(whole[i : i + 1], abs=1e-12)


def test_with_batch_refuses() -> None:
    with pytest.raises(GraphError, match="with_batch: a graph with updates depends on its batch size; trace it again"):
        with_batch(traced(small), 2)
    two = trace(lambda a, b: {"a": a, "b": b}, Spec((2, 3)), Spec((4, 3)))
    with pytest.raises(GraphError, match=r"with_batch: inputs hold \[2, 4\] records; they must hold the same number"):
        with_batch(two, 2)


def test_with_batch_leaves_scalars_alone() -> None:
    graph = trace(lambda x, by: x * by, Spec((2, 3)), Spec(()))
    assert with_batch(graph, 7).find("by").spec == Spec(())


def test_passes_keep_what_cotangents_belong_to() -> None:
    step = step_of(traced(perceptron, Spec((4, 3))), optim.sgd(0.1, momentum=0.5))
    pairs = {(step.value_name(a), step.value_name(b)) for a, b in step.like.items()}
    assert ("grad/dense_2/matmul_1/matmul_2", "dense_2/w") in pairs
    assert any(b == "dense_1/w/momentum" for _, b in pairs)
    assert not any(isinstance(node.op, Moments) for node in step)
