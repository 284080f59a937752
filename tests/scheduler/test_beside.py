"""Nodes of one kind side by side: the same numbers in another order, with as much memory as may wait at most."""

import pytest
from lockstep import SEED, assert_same_graphs, collectives
from networks import batch, small, step_of, traced

import rapydli_flow as rf
from rapydli_flow import nn, optim
from rapydli_flow.graph import Graph, verify
from rapydli_flow.ops import Cast, Leaf, Momentum
from rapydli_flow.scheduler import bucket, compile_program, data_parallel, make_plan, split, update_early
from rapydli_flow.scheduler import program as planning
from rapydli_flow.scheduler.beside import side_by_side
from rapydli_flow.spec import Spec
from rapydli_flow.template import Device
from rapydli_flow.testing.interpret import start
from rapydli_flow.tuner import Tuning

X = Spec((5, 8, 6, 4), "float64")
CARD = Device("cuda", "a card", target="sm_80", cores=108, vector_bytes=16)
WIDTH, DEPTH = 64, 6


def ops(graph: Graph) -> list[str]:
    """Names of the nodes that compute, in order."""
    return [node.name for node in graph if not isinstance(node.op, Leaf)]


def runs(graph: Graph, op: type) -> list[int]:
    """How many nodes of an op follow each other, for each time that some do."""
    found, before = [], False
    for node in graph:
        if isinstance(node.op, op):
            found = [*found[:-1], found[-1] + 1] if before else [*found, 1]
        before = isinstance(node.op, op)
    return found


def wide(precision: str = "float32") -> Graph:
    """The rank graph of a step of layers of one size."""

    def network(x):
        for _ in range(DEPTH):
            x = nn.relu(nn.dense(x, WIDTH, bias=False))
        return x

    graph = rf.trace(network, rf.Spec((2, WIDTH)))
    optimizer = optim.sgd(0.1, momentum=0.9)
    step = rf.train_step(graph, loss=nn.cross_entropy, optimizer=optimizer, label="label", precision=precision)
    (part,) = make_plan(step, 1).rank_graphs(step)
    return part


@pytest.mark.parametrize("optimizer", [optim.sgd(0.1, momentum=0.9), optim.adam(0.01, weight_decay=0.1)])
@pytest.mark.parametrize("most", [1, 200, 2**22])
def test_a_step_computes_the_same(optimizer, most) -> None:
    graph = update_early(step_of(traced(small, X), optimizer))
    new = verify(side_by_side(graph, most=most))
    assert_same_graphs(graph, [new], {**start(graph, SEED), **batch(X)})
    assert sorted(ops(new)) == sorted(ops(graph))
    assert ops(side_by_side(new, most=most)) == ops(new)


def test_updates_wait_until_so_many_elements_do() -> None:
    graph = wide()
    assert runs(graph, Momentum) == [1] * DEPTH
    assert runs(side_by_side(graph), Momentum) == [DEPTH]
    assert runs(side_by_side(graph, most=2 * WIDTH**2), Momentum) == [2] * (DEPTH // 2)
    assert ops(side_by_side(graph, most=1)) == ops(graph)


def test_casts_of_weights_come_with_the_first() -> None:
    graph = wide("bfloat16")
    assert max(runs(graph, Cast)) < DEPTH
    for most, groups in ((2**22, [DEPTH]), (3 * WIDTH**2, [3, 3])):
        new = side_by_side(graph, most=most)
        of_weights = [n for n in new if isinstance(n.op, Cast) and n.specs[0].shape == (WIDTH, WIDTH)]
        names = [n.name for n in of_weights if new.nodes[n.inputs[0][0]].name.endswith("/w")]
        assert len(names) == DEPTH
        places = [ops(new).index(name) for name in names]
        starts = [at for at in places if at - 1 not in places]
        assert len(starts) == len(groups)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_all_that_waits_is_what_memory_grows_by(precision, monkeypatch) -> None:
    graph = wide(precision)

    def program(most: int | None):
        with monkeypatch.context() as patch:
            beside = (lambda graph: graph) if most is None else (lambda graph: side_by_side(graph, most=most))
            patch.setattr(planning, "side_by_side", beside)
            return compile_program(graph, Tuning(CARD))

    before = program(None)
    for most in (2 * WIDTH**2, 4 * WIDTH**2):
        after = program(most)
        assert after.copied == before.copied == 0
        assert after.donated >= before.donated
        assert after.arena_bytes - before.arena_bytes <= 2 * most * 4
    assert program(2**22).arena_bytes > before.arena_bytes


def test_collectives_keep_their_order_and_ranks_are_alike() -> None:
    graph = step_of(traced(small, X), optim.sgd(0.1, momentum=0.9))
    parts = [update_early(part) for part in bucket(split(graph, 3, data_parallel(graph, 3).layouts))]
    beside = [verify(side_by_side(part)) for part in parts]
    assert [collectives(part) for part in beside] == [collectives(part) for part in parts]
    assert len({tuple(node.name for node in part) for part in beside}) == 1
    assert_same_graphs(graph, beside, {**start(graph, SEED), **batch(X)}, scale=1.0)


def test_processors_keep_the_order_of_the_plan() -> None:
    graph = wide()
    names = {
        device.kind: [step.name for step in compile_program(graph, Tuning(device)).steps]
        for device in (CARD, Device("cpu", "a processor"))
    }
    assert names["cpu"] == [node.name for node in graph if not isinstance(node.op, Leaf) and not node.op.view]
    assert sorted(names["cpu"]) == sorted(names["cuda"])
    assert names["cpu"] != names["cuda"]
