"""What a run tells callbacks, in which order; the log of it; and the schedule of a run."""

import json

import pytest
from small_runs import many

import rapydli_flow as rf
from rapydli_flow.runtime.events import Ended, MetricsLog, Saved, Started, Stepped, Validated, read_log
from rapydli_flow.runtime.train import Schedule


class Record(rf.Callback):
    def __init__(self):
        self.events = []

    def on_event(self, event):
        self.events.append(event)


@pytest.mark.parametrize("on", ["process", "workers"])
@pytest.mark.parametrize("granularity", ["segment", "stage"])
def test_events_come_in_order(request, step, data, tmp_path, on, granularity):
    client = request.getfixturevalue("client") if on == "workers" else None
    record, other = Record(), Record()
    rf.fit(
        step,
        data["train"],
        validation=data["test"],
        epochs=2,
        plan=many(step, 2),
        client=client,
        granularity=granularity,
        run_dir=tmp_path,
        snapshot_every=5,
        callbacks=[record, other],
    )
    events = record.events
    assert other.events == events
    first, last = events[0], events[-1]
    assert isinstance(first, Started)
    assert (first.step, first.steps, first.steps_per_epoch, first.batch, first.ranks) == (0, 14, 7, 8, 2)
    assert first.granularity == granularity
    assert "2 ranks" in first.explanation
    assert isinstance(last, Ended)
    assert (last.step, last.outcome) == (14, "done")
    assert [e.step for e in events if isinstance(e, Saved)] == [5, 10, 14]
    assert [(e.step, e.epoch) for e in events if isinstance(e, Validated)] == [(7, 1), (14, 2)]
    reached = 0
    for event in events[1:-1]:
        if isinstance(event, Stepped):
            assert event.first == reached
            assert {len(series) for series in event.scalars.values()} == {event.steps}
            reached += event.steps
        else:
            assert event.step == reached
    assert reached == 14


def test_the_log_of_a_run(step, data, tmp_path):
    run = rf.fit(step, data["train"], validation=data["test"], steps=10, run_dir=tmp_path, plan=many(step, 1))
    lines = read_log(tmp_path / "metrics.jsonl")
    assert [json.loads(text) for text in (tmp_path / "metrics.jsonl").read_text().splitlines()] == lines
    assert lines[0]["kind"] == "started"
    steps = [line for line in lines if line["kind"] == "step"]
    assert [line["step"] for line in steps] == list(range(10))
    assert [line["loss"] for line in steps] == run.scalars["loss"]
    validated = [line for line in lines if line["kind"] == "validated"]
    assert [line["step"] for line in validated] == [6, 9]
    assert validated[-1]["accuracy"] == run.metrics["accuracy"]
    assert sum(line["steps"] for line in lines if line["kind"] == "segment") == 10
    assert lines[-1]["kind"] == "ended"
    assert lines[-1]["outcome"] == "done"
    assert lines[-1]["time_s"] > 0


def test_a_line_that_was_half_written_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert read_log(path) == []
    path.write_text('{"kind": "step", "step": 0}\n{"kind": "step", "st')
    assert read_log(path) == [{"kind": "step", "step": 0}]


def test_a_log_goes_on_from_a_step(tmp_path):
    log = MetricsLog(tmp_path)
    log.on_event(Started(0, 9, 3, 8, 1, 1, "segment"))
    log.on_event(Stepped(0, 4, {"loss": (4.0, 3.0, 2.0, 1.0)}, 0.1, 0.0))
    log.on_event(Validated(3, 1, {"loss": 2.0}))
    log.on_event(Saved(3))
    log.on_event(Saved(4))
    log.close()
    log = MetricsLog(tmp_path, first_step=3)
    log.on_event(Stepped(3, 1, {"loss": (0.5,)}, 0.1, 0.0))
    log.close()
    lines = read_log(tmp_path / "metrics.jsonl")
    assert [line["loss"] for line in lines if line["kind"] == "step"] == [4.0, 3.0, 2.0, 0.5]
    assert [line["kind"] for line in lines] == [
        "started",
        *["step"] * 3,
        "segment",
        "validated",
        "saved",
        "step",
        "segment",
    ]


def test_a_log_that_is_taken_up_is_never_short_of_lines(tmp_path):
    log = MetricsLog(tmp_path)
    log.on_event(Stepped(0, 2, {"loss": (2.0, 1.0)}, 0.1, 0.0))
    log.close()
    again = MetricsLog(tmp_path, first_step=2)  # a kill may come here, before anything is told
    assert len(read_log(tmp_path / "metrics.jsonl")) == 3
    again.close()


def test_a_callback_need_not_do_anything():
    rf.Callback().on_event(Ended(0, 0.0))


@pytest.mark.parametrize(
    ("schedule", "step", "pause"),
    [
        (Schedule(0, 20, 7), 0, 20),
        (Schedule(0, 20, 7, validate=True), 0, 7),
        (Schedule(0, 20, 7, validate=True), 7, 14),
        (Schedule(0, 20, 7, snapshot_every=5, validate=True), 5, 7),
        (Schedule(0, 20, 7, snapshot_every=5), 19, 20),
        (Schedule(0, 3, 7, snapshot_every=5), 0, 3),
    ],
)
def test_where_a_run_pauses(schedule, step, pause):
    assert schedule.next_pause(step) == pause


def test_what_happens_at_a_pause():
    schedule = Schedule(0, 17, 7, snapshot_every=5, validate=True)
    assert [s for s in range(1, 18) if schedule.validates(s)] == [7, 14, 17]
    assert [s for s in range(1, 18) if schedule.saves(s)] == [5, 10, 15, 17]
    assert not Schedule(0, 17, 7).saves(17)
    assert not Schedule(0, 17, 7).validates(7)
