"""Fusion: the same numbers with fewer nodes."""

from typing import Any

import numpy as np
import pytest
from networks import batch, small, step_of, traced

from rapydli_flow import nn, optim
from rapydli_flow.graph import Fused, Graph, fuse, parts, predicting, trace, training, verify
from rapydli_flow.ops import Add, Conv, Dropout, Matmul, MaxPool, Relu, Scale, Sum
from rapydli_flow.spec import Block, Spec
from rapydli_flow.template import Epilogue
from rapydli_flow.testing.interpret import interpret, start


def fused(graph: Graph) -> list[str]:
    return [node.op.title for node in graph if isinstance(node.op, Fused)]


@pytest.mark.parametrize("phase", [training, predicting])
def test_a_network_gives_the_same_numbers(phase: Any) -> None:
    graph = phase(traced(small))
    new = verify(fuse(graph))
    feeds = {**start(graph, 2), **batch()}
    a, b = (interpret(g, feeds, 3, 1) for g in (graph, new))
    assert b.outputs["y"] == pytest.approx(a.outputs["y"], abs=1e-12)
    assert "conv+add+relu" in fused(new)
    assert "matmul+add+tanh" in fused(new)
    assert len(new) < len(graph)


def test_a_training_step_gives_the_same_numbers() -> None:
    graph = step_of(traced(small), optim.adam(0.01, weight_decay=0.1), metrics={"accuracy": nn.accuracy})
    new = verify(fuse(graph))
    feeds = {**start(graph, 2), **batch()}
    a, b = (interpret(g, feeds, 3, 1) for g in (graph, new))
    assert set(a.outputs) == set(b.outputs)
    assert set(a.updates) == set(b.updates)
    for name, value in {**a.outputs, **a.updates}.items():
        assert {**b.outputs, **b.updates}[name] == pytest.approx(value, abs=1e-11), name
    assert len(fused(new)) >= 10
    assert any("relu_grad" in title for title in fused(new))


def test_dropout_drops_the_same_elements_when_fused_and_in_blocks() -> None:
    graph = training(trace(lambda x: nn.dropout(nn.dense(x, 6), 0.5), Spec((8, 3), "float64")))
    new = fuse(graph)
    assert fused(new) == ["matmul+add+dropout"]
    node = next(node for node in new if isinstance(node.op, Fused))
    assert node.op.indexed
    x = np.random.default_rng(0).normal(size=(8, 3))
    feeds = {**start(graph), "x": x}
    want = interpret(graph, feeds, 5, 6).outputs["y"]
    assert 0.2 < (want == 0).mean() < 0.8
    assert interpret(new, feeds, 5, 6).outputs["y"] == pytest.approx(want, abs=1e-13)
    ins = [x[3:5], feeds["dense_1/w"], feeds["dense_1/b"], np.int64(5), np.int64(6)]
    (part,) = node.op.run(*ins, at=Block((3, 0), (5, 6), (8, 6)))
    assert part == pytest.approx(want[3:5], abs=1e-13)


def test_nodes_of_rank_graphs_keep_their_place() -> None:
    graph = Graph()
    x = graph.leaf("batch", "x", Spec((2, 3), "float64"))
    clock = [graph.leaf("clock", name, Spec((), "int64")) for name in ("seed", "step")]
    at = Block((4, 0), (6, 3), (8, 3))
    y = graph.add(Scale(by=2.0), (x,), at=at)
    y = graph.add(Dropout(rate=0.5, stream=1), (y, *clock), at=at)
    graph.outputs["y"] = Relu()(y).id
    new = fuse(graph)
    (node,) = (node for node in new if isinstance(node.op, Fused))
    assert node.at == at
    feeds = {"x": np.ones((2, 3))}
    assert np.array_equal(interpret(new, feeds, 1, 2).outputs["y"], interpret(graph, feeds, 1, 2).outputs["y"])


@pytest.mark.parametrize(
    ("network", "want"),
    [
        (lambda x: nn.relu(nn.tanh(x)), ["tanh+relu"]),
        (lambda x: (lambda y: nn.relu(y) + y)(nn.tanh(x)), ["relu+add"]),  # y is read twice; a relu is not
        (lambda x: (lambda y: y + y)(nn.tanh(x)), []),  # one op reads it twice
        (lambda x: nn.relu(nn.flatten(nn.max_pool(x, 2))), []),  # views and ops of two outputs take no tail
        (lambda x: nn.relu(nn.mean(x, (1, 2))), ["sum+scale+relu"]),
        (lambda x: nn.relu(nn.mean(x, (0, 1, 2, 3))), ["scale+relu"][:0]),  # scalars are left alone
        (lambda x: nn.tanh(x) * nn.mean(x, (0,)), ["sum+scale"]),  # the operand is neither whole nor by channel
        (lambda x: nn.tanh(x) * nn.mean(x, (0, 1, 2)), ["sum+scale", "tanh+multiply"]),
        (lambda x: nn.mean(x, (0, 1, 2)) * nn.tanh(x), ["sum+scale", "tanh+multiply"]),
        (lambda x: nn.batch_norm(x), []),
        (lambda x: nn.relu(x), []),  # a leaf takes no tail
    ],
)
def test_what_is_fused(network: Any, want: list[str]) -> None:
    graph = predicting(trace(network, Spec((2, 4, 4, 3), "float64")))
    new = verify(fuse(graph))
    assert fused(new) == want
    feeds = {**start(graph), "x": np.random.default_rng(0).normal(size=(2, 4, 4, 3))}
    a, b = (interpret(g, feeds).outputs["y"] for g in (graph, new))
    assert b == pytest.approx(a, abs=1e-12)


def test_an_output_between_is_kept() -> None:
    graph = trace(lambda x: (lambda y: {"y": nn.relu(y), "pre": y})(nn.tanh(x)), Spec((3,)))
    assert fused(fuse(graph)) == []


def test_parts_of_an_op() -> None:
    op = Fused(anchor=Matmul(), arity=2, tail=((Add(), (0, -1)), (Relu(), (-1,))))
    ins = (Spec((2, 3)), Spec((3, 5)), Spec((5,)))
    anchor, specs, epilogue = parts(op, ins)
    assert (anchor, specs) == (Matmul(), ins[:2])
    assert epilogue.extras == (Spec((5,)),)
    assert epilogue.out == Spec((2, 5))
    assert epilogue.scalar.parameters == ("v", "e0")
    assert epilogue.scalar.lines[0] == "t0 = e0 + v"
    assert op.title == "matmul+add+relu"
    assert op.flops(*ins) == 2 * 2 * 3 * 5 + 10 + 10
    assert parts(Relu(), (Spec((2,)),)) == (Relu(), (Spec((2,)),), Epilogue.none(Spec((2,))))


def test_an_indexed_tail_asks_for_the_index() -> None:
    op = Fused(anchor=Sum(axes=(0,)), arity=1, tail=((Dropout(rate=0.5, stream=9), (-1, 0, 1)),))
    clock = Spec((), "int64")
    scalar = op.epilogue(Spec((2, 3)), clock, clock).scalar
    assert scalar.indexed
    assert scalar.uses == ("keep",)
    assert any("keep(U(e0), U(e1), U(9), U(index)" in line for line in scalar.lines)


def test_index_of_a_fused_op() -> None:
    conv = Conv(stride=(2,), padding=((1, 1),), dilation=(1,), groups=2)
    op = Fused(anchor=conv, arity=2, tail=((Add(), (-1, 0)), (Add(), (-1, 1)), (Scale(by=2.0), (-1,))))
    ins = (Spec((1, 8, 4)), Spec((3, 2, 6)), Spec((6,)), Spec((1, 4, 6)))
    assert op.index(*ins) == "n h*2+r*1-1 g*2+c, r . g*3+k, g*3+k, n h g*3+k -> n h g*3+k | g=2 c=2 k=3"
    assert MaxPool(window=(2,), stride=(2,), padding=((0, 0),)).index(Spec((1, 8, 4))).endswith("| r=2")
