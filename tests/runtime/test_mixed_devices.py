"""Ranks of one run on processors and on cards: who is where, what each computes, and what they hold together."""

from dataclasses import replace

import numpy as np
import pytest
from small_runs import make_step, records

import rapydli_flow as rf
from rapydli_flow import nn, optim
from rapydli_flow.errors import DeviceMismatch, MissingDependency, SettingError, ShapeError, TooLittleMemory
from rapydli_flow.runtime import local
from rapydli_flow.runtime.devices import device_of
from rapydli_flow.runtime.kinds import devices_for, names_of, tunings_for
from rapydli_flow.runtime.local import Local
from rapydli_flow.template import Device
from rapydli_flow.tuner import Tuning

pytestmark = pytest.mark.filterwarnings("ignore:no GPU kernel serves")
BOTH = ("emulated", "cpu")


@pytest.fixture(scope="module")
def step():
    return make_step(dtype="float32")


@pytest.fixture(scope="module")
def data():
    return records(dtype="float32")


@pytest.fixture(scope="module")
def alone(step, data):
    return rf.fit(step, data, steps=6, validation=data, device="cpu")


HOW = [{"shard": "state"}, {"shard": "parameters", "shares": [3, 1]}, {"strategy": "pipeline", "micro_batches": 2}]


@pytest.mark.parametrize("how", HOW, ids=str)
def test_a_run_on_a_card_and_a_processor_is_that_of_one(step, data, alone, how):
    plan = rf.plan(step, device=BOTH, threads=1, **how)
    run = rf.fit(step, data, steps=6, validation=data, plan=plan)
    np.testing.assert_allclose(run.scalars["loss"], alone.scalars["loss"], rtol=1e-5)
    np.testing.assert_allclose(run.metrics["loss"], alone.metrics["loss"], rtol=1e-5)
    for name, value in alone.state.items():
        np.testing.assert_allclose(run.state[name], value, atol=1e-5)
    card, cpu = run.started.settings["device"].split(", ")
    assert card.endswith("-emulated")
    assert cpu == device_of("cpu").key
    assert "rank 0 on emulated: " in run.started.explanation
    assert "rank 1 on cpu: " in run.started.explanation


def test_what_both_hold_has_the_same_bits(step):
    plan = rf.plan(step, device=BOTH, threads=1, shard="state")
    tunings = tunings_for("fit", devices_for("fit", plan.devices, {}), None)
    programs = plan.programs(step, *tunings)
    assert [program.device.is_a(name) for program, name in zip(programs, BOTH, strict=True)] == [True, True]
    ranks = Local(step, plan, programs, tunings[0], None, None, seed=0)
    rng = np.random.default_rng(0)
    batch = {"x": rng.normal(size=(8, 6, 6, 2)).astype(np.float32), "label": rng.integers(0, 4, 8)}

    def five_steps(trainer):
        rank = trainer.rank
        rank.start(0)
        for i in range(5):
            rank.feed({name: batch[name][rank.block(name).slices] for name in batch})
            rank.step(0, i)
        return rank.state()

    try:
        card, cpu = ranks.each(five_steps)
    finally:
        ranks.close(failed=False)
    one, other = (program.layout for program in programs)
    held = [name for name in card if other.get(name) == one[name]]
    assert {"conv_1/w", "dense_1/w", "dense_1/b"} <= set(held)  # of the rest each has a part
    assert all(card[name].tobytes() == cpu[name].tobytes() for name in held)


def test_what_would_drift_apart_is_refused(step, data):
    plan = rf.plan(step, device=BOTH, threads=1)
    with pytest.raises(SettingError, match=r"^plan: batch_norm_1/mean would be computed on emulated and on cpu"):
        rf.fit(step, data, steps=1, plan=plan)
    averaged = rf.plan(step, device=BOTH, threads=1, average_every=2)  # then they become equal now and then
    assert np.isfinite(rf.fit(step, data, steps=4, plan=averaged).scalars["loss"]).all()


def test_cards_of_one_kind_have_memory_of_their_own(step, monkeypatch):
    card = device_of("emulated")
    (program,) = rf.plan(step, ranks=1, threads=1).programs(step, Tuning(card))
    monkeypatch.setattr(local, "free_bytes", lambda device: (3 * program.needed_bytes // 2, f"on cuda:{device.number}"))
    both = [replace(program, device=replace(card, number=number)) for number in (0, 1)]
    local._check_memory(both)
    with pytest.raises(TooLittleMemory, match=r"on cuda:1"):
        local._check_memory([*both, both[1]])


def test_what_cannot_be_divided_is_the_first_ranks(data):
    """Of three ranks none has a part of two biases."""

    def small(x):
        return nn.dense(nn.max_pool(nn.relu(nn.conv(x, 2, 3, padding=1)), 2), 5)

    graph = rf.trace(small, rf.Spec((9, 6, 6, 2)))
    step = rf.train_step(graph, loss=nn.cross_entropy, optimizer=optim.sgd(0.1))
    plan = rf.plan(step, device=("emulated", "cpu", "cpu"), threads=1, shard="parameters")
    assert plan.layouts["conv_1/b"][1:] == (None, None)
    run, alone = rf.fit(step, data, steps=4, plan=plan), rf.fit(step, data, steps=4, device="cpu")
    np.testing.assert_allclose(run.scalars["loss"], alone.scalars["loss"], rtol=1e-5)


def test_shares(step, data, alone):
    plan = rf.plan(step, ranks=3, threads=1, shares=[5, 2, 1], device="cpu")
    assert [block.shape[0] for block in plan.layouts["x"]] == [5, 2, 1]
    run = rf.fit(step, data, steps=6, validation=data, plan=plan)
    np.testing.assert_allclose(run.scalars["loss"], alone.scalars["loss"], rtol=1e-5)
    for shares in ([1], [1, -1, 1], [1, 0, 1], [float("inf"), 1, 1]):
        with pytest.raises(SettingError, match="is not a number above 0 for each of 3 rank"):
            rf.plan(step, ranks=3, shares=shares)
    with pytest.raises(SettingError, match="for strategy 'data'"):
        rf.plan(step, ranks=2, shares=[1, 2], strategy="pipeline")
    with pytest.raises(ShapeError, match=r"shares=\[1000, 1\] a rank has none of the 8 records of x"):
        rf.plan(step, ranks=2, shares=[1000, 1])


def test_names_that_do_not_go_together(step, data):
    with pytest.raises(SettingError, match=r"plan: device=\['cpu', 'cpu'\] has 2 names for 3 rank"):
        rf.plan(step, ranks=3, device=["cpu", "cpu"])
    with pytest.raises(SettingError, match=r"^plan: device='gpu' is not"):
        rf.plan(step, device=["cpu", "gpu"])
    plan = rf.plan(step, device="cpu", ranks=2, threads=1)
    assert plan.devices == ("cpu", "cpu")
    with pytest.raises(SettingError, match=r"fit: device='emulated', but ranks of the plan are on cpu\. Leave device"):
        rf.fit(step, data, steps=1, plan=plan, device="emulated")
    assert names_of("fit", "cuda", rf.plan(step, device=["cuda:0", "cuda:1"], threads=1)) == ("cuda:0", "cuda:1")
    with pytest.raises(MissingDependency):
        devices_for("fit", ("cpu", "cuda:7"), {})
    with pytest.raises(SettingError, match="plan: rank 0 is on 'cpu', but the tuning is of emulated"):
        plan.programs(step, Tuning(device_of("emulated")))


def test_a_tuning_is_of_one_of_the_kinds(step, data):
    plan = rf.plan(step, device=BOTH, threads=1, shard="state")
    cpu = Tuning(device_of("cpu"))
    assert tunings_for("fit", devices_for("fit", BOTH, {}), cpu)[1] == cpu
    assert np.isfinite(rf.fit(step, data, steps=1, plan=plan, tuning=cpu).scalars["loss"]).all()
    other = Tuning(Device("cuda", "another", target="sm_99"))
    with pytest.raises(SettingError, match=r"fit: the tuning is of another \(cuda-sm_99"):
        rf.fit(step, data, steps=1, plan=plan, tuning=other)


def test_a_plan_keeps_its_devices_on_disk(step, data, tmp_path):
    plan = rf.plan(step, device=BOTH, threads=1, shard="state")
    assert rf.Plan.from_json(plan.to_json()) == plan
    how = {"run_dir": tmp_path, "snapshot_every": 3}
    rf.fit(step, data, steps=3, plan=plan, **how)
    again = rf.fit(step, data, steps=6, resume=True, **how)
    whole = rf.fit(step, data, steps=6, plan=plan)
    assert all(again.state[name].tobytes() == value.tobytes() for name, value in whole.state.items())


def test_a_snapshot_of_one_kind_is_of_no_device(step, data, tmp_path):
    plan = rf.plan(step, device="emulated", ranks=2, threads=1)
    how = {"run_dir": tmp_path, "snapshot_every": 3}
    rf.fit(step, data, steps=3, plan=plan, **how)
    second = rf.fit(step, data, steps=6, resume=True, device="emulated", **how)
    whole = rf.fit(step, data, steps=6, plan=plan)
    assert all(second.state[name].tobytes() == value.tobytes() for name, value in whole.state.items())
    third = rf.fit(step, data, steps=9, resume=True, **how)
    assert third.started.settings["device"] == device_of("cpu").key
    assert third.started.ranks == 2


def test_memory_of_a_card_is_counted_with_its_kernels(step):
    (card,) = rf.plan(step, ranks=1, threads=1, device="cuda")._known
    (cpu,) = rf.plan(step, ranks=1, threads=1, device="cpu")._known
    held = sum(leaf.spec.size_bytes for leaf in step.leaves("param", "state"))
    fed = sum(leaf.spec.size_bytes for leaf in step.leaves("batch"))
    assert card.sizes[:3] == cpu.sizes[:3]
    assert card.sizes[4] > held + 2 * fed  # what is set aside, and batches on their way
    assert card.sizes[4] != cpu.sizes[4]


def test_workers_of_both_kinds(loose, step, data, alone):
    client, start = loose
    start(1, RAPYDLI_DEVICE="emulated")
    start(2, RAPYDLI_DEVICE="cpu")
    client.wait_for_workers(3, timeout=60)
    plan = rf.plan(step, client, device=["cpu", "emulated", "cpu"], threads=1, shard="state")
    where = rf.placement(step, client, plan=plan)
    kinds = client.run(lambda dask_worker: device_of().emulated)
    assert [kinds[address] for address in where.addresses] == [False, True, False]
    run = rf.fit(step, data, steps=6, validation=data, client=client, plan=plan)
    np.testing.assert_allclose(run.scalars["loss"], alone.scalars["loss"], rtol=1e-5)
    np.testing.assert_allclose(run.metrics["loss"], alone.metrics["loss"], rtol=1e-5)
    with rf.stepper(step, client, plan=plan) as advance:
        _, metrics = advance(advance.init(), {"x": data["x"][:8], "label": data["label"][:8]})
    assert np.isfinite(metrics["loss"])
    behind = rf.plan(step, client, device=["cpu", "emulated", "cpu"], threads=1, staleness=0)
    waiting = rf.fit(step, data, steps=6, plan=rf.plan(step, ranks=3, threads=1, staleness=0, device="cpu"))
    run = rf.fit(step, data, steps=6, client=client, plan=behind)
    np.testing.assert_allclose(run.scalars["loss"], waiting.scalars["loss"], rtol=1e-5)
    assert run.started.settings["device"].count(",") == 1
    two = rf.plan(step, ranks=3, device=["emulated", "emulated", "cpu"], threads=1, shard="state")
    with pytest.raises(DeviceMismatch, match=r"needs 2 worker.s. with device 'emulated' but 1 of 3 have one"):
        rf.fit(step, data, steps=1, client=client, plan=two)
