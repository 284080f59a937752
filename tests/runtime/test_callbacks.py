"""Callbacks that act on a run: what they decide, what the run then does, and that it does so to the bit anywhere."""

import math
import shutil

import numpy as np
import pytest
from small_runs import CLASSES, make_step, many, records, same_bits

import rapydli_flow as rf
from rapydli_flow import nn, optim
from rapydli_flow.data import SnapshotWriter, latest, list_snapshots, read_snapshot
from rapydli_flow.errors import SettingError
from rapydli_flow.runtime.events import Ended, Started, Stepped, Validated, read_log

STEPS = 98  # 14 epochs of 7 steps


@pytest.fixture(scope="module")
def adjustable():
    return make_step(optim.adjustable(0.05))


class Answers(rf.Callback):
    """Answers the first event that it is asked about, and remembers all."""

    decides = True

    def __init__(self, kind, answer, step=0):
        self.kind, self.answer, self.step, self.seen = kind, answer, step, []

    def on_event(self, event):
        self.seen.append(event)
        at = event.first + event.steps - 1 if isinstance(event, Stepped) else event.step  # its last step, as grouped
        if not isinstance(event, self.kind) or at < self.step or self.answer is None:
            return None
        answer, self.answer = self.answer, None
        if isinstance(answer, Exception):
            raise answer
        return answer


class Undecided(Answers):
    decides = False


def three(**how):
    """All three callbacks of the package, to act soon."""
    return [
        rf.EarlyStopping(patience=6, **how),
        rf.PlateauRate(patience=2, factor=0.3, **how),
        rf.BestSnapshot("accuracy"),
    ]


# what they decide ---------------------------------------------------------------------------------------


def told(callback, values, first=0, factor=1.0):
    """What a callback answers to validations of these losses."""
    callback.on_event(Started(first, 99, 1, 8, 1, 1, "segment", metrics=("loss",), clocks={"rate_factor": factor}))
    return [callback.on_event(Validated(i + 1, i + 1, {"loss": value})) for i, value in enumerate(values)]


def test_when_early_stopping_stops():
    stopping = rf.EarlyStopping(patience=2, min_delta=0.1)
    for _ in range(2):  # a second run begins anew
        answers = told(stopping, [math.nan, 3.0, 2.0, 1.95, 1.8, 1.75, math.nan])
        assert answers[:-1] == [None] * 6
        assert answers[-1] == rf.Stop("loss got no better than 1.8 (step 5)")
    assert told(rf.EarlyStopping(patience=2), [math.nan] * 2)[-1].reason == "loss was not a number in 2 validations"
    assert told(rf.EarlyStopping(patience=1, mode="max"), [1.0, 2.0, 1.5])[1:] == [
        None,
        rf.Stop("loss got no better than 2 (step 2)"),
    ]


def test_what_the_best_is():
    assert told(rf.BestSnapshot(name="top"), [2.0, 3.0, 2.0, 1.0]) == [rf.Save("top"), None, None, rf.Save("top")]


def test_when_the_rate_falls():
    plateau = rf.PlateauRate(patience=2, factor=0.5, min_factor=0.2)
    values = [1.0, 1.0, 1.0, 0.5, 0.6, 0.6, 0.7, 0.7, 0.7, 0.7]
    expected = [None, None, rf.SetFactor(0.5), None, None, rf.SetFactor(0.25), None, rf.SetFactor(0.2), None, None]
    assert told(plateau, values) == expected
    assert told(plateau, values, first=6, factor=0.25) == [None] * 7 + expected[7:]


# what the run does --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def local(adjustable, data, tmp_path_factory):
    """The run that all others are compared with."""
    how = {"validation": data["test"], "steps": STEPS, "plan": many(adjustable, 2)}
    run = rf.fit(adjustable, data["train"], run_dir=tmp_path_factory.mktemp("local"), callbacks=three(), **how)
    assert run.outcome.startswith("stopped: loss got no better than")
    assert 14 < run.steps < STEPS
    assert read_snapshot(latest(run.path / "snapshots")).meta["clocks"]["rate_factor"] < 1.0
    return run


def check_same(run, local):
    """The same run to the bit: state, decisions, best snapshot."""
    assert (run.steps, run.outcome) == (local.steps, local.outcome)
    assert same_bits(run.state, local.state)
    one, other = (read_snapshot(latest(path / "best")) for path in (run.path, local.path))
    assert one.step == other.step
    assert same_bits(one.arrays, other.arrays)
    last, expected = (read_snapshot(latest(path / "snapshots")) for path in (run.path, local.path))
    assert last.meta["clocks"] == expected.meta["clocks"]
    assert last.step == run.steps


def test_a_stopped_run_and_its_best_state(local):
    best = max(local.validation, key=lambda event: event.metrics["accuracy"])
    kept = list_snapshots(local.path / "best")
    assert [read_snapshot(path).step for path in kept] == [best.step]
    assert set(rf.load_model(local.path / "best").state) == set(rf.load_model(local.path).state)
    assert local.validation[-1].step == local.steps
    assert len(local.scalars["loss"]) == local.steps
    assert local.outcome[9:] in repr(local)
    log = read_log(local.path / "metrics.jsonl")
    assert log[-1]["outcome"] == local.outcome


def test_decisions_are_the_same_on_a_cluster(client, adjustable, data, local, tmp_path):
    how = {"validation": data["test"], "steps": STEPS, "plan": many(adjustable, 2), "client": client}
    run = rf.fit(adjustable, data["train"], run_dir=tmp_path, callbacks=three(), **how)
    check_same(run, local)
    assert run.scalars == local.scalars
    assert run.validation == local.validation


def test_decisions_go_on_when_a_run_is_resumed(adjustable, data, local, tmp_path):
    how = {"validation": data["test"], "plan": many(adjustable, 2), "run_dir": tmp_path}
    callbacks = three()
    for i, steps in enumerate((21, 35, STEPS)):
        callbacks = callbacks if i == 1 else three()  # those of before know no more than new ones
        run = rf.fit(adjustable, data["train"], steps=steps, resume=i > 0, callbacks=callbacks, **how)
    check_same(run, local)


@pytest.mark.parametrize("granularity", ["segment", "op"])
def test_a_factor_is_that_of_a_schedule(adjustable, data, granularity):
    """Half of the rate from step 7 on, told by a callback, and by the slow twin: a rate that knows."""
    how = {"steps": 9, "validation": data["test"], "plan": many(adjustable, 1)}
    half = Answers(Validated, [rf.SetFactor(0.7), rf.SetFactor(0.5)])
    run = rf.fit(adjustable, data["train"], granularity=granularity, callbacks=[half], **how)
    twin = make_step(optim.multistep(0.05, steps=[7], factor=0.5))
    assert same_bits(run.state, rf.fit(twin, data["train"], **how).state)


def test_when_actions_take_effect(step, data, tmp_path):
    how = {"steps": 40, "run_dir": tmp_path, "snapshot_every": 10, "validation": data["test"], "plan": many(step, 1)}
    at_once = rf.fit(step, data["train"], callbacks=[Answers(Started, [rf.Save("first"), rf.Stop("no")])], **how)
    assert (at_once.steps, at_once.outcome) == (0, "stopped: no")
    assert read_snapshot(latest(tmp_path / "first")).step == 0
    how["overwrite"] = True
    late = Answers(Stepped, rf.Stop("enough"), step=8)  # told at step 8 or later, so the pause is that at 10
    run = rf.fit(step, data["train"], callbacks=[late], **how)
    assert not (tmp_path / "first").exists()
    assert (run.steps, run.outcome) == (10, "stopped: enough")
    assert [event.step for event in run.validation] == [7, 10]
    assert latest(tmp_path / "snapshots").name == "step-00000010"
    end = rf.fit(step, data["train"], callbacks=[Answers(Validated, rf.Stop(), step=40)], **how)
    assert (end.steps, end.outcome) == (40, "done")


def test_a_snapshot_that_is_alone_in_its_folder(tmp_path):
    with SnapshotWriter(tmp_path, only=True) as writer:
        for step, value in ((9, 1.0), (4, 2.0), (4, 3.0)):
            writer.write(step, {"w": np.full(3, value)}, {})
            writer.wait()
            assert [path.name for path in list_snapshots(tmp_path)] == [f"step-{step:08d}"]
            assert read_snapshot(latest(tmp_path)).arrays["w"].tolist() == [value] * 3
    left = tmp_path / ".unfinished" / "step-00000005"  # of a process that was killed before it moved it
    shutil.copytree(tmp_path / "step-00000004", left)
    with SnapshotWriter(tmp_path, only=True) as writer:
        writer.write(5, {"w": np.zeros(3)}, {})
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000005"]


# what cannot be -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("callback", "text"),
    [
        (Answers(Started, "stop"), "Answers answered Started with 'stop', which is not an action"),
        (Undecided(Started, rf.Stop()), "Undecided answered with Stop.* but does not say that it decides"),
        (Answers(Started, rf.SetFactor(0.5)), "Answers: the learning rate .* has no factor .*optim.adjustable"),
        (Answers(Started, rf.Save("best")), "Answers: a snapshot needs a folder"),
        (Answers(Ended, rf.Stop()), "Answers answered Ended with Stop.*, but the run is over"),
        (rf.BestSnapshot(), "BestSnapshot: a snapshot needs a folder"),
        (rf.PlateauRate(patience=2), "PlateauRate: the learning rate"),
        (rf.EarlyStopping("top_loss", patience=2), "EarlyStopping: 'top_loss' is not validated; this run has loss"),
    ],
)
def test_what_a_run_cannot_do(step, data, callback, text):
    with pytest.raises(SettingError, match=text):
        rf.fit(step, data["train"], steps=2, validation=data["test"], callbacks=[callback])


def test_what_a_run_cannot_give_is_known_before_it_begins(step, data, tmp_path):
    with pytest.raises(SettingError, match=r"EarlyStopping: .* nothing is validated. Give fit validation="):
        rf.fit(step, data["train"], steps=2, run_dir=tmp_path / "run", callbacks=[rf.EarlyStopping(patience=1)])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: rf.Save("a/b"), "'a/b' is not the name of a folder"),
        (lambda: rf.Save("snapshots"), "'snapshots' is not the name"),
        (lambda: rf.SetFactor(-1.0), "-1.0 is not a finite factor"),
        (lambda: rf.SetFactor(math.nan), "nan is not a finite factor"),
        (lambda: rf.EarlyStopping(patience=0), "EarlyStopping: patience=0 is not 1 or more"),
        (lambda: rf.EarlyStopping("speed", patience=1), "is a smaller or a larger 'speed' better"),
        (lambda: rf.EarlyStopping(patience=1, mode="best"), "mode='best' is not one of auto, min, max"),
        (lambda: rf.EarlyStopping(patience=1, min_delta=-1.0), "min_delta=-1.0 is not 0 or more"),
        (lambda: rf.PlateauRate(patience=1, factor=1.0), "factor=1.0 is not between 0 and 1"),
        (lambda: rf.PlateauRate(patience=1, min_factor=2.0), r"min_factor=2.0 is not in \[0, 1\)"),
    ],
)
def test_settings_that_mean_nothing(make, text):
    with pytest.raises(SettingError, match=text):
        make()


# callbacks that raise -----------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["process", "workers"])
@pytest.mark.parametrize("kind", [Stepped, Validated])
def test_a_callback_that_raises_leaves_a_run_to_go_on_with(request, adjustable, data, local, tmp_path, where, kind):
    client = request.getfixturevalue("usable") if where == "workers" else None
    how = {"validation": data["test"], "run_dir": tmp_path, "plan": many(adjustable, 2), "client": client}
    how |= {"snapshot_every": 20}
    bad, other = Answers(kind, KeyError("mine"), 28), Answers(Ended, None)
    with pytest.raises(KeyError, match="mine") as caught:
        rf.fit(adjustable, data["train"], steps=STEPS, callbacks=[bad, *three(), other], **how)
    assert f"the callback Answers raised this when it was told {kind.__name__} at step" in caught.value.__notes__[0]
    assert len(caught.value.__notes__) == 1
    assert isinstance(bad.seen[-1], Ended)
    assert isinstance(bad.seen[-2], kind)
    lines = read_log(tmp_path / "metrics.jsonl")
    assert lines[-1]["outcome"] == "KeyError: 'mine'"
    reached = read_snapshot(latest(tmp_path / "snapshots")).step
    assert reached == max(line["step"] for line in lines if line["kind"] == "step") + 1 == other.seen[-1].step
    run = rf.fit(adjustable, data["train"], steps=STEPS, resume=True, callbacks=three(), **how)
    check_same(run, local)


def test_callbacks_that_raise_together(step, data, tmp_path):
    one, two = Answers(Validated, ValueError("one")), Answers(Validated, ValueError("two"))
    with pytest.raises(ValueError, match="one") as caught:
        rf.fit(step, data["train"], steps=9, validation=data["test"], callbacks=[one, two], run_dir=tmp_path)
    assert [note.partition(" raised")[0] for note in caught.value.__notes__] == [
        "the callback Answers",
        "ValueError: two; the callback Answers",
    ]
    assert latest(tmp_path / "snapshots").name == "step-00000007"


def test_a_state_that_is_not_finite_is_not_kept(tmp_path):
    wild = make_step(1e300, net=lambda x: nn.dense(nn.flatten(x), CLASSES))
    large = records()
    large["x"] *= 1e10  # the first loss is finite, and the parameters after it are not
    with pytest.raises(ValueError, match="mine") as caught:
        rf.fit(wild, large, steps=9, run_dir=tmp_path, callbacks=[Answers(Stepped, ValueError("mine"))])
    assert caught.value.__notes__[1].startswith("No last snapshot was written: NonFinite: dense_1")
    assert latest(tmp_path / "snapshots") is None
