"""The kinds of device that ranks of a plan are on, and a tuning for each of them. Knows nothing of Dask."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import SettingError
from ..scheduler import Plan
from ..scheduler.devices import kind_of
from ..template import Device
from ..tuner import Tuning
from .devices import device_of
from .remembered import tuning_of

Names = str | Sequence[str] | None


def names_of(where: str, device: str | None, plan: Plan | None) -> Names:
    """What a run is asked to be on: the device that is given, or those of its plan; SettingError where both differ."""
    devices = plan.devices if plan is not None else ()
    if device is not None and any(device not in (name, kind_of(name)) for name in devices):
        raise SettingError(
            f"{where}: device={device!r}, but ranks of the plan are on {', '.join(dict.fromkeys(devices))}. Leave "
            "device out, or make a plan for it: rf.plan(..., device=...)."
        )
    return devices or device


def devices_for(where: str, names: Names, workers: Mapping[str, Mapping[str, Any]]) -> tuple[Device, ...]:
    """One device of each kind: of the workers, or without workers of this process."""
    if workers:
        return tuple({worker["device"].key: worker["device"] for worker in workers.values()}.values())
    each = (names,) if isinstance(names, str) or names is None else dict.fromkeys(names)
    return tuple(device_of(name, where) for name in each)


def tunings_for(where: str, devices: Sequence[Device], tuning: Tuning | None) -> tuple[Tuning, ...]:
    """For each device the tuning that was given, if it is of its kind, else what is known for it; SettingError for one
    that is of none of them."""
    if tuning is not None and all(device.key != tuning.device.key for device in devices):
        tuning_of(where, devices[0], tuning)
    return tuple(
        tuning_of(where, device, tuning if tuning is not None and tuning.device.key == device.key else None)
        for device in devices
    )
