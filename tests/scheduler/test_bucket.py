"""Buckets: the same numbers with fewer collectives."""

from importlib import import_module

import numpy as np
import pytest
from lockstep import SEED, assert_same_graphs, collectives
from networks import batch, perceptron, small, step_of, traced

from rapydli_flow import optim
from rapydli_flow.graph import Graph, verify
from rapydli_flow.ops import Relu
from rapydli_flow.scheduler import AllReduce, Exchange, Plan, bucket, data_parallel, sharded, split
from rapydli_flow.spec import Spec
from rapydli_flow.testing.interpret import start

X = Spec((5, 8, 6, 4), "float64")
ALONE = AllReduce(ranks=(0,))


def reduces(graph: Graph) -> list[AllReduce]:
    return [node.op for node in graph if isinstance(node.op, AllReduce)]


def test_a_training_step_keeps_its_numbers_with_fewer_collectives() -> None:
    graph = step_of(traced(small, X), optim.sgd(0.1, momentum=0.9))
    plain = split(graph, 3, data_parallel(graph, 3).layouts)
    parts = [verify(part) for part in bucket(plain)]
    assert_same_graphs(graph, parts, {**start(graph, SEED), **batch(X)}, scale=1.0)
    before, after = len(collectives(plain[0])), len(collectives(parts[0]))
    assert after < before / 2
    assert sum(op.parts for op in reduces(parts[0])) == len(reduces(plain[0]))
    assert len({tuple(collectives(part)) for part in parts}) == 1
    assert len({tuple(node.name for node in part) for part in parts}) == 1
    assert all(part.updates.keys() == graph.updates.keys() for part in parts)


def test_all_gradients_of_a_network_go_together() -> None:
    graph = step_of(traced(perceptron, Spec((4, 6))), optim.sgd(0.1))
    part = bucket(split(graph, 2, data_parallel(graph, 2).layouts))[0]
    assert [op.parts for op in reduces(part)] == [len(graph.leaves("param")) + 1]  # and the loss
    (name,) = (node.name for node in part if node.op.collective)
    assert name.endswith("/and_4_more")


OPTIMIZERS = {"momentum": optim.sgd(0.1, momentum=0.9), "clipped": optim.clip_norm(optim.sgd(0.1, momentum=0.9), 0.5)}


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("parameters", [False, True])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_exchanges_of_a_divided_state_go_together(
    optimizer: str, parameters: bool, ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of gradients, and of updated parameters, as soon as there are enough of them."""
    graph = step_of(traced(small, X), OPTIMIZERS[optimizer])
    plain = split(graph, ranks, sharded(data_parallel(graph, ranks), graph, parameters=parameters).layouts)
    before = [len(exchanges(plain[0], sums)) for sums in (True, False)]
    for least, most in ((1 << 20, 1), (1, 8)):
        monkeypatch.setattr(import_module("rapydli_flow.scheduler.bucket"), "LEAST_BYTES", least)
        parts = [verify(part) for part in bucket(plain)]
        assert_same_graphs(graph, parts, {**start(graph, SEED), **batch(X)}, scale=1.0)
        for sums, many in zip((True, False), before, strict=True):
            assert sum(max(1, len(op.ends)) for op in exchanges(parts[0], sums)) == many
        if not parameters and optimizer == "momentum":
            assert before[0] > 10
            for sums in (True, False):
                together = [op for op in exchanges(parts[0], sums) if op.ends]
                assert 1 <= len(together) <= most
                assert (len(together) > 1) == (most > 1)


def exchanges(graph: Graph, sums: bool) -> list[Exchange]:
    return [node.op for node in graph if isinstance(node.op, Exchange) and node.op.sums == sums]


def test_one_collective_for_each_dtype() -> None:
    graph = Graph()
    xs = [graph.leaf("batch", f"x{i}", Spec((3,), dtype)) for i, dtype in enumerate(("float32", "float64", "float32"))]
    sums = [graph.add(ALONE, (x,), f"{x.name}/sum") for x in xs]
    graph.outputs = {x.name: Relu()(s).id for x, s in zip(xs, sums, strict=True)}
    new = verify(bucket([graph])[0])
    assert [node.name for node in new if node.op.collective] == ["x0/sum/and_1_more", "x1/sum"]
    feeds = {x.name: np.array([-1, 0, 2], x.dtype) for x in xs}
    assert_same_graphs(graph, [new], feeds)


def test_sums_of_sums_wait_for_each_other() -> None:
    graph = Graph()
    a, b = (graph.leaf("batch", name, Spec((3,), "float64")) for name in "ab")
    first = graph.add(ALONE, (a,), "first")
    second = graph.add(ALONE, (first,), "second")
    third = graph.add(ALONE, (b,), "third")
    graph.outputs = {"y": Relu()(second).id, "z": third.id}
    new = verify(bucket([graph])[0])
    assert [node.name for node in new if node.op.collective] == ["first/and_1_more", "second"]
    late = Graph()
    c = late.leaf("batch", "c", Spec((3,), "float64"))
    late.outputs["y"] = late.add(ALONE, (late.add(ALONE, (c,), "one"),), "two").id
    assert [node.name for node in bucket([late])[0] if node.op.collective] == ["one", "two"]


def test_a_graph_without_collectives_stays_as_it_is() -> None:
    graph = traced(perceptron, Spec((4, 6)))
    (new,) = bucket([graph])
    assert [node.name for node in new] == [node.name for node in graph]
    assert new.outputs == graph.outputs
    assert Plan(1).rank_graphs(graph)[0].outputs.keys() == graph.outputs.keys()
