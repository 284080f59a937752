"""Graphs as JSON."""

import json
from typing import Any

import numpy as np
import pytest
from networks import batch, perceptron, small, step_of, traced

from rapydli_flow import nn, optim
from rapydli_flow.errors import GraphError, UnknownOp
from rapydli_flow.graph import Graph, from_json, fuse, to_json, trace, training
from rapydli_flow.graph.serialise import encode
from rapydli_flow.ops import Scale
from rapydli_flow.spec import Block, Spec
from rapydli_flow.testing.interpret import interpret, start

GRAPHS = {
    "network": lambda: traced(small),
    "step": lambda: step_of(traced(small), optim.adam(optim.cosine(0.1, steps=9))),
    "fused": lambda: fuse(step_of(traced(small), optim.sgd(optim.step_decay(0.1, every=3), momentum=0.9))),
}


@pytest.mark.parametrize("name", GRAPHS)
def test_round_trip(name: str) -> None:
    graph = GRAPHS[name]()
    text = to_json(graph)
    again = from_json(text)
    assert to_json(again) == text
    assert again.nodes == graph.nodes
    assert (again.outputs, again.updates, again.like) == (graph.outputs, graph.updates, graph.like)
    assert str(again) == str(graph)


def test_a_graph_that_was_read_gives_the_same_numbers() -> None:
    graph = GRAPHS["fused"]()
    feeds = {**start(graph), **batch()}
    a, b = (interpret(g, feeds, 1, 2) for g in (graph, from_json(to_json(graph, indent=1))))
    assert np.array_equal(a.outputs["loss"], b.outputs["loss"])
    assert all(np.array_equal(a.updates[name], b.updates[name]) for name in a.updates)


def test_a_network_that_was_read_can_be_trained() -> None:
    """New nodes must not take the names of those that were read."""
    graph = trace(lambda x: nn.dense(nn.mean(nn.conv(x, 3, 2), (1, 2)), 3), Spec((2, 4, 4, 1)))
    again = from_json(to_json(graph))
    assert again.counts == graph.counts
    assert [node.name for node in step_of(again)] == [node.name for node in step_of(graph)]


def test_blocks_of_rank_graphs_are_kept() -> None:
    graph = Graph()
    x = graph.leaf("batch", "x", Spec((2, 3)))
    at = Block((2, 0), (4, 3), (8, 3))
    graph.outputs["y"] = graph.add(Scale(by=2.0), (x,), "double", at).id
    assert from_json(to_json(graph))["double"].at == at


def changed(**fields: Any) -> str:
    return json.dumps({**json.loads(to_json(traced(perceptron, Spec((2, 3))))), **fields})


def with_op(**op: Any) -> str:
    return changed(nodes=[{"name": "a", "op": op, "inputs": []}], outputs={}, updates={}, like=[])


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("{", GraphError, "not a graph: the text is not JSON"),
        ("[]", GraphError, "not a graph: 'format' is not 'rapydli-graph'"),
        (changed(format="other"), GraphError, "not a graph: 'format' is not"),
        (changed(version=99), GraphError, "format version 99, this package reads 1. Upgrade rapydli_flow, or save"),
        (changed(nodes=[{"name": "a"}]), GraphError, "not a graph: KeyError 'inputs' while reading its nodes"),
        (changed(nodes=[]), GraphError, r"output y: value \(\d+, 0\) does not exist"),
        (changed(like=3), GraphError, "not a graph: TypeError"),
        (with_op(op="teleport"), UnknownOp, "no op is named 'teleport'; import the module that defines it"),
        (with_op(op="scale", by=1.0, times=3), GraphError, "scale has no attribute times"),
        (with_op(op="scale"), GraphError, "not a graph: TypeError"),
    ],
)
def test_from_json_refuses(text: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        from_json(text)


def test_a_graph_that_breaks_rules_is_refused() -> None:
    document = json.loads(to_json(traced(perceptron, Spec((2, 3)))))
    document["nodes"][-1]["name"] = document["nodes"][0]["name"]
    with pytest.raises(GraphError, match="two nodes are named 'seed'"):
        from_json(json.dumps(document))


def test_attributes_that_json_cannot_hold_are_refused() -> None:
    with pytest.raises(GraphError, match=r"an attribute of type complex cannot be written as JSON: 1j"):
        encode(1j)


def test_training_reads_back() -> None:
    graph = training(traced(small))
    assert to_json(from_json(to_json(graph))) == to_json(graph)
