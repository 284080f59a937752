"""What tuning found on this host, as far as RAPYDLI_TUNING lets it be used. Knows nothing of Dask."""

from __future__ import annotations

from dataclasses import replace

from ..config import settings
from ..errors import SettingError
from ..template import Device
from ..tuner import Tuning, TuningCache
from .devices import device_of


def cache() -> TuningCache:
    """The tuning results of this user on this host."""
    return TuningCache(settings().cache_dir / "tuning.sqlite", settings().known_dir)


def known(device: Device) -> Tuning:
    """What is known for a device, as far as RAPYDLI_TUNING lets it be used."""
    how = settings().tuning
    if how == "off":
        return Tuning(device)
    return replace(cache().tuning(device), strict=how == "strict")


def tuning_of(where: str, device: Device, tuning: Tuning | None) -> Tuning:
    """The tuning that was given, which must be of this device; else what is known for it."""
    if tuning is None:
        return known(device)
    if tuning.device.key != device.key:
        raise SettingError(
            f"{where}: the tuning is of {tuning.device.name} ({tuning.device.key}) but the run is on {device.name} "
            f"({device.key}). Give one of that device, or none."
        )
    return replace(tuning, device=device)


def tuning_on(where: str, device: str | None, tuning: Tuning | None) -> Tuning:
    """The same for the name of a device; without one the device is the tuning's, or that of this process."""
    return tuning if tuning is not None and device is None else tuning_of(where, device_of(device, where), tuning)


def check_allowed() -> None:
    """Raise SettingError where RAPYDLI_TUNING says that nothing is tuned."""
    how = settings().tuning
    if how != "on":
        raise SettingError(f"autotune: nothing is tuned with RAPYDLI_TUNING={how}. Set it to 'on', or leave it out.")
