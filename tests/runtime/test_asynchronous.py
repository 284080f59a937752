"""Ranks that do not wait for each other within a step: local SGD, and updates that come behind."""

import threading
import time
from importlib import import_module

import numpy as np
import pytest
import small_runs
from small_runs import deviation, many, same_bits

import rapydli_flow as rf
from rapydli_flow import nn, optim
from rapydli_flow.errors import NonFinite, SettingError
from rapydli_flow.runtime.devices import device_of
from rapydli_flow.runtime.stale import StaleRank
from rapydli_flow.runtime.transport import Threads
from rapydli_flow.testing import plans
from rapydli_flow.tuner import Tuning

# local SGD ----------------------------------------------------------------------------------------------


def plain(x):
    """No batch norm: its statistics are those of a rank's own records where ranks train by themselves."""
    return nn.dense(nn.dropout(nn.max_pool(nn.relu(nn.conv(x, 4, 3, padding=1)), 2), 0.25), small_runs.CLASSES)


def test_averaging_every_step_is_the_synchronous_run(data):
    step = small_runs.make_step(net=plain)
    want = rf.fit(step, data["train"], steps=30, plan=many(step, 3), seed=3)
    averaged = rf.plan(step, ranks=3, threads=1, average_every=1)
    run = rf.fit(step, data["train"], steps=30, plan=averaged, seed=3)
    assert deviation(run.state, want.state) < 1e-10
    assert "averaged every 1 steps: another run than that of one worker" in averaged.explain(step)


def test_averaging_now_and_then_is_another_run(data):
    step = small_runs.make_step(net=plain)
    want = rf.fit(step, data["train"], steps=40, plan=many(step, 2), validation=data["test"], seed=3)
    plan = rf.plan(step, ranks=2, threads=1, average_every=4)
    assert not any(node.op.collective for part in plan.rank_graphs(step) for node in part)
    runs = [rf.fit(step, data["train"], steps=40, plan=plan, validation=data["test"], seed=3) for _ in range(2)]
    assert same_bits(runs[0].state, runs[1].state)  # whatever the segments were
    assert runs[0].scalars == runs[1].scalars
    assert deviation(runs[0].state, want.state) > 1e-6
    assert np.mean(runs[0].scalars["loss"][-7:]) < np.mean(runs[0].scalars["loss"][:7])


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"average_every": 0}, "plan: average_every=0 is not 1 or more steps, for strategy 'data'"),
        (
            {"average_every": 2, "strategy": "spatial"},
            "plan: average_every=2 is not 1 or more steps, for strategy 'data'",
        ),
        ({"average_every": 2, "shard": "state"}, "plan: average_every=2 is not 1 or more steps, for strategy 'data'"),
    ],
)
def test_what_cannot_be_averaged(how, message):
    with pytest.raises(SettingError, match=message):
        rf.plan(small_runs.make_step(net=plain), ranks=2, **how)


def test_ranks_that_train_by_themselves_stop_together(data):
    step = small_runs.make_step(1e30, net=plain)
    with pytest.raises(NonFinite, match=r"the loss of rank \d is not finite at step \d"):
        rf.fit(step, data["train"], steps=40, plan=rf.plan(step, ranks=2, threads=1, average_every=4), seed=3)


# gradients rounded on their way, and summed behind kernels -----------------------------------------------


def test_rounded_gradients_are_nearly_the_same_run(client, data):
    step = small_runs.make_step(net=plain, dtype="float32")
    want = rf.fit(step, data["train"], steps=8, plan=many(step, 2), seed=3)
    plan = rf.plan(step, ranks=2, threads=1, wire="bfloat16")
    runs = [rf.fit(step, data["train"], steps=8, plan=plan, seed=3, client=c) for c in (None, client)]
    assert same_bits(runs[0].state, runs[1].state)
    assert 1e-6 < deviation(runs[0].state, want.state) < 0.1
    np.testing.assert_allclose(runs[0].scalars["loss"], want.scalars["loss"], rtol=0.05)
    assert "gradients are rounded to bfloat16 on their way: another run than that of one worker" in plan.explain(step)
    sent = [[op for op in meetings(each, step) if op.wire] for each in (plan, many(step, 2))]
    assert len(sent[0]) == 1
    assert not sent[1]
    with pytest.raises(SettingError, match="plan: wire='float16' is not 'bfloat16', or None"):
        rf.plan(step, ranks=2, wire="float16")
    for how in ({"shard": "state"}, {"staleness": 1}, {"average_every": 2}):
        with pytest.raises(SettingError, match="plan: wire='bfloat16' is for gradients that all ranks get the sum of"):
            rf.plan(step, ranks=2, wire="bfloat16", **how)


def meetings(plan, step):
    return [node.op for node in plan.rank_graphs(step)[0] if node.op.collective]


def test_sums_behind_kernels_give_the_same_bits_however_late_they_are(data, monkeypatch):
    monkeypatch.setattr(import_module("rapydli_flow.scheduler.bucket"), "LEAST_BYTES", 1)
    step = small_runs.make_step()
    want = rf.fit(step, data["train"], steps=10, plan=many(step, 2), seed=3)
    plan = rf.plan(step, ranks=2, threads=1, overlap=True)
    assert sum(op.behind for op in meetings(plan, step)) > 1
    meet = Threads.meet

    def late(self, name, op, ins, outs):
        time.sleep(0.01 if op.behind else 0.0)
        meet(self, name, op, ins, outs)

    monkeypatch.setattr(Threads, "meet", late)
    run = rf.fit(step, data["train"], steps=10, plan=plan, seed=3)
    assert same_bits(run.state, want.state)
    assert run.scalars == want.scalars


# updates behind the training ----------------------------------------------------------------------------


def asynchronous(step, ranks, staleness):
    return rf.plan(step, ranks=ranks, threads=1, staleness=staleness)


OPTIMIZERS = {
    "momentum": optim.sgd(0.05, momentum=0.9, weight_decay=1e-3),
    "adam": optim.adam(0.01),
    "clipped": optim.clip_norm(optim.adam(0.01), 0.1),  # a sum over all that ranks own, in the update
    "rate": optim.sgd(optim.cosine(0.05, steps=30)),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("ranks", [2, 3])
def test_no_staleness_is_the_synchronous_run(data, ranks, optimizer):
    graph = rf.trace(plain, rf.Spec((small_runs.BATCH, 6, 6, 2), "float64"))
    step = rf.train_step(graph, loss=nn.cross_entropy, optimizer=OPTIMIZERS[optimizer])
    want = rf.fit(step, data["train"], steps=30, plan=many(step, ranks), seed=3)
    run = rf.fit(step, data["train"], steps=30, plan=asynchronous(step, ranks, 0), seed=3)
    assert deviation(run.state, want.state) < 1e-10


def test_staleness_is_another_run_that_learns(data):
    step = small_runs.make_step(net=plain)
    want = rf.fit(step, data["train"], steps=60, plan=many(step, 2), seed=3)
    plan = asynchronous(step, 2, 2)
    run = rf.fit(step, data["train"], steps=60, plan=plan, validation=data["test"], seed=3)
    assert deviation(run.state, want.state) > 1e-6
    assert np.mean(run.scalars["loss"][-7:]) < np.mean(run.scalars["loss"][:7])
    assert "may be 2 steps ahead of their updates: another run than that of one worker" in plan.explain(step)


def test_running_statistics_are_the_mean_of_those_of_ranks(data):
    step = small_runs.make_step()
    run = rf.fit(step, data["train"], steps=1, plan=asynchronous(step, 2, 0), seed=3)
    averaged = rf.fit(step, data["train"], steps=1, plan=rf.plan(step, ranks=2, threads=1, average_every=1), seed=3)
    for name in ("batch_norm_1/mean", "batch_norm_1/var"):
        np.testing.assert_allclose(run.state[name], averaged.state[name], rtol=1e-12)


@pytest.mark.parametrize("staleness", [0, 1, 3])
def test_a_rank_is_never_further_ahead_than_that(staleness):
    """One rank stands still after its first step; the other one goes on as far as it may."""
    step = small_runs.make_step(net=plain)
    programs = plans.programs(step, asynchronous(step, 2, staleness))
    fed = plans.batches(step, 1, small_runs.CLASSES)[0]
    transports = Threads.of(2, timeout_s=10.0)
    ranks = [StaleRank(programs, n, plans.NUMPY.device, threads=1, transport=t) for n, t in enumerate(transports)]
    done, go_on = [0, 0], threading.Event()

    def train(number):
        rank = ranks[number]
        rank.start(0)
        rank.feed(
            {
                name: x[block.slices]
                for name, block in programs[number].gradients.layout.items()
                if (x := fed.get(name)) is not None
            }
        )
        for n in range(8):
            rank.step(0, n)
            done[number] += 1
            if number == 1 and n == 0:
                go_on.wait(5.0)
        rank.finish()

    threads = [threading.Thread(target=train, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    time.sleep(0.5)
    ahead = list(done)
    go_on.set()
    for thread in threads:
        thread.join(10.0)
    assert ahead == [min(8, 2 + staleness), 1]
    assert done == [8, 8]
    for rank in ranks:
        rank.close()


def test_a_rank_that_fails_behind_ends_the_run(data):
    step = small_runs.make_step(1e30, net=plain)
    with pytest.raises(NonFinite, match=r"the loss of rank \d is not finite at step \d"):
        rf.fit(step, data["train"], steps=40, plan=asynchronous(step, 2, 1), seed=3)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"staleness": -1}, "plan: staleness=-1 is not 0 or more"),
        ({"staleness": 1, "strategy": "spatial"}, "plan: staleness=1 is not 0 or more steps, for strategy 'data'"),
        ({"staleness": 1, "average_every": 2}, "plan: average_every is for ranks that train by themselves, staleness"),
    ],
)
def test_what_cannot_be_asynchronous(how, message):
    with pytest.raises(SettingError, match=message):
        rf.plan(small_runs.make_step(net=plain), ranks=2, **how)


def test_where_a_step_is_one_of_all_ranks(data):
    step = small_runs.make_step(net=plain)
    plan = asynchronous(step, 2, 1)
    with pytest.raises(SettingError, match=r"average_every or staleness is for rf\.fit"):
        rf.stepper(step, plan=plan)
    with pytest.raises(SettingError, match="average_every or staleness is for granularity 'segment'"):
        rf.fit(step, data["train"], steps=2, plan=plan, granularity="stage")


CARDS = [("emulated", "emulated"), ("emulated", "cpu"), ("cpu", "emulated")]


@pytest.mark.filterwarnings("ignore:no GPU kernel serves")
@pytest.mark.parametrize("devices", CARDS, ids=str)
def test_ranks_on_cards_make_gradients_that_hosts_update_with(devices, tmp_path):
    step, data = small_runs.make_step(net=plain, dtype="float32"), small_runs.records(dtype="float32")
    want = rf.fit(step, data, steps=9, plan=asynchronous(step, 2, 0), seed=3)
    plan = rf.plan(step, device=devices, threads=1, staleness=0)
    how = {"plan": plan, "seed": 3, "run_dir": tmp_path, "snapshot_every": 3}
    rf.fit(step, data, steps=6, **how)
    run = rf.fit(step, data, steps=9, resume=True, **how)
    np.testing.assert_allclose(run.scalars["loss"], want.scalars["loss"][6:], rtol=1e-5)
    assert deviation(run.state, want.state) < 1e-4
    programs = plan.programs(step, *(Tuning(device_of(name)) for name in dict.fromkeys(devices)))
    assert [program.on.called for program in programs] == list(devices)
    assert {program.device.kind for program in programs} == {"cpu"}
    card = next(program for program in programs if program.on.kind == "cuda")
    aside = sum(card.gradients.leaves[name].spec.size_bytes for name in card.gradients.kind("param", "state"))
    fed = sum(card.gradients.leaves[name].spec.size_bytes for name in card.gradients.kind("batch"))
    assert card.needed_bytes == card.gradients.arena_bytes + aside + 2 * fed  # of the card's memory
    stale = rf.fit(step, data, steps=20, plan=rf.plan(step, device=devices, threads=1, staleness=2), seed=3)
    assert np.isfinite(stale.scalars["loss"]).all()


def test_on_workers_it_is_the_same_and_goes_on_from_a_snapshot(client, data, tmp_path):
    step = small_runs.make_step(net=plain)
    plan = asynchronous(step, 2, 0)
    want = rf.fit(step, data["train"], steps=30, plan=plan, seed=3)
    how = {"plan": plan, "client": client, "seed": 3, "run_dir": tmp_path, "snapshot_every": 10}
    rf.fit(step, data["train"], steps=20, **how)
    run = rf.fit(step, data["train"], steps=30, resume=True, **how)
    assert same_bits(run.state, want.state)
