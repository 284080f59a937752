"""The progress bar: few plain lines without a terminal, a live bar in one; brackets are not markup."""

import io

import numpy as np
from networks import perceptron, traced
from rich.console import Console

import rapydli_flow as rf
from rapydli_flow import nn, optim
from rapydli_flow.progress import ProgressBar
from rapydli_flow.runtime.events import Ended, Event, Saved, Started, Stepped, Validated
from rapydli_flow.spec import Spec


def watch(*events: Event, terminal: bool = False) -> str:
    console = Console(file=io.StringIO(), width=120, force_terminal=terminal)
    bar = ProgressBar(console)
    for event in events:
        bar.on_event(event)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def started(step: int = 0, explanation: str = "") -> Started:
    return Started(step, 100, 25, 32, 1, 2, "segment", explanation)


def stepped(first: int, steps: int = 5, time_s: float = 0.5) -> Stepped:
    return Stepped(first, steps, {"loss": tuple(2.0 - 0.01 * (first + i) for i in range(steps))}, time_s, 0.0)


def test_plain_lines_every_tenth_of_a_run() -> None:
    lines = watch(started(), *(stepped(i) for i in range(0, 100, 5)), Ended(100, 10.0)).splitlines()
    assert lines[0] == " 10%  epoch 1/4  step 10  loss 1.9100  320 records/s"
    assert lines[-2:] == [
        "100%  epoch 4/4  step 100  loss 1.0100  320 records/s",
        "done after 100 of 100 steps, 10.0 s",
    ]
    assert len(lines) == 11


def test_a_validation_takes_the_place_of_other_lines() -> None:
    events: list[Event] = [started()]
    for i in range(0, 100, 25):
        events += [stepped(i, 25), Validated(i + 25, i // 25 + 1, {"loss": 0.5, "accuracy": 0.75}), Saved(i + 25)]
    lines = watch(*events).splitlines()
    assert lines[1] == "epoch 1/4  step 25  validation: loss 0.5000  accuracy 0.7500  1,600 records/s"
    assert sum("validation" in line for line in lines) == 4
    assert len(lines) == 5  # and one before the first validation was seen


def test_the_plan_and_a_resumed_step_are_shown() -> None:
    lines = watch(started(40, "2 ranks\n  x: rank 0 [0:16,0:3]"), stepped(40, time_s=0.0)).splitlines()
    assert lines == ["2 ranks", "  x: rank 0 [0:16,0:3]", "resumed at step 40"]


def test_failures_are_shown_as_they_are() -> None:
    text = watch(started(), Ended(3, 1.25, "ShapeError: x [red]f32[3][/red]"))
    assert text == "ShapeError: x [red]f32[3][/red] after 3 of 100 steps, 1.2 s\n"


def test_a_terminal_has_a_bar() -> None:
    text = watch(
        started(), stepped(0, 50), Validated(50, 2, {"loss": 0.5}), Ended(50, 5.0, "interrupted"), terminal=True
    )
    assert "epoch 2/4  step 50  loss 1.5100  3,200 records/s" in text
    assert "50%" in text
    assert "validation: loss 0.5000" in text
    assert "interrupted after 50 of 100 steps" in text


def test_a_run_that_ends_before_it_starts() -> None:
    assert watch(Ended(0, 0.0, "failed")) == "failed after 0 of 1 steps, 0.0 s\n"


def test_it_watches_a_real_run() -> None:
    rng = np.random.default_rng(0)
    data = {"x": rng.normal(size=(32, 6)).astype(np.float32), "label": rng.integers(0, 3, 32)}
    step = rf.train_step(traced(perceptron, Spec((8, 6))), loss=nn.cross_entropy, optimizer=optim.sgd(0.1))
    console = Console(file=io.StringIO(), width=120)
    rf.fit(step, data, validation=data, epochs=2, callbacks=[ProgressBar(console)])
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert text.startswith("1 rank, ")
    assert "epoch 2/2  step 8  validation: loss" in text
    assert "done after 8 of 8 steps" in text
