"""Kernels of a card are checked and timed as those of the processor: on an emulated one."""

import numpy as np
import pytest
from click.testing import CliRunner

import rapydli_flow as rf
from gpu_kernels.compile import Cubin
from rapydli_flow import nn, optim
from rapydli_flow.cli import main
from rapydli_flow.config import settings
from rapydli_flow.errors import DeviceFault, TemplateError
from rapydli_flow.ops import Add, Matmul
from rapydli_flow.runtime import card_measure
from rapydli_flow.runtime.card_measure import CardMeasure, seconds_of
from rapydli_flow.runtime.devices import device_of
from rapydli_flow.spec import Spec
from rapydli_flow.template import Epilogue
from rapydli_flow.tuner import REFERENCE, Request

pytestmark = pytest.mark.filterwarnings("ignore:no GPU kernel serves")


@pytest.fixture
def card():
    return device_of("emulated")


@pytest.fixture
def results(tmp_path, monkeypatch):
    """A folder of its own for what is found."""
    monkeypatch.setenv("RAPYDLI_CACHE_DIR", str(tmp_path))
    settings.cache_clear()
    yield tmp_path
    settings.cache_clear()


def request_of(op, *ins):
    return Request(op, ins, Epilogue.none(op.out_specs(*ins)[0]), op.title, op)


def test_every_config_is_checked_and_timed(card):
    request = request_of(Add(), Spec((4, 8)), Spec((4, 8)))
    (template, *_) = request.templates(card)
    choices = [request.default(card).of(template, config) for config in template.configs(*_asked(request), card)][:4]
    trials = CardMeasure(card, threads=1)(request, choices)
    assert [trial.choice for trial in trials] == choices
    assert all(trial.time_s > 0 for trial in trials)


def _asked(request):
    return request.op, request.ins, request.outs


def test_a_kernel_that_is_wrong_fails(card, monkeypatch):
    request = request_of(Matmul(), Spec((8, 8)), Spec((8, 8)))
    run = card_measure.CardMeasure._draw

    def draw(self, request):
        run(self, request)
        self._wanted = tuple(y + (np.arange(y.size) == 3).reshape(y.shape) for y in self._wanted)

    monkeypatch.setattr(card_measure.CardMeasure, "_draw", draw)
    (trial,) = CardMeasure(card, threads=1)(request, [request.default(card)])
    assert trial.time_s is None
    assert "1 of 64 elements are wrong, the first at (0, 3)" in trial.error


def test_inputs_that_a_cache_would_hold_are_rotated(card, monkeypatch):
    """Several sets of buffers, each with the same operands: what is measured last is right too."""
    request = request_of(Add(), Spec((4, 8)), Spec((4, 8)))
    measure = CardMeasure(card, threads=1)
    monkeypatch.setattr(measure, "device", card_measure.Device("cuda", "x", target=card.target, emulated=False))
    monkeypatch.setattr(card_measure, "CACHE_BYTES", 3000)
    measure._take(request, [request.default(card)])
    assert measure._sets == 8  # of three arrays of 128 bytes
    monkeypatch.setattr(measure, "device", card)
    launches, outs = measure._prepare(request, request.default(card))
    assert len(launches) == 8
    np.testing.assert_allclose(outs[0], measure._wanted[0])


def test_what_spills_is_left_out(card, monkeypatch):
    spilled = Cubin(b"", "sm_90a", "kernel", 1, 32, 0, 1, spill_bytes=96)
    monkeypatch.setattr(card_measure, "cubins", lambda request: (spilled,))
    request = request_of(Add(), Spec((4, 8)), Spec((4, 8)))
    measure = CardMeasure(card, threads=1)
    measure._take(request, [request.default(card)])
    monkeypatch.setattr(measure, "device", card_measure.Device("cuda", "x", target=card.target))
    with pytest.raises(TemplateError, match="pruned: 96 bytes of registers are spilled"):
        measure._prepare(request, request.default(card))


def test_a_process_whose_card_failed_ends(card, monkeypatch):
    """Where it is contained, so that another one goes on with the other configs."""
    ended = []
    monkeypatch.setattr(card_measure.os, "_exit", ended.append)
    measure = CardMeasure(card, threads=1)
    for contained in (False, True):
        measure.contained = contained
        measure._lost(DeviceFault("gone", sticky=True))
        measure._lost(DeviceFault("refused"))
    assert ended == [card_measure.LOST]


def test_what_no_kernel_serves_has_no_time(card, monkeypatch):
    monkeypatch.setattr(Request, "default", lambda self, device: REFERENCE)
    with pytest.raises(TemplateError, match="no kernel for emulated serves"):
        seconds_of(request_of(Matmul(), Spec((4, 4)), Spec((4, 4))), card)


def test_a_network_is_tuned_for_a_card_and_runs_with_what_was_found(results):
    graph = rf.trace(lambda x: nn.dense(x, 4), rf.Spec((8, 16)))
    step = rf.train_step(graph, loss=nn.cross_entropy, optimizer=optim.sgd(0.1))
    report = rf.autotune(step, budget_s=20, trials=2, device="emulated")
    (session,) = report.sessions
    assert session.device.emulated
    assert any(len(found.trials) > 1 for found in session.found)
    assert all(trial.error == "" for found in session.found for trial in found.trials)
    assert len(report.tuning) > 0
    run = rf.time(step, device="emulated", iterations=1)
    assert "(tuned)" in str(run)
    for device, known in (("emulated", True), ("cpu", False)):
        shown = CliRunner().invoke(main, ["tune", "show", "matmul", "--device", device]).output
        assert ("matmul" in shown and "-emulated" in shown) == known


def test_commands_take_a_device(results):
    done = CliRunner().invoke(main, ["warm", "lenet", "--batch", "2", "--device", "emulated"])
    assert done.exit_code == 0, done.output
    assert "0 kernels compiled" in done.output
    assert "is not 'cpu', 'cuda'" in CliRunner().invoke(main, ["time", "lenet", "--device", "gpu"]).output
