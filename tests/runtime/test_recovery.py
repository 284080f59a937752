"""Runs that outlive their workers: SIGKILL, SIGSTOP, fewer and more workers, a dead client; the same bits."""

import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import small_runs
from distributed import Client
from small_runs import Once, many, same_bits

import rapydli_flow as rf
from cpu_kernels.compile import host
from rapydli_flow import nn
from rapydli_flow.data import list_snapshots, read_snapshot
from rapydli_flow.errors import NoWorkers, RunLost, SettingError
from rapydli_flow.runtime import worker as tasks
from rapydli_flow.runtime.copies import Copies, common_step, only_here, sources
from rapydli_flow.runtime.events import Recovered, read_log
from rapydli_flow.runtime.rank import Rank
from rapydli_flow.runtime.workers import ready_workers
from rapydli_flow.scheduler import make_plan
from rapydli_flow.testing.chaos import survive
from rapydli_flow.testing.plans import programs

STEPS, LONG = 160, 1500  # LONG: several segments where nothing pauses the run


class Strike(Once):
    """Does something to the workers of a run; remembers how the run went on."""

    def __init__(self, step, action, client=None):
        super().__init__(step, action)
        self.recovered, self.client = [], client

    def on_event(self, event):
        super().on_event(event)
        if isinstance(event, Recovered):
            self.recovered.append(event)
            if self.client is not None:
                self.warm = [each for ranks in self.client.run(warm).values() for each in ranks]


def warm():
    """For each rank on a worker, whether its records are in memory."""
    return [held.trainer.feed.feed.cache.complete for held in tasks._held.values()]


def pids(client, ranks):
    workers = ready_workers(client, ranks, 60.0)
    return [workers[address]["pid"] for address in sorted(workers)[:ranks]]


def read_a_step(explanation):
    """Bytes of records that ranks have to read, as a placement says."""
    return int(re.search(r"placed so .* hosts, ([\d,]+) read", explanation)[1].replace(",", ""))


@pytest.fixture
def three(mortal):
    """Three workers that are there again."""
    ready_workers(mortal, 3, 60.0)
    return mortal


def plain(x):
    """Layers for every strategy."""
    x = nn.relu(nn.conv(x, 4, 3, padding=1))
    x = nn.relu(nn.conv(nn.dropout(x, 0.2), 6, 3, padding=1))
    return nn.dense(nn.max_pool(x, 2), small_runs.CLASSES)


@pytest.fixture(scope="module")
def plain_step():
    return small_runs.make_step(net=plain)


@pytest.mark.parametrize(
    ("transport", "victim"),
    [("auto", 1), *(pytest.param(*case, marks=pytest.mark.slow) for case in (("auto", 0), ("comm", 1)))],
)
def test_a_killed_worker_is_replaced(three, data, step, tmp_path, transport, victim):
    want = rf.fit(step, data["train"], steps=STEPS, plan=many(step, 2), validation=data["test"], seed=3)
    victims = pids(three, 2)
    strike = Strike(40, lambda: os.kill(victims[victim], signal.SIGKILL), three)
    how = {"run_dir": tmp_path / "run", "snapshot_every": 20, "validation": data["test"], "transport": transport}
    run = rf.fit(step, data["train"], steps=STEPS, plan=many(step, 2), client=three, seed=3, callbacks=[strike], **how)
    assert same_bits(run.state, want.state)
    assert run.scalars == want.scalars
    assert [(v.step, v.metrics) for v in run.validation] == [(v.step, v.metrics) for v in want.validation]
    (again,) = strike.recovered
    assert again.ranks == 2
    assert again.reason.startswith(f"rank {victim} is lost")
    assert read_a_step(again.explanation) * 2 == read_a_step(run.started.explanation)  # the survivor has its chunks
    assert sorted(strike.warm) == [False, True]
    log = read_log(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in log if line["kind"] == "recovered"] == [again.step]
    assert all(read_snapshot(path).step % 20 == 0 for path in list_snapshots(tmp_path / "run" / "snapshots"))


def test_faults_at_random(three):
    """The short form of `make chaos`. A fault may hit the worker that has no rank."""
    outcome = survive(three, ["kill", "stop"], ranks=2, seed=3)
    assert outcome.good, outcome
    assert outcome.same_bits
    assert [fault.kind for fault in outcome.faults] == ["kill", "stop"]


@pytest.mark.slow
def test_a_worker_that_stands_still_is_replaced(three, data, step):
    want = rf.fit(step, data["train"], steps=LONG, plan=many(step, 2), seed=3)
    victim = pids(three, 2)[1]
    strike = Strike(40, lambda: os.kill(victim, signal.SIGSTOP))
    try:
        run = rf.fit(step, data["train"], steps=LONG, plan=many(step, 2), client=three, seed=3, callbacks=[strike])
        assert time.monotonic() - strike.at < 25  # it is noticed within 10 s, whatever Dask thinks
    finally:
        os.kill(victim, signal.SIGCONT)
    assert same_bits(run.state, want.state)
    assert "has not answered for" in strike.recovered[0].reason
    assert len(ready_workers(three, 3, 60.0)) == 3  # it is there again, and lets go of its rank
    limit = time.monotonic() + 30
    while sum(three.run(held).values()) and time.monotonic() < limit:
        time.sleep(0.1)
    assert sum(three.run(held).values()) == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "how", [{"strategy": "pipeline", "micro_batches": 2}, {"shard": "parameters"}, {"staleness": 0}]
)
def test_what_only_the_lost_rank_held_is_with_another(three, data, plain_step, how):
    step = plain_step
    plan = make_plan(step, 2, **how)
    want = rf.fit(step, data["train"], steps=LONG, plan=plan, seed=3)
    victims = pids(three, 2)
    strike = Strike(10, lambda: os.kill(victims[1], signal.SIGKILL))
    run = rf.fit(step, data["train"], steps=LONG, plan=plan, client=three, seed=3, callbacks=[strike])
    assert strike.recovered
    assert same_bits(run.state, want.state)


@pytest.mark.slow
def test_a_run_goes_on_with_fewer_workers_and_grows_again(loose, data, step):
    client, start = loose
    start(3)
    want = rf.fit(step, data["train"], steps=600, plan=many(step, 3), seed=3)
    victims = pids(client, 3)
    strike = Strike(40, lambda: os.kill(victims[2], signal.SIGKILL))

    class Come(rf.Callback):
        def on_event(self, event):
            if isinstance(event, Recovered) and event.ranks == 2:
                start(1)

    how = {"min_workers": 2, "patience_s": 1.0, "callbacks": [strike, Come()]}
    run = rf.fit(step, data["train"], steps=6000, plan=many(step, 3), client=client, seed=3, **how)
    assert [event.ranks for event in strike.recovered] == [2, 3]
    assert run.scalars["loss"][:600] == pytest.approx(want.scalars["loss"], rel=1e-8)


@pytest.mark.slow
def test_a_run_needs_the_workers_that_it_asks_for(loose, data, step):
    client, start = loose
    start(2)
    victims = pids(client, 2)
    strike = Strike(40, lambda: os.kill(victims[1], signal.SIGKILL))
    with pytest.raises(NoWorkers, match=r"the run needs 2 worker\(s\) to go on but 1 answer after 1 s"):
        rf.fit(
            step,
            data["train"],
            steps=5000,
            plan=many(step, 2),
            client=client,
            patience_s=1.0,
            callbacks=[strike],
        )


@pytest.mark.slow
@pytest.mark.parametrize("kill", [False, True])
def test_several_fits_at_once_of_two_clients(three, data, step, kill):
    """Runs share workers, and meet in other orders on each; a worker that dies has ranks of several."""
    want = rf.fit(step, data["train"], steps=LONG, plan=many(step, 2), seed=3)
    victim = pids(three, 2)[1]
    strike = Strike(40, lambda: os.kill(victim, signal.SIGKILL)) if kill else Strike(40, lambda: None)

    def fit(client, callbacks):
        how = {"plan": many(step, 2), "client": client, "seed": 3, "callbacks": callbacks}
        return rf.fit(step, data["train"], steps=LONG, **how)

    with Client(three.scheduler.address) as other, ThreadPoolExecutor(3) as pool:
        runs = [pool.submit(fit, three, [strike]), pool.submit(fit, other, []), pool.submit(fit, three, [])]
        assert all(same_bits(run.result(timeout=120).state, want.state) for run in runs)
    assert strike.at


def test_a_killed_client_leaves_nothing(three, data, tmp_path):
    here = str(Path(small_runs.__file__).parent)
    path = os.pathsep.join([here, str(Path(rf.__file__).parents[1])])
    code = (
        "import rapydli_flow as rf, small_runs\n"
        "from distributed import Client\n"
        f"client, data = Client({three.scheduler.address!r}), rf.load({data.url!r})\n"
        "step = small_runs.make_step()\n"
        "rf.fit(step, data['train'], steps=10**6, plan=small_runs.many(step, 2), client=client, "
        f"run_dir={str(tmp_path / 'run')!r}, snapshot_every=10)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path})
    limit = time.monotonic() + 60
    while not list_snapshots(tmp_path / "run" / "snapshots") and time.monotonic() < limit:
        time.sleep(0.1)
    assert sum(three.run(held).values()) == 2
    process.send_signal(signal.SIGKILL)
    process.wait()
    while sum(three.run(held).values()) and time.monotonic() < limit:
        time.sleep(0.1)
    assert sum(three.run(held).values()) == 0


def held():
    return len(tasks._held)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"retries": -1}, "fit: retries=-1, patience_s=30.0 are not 0 or more"),
        ({"min_workers": 0}, "fit: min_workers=0 is not 1 or more"),
    ],
)
def test_policies_that_mean_nothing(data, step, how, message):
    with pytest.raises(SettingError, match=message):
        rf.fit(step, data["train"], steps=1, **how)


# copies ------------------------------------------------------------------------------------------------


def test_who_has_what_alone(plain_step):
    graph = plain_step
    data_parallel = programs(graph, make_plan(graph, 3))
    assert only_here(data_parallel) == ((), (), ())
    shards = programs(graph, make_plan(graph, 2, shard="state"))
    assert all(name.endswith("momentum") for names in only_here(shards) for name in names)
    stages = only_here(programs(graph, make_plan(graph, 2, strategy="pipeline", micro_batches=2)))
    assert "conv_1/w" in stages[0]
    assert "dense_1/w" in stages[1]


def test_the_last_common_step(plain_step):
    made = programs(plain_step, make_plan(plain_step, 2, shard="state"))
    held = [[(n, p.layout[n]) for n in p.kind("param", "state")] for p in made]
    assert common_step([{10: held[0], 20: held[0]}, {10: held[1]}], made) == 10
    assert common_step([{10: held[0], 20: held[0] + held[1]}, {10: held[1]}], made) == 20
    assert common_step([{10: held[0]}], made) is None
    offers = [("a", tuple(held[0])), ("b", tuple(held[1])), ("c", tuple(held[0]))]
    assert sources(made[0], offers, "c") == [2]
    assert sources(made[1], offers, "c") == [2, 1]
    whole = programs(plain_step, make_plan(plain_step, 1))[0]
    assert set(sources(whole, offers[:2], "d")) == {0, 1}


def test_what_was_offered_is_not_let_go(plain_step):
    """A survivor that does not know of the loss yet may finish a step after it was asked what it has."""
    program = programs(plain_step, make_plan(plain_step, 1))[0]
    rank = Rank(program, host())
    rank.start(0)
    copies = Copies(rank, [program], 0)
    for step in (0, 10):
        rank.set_aside()
        copies.keep(step, rank.aside_later())
        copies.settle(step)
    assert set(copies.offered()) == {10}
    rank.set_aside()
    copies.keep(20, rank.aside_later())
    copies.settle(20)
    assert {piece.name for piece in copies.handed_out(10)} == set(rank.aside())
    with pytest.raises(RunLost, match="rank 0 has no copy of step 0, but of 10, 20; resume"):
        copies.handed_out(0)
