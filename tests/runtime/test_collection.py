"""A compiled graph is a Dask collection, whose tasks are kernel calls."""

import dask
import numpy as np
import pytest
from dask.base import is_dask_collection, key_split, tokenize
from distributed import get_task_stream
from small_runs import BATCH, make_step, many, network, records

import rapydli_flow as rf
from rapydli_flow.errors import SettingError
from rapydli_flow.graph import predicting
from rapydli_flow.ops import Leaf
from rapydli_flow.runtime import devices, workers
from rapydli_flow.testing.interpret import interpret


@pytest.fixture(scope="module")
def net(step):
    return predicting(step.network)


@pytest.fixture(scope="module")
def feeds():
    return {name: array[:BATCH] for name, array in records().items()}


@pytest.fixture(scope="module")
def wanted(net, feeds):
    return interpret(net, {**rf.init(net), **feeds}).outputs


def check(got, wanted):
    assert set(got) == set(wanted)
    for name, value in wanted.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-12, atol=1e-14)


def kernels_of(graph):
    """The nodes of the graph as it is carried out, without its leaves."""
    (fused,) = many(graph, 1).rank_graphs(graph)
    return [node for node in fused if not isinstance(node.op, Leaf)]


def key_names(collection):
    return {key_split(key) for key in dict(collection.__dask_graph__())}


def test_tasks_are_called_what_they_do(net, feeds):
    names = key_names(rf.compile(net, feeds))
    assert {"param", "state", "batch", "outputs", "cross_entropy"} <= names
    assert any(name.startswith("conv") for name in names)
    assert any(name.startswith("matmul") for name in names)


def test_a_fused_tail_is_in_the_name():
    graph = rf.trace(lambda x: rf.nn.relu(rf.nn.conv(x, 4, 3) + rf.nn.conv(x, 4, 3)), rf.Spec((2, 6, 6, 2)))
    names = key_names(rf.compile(graph))
    assert [name for name in names if name.startswith("conv_") and name.endswith("_relu")]


@pytest.mark.parametrize("granularity", ["op", "stage"])
@pytest.mark.parametrize("scheduler", ["threads", "sync"])
def test_compute(net, feeds, wanted, scheduler, granularity):
    compiled = rf.compile(net, feeds, granularity=granularity)
    assert is_dask_collection(compiled)
    check(compiled.compute(scheduler=scheduler), wanted)


def test_compute_on_a_cluster(client, net, feeds, wanted):
    compiled = rf.compile(net, feeds)
    check(compiled.compute(), wanted)
    persisted = compiled.persist()
    assert persisted.outputs == compiled.outputs
    check(persisted.compute(), wanted)
    check(client.compute(compiled, sync=True), wanted)


def test_persist_here(net, feeds, wanted):
    persisted = rf.compile(net, feeds).persist(scheduler="sync")
    assert len(persisted.__dask_graph__()) == len(wanted)
    check(persisted.compute(scheduler="sync"), wanted)
    check(persisted.persist(scheduler="sync").compute(scheduler="threads"), wanted)


def test_several_at_once(net, feeds, wanted):
    other = {**feeds, "x": feeds["x"][::-1].copy()}
    one, two = dask.compute(rf.compile(net, feeds), rf.compile(net, other), scheduler="sync")
    check(one, wanted)
    check(two, interpret(net, {**rf.init(net), **other}).outputs)
    (kept,) = dask.optimize(rf.compile(net, feeds))
    check(kept.compute(scheduler="sync"), wanted)


def test_names_are_deterministic(net, feeds):
    one, again = rf.compile(net, feeds), rf.compile(net, feeds)
    assert tokenize(one) == tokenize(again)
    assert one.__dask_keys__() == again.__dask_keys__()
    assert one.__dask_layers__() == (one.name,)
    others = [rf.compile(net, feeds, seed=1), rf.compile(net, feeds, granularity="stage"), rf.compile(net)]
    assert len({tokenize(c) for c in (one, *others)}) == 4


def test_at_granularity_op_a_task_is_a_kernel_call(step, feeds):
    compiled = rf.compile(step, feeds)
    (fused,) = many(step, 1).rank_graphs(step)
    fed = [node for node in fused if isinstance(node.op, Leaf) and node.op.kind != "clock"]
    assert len(compiled.__dask_graph__()) == len(kernels_of(step)) + len(fed) + len(compiled.outputs)
    assert repr(compiled) == f"<Compiled: loss, accuracy; {len(compiled.__dask_graph__())} tasks>"
    stages = rf.compile(step, feeds, granularity="stage")
    assert len(stages.__dask_graph__()) == 1 + len(fed) + len(stages.outputs)


def test_a_training_step_is_one_too(step, feeds):
    got = rf.compile(step, feeds, seed=5, step=3).compute(scheduler="sync")
    outputs = interpret(step, {**rf.init(step, seed=5), **feeds}, seed=5, step=3).outputs
    for name, value in got.items():
        np.testing.assert_allclose(value, outputs[name], rtol=1e-10)


def test_a_cluster_shows_kernels_in_its_task_stream(client, net, feeds):
    compiled = rf.compile(net, {**feeds, "x": feeds["x"] + 1})
    with get_task_stream(client) as stream:
        compiled.compute()
    ran = {str(task["key"]) for task in stream.data}
    own = [key for key in compiled.__dask_graph__() if key_split(key) not in ("param", "state", "batch", "outputs")]
    assert len(own) == len(kernels_of(net))
    assert {str(key) for key in own} <= ran


def test_a_state_may_be_given(step, net, feeds, data):
    run = rf.fit(step, data["train"], steps=5)
    got = rf.compile(net, feeds, state=run.state).compute(scheduler="sync")
    state = {x.name: run.state[x.name] for x in net.leaves("param", "state")}
    check(got, interpret(net, {**state, **feeds}).outputs)


def test_a_graph_without_data_can_be_looked_at_but_not_computed(net):
    compiled = rf.compile(net)
    assert "cross_entropy" in key_names(compiled)
    with pytest.raises(
        SettingError, match=r"x is not fed. Give it to rf.compile\(graph, \{'x': array\}\)|label is not fed"
    ):
        compiled.compute(scheduler="sync")


@pytest.mark.parametrize("scheduler", ["sync", "threads"])
def test_wrong_feeds(net, feeds, scheduler):
    with pytest.raises(SettingError, match="compile: y is not an input of the graph; its inputs are x, label"):
        rf.compile(net, {"y": feeds["x"]})
    with pytest.raises(
        SettingError, match=r"x is fed float64 \(7, 6, 6, 2\) but the graph takes float64 \(8, 6, 6, 2\)"
    ):
        rf.compile(net, {**feeds, "x": feeds["x"][:7]}).compute(scheduler=scheduler)
    with pytest.raises(SettingError, match="label is fed float64"):
        rf.compile(net, {**feeds, "label": feeds["label"] + 0.5}).compute(scheduler=scheduler)
    with pytest.raises(SettingError, match="granularity 'segment' is not one of op, stage"):
        rf.compile(net, feeds, granularity="segment")


def test_tasks_for_a_gpu_go_to_workers_that_have_one(client, net, feeds, monkeypatch):
    cpu = devices.device_of("cpu")
    addresses = sorted(client.scheduler_info(n_workers=-1)["workers"])
    for some in (addresses[:1], addresses):
        found = {address: {"device": cpu} for address in some}
        monkeypatch.setattr(workers, "workers_for", lambda *how, found=found: found)
        shifted = {**feeds, "x": feeds["x"] + len(some)}
        with get_task_stream(client) as stream:
            rf.compile(net, shifted, device="cuda").compute()
        assert {task["worker"] for task in stream.data} <= set(some)


def test_float32_is_cast_on_the_way_in(feeds):
    graph = predicting(make_step(net=network, dtype="float32").network)
    assert rf.compile(graph, feeds).compute(scheduler="sync")["y"].dtype == np.float32
