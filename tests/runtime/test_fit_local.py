"""Training in this process: any number of ranks, any granularity, the same run."""

import os
import signal
import threading

import numpy as np
import pytest
from small_runs import deviation, many, records, same_bits

import rapydli_flow as rf
from rapydli_flow.data import Feed
from rapydli_flow.errors import SettingError
from rapydli_flow.testing.interpret import interpret


@pytest.fixture(scope="module")
def alone(step, data):
    return rf.fit(step, data["train"], validation=data["test"], steps=200, plan=many(step, 1))


@pytest.mark.parametrize("ranks", [2, 3])
def test_any_number_of_ranks_computes_the_same_run(step, data, alone, ranks):
    run = rf.fit(step, data["train"], validation=data["test"], steps=200, plan=many(step, ranks))
    for name in ("loss", "accuracy"):
        np.testing.assert_allclose(run.scalars[name], alone.scalars[name], rtol=1e-10)
    assert len(run.scalars["loss"]) == 200
    assert deviation(alone.state, run.state) < 1e-10


def test_the_run_is_that_of_the_references(step, data, alone):
    state = rf.init(step)
    feed = Feed(data["train"], 8)
    for i in range(5):
        outputs, updates = interpret(step, {**state, **feed.batch(i)}, step=i)
        state.update(updates)
        assert alone.scalars["loss"][i] == pytest.approx(float(outputs["loss"]), rel=1e-10)
    feed.close()


def test_validation_metrics_do_not_depend_on_ranks(step, data):
    runs = [rf.fit(step, data["train"], validation=data["test"], steps=9, plan=many(step, n)) for n in (1, 2, 3)]
    for run in runs:
        assert [v.step for v in run.validation] == [7, 9]
        for one, other in zip(runs[0].validation, run.validation, strict=True):
            assert one.metrics == pytest.approx(other.metrics, rel=1e-12)
    by_hand = rf.evaluate(step, runs[0].state, data["test"])
    assert runs[0].metrics == pytest.approx(by_hand, rel=1e-12)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_granularities_give_the_same_bits(step, data, ranks):
    how = {"steps": 5, "plan": many(step, ranks), "validation": data["test"], "seed": 7}
    segment = rf.fit(step, data["train"], **how)
    for granularity in ("stage", "op"):
        run = rf.fit(step, data["train"], granularity=granularity, **how)
        assert run.scalars == segment.scalars
        assert same_bits(run.state, segment.state)
        assert run.metrics == segment.metrics


def test_the_same_seed_gives_the_same_bits_and_another_does_not(step, data):
    how = {"steps": 10, "plan": many(step, 1)}
    one, again, other, stored = (
        rf.fit(step, data["train"], **how, **options) for options in ({}, {}, {"seed": 1}, {"shuffle": False})
    )
    assert same_bits(one.state, again.state)
    assert not same_bits(one.state, other.state)
    assert not same_bits(one.state, stored.state)


def test_more_threads_change_rounding_at_most(step, data):
    one, two = (rf.fit(step, data["train"], steps=20, plan=rf.plan(step, threads=n)) for n in (1, 2))
    assert deviation(one.state, two.state) < 1e-10


def test_arrays_train_as_a_dataset_of_them_does(step, data):
    how = {"steps": 8, "plan": many(step, 1), "shuffle": False}
    stored = rf.fit(step, data["train"], **how)
    arrays = rf.fit(step, records(), validation=records(13, seed=1), **how)
    assert same_bits(stored.state, arrays.state)
    assert arrays.validation[-1].step == 8


def test_epochs_may_be_broken(step, data):
    assert rf.fit(step, data["train"], epochs=0.5, plan=many(step, 1)).steps == 4  # of 7
    run = rf.fit(step, data["train"], epochs=2)
    assert run.steps == 14
    assert len(run.scalars["loss"]) == 14
    assert sum(s.steps for s in run.segments) == 14


def test_a_run_reports_where_the_time_went(step, data):
    run = rf.fit(step, data["train"], steps=30, plan=many(step, 2))
    last = run.segments[-1]
    assert last.ops
    assert any(title.startswith("conv") for title in last.ops)
    assert "all_reduce" in last.ops
    assert 0 < sum(last.ops.values()) < last.time_s * 2
    assert "30 steps; loss" in repr(run)


def test_nothing_runs_on_after_a_fit(step, data, tmp_path):
    before = set(threading.enumerate())
    rf.fit(step, data["train"], steps=4, plan=many(step, 2), run_dir=tmp_path / "run")
    left = [t.name for t in set(threading.enumerate()) - before if t.name.startswith("rapydli")]
    assert left == []


def test_a_run_begins_with_a_state_that_is_given(step, data):
    first = rf.fit(step, data["train"], steps=6)
    head = rf.init(step, seed=3)["dense_1/w"]
    begin = {leaf.name: first.state[leaf.name] for leaf in step.network.leaves("param", "state")} | {"dense_1/w": head}
    again = rf.fit(step, data["train"], steps=1, state=begin)  # momentum, which is not given, starts anew
    with rf.stepper(step) as one:
        state = one.init(begin)
        assert np.array_equal(state["dense_1/w"], head)
        assert not state["dense_1/w/momentum"].any()
    assert again.scalars["loss"][0] != first.scalars["loss"][0]
    moved = {name: np.abs(again.state[name] - begin[name]).max() for name in begin}
    assert 0 < moved["conv_1/w"] < 0.1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s | {"dense_7/w": s["dense_1/w"]}, r"has no dense_7/w\. Is the state another network's"),
        (lambda s: {k: v for k, v in s.items() if k != "dense_1/b"}, r"the state has no 'dense_1/b'"),
        (lambda s: s | {"dense_1/b": np.zeros(3)}, r"state 'dense_1/b' has shape \(3,\)"),
    ],
)
def test_a_state_that_does_not_fit_is_refused(step, data, change, message):
    with pytest.raises(SettingError, match=message):
        rf.fit(step, data["train"], steps=1, state=change(rf.init(step)))


def test_a_state_and_resume_exclude_each_other(step, data, tmp_path):
    with pytest.raises(SettingError, match="give state or resume, not both"):
        rf.fit(step, data["train"], steps=1, state=rf.init(step), resume=True, run_dir=tmp_path)


# leaving ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("why", ["SIGTERM", "its time is up"])
def test_a_run_that_must_leave_can_go_on(step, data, tmp_path, why):
    want = rf.fit(step, data["train"], steps=60, plan=many(step, 2), seed=3)

    class Term(rf.Callback):
        def on_event(self, event):
            if why == "SIGTERM" and type(event).__name__ == "Stepped":
                os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    how = {"run_dir": tmp_path, "seed": 3, "snapshot_every": 1000}
    leave = {"walltime_s": 0.001} if why != "SIGTERM" else {}
    run = rf.fit(step, data["train"], steps=60, plan=many(step, 2), callbacks=[Term()], **how, **leave)
    assert run.outcome == f"stopped: {why}"
    assert 1 <= run.steps < 60
    assert signal.getsignal(signal.SIGTERM) is before
    run = rf.fit(step, data["train"], steps=60, resume=True, **how)
    assert same_bits(run.state, want.state)


def test_no_time_at_all(step, data):
    with pytest.raises(SettingError, match="fit: walltime_s=0 is not more than 0 seconds"):
        rf.fit(step, data["train"], steps=2, walltime_s=0)
