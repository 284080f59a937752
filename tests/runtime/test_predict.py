"""predict: a lazy Dask array with a chunk for every batch."""

import dask.array as da
import numpy as np
import pytest
from dask.base import key_split
from distributed import get_task_stream
from small_runs import BATCH, CLASSES, make_step, records

import rapydli_flow as rf
from cpu_kernels.compile import host
from rapydli_flow.errors import DeviceMismatch, SettingError
from rapydli_flow.graph import predicting, with_batch
from rapydli_flow.runtime import bodies, workers
from rapydli_flow.runtime import predict as tasks
from rapydli_flow.runtime.evaluate import Predictor
from rapydli_flow.runtime.remembered import known
from rapydli_flow.template import Device
from rapydli_flow.testing.interpret import interpret


@pytest.fixture(scope="module")
def run(step, data):
    return rf.fit(step, data["train"], steps=10)


@pytest.fixture(scope="module")
def wanted(step, run):
    """Batch by batch, with each op's reference; the last batch has 5 records."""
    fed, out = records(13, seed=1), []
    for lo in (0, BATCH):
        feeds = {name: array[lo : lo + BATCH] for name, array in fed.items()}
        graph = predicting(with_batch(step.network, len(feeds["x"])))
        state = {x.name: run.state[x.name] for x in graph.leaves("param", "state")}
        out.append(interpret(graph, {**state, **feeds}).outputs["y"])
    return np.concatenate(out)


def test_a_dataset(run, data, wanted):
    lazy = rf.predict(run.graph, run.state, data["test"])
    assert isinstance(lazy, da.Array)
    assert lazy.chunks == ((7, 6), (CLASSES,))
    assert lazy.dtype == np.float64
    for scheduler in ("sync", "threads"):
        np.testing.assert_allclose(lazy.compute(scheduler=scheduler), wanted, rtol=1e-5)
    part = rf.predict(run.graph, run.state, data["test"][3:7])
    np.testing.assert_allclose(part.compute(scheduler="sync"), wanted[3:7], rtol=1e-5)
    np.testing.assert_array_equal(lazy.argmax(1).compute(scheduler="sync"), wanted.argmax(1))


def test_arrays(run, wanted):
    x = records(13, seed=1)["x"]
    for given in (x, {"x": x}, x.tolist(), {"x": x, "other": x[:2]}):
        lazy = rf.predict(run.graph, run.state, given)
        np.testing.assert_allclose(lazy.compute(scheduler="sync"), wanted, rtol=1e-5)
    assert rf.predict(run.graph, run.state, x[:3]).compute(scheduler="sync").shape == (3, CLASSES)


def test_on_a_cluster(client, run, data, wanted):
    lazy = rf.predict(run.graph, run.state, data["train"])
    with get_task_stream(client) as stream:
        got = lazy.compute()
    np.testing.assert_allclose(got, lazy.compute(scheduler="sync"), rtol=1e-12)
    assert len({task["worker"] for task in stream.data}) > 1  # not pinned
    assert {key_split(task["key"]) for task in stream.data} >= {"predict"}
    np.testing.assert_allclose(rf.predict(run.graph, run.state, data["test"]).compute(), wanted, rtol=1e-5)


def test_another_output(run, data):
    lazy = rf.predict(run.graph, run.state, data["test"])
    assert rf.predict(run.graph, run.state, data["test"]).name == lazy.name
    with pytest.raises(SettingError, match="predict: there is no output 'z'; the network has y, loss, accuracy"):
        rf.predict(run.graph, run.state, data["test"], output="z")


def test_a_network_that_was_never_trained(data):
    graph = rf.trace(lambda x: {"probability": rf.nn.softmax(rf.nn.dense(x, 3))}, rf.Spec((4, 6, 6, 2), "float64"))
    lazy = rf.predict(graph, rf.init(graph), data["test"], output="probability")
    np.testing.assert_allclose(lazy.sum(1).compute(scheduler="sync"), 1)


def test_data_that_does_not_fit(run, data):
    with pytest.raises(SettingError, match="the network is fed 'x', which the data does not have"):
        rf.predict(run.graph, run.state, {"image": np.zeros((3, 6, 6, 2))})
    with pytest.raises(SettingError, match=r"records of 'x' are \(6, 5, 2\), the network takes \(6, 6, 2\)"):
        rf.predict(run.graph, run.state, np.zeros((3, 6, 5, 2)))
    with pytest.raises(SettingError, match="there are no records"):
        rf.predict(run.graph, run.state, np.zeros((0, 6, 6, 2)))
    with pytest.raises(SettingError, match="the state has no 'conv_1/w'"):
        rf.predict(run.graph, {"dense_1/w": run.state["dense_1/w"]}, data["test"])


def test_two_states_are_not_mixed_up(step, run, data):
    one = rf.predict(run.graph, run.state, data["test"])
    other = rf.predict(run.graph, rf.init(make_step().network, seed=4), data["test"])
    assert one.name != other.name
    assert not np.allclose(one.compute(scheduler="sync"), other.compute(scheduler="sync"))


def test_parameters_are_read_where_they_are(run):
    """No program has a copy of them, whatever the batch; arrays that kernels cannot read are copied."""
    fed, network = records(BATCH, seed=1), predicting(run.graph)
    predictor = Predictor(network, run.state, known(host()))
    wanted = predictor(fed)["y"]
    assert set(predictor.program(BATCH).lent) == {leaf.name for leaf in network.leaves("param", "state")}
    for size in (BATCH, 3):
        assert np.shares_memory(predictor._rank(size).leaf("dense_1/w"), run.state["dense_1/w"])
    fortran = {name: np.asfortranarray(value) for name, value in run.state.items()}
    single = {name: value.astype(np.float32) for name, value in run.state.items()}
    read_only = {name: value.copy() for name, value in run.state.items()}
    for value in read_only.values():
        value.flags.writeable = False
    for state, rtol in ((fortran, 1e-12), (single, 1e-5), (read_only, 1e-12)):
        predictor.load(state)
        np.testing.assert_allclose(predictor(fed)["y"], wanted, rtol=rtol)
    predictor.load({name: 2 * value for name, value in run.state.items()})
    assert not np.allclose(predictor(fed)["y"], wanted)


GPU = Device("cuda", "a card", target="sm_90a", cores=132, vector_bytes=16, number=1)


def test_a_gpu_is_one_of_the_workers(client, run, data, monkeypatch):
    """The process of the client has none."""
    asked = []
    monkeypatch.setattr(workers, "workers_for", lambda *how: asked.append(how[3:]) or {"a": {"device": GPU}})
    lazy = rf.predict(run.graph, run.state, data["test"], device="cuda")
    assert asked == [("cuda", "predict")]
    (told,) = [node.value for key, node in dict(lazy.dask).items() if str(key).startswith("tuning-")]
    assert (told[0].device, told[1:]) == (GPU, (False, "cuda"))
    with pytest.raises(DeviceMismatch, match=r"^worker tcp://\S+ has device .*, and no GPU\. Say which"):
        lazy.compute()


def test_a_worker_predicts_on_the_gpu_that_it_has(monkeypatch):
    named = []
    monkeypatch.setattr(tasks, "device_of", lambda *how: named.append(how) or GPU)
    assert tasks._own("cuda") == GPU
    monkeypatch.setattr(bodies, "get_worker", object)
    monkeypatch.setattr(bodies, "device_of", lambda: GPU)
    assert tasks._own("cuda").number == 1
    assert named == [("cuda", "predict")]
