"""Kernels of any device, compiled: where they are kept, and how they are made."""

from __future__ import annotations

from collections.abc import Sequence

from cpu_kernels.compile import kept
from gpu_kernels.compile import Request as CardRequest
from gpu_kernels.compile import cubins
from gpu_kernels.compile import kept as kept_cubins
from gpu_kernels.many import Alike, Many, alike

from ..template import Device
from ..tuner import Choice, Request
from .rank import asked_of, kernel_of

MANY = Choice("many")  # of no template: the kernel of all ops that are like this one


def build(request: Request, choice: Choice, device: Device) -> None:
    """Compile a kernel into the cache, unless it is there. An emulated card needs none."""
    if device.kind == "cpu":
        kernel_of(request, choice, device)
    elif not device.emulated:
        cubins(card_request(request, choice, device))


def built(pairs: Sequence[tuple[Request, Choice]], device: Device) -> list[bool]:
    """Which kernels need not be compiled any more."""
    if device.kind == "cpu":
        there: list[bool] = kept([asked_of(request, choice, device) for request, choice in pairs], device)
        return there
    return [device.emulated or kept_cubins(card_request(request, choice, device)) for request, choice in pairs]


def card_request(request: Request, choice: Choice, device: Device) -> CardRequest:
    """A kernel as the compiler of cards is asked for it."""
    if choice == MANY:
        return many_of([request]).request(device.target)
    template = choice.find(request, device)
    given = (request.op, request.ins, request.outs, request.epilogue, dict(choice.config))
    return CardRequest(template, *given, device.target)


def alike_of(request: Request) -> Alike | None:
    """What a pointwise kernel has in common with those that may become one kernel with it."""
    return alike(request.op, request.ins, request.outs, request.epilogue)


def many_of(requests: Sequence[Request]) -> Many:
    """The kernel of requests that are alike."""
    key = alike_of(requests[0])
    assert key is not None
    return Many(key, tuple(request.outs[0].size for request in requests))
