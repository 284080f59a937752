"""Ranks on cards that hand each other memory: the same numbers as through the host, and nobody waits for ever."""

import gc
import os
import signal
import sys
import threading
import time
import weakref
from types import SimpleNamespace

import ml_dtypes  # noqa: F401 - makes bfloat16 a dtype
import numpy as np
import pytest
from small_runs import Once, in_threads, make_step, records, same_bits

import rapydli_flow as rf
from gpu_kernels import nccl as nccl_module
from gpu_kernels.emulated import Emulated
from gpu_kernels.emulated_nccl import Meeting, new_meeting
from rapydli_flow import nn
from rapydli_flow.errors import DeviceFault, MissingDependency, RunLost, SettingError
from rapydli_flow.runtime import card_meetings
from rapydli_flow.runtime.building import MANY
from rapydli_flow.runtime.card_meetings import Meetings
from rapydli_flow.runtime.card_rank import CardRank
from rapydli_flow.runtime.devices import device_of
from rapydli_flow.runtime.events import Recovered
from rapydli_flow.runtime.grouped import kernels_of
from rapydli_flow.runtime.transport import Threads
from rapydli_flow.runtime.workers import ready_workers
from rapydli_flow.scheduler import AllReduce, Collective, Plan, make_plan
from rapydli_flow.scheduler.strategy import remade
from rapydli_flow.template import Device
from rapydli_flow.tuner import Tuning

pytestmark = pytest.mark.filterwarnings("ignore:no GPU kernel serves")
CARD = "emulated"
HERE = Device("cuda", "A card", target="sm_90a", cores=132, vector_bytes=16, memory_bytes=1 << 30)


@pytest.fixture(scope="module")
def step():
    return make_step(dtype="float32")


@pytest.fixture(scope="module")
def data():
    return records(dtype="float32")


def plain(x):
    x = nn.relu(nn.conv(x, 4, 3, padding=1))
    return nn.dense(nn.max_pool(nn.relu(nn.conv(x, 6, 3, padding=1)), 2), 5)


# runs ---------------------------------------------------------------------------------------------------

HOW = [
    (2, {}),
    (3, {"overlap": True}),
    (3, {"shard": "state"}),
    (2, {"shard": "parameters", "overlap": True}),
    (4, {"strategy": "spatial", "grid": (2, 2)}),
    (2, {"strategy": "channels"}),
    (2, {"strategy": "hybrid"}),
]


@pytest.mark.parametrize(("ranks", "how"), HOW, ids=str)
def test_a_run_is_that_through_the_host(step, data, ranks, how):
    """Up to three ranks a sum has the same order both ways."""
    through, direct = (
        rf.fit(step, data, steps=4, plan=rf.plan(step, ranks=ranks, threads=1, nccl=nccl, **how), device=CARD)
        for nccl in (False, True)
    )
    np.testing.assert_allclose(direct.scalars["loss"], through.scalars["loss"], rtol=1e-5)
    for name, value in through.state.items():
        if ranks < 4:
            assert direct.state[name].tobytes() == value.tobytes(), name
        else:
            np.testing.assert_allclose(direct.state[name], value, atol=1e-5)


def test_pipelines(data):
    step = make_step(net=plain, dtype="float32")
    for ranks, stages in ((2, 2), (4, 2)):
        how = {"ranks": ranks, "threads": 1, "strategy": "pipeline", "stages": stages, "micro_batches": 2}
        through, direct = (
            rf.fit(step, data, steps=3, plan=rf.plan(step, nccl=nccl, **how), device=CARD) for nccl in (False, True)
        )
        assert same_bits(through.state, direct.state)


def test_halves_meet_as_they_are(data):
    """Sums in bfloat16, where the loss is scaled and gradients are cast."""
    graph = rf.trace(plain, rf.Spec((8, 6, 6, 2)))
    optimizer = rf.optim.sgd(0.05)
    step = rf.train_step(graph, loss=nn.cross_entropy, optimizer=optimizer, precision="bfloat16")
    through, direct = (
        rf.fit(step, data, steps=3, plan=rf.plan(step, ranks=2, threads=1, nccl=nccl), device=CARD)
        for nccl in (False, True)
    )
    assert same_bits(through.state, direct.state)


def test_workers_that_are_killed_are_replaced(loose, data, step):
    """The survivor waits on its card for a rank that is gone: it is told to give up, and meets the new one."""
    client, start = loose
    start(3, RAPYDLI_DEVICE=CARD)
    client.wait_for_workers(3, timeout=60)
    plan = rf.plan(step, client, ranks=2, threads=1, device=CARD, nccl=True)
    assert plan.nccl
    want = rf.fit(step, data, steps=60, plan=plan, device=CARD, seed=3)
    workers = ready_workers(client, 3, 60.0)
    victim = workers[sorted(workers)[1]]["pid"]
    seen = []

    class Strike(Once):
        def on_event(self, event):
            super().on_event(event)
            seen.extend([event] if isinstance(event, Recovered) else [])

    strike = Strike(10, lambda: os.kill(victim, signal.SIGKILL))
    how = {"client": client, "plan": plan, "seed": 3, "callbacks": [strike]}
    run = rf.fit(step, data, steps=60, **how)
    assert [event.ranks for event in seen] == [2]
    assert same_bits(run.state, want.state)


def test_with_a_clock_after_each_kernel(step, data):
    ranks = bound(step, 2, overlap=True)

    def timed(rank):
        rank.start(0)
        rank.feed({name: data[name][:8][rank.block(name).slices] for name in ("x", "label")})
        return rank.step_timed(0, 0)

    try:
        for _, times in in_threads(timed, ranks):
            titles = {took.title for took in times}
            assert {"all_reduce", "wait"} <= titles
            assert all(took.time_s >= 0 for took in times)
    finally:
        for rank in ranks:
            rank.close()


def test_a_loss_that_is_not_finite_is_explained(step, data):
    broken = {**data, "x": np.where(data["x"] > 2, np.inf, data["x"])}
    said = []
    for nccl in (False, True):
        with pytest.raises(rf.errors.NonFinite) as error:
            rf.fit(step, broken, steps=9, plan=rf.plan(step, ranks=2, threads=1, nccl=nccl), device=CARD)
        said.append(str(error.value))
    assert said[0] == said[1]


# what is said -------------------------------------------------------------------------------------------


def test_what_does_not_go_with_it(step, data):
    with pytest.raises(SettingError, match=r"^plan: nccl=True is for ranks on GPUs, not for cpu\.$"):
        rf.plan(step, ranks=2, device="cpu", nccl=True)
    with pytest.raises(SettingError, match=r"^plan: nccl=True is for ranks on GPUs, not for emulated, cpu\.$"):
        rf.plan(step, ranks=2, device=[CARD, "cpu"], nccl=True, shard="state")
    for name, value in {"wire": "bfloat16", "average_every": 2, "staleness": 1}.items():
        with pytest.raises(SettingError, match=f"as it is; {name}={value!r} goes through the host"):
            rf.plan(step, ranks=2, nccl=True, **{name: value})
    with pytest.raises(SettingError, match=r"^plan: nccl=True is for ranks on GPUs\. Run it with device='cuda'"):
        rf.fit(step, data, steps=1, plan=rf.plan(step, ranks=2, nccl=True), device="cpu")


def test_a_plan_says_so_and_is_kept(step):
    plan = rf.plan(step, ranks=4, threads=1, device=CARD, nccl=True, shard="state")
    assert "  GPUs hand each other all this by NCCL; where all get a sum, its order is NCCL's own" in plan.explain(step)
    assert Plan.from_json(plan.to_json()) == plan
    assert remade(plan, step, 2).nccl
    tuning = Tuning(device_of(CARD))
    with_it, without = (
        rf.plan(step, ranks=4, threads=1, shard="state", nccl=nccl).programs(step, tuning)[0] for nccl in (True, False)
    )
    assert with_it.needed_bytes == without.needed_bytes + with_it.staged_bytes
    assert with_it.staged_bytes > 0
    assert not rf.plan(step, ranks=1, nccl=True).programs(step, tuning)[0].nccl


def test_without_cupy(monkeypatch):
    """Said when a rank is bound, before anything runs."""
    monkeypatch.setitem(sys.modules, "cupy", None)
    said = r"nccl=True needs CuPy and NCCL.*Install rapydli-flow\[cuda12\]"
    with pytest.raises(MissingDependency, match=said):
        nccl_module.new_meeting()
    (part,) = (Collective("x", AllReduce(ranks=(0, 1)), (), ()),)
    program = SimpleNamespace(steps=(part,), staged_bytes=0)
    card = Emulated()
    with pytest.raises(MissingDependency, match=said):
        Meetings(program, HERE, Threads.of(2)[0], card, card, lambda buffer: 0, card.reserve)
    with monkeypatch.context() as patch:
        fake = SimpleNamespace(nccl=SimpleNamespace(available=False))
        patch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=fake))
        patch.setitem(sys.modules, "cupy.cuda", fake)
        with pytest.raises(MissingDependency, match="CuPy finds no libnccl"):
            nccl_module.library()


def test_what_adds_is_compiled_beforehand(step):
    tuning = Tuning(device_of(CARD))
    for shard, adds in (("state", True), (None, False)):
        plan = rf.plan(step, ranks=2, threads=1, nccl=True, shard=shard)
        kernels = kernels_of(plan.programs(step, tuning)[0])
        assert any(choice == MANY and request.title == "add" for request, choice in kernels) == adds


# ranks that do not come ---------------------------------------------------------------------------------


def bound(step, count, *, timeout_s=120.0, **how):
    """Ranks of a plan, as threads would have them."""
    device = device_of(CARD)
    programs = make_plan(step, count, nccl=True, **how).programs(step, Tuning(device))
    ends = Threads.of(count, timeout_s=timeout_s)
    return [CardRank(program, device, transport=end) for program, end in zip(programs, ends, strict=True)]


def test_a_rank_that_does_not_come_is_waited_for_so_long(step):
    ranks = bound(step, 2, timeout_s=0.5)
    together = threading.Barrier(2)

    def run(rank):
        rank.start(0)
        rank._meetings[0].begin()
        together.wait(10)
        if rank.transport.rank == 0:
            with pytest.raises(RunLost, match=r"^rank 0: a step on the card did not end in 0\.5 s: another rank"):
                rank.step(0, 0)
            with pytest.raises(RunLost, match=r"^rank 0: the run was given up"):
                rank.step(0, 0)

    in_threads(run, ranks)
    for rank in ranks:
        rank.close()


def test_a_run_that_is_given_up_wakes_who_waits(step):
    ranks = bound(step, 2)
    waits = threading.Event()

    def run(rank):
        rank.start(0)
        rank._meetings[0].begin()
        if rank.transport.rank == 1:
            assert waits.wait(10)
            time.sleep(0.3)
            rank.transport.close()
            return
        waits.set()
        with pytest.raises(RunLost, match=r"^rank 0: the run was given up"):
            rank.step(0, 0)

    in_threads(run, ranks)
    for rank in ranks:
        rank.close()


def test_who_comes_alone_to_a_meeting_gives_up():
    def alive(waited_s):
        if waited_s > 0.2:
            raise RunLost("nobody is there")

    with pytest.raises(RunLost, match="nobody is there"):
        Meeting(new_meeting(), 0, 2, alive)
    with pytest.raises(RunLost, match="another card is gone"):
        Meeting(b"1", 1, 2, alive)


def test_a_rank_that_is_dropped_is_let_go(step):
    """On a worker nobody closes it."""
    ranks = bound(step, 2)
    in_threads(lambda rank: (rank.start(0), rank.step(0, 0)), ranks)
    gone = [weakref.ref(rank) for rank in ranks]
    queues = [rank.card for rank in ranks]
    del ranks
    gc.collect()
    assert [each() for each in gone] == [None, None]
    assert [card._memory for card in queues] == [{}, {}]


def test_a_meeting_that_fails_is_not_gone_on_from(step, monkeypatch):
    """Without the others a sum would be what this rank has."""
    ranks = bound(step, 2)

    def refuses(self, *_):
        raise DeviceFault("NCCL refused (no).")

    def run(rank):
        rank.start(0)
        with pytest.raises(DeviceFault, match="NCCL refused"):
            rank.step(0, 0)
        with pytest.raises(RunLost, match="the run was given up"):
            rank.step(0, 0)

    monkeypatch.setattr(Emulated, "meeting", lambda self: b"1")
    monkeypatch.setattr(Emulated, "meet", refuses)
    in_threads(run, ranks)
    for rank in ranks:
        rank.close()


class Late(Emulated):
    """A card that is not done before others come, which they do not."""

    def mark(self):
        mark = super().mark()
        mark.passed = lambda: False
        return mark


@pytest.mark.parametrize("given_up", [True, False])
def test_who_waits_on_its_card_looks_whether_others_are_there(given_up):
    end, card = Threads.of(2, timeout_s=0.2)[0], Late()
    program = SimpleNamespace(steps=(), staged_bytes=0)
    meetings = Meetings(program, device_of(CARD), end, card, card, lambda buffer: 0, card.reserve)
    left = []
    meetings._ways = {(False, (0, 1)): SimpleNamespace(check=lambda: None, abort=lambda: left.append(1))}
    if given_up:
        end.close()
    with pytest.raises(RunLost, match="the run was given up" if given_up else r"did not end in 0\.2 s"):
        meetings.wait()
    assert left == [1]


def test_all_ways_are_left_at_once():
    """To leave one may take until another one is left."""
    other = threading.Event()
    card = Emulated()
    program = SimpleNamespace(steps=(), staged_bytes=0)
    meetings = Meetings(program, device_of(CARD), Threads.of(2)[0], card, card, lambda buffer: 0, card.reserve)
    for order in (1, -1):
        other.clear()
        ways = [lambda: other.wait(20), other.set][::order]
        meetings._ways = {(i, (0, 1)): SimpleNamespace(abort=abort) for i, abort in enumerate(ways)}
        begin = time.monotonic()
        meetings.abort()
        assert time.monotonic() - begin < 10


def test_a_thread_that_is_held_is_freed_by_another(monkeypatch):
    """NCCL, or the driver, may hold the rank's own: it cannot look."""
    monkeypatch.setattr(card_meetings, "WATCH_S", 0.05)
    card, end = Emulated(), Threads.of(2, timeout_s=30.0)[0]
    part = Collective("x", AllReduce(ranks=(0, 1)), (), ())
    program = SimpleNamespace(steps=(), staged_bytes=0)
    meetings = Meetings(program, device_of(CARD), end, card, card, lambda buffer: 0, card.reserve)
    freed = threading.Event()

    def holds(way):
        end.close()
        assert freed.wait(20)
        raise RunLost("it was freed")

    group = False, (0, 1)
    meetings._work, meetings._groups = {"x": holds}, {"x": group}
    monkeypatch.setattr(meetings, "_meet_others", lambda: None)
    meetings._ways = {group: SimpleNamespace(abort=freed.set)}
    with pytest.raises(RunLost, match="it was freed"):
        meetings.meet(part)
