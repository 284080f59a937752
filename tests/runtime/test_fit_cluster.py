"""Training on Dask workers: the same run as in this process, whatever carries bytes between ranks."""

import time

import numpy as np
import pytest
from dask.base import key_split
from distributed import Client, LocalCluster, get_task_stream
from small_runs import deviation, make_step, many, records, same_bits

import rapydli_flow as rf
from rapydli_flow.data import list_snapshots, read_snapshot
from rapydli_flow.errors import SettingError
from rapydli_flow.runtime import cluster, train
from rapydli_flow.runtime import worker as tasks
from rapydli_flow.runtime.cluster import BEAT_S
from rapydli_flow.runtime.events import Recovered, Stepped, Validated
from rapydli_flow.runtime.workers import ready_workers


def held_ranks():
    return sorted(tasks._held)


@pytest.fixture(scope="module")
def alone(step, data):
    """One rank in this process."""
    return rf.fit(step, data["train"], validation=data["test"], steps=200, plan=many(step, 1))


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_any_number_of_workers_computes_the_same_run(client, step, data, alone, ranks):
    plan = many(step, ranks)
    run = rf.fit(step, data["train"], validation=data["test"], steps=200, plan=plan, client=client)
    for name in ("loss", "accuracy"):
        assert len(run.scalars[name]) == 200
        np.testing.assert_allclose(run.scalars[name], alone.scalars[name], rtol=1e-10)
    assert deviation(alone.state, run.state) < 1e-10
    assert [v.step for v in run.validation] == [v.step for v in alone.validation]
    for mine, its in zip(run.validation, alone.validation, strict=True):
        assert mine.metrics == pytest.approx(its.metrics, rel=1e-10)
    assert not any(client.run(held_ranks).values())


@pytest.mark.parametrize("ranks", [2, 3])
def test_transports_give_the_same_bits(client, step, data, ranks):
    how = {"steps": 40, "plan": many(step, ranks), "seed": 5}
    threads = rf.fit(step, data["train"], **how)
    shared = rf.fit(step, data["train"], client=client, transport="shared", **how)
    comm = rf.fit(step, data["train"], client=client, transport="comm", **how)
    assert threads.scalars == shared.scalars == comm.scalars
    assert same_bits(threads.state, shared.state)
    assert same_bits(threads.state, comm.state)


@pytest.mark.parametrize("ranks", [1, 2])
def test_granularities_give_the_same_bits_on_workers(client, step, data, ranks):
    how = {"steps": 4, "plan": many(step, ranks), "validation": data["test"]}
    segment = rf.fit(step, data["train"], client=client, **how)
    for granularity in ("stage", "op"):
        run = rf.fit(step, data["train"], client=client, granularity=granularity, **how)
        assert run.scalars == segment.scalars
        assert same_bits(run.state, segment.state)


def test_kernels_of_a_run_are_tasks_at_granularity_op(client, step, data):
    with get_task_stream(client) as stream:
        rf.fit(step, data["train"], client=client, granularity="op", steps=2, plan=many(step, 2))
    names = {key_split(task["key"]) for task in stream.data}
    assert {"load_batch", "all_reduce", "scalars"} <= names
    assert any(name.startswith("conv") for name in names)


def test_without_a_plan_every_worker_has_a_rank(client, step, data):
    run = rf.fit(step, records(), steps=6, client=client, shuffle=False)
    three = rf.fit(step, data["train"], steps=6, plan=many(step, 3), shuffle=False)
    assert same_bits(run.state, three.state)
    assert rf.plan(step, client).ranks == 3


def test_a_validation_set_smaller_than_the_ranks(client, step, data):
    how = {"validation": data["test"][:2], "steps": 3, "plan": many(step, 3)}
    run = rf.fit(step, data["train"], client=client, **how)
    assert run.metrics == pytest.approx(rf.fit(step, data["train"], **how).metrics, rel=1e-12)


@pytest.mark.parametrize(("how", "there"), [({"shard": "state"}, True), ({"shard": "parameters"}, False)])
def test_ranks_that_have_all_parameters_validate(client, step, data, how, there, monkeypatch):
    """Others give theirs to the client, which does it for them; the sums have the same bits."""
    plan = rf.plan(step, ranks=2, threads=1, **how)
    want = rf.fit(step, data["train"], validation=data["test"], steps=9, plan=plan)
    here = []
    score = cluster.Scorer.__call__
    monkeypatch.setattr(cluster.Scorer, "__call__", lambda self, state: here.append(1) or score(self, state))
    run = rf.fit(step, data["train"], validation=data["test"], steps=9, plan=plan, client=client)
    assert [v.metrics for v in run.validation] == [v.metrics for v in want.validation]
    assert bool(here) is not there
    assert same_bits(run.state, want.state)


def test_snapshots_of_workers_are_those_of_threads(client, step, data, tmp_path):
    how = {"steps": 8, "plan": many(step, 2), "snapshot_every": 3, "keep": 2}
    run = rf.fit(step, data["train"], client=client, run_dir=tmp_path / "workers", **how)
    rf.fit(step, data["train"], run_dir=tmp_path / "threads", **how)
    pairs = [list_snapshots(tmp_path / name / "snapshots") for name in ("workers", "threads")]
    assert [path.name for path in pairs[0]] == ["step-00000006", "step-00000008"] == [p.name for p in pairs[1]]
    for one, other in zip(*pairs, strict=True):
        assert same_bits(read_snapshot(one).arrays, read_snapshot(other).arrays)
    assert same_bits(read_snapshot(pairs[0][-1]).arrays, run.state)


def test_workers_say_what_they_are(client):
    for worker in ready_workers(client, 3, 30.0).values():
        assert worker["version"] == rf.__version__
        assert worker["threads"] == 1
        assert worker["memory_bytes"] > worker["used_bytes"] > 0


@pytest.fixture(scope="module")
def threads_client():
    """Workers that are threads of this process: seen by the debugger, and by the measure of coverage."""
    with (
        LocalCluster(
            n_workers=2, threads_per_worker=1, processes=False, protocol="tcp", dashboard_address=":0"
        ) as cluster,
        Client(cluster) as client,
    ):
        yield client


@pytest.mark.parametrize("transport", ["auto", "shared", "comm"])
def test_workers_in_one_process(threads_client, data, tmp_path, transport):
    step = make_step()
    how = {"steps": 12, "validation": data["test"], "plan": many(step, 2), "snapshot_every": 5}
    run = rf.fit(step, data["train"], client=threads_client, transport=transport, run_dir=tmp_path / "a", **how)
    threads = rf.fit(step, data["train"], run_dir=tmp_path / "b", **how)
    assert same_bits(run.state, threads.state)
    assert run.scalars == threads.scalars
    resumed = rf.fit(
        step,
        data["train"],
        client=threads_client,
        transport=transport,
        run_dir=tmp_path / "a",
        resume=True,
        **{**how, "steps": 20},
    )
    assert same_bits(resumed.state, rf.fit(step, data["train"], **{**how, "steps": 20, "snapshot_every": None}).state)
    assert not tasks._held


def test_a_transport_that_is_not_there(client, step, data):
    with pytest.raises(SettingError, match="transport='pigeon' is not one of auto, shared, comm"):
        rf.fit(step, data["train"], steps=1, client=client, transport="pigeon")


class Slow(rf.Callback):
    """Takes its time over each segment, and knows when the first one came."""

    first_s = 0.0

    def on_event(self, event):
        if isinstance(event, Stepped):
            self.first_s = self.first_s or time.monotonic()
            time.sleep(0.1)


class Busy(rf.Callback):
    """Has something else to do for longer than a worker may be silent, when nothing is ordered."""

    recovered = False

    def on_event(self, event):
        self.recovered |= isinstance(event, Recovered)
        if isinstance(event, Validated):
            time.sleep(3.5)


def test_a_callback_that_takes_its_time_is_no_loss(client, step, data, monkeypatch):
    monkeypatch.setattr(cluster, "BEAT_S", 0.2)
    monkeypatch.setattr(cluster, "SILENT_S", 3.0)
    busy = Busy()
    rf.fit(step, data["train"], validation=data["test"], steps=9, plan=many(step, 2), client=client, callbacks=[busy])
    assert not busy.recovered


def test_workers_whose_segments_come_are_not_asked_for_signs_of_life(client, step, data, monkeypatch):
    beats, run_on, slow = [], Client._run, Slow()

    def counted(self, function, *arguments, **options):
        if function is tasks.beat:
            beats.append(time.monotonic())
        return run_on(self, function, *arguments, **options)

    monkeypatch.setattr(Client, "_run", counted)
    monkeypatch.setattr(train, "SEGMENT_S", 0.0)  # a step each
    run = rf.fit(step, data["train"], steps=30, plan=many(step, 2), client=client, callbacks=[slow])
    assert len(run.segments) == 30
    assert time.monotonic() - slow.first_s > 2 * BEAT_S
    assert not [beat for beat in beats if beat > slow.first_s]
