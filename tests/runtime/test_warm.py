"""The kernel cache filled by several processes: what is there is found, what fails fails as ever."""

import numpy as np
import pytest

import rapydli_flow as rf
import rapydli_flow.template as registry
from cpu_kernels import compile as compiler
from cpu_kernels.compile import host
from rapydli_flow import nn, optim
from rapydli_flow.config import Settings, settings
from rapydli_flow.errors import SettingError, TemplateError
from rapydli_flow.ops import Relu, Scale, Tanh
from rapydli_flow.runtime import warm as module
from rapydli_flow.runtime.rank import kernel_of
from rapydli_flow.runtime.timing import programs_of
from rapydli_flow.runtime.warm import kept_of, warm
from rapydli_flow.runtime.worker import warm as on_worker
from rapydli_flow.spec import Spec
from rapydli_flow.template import Epilogue, Loop, template
from rapydli_flow.tuner import Choice, Request, Tuning

X = Spec((4, 6))


def pair(op):
    request = Request(op, (X,), Epilogue.none(X), op.name)
    return request, Tuning(host()).choose(request)


PAIRS = [pair(op) for op in (Relu(), Tanh(), Scale(by=3.0), Scale(by=5.0))]


@pytest.fixture
def empty(tmp_path, monkeypatch):
    """A cache with nothing in it, and a process that has no kernels."""
    monkeypatch.setenv("RAPYDLI_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(compiler, "_kernels", {})
    settings.cache_clear()
    yield tmp_path / "cache" / "kernels"
    settings.cache_clear()


def forget(monkeypatch):
    """As another process: no kernel is loaded."""
    monkeypatch.setattr(compiler, "_kernels", {})


def test_children_fill_the_cache(empty, monkeypatch):
    told = []
    done = warm(PAIRS + PAIRS, host(), compilers=2, watch=lambda done, count: told.append((done, count)))
    assert (done.compiled, done.found, done.failed, done.processes) == (4, 0, (), 2)
    assert sorted(told) == [(i, 4) for i in (1, 2, 3, 4)]
    forget(monkeypatch)
    assert kept_of(PAIRS, host()) == [True] * 4
    assert all(kernel_of(*each, host()).reloaded for each in PAIRS)
    again = warm(PAIRS, host())
    assert (again.compiled, again.found) == (0, 4)
    assert str(again).startswith("0 kernels compiled, 4 found, 0.")
    assert "in 2 processes" in str(done)


def test_few_are_compiled_here(empty, monkeypatch):
    monkeypatch.setattr(module, "Contained", None)  # no child could be started
    assert warm(PAIRS[:2], host(), compilers=2).processes == 1
    assert warm(PAIRS, host(), compilers=1).compiled == 2
    assert kept_of(PAIRS, host()) == [True] * 4


@pytest.mark.parametrize("which", range(len(PAIRS)))
def test_a_damaged_cache_is_compiled_again(empty, monkeypatch, which):
    warm(PAIRS, host(), compilers=1)
    for file in empty.glob("__pycache__/*.nbc"):
        file.write_bytes(b"damaged")
    sorted(empty.glob("*.py"))[which].write_text("damaged")
    forget(monkeypatch)
    assert warm(PAIRS, host()).failed == ()
    x, y = np.array([[-1.0] * 6] * 4, np.float32), np.ones((4, 6), np.float32)
    compiler.run_kernel(kernel_of(*PAIRS[0], host()), [x], [y])
    assert (y == 0).all()
    for file in empty.glob("__pycache__/*.nbc"):
        file.unlink()
    forget(monkeypatch)
    assert kept_of(PAIRS, host()) == [False] * 4


@pytest.fixture
def broken():
    """A template that Numba cannot compile."""

    @template("pointwise", "cpu", space={})
    def cannot(op, ins, outs, epilogue):
        def body(task, x, y, extras, at):
            y[0] = x.nothing

        return Loop(body, 1)

    yield Choice("cannot")
    known = registry._templates["pointwise", "cpu"]
    known[:] = [one for one in known if one.name != "cannot"]


@pytest.mark.parametrize("compilers", [1, 2])
def test_what_cannot_be_compiled_fails_as_before(empty, broken, compilers):
    wrong = (PAIRS[0][0], broken)
    with pytest.raises(TemplateError) as expected:
        kernel_of(*wrong, host())
    done = warm([wrong, *PAIRS], host(), compilers=compilers)
    assert done.compiled == 4
    assert [failed for failed, _ in done.failed] == [wrong]
    with pytest.raises(TemplateError) as found:
        done.check()
    assert str(found.value) == str(expected.value)
    with pytest.raises(TemplateError):
        on_worker([wrong], host())


def test_runs_warm_up_by_themselves(empty, monkeypatch):
    """With two compilers the kernels of a run are compiled by two processes, and the run goes on with them."""
    monkeypatch.setenv("RAPYDLI_COMPILERS", "2")
    settings.cache_clear()
    asked = []
    original = module._Crew.run
    monkeypatch.setattr(module._Crew, "run", lambda crew, helpers: (asked.append(helpers), original(crew, helpers))[1])
    graph = rf.trace(lambda x: nn.dense(x, 3), rf.Spec((4, 5)))
    step = rf.train_step(graph, loss=nn.cross_entropy, optimizer=optim.sgd(0.1))
    data = {"x": np.ones((8, 5), np.float32), "label": np.arange(8) % 3}
    rf.fit(step, data, steps=1)
    assert asked == [1]
    forget(monkeypatch)
    training = programs_of(step, Tuning(host()), 1)[0]
    assert all(kept_of([p for p in training.requests if not p[1].reference], host()))


def test_the_setting():
    assert Settings.read({"RAPYDLI_COMPILERS": "3"}).compilers == 3
    assert Settings.read({}).compilers >= 1
    with pytest.raises(SettingError, match="RAPYDLI_COMPILERS=0: 1 process or more"):
        Settings.read({"RAPYDLI_COMPILERS": "0"})
