"""Kernels of a card as tasks of Dask: arrays stay there between tasks, in this process and on workers."""

import gc
import os
import pickle
import sys
import threading
from contextlib import suppress

import dask
import numpy as np
import pytest
from dask.local import get_sync
from distributed import get_task_stream
from distributed.protocol import deserialize, serialize
from small_runs import make_step, many, records, same_bits

import rapydli_flow as rf
from gpu_kernels import emulated
from rapydli_flow import nn
from rapydli_flow.errors import DeviceFault, DeviceMismatch, NonFinite, RunLost, SettingError, TemplateError
from rapydli_flow.ops import Relu
from rapydli_flow.runtime import bodies, card_array, devices, flow
from rapydli_flow.runtime.card_array import CardArray, Desk, desk_of
from rapydli_flow.runtime.devices import device_of
from rapydli_flow.spec import Spec
from rapydli_flow.template import Device
from rapydli_flow.tuner import REFERENCE, Tuning

pytestmark = pytest.mark.filterwarnings("ignore:no GPU kernel serves")
CARD = "emulated"
FINER = ("stage", "op")


@pytest.fixture(scope="module")
def step():
    return make_step(dtype="float32")


@pytest.fixture(scope="module")
def data():
    return records(dtype="float32")


@pytest.fixture
def desk():
    return Desk(device_of(CARD))


def same_run(one, other):
    return one.scalars == other.scalars and same_bits(one.state, other.state)


@pytest.mark.parametrize("granularity", FINER)
def test_tasks_give_what_segments_give(step, data, granularity, tmp_path):
    how = {"steps": 4, "validation": data, "device": CARD}
    whole = rf.fit(step, data, **how)
    run = rf.fit(step, data, granularity=granularity, run_dir=tmp_path, snapshot_every=2, **how)
    assert same_run(run, whole)
    assert run.metrics == whole.metrics
    assert run.started.settings["device"].endswith("-emulated")
    longer = rf.fit(step, data, granularity=granularity, run_dir=tmp_path, resume=True, **{**how, "steps": 6})
    assert same_bits(longer.state, rf.fit(step, data, **{**how, "steps": 6}).state)


PLANS = [
    {"ranks": 3},
    {"ranks": 2, "overlap": True},
    {"ranks": 2, "shard": "state"},
    {"ranks": 2, "strategy": "pipeline", "micro_batches": 2},
    {"ranks": 2, "strategy": "spatial"},
    {"device": (CARD, "cpu"), "shard": "state"},
]


@pytest.mark.parametrize("how", PLANS, ids=str)
def test_every_plan(step, data, how):
    plan = rf.plan(step, threads=1, **({"device": CARD} | how))
    whole = rf.fit(step, data, steps=3, plan=plan)
    for granularity in FINER:
        assert same_run(rf.fit(step, data, steps=3, plan=plan, granularity=granularity), whole)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_halves(data, precision):
    graph = rf.trace(lambda x: nn.dense(nn.relu(nn.conv(x, 4, 3)), 5), rf.Spec((8, 6, 6, 2)))
    step = rf.train_step(graph, loss=nn.cross_entropy, optimizer=rf.optim.sgd(0.1), precision=precision)
    whole = rf.fit(step, data, steps=3, device=CARD)
    assert same_run(rf.fit(step, data, steps=3, device=CARD, granularity="op"), whole)


def test_what_is_not_for_tasks(step, data):
    for how, what in (({"nccl": True}, "nccl"), ({"staleness": 1, "device": "cpu"}, "average_every or staleness")):
        plan = rf.plan(step, **{"ranks": 2, "threads": 1, "device": CARD} | how)
        with pytest.raises(SettingError, match=f"a plan with {what} is for granularity 'segment', not 'op'"):
            rf.fit(step, data, steps=1, plan=plan, granularity="op")


@pytest.mark.parametrize("granularity", FINER)
def test_a_loss_that_is_not_finite(data, granularity):
    step = make_step(rate=1e30, dtype="float32")
    with pytest.raises(NonFinite, match=r"loss is (nan|inf) at step \d.*The first output that is not finite is of \w+"):
        rf.fit(step, data, steps=9, device=CARD, granularity=granularity)


def test_arrays_stay_on_the_card_between_tasks(step, data, monkeypatch):
    brought = []
    monkeypatch.setattr(CardArray, "__array__", lambda self, *_, **__: brought.append(self) or downloaded(self))
    feeds = {name: value[:8] for name, value in data.items()}
    lazy = rf.compile(rf.graph.predicting(step.network), feeds, device=CARD)
    tasks = dict(lazy.__dask_graph__())
    made = [key for key in tasks if isinstance(key, tuple) and len(key) == 3]  # kernels
    given = get_sync(tasks, made)
    on_card = [array for arrays in given for array in arrays if isinstance(array, CardArray)]
    assert len(on_card) > 4
    assert len(brought) <= 1  # an op without a kernel
    named = lazy.compute(scheduler="sync")
    assert all(type(array) is np.ndarray for array in named.values())
    for scheduler in ("sync", "threads"):
        for granularity in FINER:
            again = rf.compile(rf.graph.predicting(step.network), feeds, device=CARD, granularity=granularity)
            (found,) = dask.compute(again, scheduler=scheduler)
            assert all(np.array_equal(found[name], named[name]) for name in named)


def downloaded(array):
    found = np.empty(array.shape, array.dtype)
    with array.desk.at_work() as card:
        card.download(found, array.address)
    return found


def test_an_array_on_a_card(desk):
    sent = []
    x = np.arange(12, dtype="bfloat16").reshape(3, 4)
    array = desk._there(x, sent)
    assert repr(array) == "<CardArray: bf16[3,4] on emulated>"
    assert (array.shape, array.dtype, array.nbytes) == (x.shape, x.dtype, 24)
    assert sys.getsizeof(array) >= 24
    assert np.array_equal(np.asarray(array), x)
    assert np.asarray(array, "float32").dtype == np.float32
    with pytest.raises(ValueError, match="cannot be read without a copy"):
        np.array(array, copy=False)
    for other in (pickle.loads(pickle.dumps(array)), deserialize(*serialize((array,)))[0]):  # elsewhere, or spilled
        assert type(other) is np.ndarray
        assert other.dtype == x.dtype
        assert np.array_equal(other, x)
    assert desk._there(array, sent) is array
    another = Desk(device_of(CARD))._there(array, sent)  # of another card it is copied, through the host
    assert another is not array
    assert np.array_equal(np.asarray(another), x)
    assert len(desk.card._memory) == 1
    del array
    gc.collect()
    assert not desk.card._memory


@pytest.mark.parametrize("device", ["cpu", CARD])
@pytest.mark.parametrize("granularity", FINER)
def test_records_of_another_dtype_are_cast(step, data, device, granularity):
    other = {"x": data["x"].astype(np.float64), "label": data["label"].astype(np.int32)}
    whole = rf.fit(step, data, steps=3, device=device)
    assert same_run(rf.fit(step, other, steps=3, device=device, granularity=granularity), whole)


def test_what_a_kernel_does_not_take_is_refused(desk):
    request, choice = Tuning(desk.device).serve(Relu(), [Spec((3, 4))])
    with pytest.raises(TemplateError, match=r"relu: expected f32\[3,4\] but got f64\[3,4\]"):
        desk.run(request, choice, [np.ones((3, 4))], None)
    assert not desk.card._memory


def test_a_task_lets_go_of_what_nobody_reads_any_more(step, data, monkeypatch):
    held = []
    run_node = bodies.run_node

    def counted(kernel, arrays, device, threads):
        gc.collect()
        held.append(len(desk_of(device).card._memory))
        return run_node(kernel, arrays, device, threads)

    monkeypatch.setattr(bodies, "run_node", counted)
    rf.fit(step, data, steps=1, device=CARD, granularity="stage")
    assert len(held) > 20
    assert held[-1] - held[0] < 20  # parameters and state that the step gives, and a few between


def test_kernels_are_compiled_before_the_card_is_taken(desk, monkeypatch):
    def build(request, choice, device):
        thread = threading.Thread(target=lambda: np.asarray(there))
        thread.start()
        thread.join(10)
        assert not thread.is_alive()
        built.append(request)

    there, built = desk.put(np.ones(3, np.float32)), []
    monkeypatch.setattr(card_array, "build", build)
    monkeypatch.setattr(card_array, "MOST_KERNELS", 1)
    for size in (3, 4, 3):
        request, choice = Tuning(desk.device).serve(Relu(), [Spec((size,))])
        desk.run(request, choice, [np.ones(size, np.float32)], None)
    assert len(desk._kernels) == 1
    assert len(built) >= 3


def test_memory_of_a_kernel_is_given_back(desk):
    op, spec = Relu(), Spec((3, 4))
    request, choice = Tuning(desk.device).serve(op, [spec])
    (y,) = desk.run(request, choice, [np.full((3, 4), -1.0, np.float32)], None)
    assert not np.asarray(y).any()
    assert len(desk.card._memory) == 1
    assert len(desk._kernels) == 1


def test_one_queue_for_all_tasks_of_a_process():
    device = device_of(CARD)
    assert desk_of(device) is desk_of(device)
    other = Device("cuda", "emulated", target=device.target, memory_bytes=device.memory_bytes, cores=device.cores)
    assert other != device


def test_a_kernel_that_fails_is_named(step, data, monkeypatch):
    def refuse(self, request):
        raise DeviceFault("CUDA_ERROR_LAUNCH_FAILED.", sticky=True)

    monkeypatch.setattr(emulated.Emulated, "prepare", refuse)
    monkeypatch.setattr(card_array, "_desks", {})
    message = r"^\w+.* \(f32\[.*\) with .* on emulated: CUDA_ERROR_LAUNCH_FAILED. Snapshots written before are kept"
    with pytest.raises(DeviceFault, match=message) as caught:
        rf.fit(step, data, steps=1, device=CARD, granularity="op")
    assert caught.value.sticky


def test_what_is_under_way_is_waited_for_when_something_fails(desk, monkeypatch):
    waited = []
    monkeypatch.setattr(desk.card, "wait", lambda: waited.append(1))
    with pytest.raises(KeyError), desk.at_work():
        raise KeyError
    assert waited == [1]


def test_ops_without_a_kernel_run_on_the_host_and_are_told_once(step, data, monkeypatch):
    monkeypatch.setattr(devices, "_told", set())
    device, plan = device_of(CARD), many(step, 1)
    (program,) = plan.programs(step, Tuning(device))
    convs = [request.key(device) for request, _ in program.requests if request.title.startswith("conv")]
    tuning = Tuning(device, dict.fromkeys(convs, REFERENCE))
    with pytest.warns(RuntimeWarning, match=r"no GPU kernel serves .*conv.*: these ops run on the host") as told:
        run = rf.fit(step, data, steps=3, tuning=tuning, device=CARD, granularity="op")
    assert len(told) == 1
    assert same_run(run, rf.fit(step, data, steps=3, tuning=tuning, device=CARD))


class Worker:
    address = "tcp://here"


def test_a_worker_takes_its_own_gpu(monkeypatch):
    card = Device("cuda", "H200", target="sm_90a")
    other = Device("cuda", "H200", target="sm_90a", number=1)
    cpu = device_of("cpu")
    assert bodies.at_hand(card) is card  # this process is no worker
    monkeypatch.setattr(bodies, "get_worker", Worker)
    monkeypatch.setattr(bodies, "device_of", lambda: other)
    assert bodies.at_hand(card) is other
    assert bodies.at_hand(cpu) is cpu
    assert bodies.at_hand(device_of(CARD)) is device_of(CARD)
    with pytest.raises(DeviceMismatch, match=r"^worker tcp://here has H200 .*, kernels were chosen for A100 .*\."):
        bodies.at_hand(Device("cuda", "A100", target="sm_80"))
    monkeypatch.setattr(bodies, "device_of", lambda: cpu)
    with pytest.raises(DeviceMismatch, match=r"^worker tcp://here has device .*, and no GPU\. Say which workers"):
        bodies.at_hand(card)


def test_workers_with_a_card_beside_others(loose, step, data, tmp_path):
    client, start = loose
    start(2, RAPYDLI_DEVICE=CARD)
    start(1, RAPYDLI_DEVICE="cpu")
    client.wait_for_workers(3, timeout=60)
    records_ = rf.ingest({"train": data, "test": data}, tmp_path / "data.zarr", chunk_records=8)
    plan = rf.plan(step, client, device=CARD, threads=1)
    how = {"steps": 3, "plan": plan, "validation": records_["test"]}
    whole = rf.fit(step, records_["train"], device=CARD, **how)
    cards = {address for address, device in client.run(lambda: device_of().called).items() if device == CARD}
    for granularity in FINER:
        with get_task_stream(client) as stream:
            run = rf.fit(step, records_["train"], client=client, granularity=granularity, **how)
        assert same_run(run, whole)
        assert run.metrics == whole.metrics
        assert set(client.run(lambda: flow._scorer.cache_info().currsize).values()) == {0}  # nothing is left there
        ran = {task["worker"] for task in stream.data}
        assert ran <= cards
    exploding = make_step(rate=1e30, dtype="float32")
    with pytest.raises(NonFinite, match="The first output that is not finite is of"):
        rf.fit(exploding, data, steps=9, client=client, device=CARD, granularity="op")
    mixed = rf.plan(step, client, device=[CARD, "cpu"], threads=1, shard="state")
    with pytest.raises(SettingError, match=r"granularity='op' is for workers of one kind, not for .* and .*Use 'segm"):
        rf.fit(step, records_["train"], steps=1, plan=mixed, client=client, granularity="op")
    with pytest.raises(DeviceMismatch, match=r"^compile needs 1 worker.s. with device 'cuda' but 0 of 3 have one"):
        rf.compile(step, device="cuda")


def test_the_last_worker_with_a_card_is_lost(loose, step, data, monkeypatch):
    monkeypatch.setattr(flow, "LOOK_S", 0.5)
    client, start = loose
    start(1, RAPYDLI_DEVICE=CARD)
    start(1, RAPYDLI_DEVICE="cpu")
    client.wait_for_workers(2, timeout=60)
    (card,) = (address for address, name in client.run(lambda: device_of().called).items() if name == CARD)

    class Accident(rf.Callback):
        def on_event(self, event):
            if type(event).__name__ == "Stepped":
                with suppress(Exception):
                    client.run(os._exit, 1, workers=[card])

    how = {"granularity": "stage", "device": CARD, "client": client, "callbacks": [Accident()]}
    with pytest.raises(RunLost, match=r"^no worker with emulated is left\. Start one, and resume the run"):
        rf.fit(step, data, steps=40, **how)
