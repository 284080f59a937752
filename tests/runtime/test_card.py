"""Training, evaluating and predicting on a card that NumPy plays: all of the runtime's way to a GPU, without one."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from small_runs import make_step, many, records, same_bits

import rapydli_flow as rf
from gpu_kernels.emulated import Emulated
from rapydli_flow.cli import main
from rapydli_flow.config import Settings
from rapydli_flow.errors import DeviceFault, NonFinite, RunLost, SettingError, TooLittleMemory
from rapydli_flow.runtime import card_rank, devices
from rapydli_flow.runtime.backend import Writers
from rapydli_flow.runtime.card_rank import CardRank
from rapydli_flow.runtime.copies import Copies
from rapydli_flow.runtime.devices import device_of, free_bytes
from rapydli_flow.runtime.feeding import Given
from rapydli_flow.runtime.rank import Rank
from rapydli_flow.runtime.segment import Trainer
from rapydli_flow.scheduler import make_plan
from rapydli_flow.tuner import REFERENCE, Tuning

pytestmark = pytest.mark.filterwarnings("ignore:no GPU kernel serves")
CARD = "emulated"


@pytest.fixture(scope="module")
def step():
    return make_step(dtype="float32")


@pytest.fixture(scope="module")
def data():
    return records(dtype="float32")


@pytest.fixture(scope="module")
def runs(step, data):
    """The same run on the processor and on the card."""
    return {name: rf.fit(step, data, steps=9, validation=data, device=name) for name in ("cpu", CARD)}


def close(found, wanted, tol=1e-5):
    np.testing.assert_allclose(found, wanted, rtol=tol, atol=tol)


def batch_of(step, seed=0):
    rng, out = np.random.default_rng(seed), {}
    for leaf in step.leaves("batch"):
        out[leaf.name] = rng.normal(size=leaf.shape) if leaf.spec.floating else rng.integers(0, 4, leaf.shape)
        out[leaf.name] = out[leaf.name].astype(leaf.dtype)
    return out


def bound(step, **how):
    device = device_of(CARD)
    (program,) = make_plan(step, 1).programs(step, Tuning(device))
    return CardRank(program, device, **how)


def test_losses_metrics_and_state_are_those_of_the_processor(runs):
    cpu, card = runs["cpu"], runs[CARD]
    close(card.scalars["loss"], cpu.scalars["loss"])
    close(card.scalars["accuracy"], cpu.scalars["accuracy"])
    close(card.metrics["loss"], cpu.metrics["loss"])
    for name, value in cpu.state.items():
        close(card.state[name], value, 1e-4)
    assert card.started.settings["device"].endswith("-emulated")


def test_most_kernels_ran_on_the_card(step):
    rank = bound(step)
    runs = [part for part in rank._parts if isinstance(part, card_rank._Run)]
    on_card = [call for run in runs for calls in run.calls for call in calls]
    assert len(on_card) > len(rank.program.steps) / 2
    rank.close()


def test_predict_and_evaluate(runs, step, data):
    run = runs[CARD]
    x = data["x"][:20]
    wanted = rf.predict(run.graph, run.state, x).compute()
    close(rf.predict(run.graph, run.state, x, device=CARD).compute(), wanted)
    close(rf.Model(run.graph, run.state).predict(x, device=CARD).compute(), wanted)
    cpu, card = (rf.evaluate(step, run.state, data, device=name) for name in ("cpu", CARD))
    close([card["loss"], card["accuracy"]], [cpu["loss"], cpu["accuracy"]])


def test_two_ranks_meet_through_the_host(runs, step, data):
    """Batch norm sums over ranks in the middle of kernels; gradients are summed at the end."""
    run = rf.fit(step, data, steps=9, plan=many(step, 2), device=CARD)
    close(run.scalars["loss"], runs["cpu"].scalars["loss"])


@pytest.mark.parametrize("how", [{"overlap": True}, {"shard": "state"}, {"strategy": "spatial"}])
def test_other_plans(runs, step, data, how):
    run = rf.fit(step, data, steps=4, plan=rf.plan(step, ranks=2, threads=1, **how), device=CARD)
    close(run.scalars["loss"], runs["cpu"].scalars["loss"][:4])


def test_local_sgd(step, data):
    plan = rf.plan(step, ranks=2, threads=1, average_every=2)
    cpu, card = (rf.fit(step, data, steps=4, plan=plan, device=name) for name in ("cpu", CARD))
    close(card.scalars["loss"], cpu.scalars["loss"])


def test_resumed_run_has_the_bits_of_one_that_was_not_interrupted(runs, step, data, tmp_path):
    rf.fit(step, data, steps=5, run_dir=tmp_path / "run", snapshot_every=5, device=CARD)
    run = rf.fit(step, data, steps=9, run_dir=tmp_path / "run", resume=True, device=CARD)
    for name, value in runs[CARD].state.items():
        np.testing.assert_array_equal(run.state[name], value)


def test_a_run_goes_on_elsewhere(runs, step, data, tmp_path):
    """A snapshot is of no device: one that was begun on a card is finished by the processor."""
    rf.fit(step, data, steps=5, run_dir=tmp_path / "run", snapshot_every=5, device=CARD)
    run = rf.fit(step, data, steps=9, run_dir=tmp_path / "run", resume=True, device="cpu")
    close(run.state["dense_1/w"], runs["cpu"].state["dense_1/w"], 1e-4)


def test_stepper(step):
    batches = [batch_of(step, seed) for seed in range(3)]
    losses = {}
    for name in ("cpu", CARD):
        with rf.stepper(step, device=name) as advance:
            state, losses[name] = advance.init(), []
            for batch in batches:
                first, (state, metrics) = state, advance(state, batch)
                losses[name].append(metrics["loss"])
            _, again = advance(first, batches[-1])
            assert again["loss"] == losses[name][-1]
    close(losses[CARD], losses["cpu"])


def test_probe_and_gradients(step):
    batch = batch_of(step)
    for ask in (
        lambda **how: rf.probe(step, ["conv_1", "dense_1"], batch, **how),
        lambda **how: rf.gradients(step, batch, **how),
    ):
        cpu, card = ask(device="cpu"), ask(device=CARD)
        assert list(cpu) == list(card)
        for name, value in cpu.items():
            close(card[name], value, 1e-4)


def test_a_loss_that_is_not_finite_is_explained_as_on_the_processor(step, data):
    broken = {**data, "x": np.where(data["x"] > 2, np.inf, data["x"])}
    said = []
    for name in ("cpu", CARD):
        with pytest.raises(NonFinite) as error:
            rf.fit(step, broken, steps=9, device=name)
        said.append(str(error.value))
    assert said[0] == said[1]


def test_graphs_and_plain_launches_give_the_same_bits(step):
    found = []
    for replay in (True, False):
        rank = bound(step, replay=replay, poison=True)
        rank.start(0)
        for i in range(3):
            rank.feed(batch_of(step, i))
            rank.advance(0, i)
        found.append((rank.taken(), rank.state()))
        rank.close()
    assert found[0][0] == found[1][0]
    assert len(found[0][0]) == 3
    for name, value in found[0][1].items():
        np.testing.assert_array_equal(found[1][1][name], value)


def test_steps_with_a_clock_after_each_kernel(step):
    rank = bound(step)
    rank.start(0)
    rank.feed(batch_of(step))
    _, times = rank.step_timed(0, 0)
    assert sorted(took.name for took in times) == sorted(part.name for part in rank.program.steps)
    assert all(took.time_s >= 0 for took in times)
    begins = [took.begin_s for took in times]
    assert begins == sorted(begins)
    rank.close()


def test_more_steps_under_way_than_there_are_slots(step, monkeypatch):
    monkeypatch.setattr(card_rank, "SLOTS", 2)
    rank = bound(step)
    rank.start(0)
    rank.feed(batch_of(step))
    for i in range(5):
        rank.advance(0, i)
    losses = [values["loss"] for values in rank.taken()]
    assert len(losses) == len(set(losses)) == 5
    assert rank.taken() == []
    rank.close()


def test_what_is_set_aside_comes_back(step):
    rank = bound(step)
    rank.start(3)
    before = rank.state()
    assert rank.aside() == {}
    rank.set_aside()
    rank.feed(batch_of(step))
    rank.step(3, 0)
    assert any((value != before[name]).any() for name, value in rank.state().items())
    rank.back()
    for state in (rank.state(), rank.aside()):
        for name, value in state.items():
            np.testing.assert_array_equal(value, before[name])
    rank.close()


def given(step):
    """A feed that has the same batch for each step."""
    feed = Given()
    feed.part = batch_of(step)
    return feed


class Slow(Emulated):
    """A card whose copies to the host wait until they may go on."""

    may = threading.Event()

    def download(self, data, address):
        assert self.may.wait(30)
        super().download(data, address)


@pytest.fixture
def slow(monkeypatch):
    """The state that is set aside stays on its way to the host until this is set."""
    monkeypatch.setattr(card_rank, "card_of", lambda device: Slow())
    Slow.may.clear()
    yield Slow.may
    Slow.may.set()


def test_a_snapshot_is_of_its_moment_while_steps_go_on(step, slow):
    """A segment begins, and ends, while the state of before is on its way."""
    rank = bound(step, card=Emulated())
    rank.start(0)
    trainer = Trainer(rank, given(step), 0, step)
    trainer.segment(0, 2)
    before = rank.state()
    later = trainer.state_later()
    result = trainer.segment(2, 3)
    assert result.steps == 3
    assert not rank.aside_later().done()
    slow.set()
    assert same_bits(later(), before)
    assert not same_bits(rank.state(), before)
    rank.close()


def test_what_is_on_its_way_is_not_written_over(step, slow):
    rank = bound(step, card=Emulated())
    rank.start(0)
    first, state = rank.state_later(), rank.state()
    assert rank.state_later() is first  # nothing was done since
    rank.feed(batch_of(step))
    rank.step(0, 0)
    with ThreadPoolExecutor(1) as other:
        waits = other.submit(rank.set_aside)
        time.sleep(0.2)
        assert not waits.done()
        slow.set()
        waits.result(30)
    assert same_bits(first.result(), state)
    assert same_bits(rank.aside(), rank.state())
    rank.close()


def test_copies_of_a_segment_come_behind_it(step, slow):
    """Those of the segment before are kept until they are there."""
    rank = bound(step, card=Emulated())
    rank.start(0)
    copies = Copies(rank, [rank.program], 0)
    trainer = Trainer(rank, given(step), 0, step, copies=copies)
    slow.set()
    trainer.segment(0, 2)
    rank.aside()
    slow.clear()
    states = {2: rank.state()}
    trainer.segment(2, 2)
    assert set(copies._steps) == {0, 2}
    slow.set()
    assert same_bits({piece.name: piece.array for piece in copies.handed_out(2)}, states[2])
    copies.settle(2)
    assert set(copies.offered()) == {2}
    rank.close()


def test_a_copy_that_cannot_be_brought_is_a_lost_rank(step, monkeypatch):
    rank = bound(step)
    rank.start(0)

    def fails(self, data, address):
        raise DeviceFault("cuMemcpyDtoHAsync_v2: CUDA_ERROR_UNKNOWN (999).")

    copies = Copies(rank, [rank.program], 0)
    with monkeypatch.context() as patch:
        patch.setattr(Emulated, "download", fails)
        rank.set_aside()
        copies.keep(0, rank.aside_later())
        with pytest.raises(RunLost, match="rank 0 cannot bring its copy of step 0 from its card"):
            copies.handed_out(0)
    assert copies.offered() == {}  # nobody can have it
    copies.settle(0)
    assert set(copies._steps) == {0}
    rank.close()


def test_numbers_of_a_snapshot_that_are_not_finite_are_said(step, slow, tmp_path):
    """At once, or by the thread that writes it to who waits for it; nothing is written."""
    rank = bound(step, card=Emulated())
    rank.start(0)
    rank.put({"dense_1/b": np.full(5, np.nan, np.float32)})
    trainer = Trainer(rank, given(step), 0, step)
    writers = Writers(tmp_path, 1)
    wait = writers.write("snapshots", 3, trainer.state_later(), {})
    slow.set()
    with pytest.raises(NonFinite, match="dense_1/b is not finite after the last step"):
        wait()
    with pytest.raises(NonFinite, match="dense_1/b is not finite after the last step"):
        trainer.state_later()  # it is here
    writers.close()
    assert not list(tmp_path.glob("snapshots/step*"))
    rank.close()


def test_memory_is_given_back(step):
    class Counting(Emulated):
        closed = 0

        def close(self):
            self.closed += 1

    card = Counting()
    rank = bound(step, card=card)
    rank.set_aside()
    assert len(card._memory) == 4  # arena, two batches, what is set aside
    rank.close()
    assert (card._memory, card.closed) == ({}, 1)
    other = Counting()
    bound(step, card=other)  # dropped without a word
    assert (other._memory, other.closed) == ({}, 1)


def test_each_step_reads_its_own_batch(step):
    """More batches are handed over than there is room for, before any number is looked at."""
    rank, losses = bound(step), []
    for together in (False, True):
        rank.start(0)
        for i in range(5):
            rank.feed(batch_of(step, i))
            rank.advance(0, i)
            if not together:
                losses += rank.taken()
    assert rank.taken() == losses
    with pytest.raises(SettingError, match=r"feed: x has shape \(1,\) but the program takes"):
        rank.feed({**batch_of(step), "x": np.zeros(1)})
    rank.close()


def test_ops_without_a_kernel_run_on_the_host_and_are_told_once(step, runs, monkeypatch):
    monkeypatch.setattr(devices, "_told", set())
    device = device_of(CARD)
    (program,) = make_plan(step, 1).programs(step, Tuning(device))
    reference = {request.key(device): REFERENCE for request, _ in program.requests}
    (program,) = make_plan(step, 1).programs(step, Tuning(device, reference))
    with pytest.warns(RuntimeWarning, match=r"no GPU kernel serves .*conv.*these ops run on the host") as told:
        ranks = [CardRank(program, device) for _ in range(2)]
    assert len(told) == 1
    rank, other = ranks[0], bound(step)
    for each in (rank, other):
        each.start(0)
        each.feed(batch_of(step))
    close(rank.step(0, 0)["loss"], other.step(0, 0)["loss"])
    for each in (*ranks, other):
        each.close()


def test_too_little_memory_is_said_before_anything_is_reserved(step, data, monkeypatch):
    monkeypatch.setattr(devices.emulated.Emulated, "free_bytes", lambda self: 1000)
    monkeypatch.setattr(devices.emulated.Emulated, "reserve", lambda self, size: pytest.fail("reserved"))
    with pytest.raises(TooLittleMemory, match=r"1,000 are free for the emulated card[\s\S]*largest buffers"):
        rf.fit(step, data, steps=1, device=CARD)
    assert free_bytes(device_of("cpu"))[1] == "in this process"


def test_what_cards_do_not_do_is_said(step, data):
    with pytest.raises(SettingError, match=r"the tuning is of .* but the run is on emulated"):
        rf.fit(step, data, steps=1, device=CARD, tuning=Tuning(device_of("cpu")))
    others = {
        "time": lambda **how: rf.time(step, **how),
        "evaluate": lambda **how: rf.evaluate(step, {}, data, **how),
        "predict": lambda **how: rf.predict(step.network, rf.fit(step, data, steps=1).state, data["x"], **how),
        "stepper": lambda **how: rf.stepper(step, **how),
    }
    for name, call in others.items():
        with pytest.raises(SettingError, match=rf"^{name}: the tuning is of .* but the run is on emulated"):
            call(device=CARD, tuning=Tuning(device_of("cpu")))


def test_a_device_that_means_nothing_is_said_by_what_was_given_it(step, data):
    state, batch = rf.init(step), {name: values[:8] for name, values in data.items()}
    asked = {
        "fit": lambda **how: rf.fit(step, data, steps=1, **how),
        "plan": lambda **how: rf.plan(step, **how),
        "time": lambda **how: rf.time(step, tune_s=1.0, **how),
        "autotune": lambda **how: rf.autotune(step, budget_s=1.0, **how),
        "evaluate": lambda **how: rf.evaluate(step, state, data, **how),
        "predict": lambda **how: rf.predict(step.network, state, data["x"], **how),
        "stepper": lambda **how: rf.stepper(step, **how),
        "probe": lambda **how: rf.probe(step, "loss", batch, **how),
        "gradients": lambda **how: rf.gradients(step, batch, **how),
        "LocalCluster": lambda **how: rf.LocalCluster(1, **how),
    }
    words = "is not 'cpu', 'cuda', 'cuda:1' and so on, or 'emulated'"
    for name, call in asked.items():
        with pytest.raises(SettingError, match=rf"^{name}: device='tpu' {words}\.$"):
            call(device="tpu")
    recipe = str(Path(__file__).parents[2] / "examples" / "digits.py")
    for command in (["train", recipe], ["time", "lenet"], ["warm", "lenet"], ["tune", recipe], ["tune", "show"]):
        done = CliRunner().invoke(main, [*command, "--device", "tpu"])
        where = "autotune" if command == ["tune", recipe] else command[0]
        assert done.output.startswith(f"Error: {where}: device='tpu' {words}.")
        assert done.exit_code == 1
    with pytest.raises(SettingError, match=rf"^RAPYDLI_DEVICE='tpu' {words}\.$"):
        Settings.read({"RAPYDLI_DEVICE": "tpu"})


def test_time(step):
    timing = rf.time(step, iterations=1, device=CARD)
    assert "emulated" in str(timing)


def test_ranks_of_both_kinds_have_the_same_arena_interface(step):
    """What one rank sets, both give back in the same dtype and shape."""
    device = device_of("cpu")
    (program,) = make_plan(step, 1).programs(step, Tuning(device))
    host, card = Rank(program, device), bound(step)
    for rank in (host, card):
        rank.start(1)
    for name, value in host.state().items():
        np.testing.assert_array_equal(card.state()[name], value)
        assert card.state()[name].dtype == value.dtype
    card.close()
