"""The harness: kernels that crash, hang, are wrong or do not compile are failed trials; the others get times."""

import math
import os
import signal
import sys
import time
from typing import Any

import pytest

from cpu_kernels.compile import host
from rapydli_flow.ops import Op, Scale
from rapydli_flow.runtime.bench import Bench
from rapydli_flow.runtime.contained import Contained, Failed, Lost, share
from rapydli_flow.runtime.measure import THOROUGH
from rapydli_flow.runtime.own import carry, unpack
from rapydli_flow.runtime.peak import Peak, measured_peak
from rapydli_flow.spec import Spec
from rapydli_flow.template import Loop, template
from rapydli_flow.tuner import Choice, Request, Tuning

HERE = host()

# a process of its own ----------------------------------------------------------------------------------


def add(a: int, b: int, *, say: Any) -> int:
    return a + b


def refuse(*, say: Any) -> None:
    raise ValueError("not today")


def die(code: int, *, say: Any) -> None:
    say("about to")
    os.kill(os.getpid(), signal.SIGSEGV) if code < 0 else os._exit(code)


def sleep(seconds: float, *, say: Any) -> str:
    say("asleep")
    time.sleep(seconds)
    return "awake"


def pid(*, say: Any) -> int:
    return os.getpid()


@pytest.fixture
def child() -> Any:
    one = Contained()
    yield one
    one.stop()


def call(child: Contained, *what: Any, limit_s: float = 60.0) -> Any:
    child.ask(*what)
    return child.answer(limit_s)


def test_calls_are_answered_in_another_process(child: Contained) -> None:
    assert call(child, add, 2, 3) == 5
    assert call(child, pid) != os.getpid()
    assert call(child, refuse) == Failed("ValueError: not today")
    assert call(child, lambda *, say: sys.flags.interactive) == 0


def test_a_child_that_dies_is_replaced(child: Contained) -> None:
    before = call(child, pid)
    assert call(child, die, -1) == Lost("crashed: SIGSEGV", "about to")
    assert call(child, die, 3) == Lost("crashed: exit status 3", "about to")
    assert call(child, pid) not in (before, os.getpid())
    os.kill(call(child, pid), signal.SIGKILL)  # while it is idle
    time.sleep(0.2)
    assert call(child, add, 1, 1) in (2, Lost("crashed: SIGKILL"))
    assert call(child, add, 1, 1) == 2


def test_a_child_that_hangs_is_stopped(child: Contained) -> None:
    assert call(child, add, 0, 0) == 0
    begin = time.monotonic()
    assert call(child, sleep, 60.0, limit_s=0.5) == Lost("hung: nothing for 0.5 s", "asleep")
    assert time.monotonic() - begin < 30
    assert call(child, sleep, 0.0) == "awake"


def test_calls_are_shared_out_and_each_has_its_answer() -> None:
    children = [Contained(), Contained()]
    try:
        calls = [(add, n, n) for n in range(5)]
        mixed = [*calls, (die, -1), (refuse,), (sleep, 60.0), *calls]
        answers = share(children, mixed, 3.0)
        assert answers[:5] == answers[8:] == [0, 2, 4, 6, 8]
        assert answers[5].why == "crashed: SIGSEGV"
        assert answers[6] == Failed("ValueError: not today")
        assert answers[7].why == "hung: nothing for 3 s"
        assert share(children, [], 1.0) == []
    finally:
        for each in children:
            each.stop()


# kernels -----------------------------------------------------------------------------------------------


class Halved(Op, abstract=True):
    family = "test_halved"

    def infer(self, x: Spec) -> Spec:
        return x

    def index(self, x: Spec) -> str:
        return "a b -> a b"

    def reference(self, x: Any) -> Any:
        return x / 2


def loop(ins: Any, epilogue: Any, factor: float, idle: int = 0) -> Loop:
    n, channels = ins[0].size, ins[0].shape[-1]

    def body(task, x, y, extras, at):
        for i in range(n):
            v = x[i]
            for _ in range(idle):
                v = math.sin(v)
            y[i] = epilogue(x[i] * factor + v * 0, extras, i, i % channels, at)

    return Loop(body, 1)


@template("test_halved", "cpu", space={"idle": (40, 0)})
def right(op: Any, ins: Any, outs: Any, epilogue: Any, *, idle: int) -> Loop:
    return loop(ins, epilogue, 0.5, idle)


@template("test_halved", "cpu")
def wrong(op: Any, ins: Any, outs: Any, epilogue: Any) -> Loop:
    return loop(ins, epilogue, 0.6)


@template("test_halved", "cpu")
def crashes(op: Any, ins: Any, outs: Any, epilogue: Any) -> Loop:
    def body(task, x, y, extras, at):
        for i in range(1 << 40):  # far beyond the array
            y[i * 4096] = x[0]

    return Loop(body, 1)


@template("test_halved", "cpu")
def hangs(op: Any, ins: Any, outs: Any, epilogue: Any) -> Loop:
    def body(task, x, y, extras, at):
        i = 0
        while x[0] * 0 == 0:
            i += 1
            y[i & 7] = x[0] + i
        y[0] = i

    return Loop(body, 1)


@template("test_halved", "cpu")
def cannot_be_compiled(op: Any, ins: Any, outs: Any, epilogue: Any) -> Loop:
    def body(task, x, y, extras, at):
        y[0] = x.nothing_of_the_kind

    return Loop(body, 1)


@template("test_halved", "cpu")
def kills_the_compiler(op: Any, ins: Any, outs: Any, epilogue: Any) -> Loop:
    os._exit(7)


SLOW, FAST = Choice("right", (("idle", 40),)), Choice("right", (("idle", 0),))


def asked() -> Request:
    return Tuning(HERE).serve(Halved(), [Spec((64, 32))])[0]


def test_nothing_that_a_kernel_does_ends_a_tuning_run() -> None:
    """The templates are this file's own, which other processes cannot import: they are sent by value."""
    names = ["wrong", "crashes", "hangs", "cannot_be_compiled", "kills_the_compiler"]
    choices = [SLOW, *map(Choice, names), FAST, Choice("lost")]
    with Bench(HERE, threads=1, compilers=2, limit_s=8.0) as bench:
        trials = {t.choice: t for t in bench(asked(), choices)}
        assert list(trials) == choices
        assert trials[FAST].time_s is not None
        assert trials[SLOW].time_s is not None
        assert trials[FAST].time_s < trials[SLOW].time_s
        stages = {name: (trials[Choice(name)].stage, trials[Choice(name)].error) for name in names}
        assert stages["wrong"][0] == "check"
        assert "deviates from the reference by " in stages["wrong"][1]
        assert stages["crashes"] == ("check", "crashed: SIGSEGV")
        assert stages["hangs"] == ("check", "hung: nothing for 8 s")
        assert stages["cannot_be_compiled"][0] == "compile"
        assert "nothing_of_the_kind" in stages["cannot_be_compiled"][1]
        assert stages["kills_the_compiler"] == ("compile", "crashed: exit status 7")
        assert trials[Choice("lost")].error.startswith("TemplateError: test_halved has no template 'lost'")
        again = bench(asked(), [FAST], against=[SLOW], thorough=True)
        assert [t.choice for t in again] == [SLOW, FAST]
        assert [t.rounds for t in again] == [THOROUGH, THOROUGH]
        low, middle, high = again[1].low_s, again[1].time_s, again[1].high_s
        assert low is not None
        assert middle is not None
        assert high is not None
        assert 0 < low <= middle <= high


def test_a_request_travels_with_the_templates_that_serve_it() -> None:
    packed = carry(asked(), HERE)
    assert unpack(packed).key(HERE) == asked().key(HERE)
    plain = Tuning(HERE).serve(Scale(by=2.0), [Spec((4,))])[0]
    assert len(carry(plain, HERE)) < len(packed)
    assert unpack(carry(plain, HERE)) == plain


def test_the_peak_is_more_than_nothing() -> None:
    peak = measured_peak(HERE, 1)
    assert peak.flops_s > 1e9
    assert peak.bytes_s > 1e8
    assert "GFLOP/s" in str(peak)
    assert peak.better(Peak(1e20, 1.0, 1)) == Peak(1e20, peak.bytes_s, 1)
