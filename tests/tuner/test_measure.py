"""Measuring real kernels: checked before they are timed; tuning a graph and remembering it."""

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cpu_kernels.compile import host
from rapydli_flow.config import settings
from rapydli_flow.errors import SettingError, SpaceError
from rapydli_flow.graph import Fused, Graph, fuse
from rapydli_flow.ops import Add, CrossEntropy, Dropout, MaxPool, MaxPoolGrad, Op, Relu, Scale
from rapydli_flow.runtime.measure import Measure
from rapydli_flow.runtime.rank import Rank
from rapydli_flow.runtime.tuning import TuningReport, autotune, cache, known, requests_of
from rapydli_flow.scheduler import AllReduce, compile_program
from rapydli_flow.spec import Spec
from rapydli_flow.template import Loop, template, templates
from rapydli_flow.tuner import Choice, Request, Trial, Tuning

HERE = host()


class Tripled(Op, abstract=True):
    family = "test_tripled"

    def infer(self, x: Spec) -> Spec:
        return x

    def index(self, x: Spec) -> str:
        return "a b -> a b"

    def reference(self, x: Any) -> Any:
        return x * 3


@template("test_tripled", "cpu", space={"rounds": (20, 10)})
def slow(op: Any, ins: Any, outs: Any, epilogue: Any, *, rounds: int) -> Loop:
    """Right, but takes its time."""
    n, channels = ins[0].size, ins[0].shape[-1]

    def body(task, x, y, extras, at):
        for i in range(n):
            idle = x[i]
            for _ in range(rounds):
                idle = math.sin(idle)
            y[i] = epilogue(x[i] * 3 + idle * 0, extras, i, i % channels, at)

    return Loop(body, 1)


@template("test_tripled", "cpu")
def wrong(op: Any, ins: Any, outs: Any, epilogue: Any) -> Loop:
    n, channels = ins[0].size, ins[0].shape[-1]

    def body(task, x, y, extras, at):
        for i in range(n):
            y[i] = epilogue(x[i] * 3.01, extras, i, i % channels, at)

    return Loop(body, 1)


@template("test_tripled", "cpu")
def forgets_the_last(op: Any, ins: Any, outs: Any, epilogue: Any) -> Loop:
    n, channels = ins[0].size, ins[0].shape[-1]

    def body(task, x, y, extras, at):
        for i in range(n - 1):
            y[i] = epilogue(x[i] * 3, extras, i, i % channels, at)

    return Loop(body, 1)


@template("test_tripled", "cpu")
def cannot_be_built(op: Any, ins: Any, outs: Any, epilogue: Any) -> Loop:
    raise ZeroDivisionError("no tasks")


@template("test_tripled", "cpu")
def cannot_be_compiled(op: Any, ins: Any, outs: Any, epilogue: Any) -> Loop:
    def body(task, x, y, extras, at):
        y[0] = x.nothing_of_the_kind

    return Loop(body, 1)


@template("test_tripled", "cpu")
def straight(op: Any, ins: Any, outs: Any, epilogue: Any) -> Loop:
    n, channels = ins[0].size, ins[0].shape[-1]

    def body(task, x, y, extras, at):
        for i in range(n):
            y[i] = epilogue(x[i] * 3, extras, i, i % channels, at)

    return Loop(body, 1)


X = Spec((64, 32))
TAIL = Fused(anchor=Tripled(), arity=1, tail=((Add(), (-1, 0)), (Relu(), (-1,))))


def request(op: Op, *ins: Spec) -> Request:
    return Tuning(HERE).serve(op, ins)[0]


def exhaustive(asked: Request) -> list[Choice]:
    """Every config of every template, the first of each first."""
    found = asked.templates(HERE)
    each = [[Choice.of(t, c) for c in t.configs(asked.op, asked.ins, asked.outs, HERE)] for t in found]
    return [*(choices[0] for choices in each), *(c for choices in each for c in choices[1:])]


def measured(asked: Request, choices: Sequence[Choice] | None = None, threads: int = 1) -> dict[str, Trial]:
    choices = exhaustive(asked) if choices is None else choices
    trials = Measure(HERE, threads=threads)(asked, choices)
    assert [t.choice for t in trials] == choices
    assert all((t.time_s is None) == bool(t.error) for t in trials)
    assert all(t.time_s is None or t.time_s > 0 for t in trials)
    return {t.choice.template: t for t in reversed(trials)}


@pytest.mark.parametrize("asked", [request(Tripled(), X), request(TAIL, X, Spec((32,)))], ids=["plain", "tail"])
def test_what_is_wrong_gets_no_time(asked: Request) -> None:
    """With or without a tail: the reference is the whole op."""
    trials = measured(asked)
    assert trials["slow"].time_s is not None
    assert trials["straight"].time_s is not None
    assert trials["straight"].time_s < trials["slow"].time_s
    assert "deviates from the reference by " in trials["wrong"].error
    assert "deviates from the reference by nan" in trials["forgets_the_last"].error
    assert trials["cannot_be_built"].error == "ZeroDivisionError: no tasks"
    assert "nothing_of_the_kind" in trials["cannot_be_compiled"].error


def test_a_request_of_unknown_origin_is_timed_unchecked_if_it_has_a_tail() -> None:
    asked = request(TAIL, X, Spec((32,)))
    bare = Request(asked.op, asked.ins, asked.epilogue)
    assert measured(bare, [Choice("wrong")])["wrong"].time_s is not None
    plain = Request(Tripled(), (X,), request(Tripled(), X).epilogue)
    assert measured(plain, [Choice("wrong")])["wrong"].error


def test_a_choice_that_does_not_exist_is_a_trial() -> None:
    trials = measured(request(Tripled(), X), [Choice("lost"), Choice("straight"), Choice("slow", (("rounds", 7),))])
    assert trials["lost"].error.startswith("TemplateError: test_tripled has no template 'lost'")
    assert trials["straight"].time_s is not None


@pytest.mark.parametrize(
    ("op", "ins"),
    [
        (Scale(by=2.0), (X,)),
        (Scale(by=2.0), (Spec(()),)),
        (Scale(by=2.0), (Spec((8, 4), "float64"),)),
        (CrossEntropy(), (Spec((6, 5)), Spec((6,), "int64"))),
        (MaxPool(window=(2,), stride=(2,), padding=((0, 0),)), (Spec((2, 8, 3)),)),
        (
            MaxPoolGrad(size=(8,), window=(2,), stride=(2,), padding=((0, 0),)),
            (Spec((2, 4, 3)), Spec((2, 4, 3), "uint8")),
        ),
        (Dropout(rate=0.5, stream=3), (X, Spec((), "int64"), Spec((), "int64"))),
    ],
)
def test_kernels_of_the_package_are_right_and_timed(op: Op, ins: tuple[Spec, ...]) -> None:
    asked = request(op, *ins)
    assert not any(trial.error for trial in measured(asked, exhaustive(asked)[:2], threads=2).values())


class Spoiled(Tripled, abstract=True):
    family = "test_spoiled"


@template("test_spoiled", "cpu")
def spoils(op: Any, ins: Any, outs: Any, epilogue: Any) -> Loop:
    """Wrong, and writes over what it reads."""
    n = ins[0].size

    def body(task, x, y, extras, at):
        for i in range(n):
            x[i] = y[i] = 1.0

    return Loop(body, 1)


template("test_spoiled", "cpu")(straight)


def test_what_writes_over_its_operands_does_not_spoil_them_for_others() -> None:
    trials = measured(request(Spoiled(), X), [Choice("spoils"), Choice("straight"), Choice("spoils")])
    assert "deviates from the reference" in trials["spoils"].error
    assert trials["straight"].time_s is not None


# tuning a graph ----------------------------------------------------------------------------------------


class Searching(Tripled, abstract=True):
    family = "test_searching"


template("test_searching", "cpu", space={"rounds": (400,)})(slow)  # slower than a busy machine makes the other
template("test_searching", "cpu")(straight)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache of this user."""
    monkeypatch.setenv("RAPYDLI_CACHE_DIR", str(tmp_path))
    settings.cache_clear()
    yield tmp_path
    monkeypatch.undo()
    settings.cache_clear()


def graph() -> Graph:
    new = Graph()
    x, b = new.leaf("batch", "x", X), new.leaf("param", "b", Spec((32,)))
    y = Relu()(Searching()(x) + b)
    y = new.add(AllReduce(ranks=(0,)), (Searching()(y) + b,), "sum")
    new.outputs["y"] = y.id
    return fuse(new)


BEST = Choice("straight")


def test_a_graph_is_tuned_and_remembered(folder: Path) -> None:
    assert cache().path == folder / "tuning.sqlite"
    before = compile_program(graph(), known(HERE))
    assert {choice.template for _, choice in before.requests} == {"slow"}
    for asked in requests_of([graph()], HERE):  # so that a choice below is one of time, not of failure
        assert not [trial.error for trial in measured(asked).values() if trial.error]
    told: list[Any] = []
    report = autotune([graph(), graph()], 1, None, budget_s=60.0, watch=told.append)
    assert isinstance(report, TuningReport)
    assert [found.best.choice for found in report.found] == [BEST] * 2
    assert [found.default.choice.template for found in report.found] == ["slow"] * 2
    ended = [str(progress) for progress in told if progress.ended]
    assert len(ended) == 2
    assert " after 2 trials (nothing left to try)" in ended[0]
    assert set(report.tuning.choices.values()) == {BEST}
    assert report.gain is None  # a rank that meets others is not timed alone
    text = str(report)
    assert text.split()[:7] == ["kernel", "calls", "default", "best", "gain", "GFLOP/s", "of"]
    assert "2 of 2 kernels, 4 configs" in text.splitlines()[-1]
    assert "searching+add+relu f32[64,32]" in text
    assert (folder / "tuning.sqlite").exists()

    after = compile_program(graph(), known(HERE))  # another run
    assert {choice for _, choice in after.requests} == {BEST}
    rng = np.random.default_rng(0)
    x, b = rng.normal(size=X.shape).astype("f"), rng.normal(size=32).astype("f")
    outputs = []
    for program in (before, after):
        rank = Rank(program, HERE, poison=True)
        rank.leaf("b")[...] = b
        rank.feed({"x": x})
        rank.step(0, 0)
        outputs.append(rank.output("y"))
    assert np.allclose(outputs[1], np.maximum(x * 3 + b, 0) * 3 + b, rtol=1e-5, atol=1e-5)
    assert np.array_equal(outputs[0], outputs[1])


def test_no_time_no_results(folder: Path) -> None:
    """Defaults are timed, for their share of the step, and kept as trials; nothing is chosen."""
    report = autotune([graph()], 1, None, budget_s=0.0)
    assert [len(found.trials) for found in report.found] == [1, 1]
    assert (report.requests, len(report.tuning)) == (2, 0)
    (first, _) = requests_of([graph()], HERE)
    assert [t.choice.template for t in cache().trials(HERE, first)] == ["slow"]


def test_each_kernel_is_counted_once_for_each_call() -> None:
    new = Graph()
    small, large = new.leaf("batch", "small", Spec((2, 2))), new.leaf("batch", "large", Spec((200, 2)))
    for x in (small, large, small):
        new.outputs[f"y{len(new.outputs)}"] = Scale(by=2.0)(x).id
    found = {request.ins[0].shape: calls for request, calls in requests_of([new, new], HERE).items()}
    assert found == {(2, 2): 2, (200, 2): 1}
    assert [t.name for t in templates("test_searching", "cpu")] == ["slow", "straight"]


def test_constraints_that_cannot_be_kept(folder: Path) -> None:
    new = Graph()
    new.outputs["y"] = Scale(by=2.0)(new.leaf("batch", "x", X)).id
    message = "constraint 'flat' names height, but no template of this step has all of them. Its parameters are .*grain"
    with pytest.raises(SettingError, match=message):
        autotune([new], 1, None, budget_s=60.0, soft={"flat": "height < 3"})
    with pytest.raises(SpaceError, match="no point keeps soft 'never'"):
        autotune([new], 1, None, budget_s=60.0, soft={"never": "grain < 0"})


def test_reports_in_every_form(folder: Path) -> None:
    new = Graph()
    new.outputs["y"] = Searching()(new.leaf("batch", "x", X)).id
    report = autotune([new], 1, None, budget_s=60.0)
    assert report.gain is not None
    assert report.gain > 1.0
    page = report.save(folder / "sub" / "report.html").read_text()
    assert page.startswith("<!doctype html>")
    assert "straight" in page
    assert "<svg" in page
    form = json.loads(report.save(folder / "report.json").read_text())
    (session,) = form["sessions"]
    (kernel,) = session["kernels"]
    assert kernel["best"]["template"] == "straight"
    assert kernel["default"]["config"] == {"rounds": 400}
    assert kernel["ended"] == "nothing left to try"
    assert session["step"]["tuned_s"] < session["step"]["default_s"]
    assert session["peak_gflops"] > 1
    assert form["funnel"][-1] == {"stage": "timed", "left": 2, "lost": {}}
    assert "straight" in report._repr_html_()
    with pytest.raises(SettingError, match=r"neither \.html nor \.json"):
        report.save(folder / "report.pdf")
