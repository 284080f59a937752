"""What NCCL is asked for, and what its answers mean: played by Python."""

import threading
from types import SimpleNamespace

import ml_dtypes  # noqa: F401 - makes bfloat16 a dtype
import pytest

from gpu_kernels import nccl as nccl_module
from gpu_kernels.nccl import Nccl
from rapydli_flow.errors import DeviceFault, RunLost


class Refused(RuntimeError):
    def __init__(self, text, status):
        super().__init__(text)
        self.status = status


def fake(log, *, refuse="", late=(), status=5):
    """CuPy's module, as far as it is used."""

    def say(name):
        def ask(*args):
            log.append((name, *args))
            if name == refuse:
                raise Refused(f"NCCL_ERROR_INVALID_USAGE: {name}", status)

        return ask

    class NcclCommunicator:
        def __init__(self, ranks, meeting, rank):
            for each in late:
                each.wait(5)
            say("init")(ranks, meeting, rank)

        def __getattr__(self, name):
            return say(name)

    ask = {name: say(name) for name in ("groupStart", "groupEnd")}
    return SimpleNamespace(
        available=True, NcclError=Refused, NcclCommunicator=NcclCommunicator, get_unique_id=lambda: b"7" * 128, **ask
    )


def joined(monkeypatch, log, alive=lambda waited_s: None, **how):
    monkeypatch.setattr(nccl_module, "library", lambda: fake(log, **how))
    card = SimpleNamespace(use=lambda: log.append(("use",)), stream=9)
    return card, Nccl(card, nccl_module.new_meeting(), 1, 2, alive)


def test_what_nccl_is_asked_for(monkeypatch):
    log = []
    card, way = joined(monkeypatch, log)
    way.all_reduce(card, [(16, 32, 5), (64, 64, 7)], "bfloat16")
    way.swap(card, [(0, 128, 10)], [(0, 256, 20)])
    way.check()
    way.abort()
    way.abort()
    assert log == [
        ("use",),
        ("init", 2, b"7" * 128, 1),
        ("groupStart",),
        ("allReduce", 16, 32, 5, 9, 0, 9),
        ("allReduce", 64, 64, 7, 9, 0, 9),
        ("groupEnd",),
        ("groupStart",),
        ("send", 128, 10, 1, 0, 9),
        ("recv", 256, 20, 1, 0, 9),
        ("groupEnd",),
        ("check_async_error",),
        ("abort",),
    ]
    with pytest.raises(RunLost, match="given up"):
        way.check()


def test_what_nccl_refuses(monkeypatch):
    with pytest.raises(DeviceFault, match=r"NCCL refused \(NCCL_ERROR_INVALID_USAGE: init\)\. Each rank needs a GPU"):
        joined(monkeypatch, [], refuse="init")
    log = []
    card, way = joined(monkeypatch, log, refuse="send")
    with pytest.raises(DeviceFault, match="NCCL refused"):
        way.swap(card, [(0, 128, 10)], [])
    assert log[-1] == ("groupEnd",)
    _, way = joined(monkeypatch, [], refuse="check_async_error")
    with pytest.raises(RunLost, match="another card is gone"):
        way.check()


@pytest.mark.parametrize("name", ["init", "allReduce"])
def test_what_nccl_says_of_others_is_a_lost_rank(name, monkeypatch):
    """Not a fault of this one: a run would not go on after that."""

    def ask():
        card, way = joined(monkeypatch, [], refuse=name, status=6)
        way.all_reduce(card, [(16, 32, 5)], "float32")

    with pytest.raises(RunLost, match="another card is gone"):
        ask()


def test_what_nccl_refuses_of_one_that_was_aborted(monkeypatch):
    card, way = joined(monkeypatch, [], refuse="send", status=4)
    way.abort()
    with pytest.raises(RunLost, match="given up"):
        way.swap(card, [(0, 128, 10)], [])


def test_a_card_that_never_comes_is_not_waited_for(monkeypatch):
    came = threading.Event()

    def alive(waited_s):
        if waited_s > 0.1:
            raise RunLost("nobody is there")

    with pytest.raises(RunLost, match="nobody is there"):
        joined(monkeypatch, [], alive, late=[came])
    came.set()
