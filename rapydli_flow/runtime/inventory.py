"""What a process can run kernels on: its processor and its GPUs, their limits, and what they were measured to reach."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import psutil

from cpu_kernels.compile import host
from gpu_kernels.compile import missing
from gpu_kernels.driver import Driver

from ..config import settings
from ..errors import MissingDependency, RapydliError
from ..template import Device
from .devices import card_named, supported
from .peak import Peak, measured_peak, tensor_cores


@dataclass(frozen=True)
class Listed:
    """A device: the name that ``device=`` takes, what is known of it, and its peak, or why that is not known.

    ``tensor_cores``: of a GPU, operations a second by what operands are rounded to.
    """

    name: str
    device: Device
    facts: dict[str, Any]
    peak: Peak | None
    trouble: str = ""
    tensor_cores: Mapping[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Inventory:
    """All devices; ``without``: why there is no GPU."""

    devices: tuple[Listed, ...]
    without: str = ""

    def to_json(self) -> dict[str, Any]:
        return {"devices": [each.to_json() for each in self.devices], "without_gpu": self.without or None}


def inventory(*, measure: bool = True) -> Inventory:
    """Look at everything that is here; ``measure`` takes some seconds."""
    found = [_listed("cpu", host(), _cpu_facts(), measure)]
    try:
        driver = Driver()
        count, version = driver.count(), driver.version()
    except RapydliError as error:
        return Inventory(tuple(found), str(error))
    for number in range(count):
        name = f"cuda:{number}"
        card = card_named(name)
        device = card.describe()
        facts = {"driver_cuda": version, **card.facts(), "free_bytes": card.free_bytes()}
        trouble = _unusable(device)
        found.append(_listed(name, device, facts, measure and not trouble, trouble))
    return Inventory(tuple(found), "" if count else "the CUDA driver is there but sees no GPU.")


def _unusable(device: Device) -> str:
    """Why nothing can run on a card, or ''."""
    try:
        supported(device)
    except MissingDependency as error:
        return str(error)
    return missing() or ""


def _listed(name: str, device: Device, facts: dict[str, Any], measure: bool, trouble: str = "") -> Listed:
    peak, products = None, dict[str, float]()
    if measure:
        try:
            peak = measured_peak(device, settings().threads)
            products = tensor_cores(device) if device.kind != "cpu" else {}
        except RapydliError as error:
            trouble = f"not measured: {error}"
    return Listed(name, device, facts, peak, trouble, products)


def _cpu_facts() -> dict[str, Any]:
    clock: Callable[[], Any] = psutil.cpu_freq
    try:
        found = clock()
    except (OSError, NotImplementedError):  # a system that does not tell
        found = None
    facts: dict[str, Any] = {"threads": settings().threads, "free_bytes": int(psutil.virtual_memory().available)}
    return {**facts, "clock_khz": round(found.max * 1000)} if found is not None and found.max else facts
