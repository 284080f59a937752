"""Recomputation: less memory, the same bits."""

from typing import Any

import numpy as np
import pytest

import rapydli_flow as rf
from cpu_kernels.compile import host
from rapydli_flow import nn, optim
from rapydli_flow.errors import GraphError
from rapydli_flow.graph import Graph, verify
from rapydli_flow.ops import Again
from rapydli_flow.scheduler import Plan, compile_program
from rapydli_flow.testing.interpret import interpret
from rapydli_flow.tuner import Tuning


def block(x: Any) -> Any:
    y = nn.relu(nn.batch_norm(nn.conv(x, 16, 3, padding=1, bias=False)))
    y = nn.batch_norm(nn.conv(nn.dropout(y, 0.3), 16, 3, padding=1, bias=False))
    return nn.relu(x + y)


def network(x: Any) -> Any:
    x = nn.conv(x, 16, 1)
    for _ in range(3):
        x = block(x)
    return nn.dense(nn.mean(x, axes=(1, 2)), 3)


@pytest.fixture(scope="module")
def step() -> Graph:
    graph = rf.trace(network, rf.Spec((8, 16, 16, 4)))
    return rf.train_step(graph, loss=nn.cross_entropy, optimizer=optim.sgd(0.1, momentum=0.9))


def arena(step: Graph) -> int:
    (graph,) = Plan(1, 1).rank_graphs(step)
    return compile_program(graph, Tuning(host())).arena_bytes


def test_it_takes_less_memory(step: Graph) -> None:
    less = rf.remat(step)
    verify(less)
    assert sum(isinstance(node.op, Again) for node in less) >= 3
    assert arena(less) < 0.8 * arena(step)


def test_it_computes_the_same(step: Graph) -> None:
    rng = np.random.default_rng(0)
    feeds = {"x": rng.normal(size=(8, 16, 16, 4)).astype("float32"), "label": rng.integers(0, 3, 8)}
    plain, again = (interpret(each, feeds, 1, 2) for each in (step, rf.remat(step)))
    for name, value in plain.updates.items():
        np.testing.assert_array_equal(value, again.updates[name], err_msg=name)


@pytest.mark.slow
def test_kernels_compute_the_same_bits(step: Graph) -> None:
    rng = np.random.default_rng(0)
    records = {"x": rng.normal(size=(16, 16, 16, 4)).astype("float32"), "label": rng.integers(0, 3, 16)}
    runs = [rf.fit(each, records, steps=3) for each in (step, rf.remat(step))]
    for name, value in runs[0].state.items():
        np.testing.assert_array_equal(value, runs[1].state[name], err_msg=name)


def test_a_network_has_nothing_to_make_again(step: Graph) -> None:
    assert step.network is not None
    with pytest.raises(GraphError, match="remat: this graph has no backward pass; give it the result of"):
        rf.remat(step.network)


def test_the_graph_given_stays_as_it_is(step: Graph) -> None:
    before = str(step)
    rf.remat(step)
    assert str(step) == before
