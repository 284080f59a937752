"""Devices by name: this machine's processor, its cards, and a card that NumPy plays.

    cpu              the processor
    cuda, cuda:1     the first GPU, the second one
    emulated         a card without one: slow, for tests

A process without a name for it runs on what RAPYDLI_DEVICE says; so does a Dask worker.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from functools import cache
from typing import Any

import psutil

from cpu_kernels.compile import host
from gpu_kernels import emulated
from gpu_kernels.card import Accelerator
from gpu_kernels.compile import capability_of
from gpu_kernels.launch import Card

from ..config import checked_device, settings
from ..errors import MissingDependency
from ..template import Device
from ..tuner import ANY_CPU

LEAST = (8, 0)  # the oldest capability that kernels are written for
_told: set[str] = set()  # ops of this process that were said to run on the host


def device_of(name: str | None = None, where: str = "") -> Device:
    """The device with a name, or that of this process; ``where``: the function that was given the name.

    MissingDependency where it is not there, SettingError for what is no name of one.
    """
    if name is None:
        return _named(settings().device)
    return _named(checked_device(name, f"{where}: device=" if where else "device="))


@cache
def _named(name: str) -> Device:
    if name == "emulated":
        return emulated.device()
    device: Device = host() if name == "cpu" else supported(card_named(name).describe())
    return device


def supported(device: Device) -> Device:
    """The device itself; MissingDependency for a card that is too old."""
    capability = capability_of(device.target)[:2]
    if capability < LEAST:
        raise MissingDependency(
            f"{device.name} has compute capability {capability[0]}.{capability[1]}; GPU kernels are written for "
            f"{LEAST[0]}.{LEAST[1]} (Ampere) and newer. Use device='cpu'."
        )
    return device


@cache
def card_named(name: str) -> Card:
    """One for the process, to ask for what is known of a card."""
    return Card(int(name.partition(":")[2] or 0))


def here(like: Device) -> Device:
    """The device of this process, where it runs the same kernels; else that device itself."""
    if like.kind == "cpu":
        return host() if like == ANY_CPU else like
    own = device_of()
    return own if own.key == like.key else like


def card_of(device: Device) -> Accelerator:
    """A queue of its own on a card."""
    return emulated.Emulated() if device.emulated else Card(device.number)


def tell_hosted(titles: Iterable[str]) -> None:
    """Say of ops for a card that they run on the host; each is said once in a process."""
    if new := [title for title in dict.fromkeys(titles) if title not in _told]:
        _told.update(new)
        warnings.warn(
            f"no GPU kernel serves {', '.join(new)}: these ops run on the host, which is correct but slow.",
            RuntimeWarning,
            stacklevel=3,
        )


def free_bytes(device: Device) -> tuple[int, str]:
    """Memory that is free for arenas, and where."""
    if device.kind == "cpu":
        return int(psutil.virtual_memory().available), "in this process"
    if device.emulated:
        return emulated.Emulated().free_bytes(), "for the emulated card"
    card = card_named(f"cuda:{device.number}")
    return card.free_bytes(), f"on {card.name} ({device.name})"


def named(device: Device) -> dict[str, Any]:
    """What a worker says of its memory, where its device has its own."""
    if device.kind == "cpu":
        return {}
    free, _ = free_bytes(device)
    return {"memory_bytes": free, "used_bytes": 0}
