"""Early updates: the same numbers in another order, with less memory."""

import numpy as np
import pytest
from lockstep import SEED, assert_same_graphs, collectives
from networks import batch, perceptron, small, step_of, traced

from cpu_kernels.compile import host
from rapydli_flow import optim
from rapydli_flow.graph import Graph, verify
from rapydli_flow.ops import Leaf, Matmul, Momentum, Relu, Scale, Transpose
from rapydli_flow.scheduler import bucket, compile_program, data_parallel, split, update_early
from rapydli_flow.spec import Spec
from rapydli_flow.testing.interpret import start
from rapydli_flow.tuner import Tuning

X = Spec((5, 8, 6, 4), "float64")
F3 = Spec((3,))


def ops(graph: Graph) -> list[str]:
    """Names of the nodes that compute, in order."""
    return [node.name for node in graph if not isinstance(node.op, Leaf)]


@pytest.mark.parametrize("optimizer", [optim.sgd(0.1, momentum=0.9), optim.adam(0.01, weight_decay=0.1)])
def test_a_step_computes_the_same(optimizer) -> None:
    graph = step_of(traced(small, X), optimizer)
    new = verify(update_early(graph))
    assert_same_graphs(graph, [new], {**start(graph, SEED), **batch(X)})
    assert sorted(ops(new)) == sorted(ops(graph))
    assert ops(new) != ops(graph)
    assert ops(update_early(new)) == ops(new)


def test_each_parameter_is_replaced_once_its_gradient_is_there_and_nothing_reads_it() -> None:
    graph = update_early(step_of(traced(perceptron, Spec((4, 6))), optim.sgd(0.1, momentum=0.9)))
    assert isinstance(graph.nodes[-1].op, Momentum)  # that of the first layer, with nothing after it
    assert sum(isinstance(node.op, Momentum) for node in graph.nodes[-4:]) == 2
    for i, node in enumerate(graph.nodes):
        if isinstance(node.op, Momentum):
            readers = [j for j, other in enumerate(graph.nodes) if node.inputs[0] in other.inputs]
            assert max(readers) == i
            needs = max(*readers[:-1], node.inputs[2][0])
            assert all(isinstance(graph.nodes[j].op, Momentum) for j in range(needs + 1, i))


def test_gradients_do_not_wait_in_memory() -> None:
    def wide(x):
        for _ in range(6):
            x = Relu()(Matmul()(x, x.graph.leaf("param", f"w{len(x.graph)}", Spec((64, 64)))))
        return x

    def needed(graph: Graph) -> int:
        return compile_program(graph, Tuning(host())).arena_bytes

    graph = step_of(traced(wide, Spec((2, 64))), optim.sgd(0.1, momentum=0.9))
    w = Spec((64, 64)).size_bytes
    assert needed(graph) - needed(update_early(graph)) >= 4 * w


def test_collectives_keep_their_order_and_ranks_are_alike() -> None:
    graph = step_of(traced(small, X), optim.sgd(0.1, momentum=0.9))
    parts = bucket(split(graph, 3, data_parallel(graph, 3).layouts))
    early = [verify(update_early(part)) for part in parts]
    assert [collectives(part) for part in early] == [collectives(part) for part in parts]
    assert len({tuple(node.name for node in part) for part in early}) == 1
    assert_same_graphs(graph, early, {**start(graph, SEED), **batch(X)}, scale=1.0)


def test_leaves_that_change_places_wait_for_each_other() -> None:
    graph = Graph()
    a, b = (graph.leaf("state", name, F3) for name in "ab")
    x = graph.leaf("batch", "x", F3)
    y = Relu()(x)
    graph.updates = {"a": Scale(by=2.0)(b).id, "b": Scale(by=3.0)(a).id}
    graph.outputs = {"y": y.id}
    assert ops(update_early(graph)) == ops(graph)
    feeds = {name: np.float32([i, -1, 2]) for i, name in enumerate("abx")}
    assert_same_graphs(graph, [update_early(graph)], feeds)


@pytest.mark.parametrize(
    ("op", "order"), [(Transpose(order=(1, 0)), ["relu_1", "transpose_1"]), (Scale(by=0.5), ["scale_1", "relu_1"])]
)
def test_only_an_update_that_is_written_in_place_comes_early(op, order) -> None:
    graph = Graph()
    w, x = graph.leaf("param", "w", Spec((3, 3))), graph.leaf("batch", "x", F3)
    graph.outputs = {"y": Relu()(x).id}
    graph.updates = {"w": op(w).id}
    assert ops(update_early(graph)) == order


def test_single_numbers_of_the_step_come_first() -> None:
    graph = Graph()
    x, rate = graph.leaf("batch", "x", F3), graph.leaf("clock", "step", Spec(()))
    y = Relu()(x)
    half = Scale(by=0.5)(rate)
    graph.outputs = {"y": y.id, "half": half.id}
    assert ops(update_early(graph)) == ["scale_1", "relu_1"]
