"""What tuning found on this host, as far as RAPYDLI_TUNING lets it be used. Knows nothing of Dask."""

from __future__ import annotations

from dataclasses import replace

from ..config import settings
from ..errors import SettingError
from ..template import Device
from ..tuner import Tuning, TuningCache


def cache() -> TuningCache:
    """The tuning results of this user on this host."""
    return TuningCache(settings().cache_dir / "tuning.sqlite", settings().known_dir)


def known(device: Device) -> Tuning:
    """What is known for a device, as far as RAPYDLI_TUNING lets it be used."""
    how = settings().tuning
    if how == "off":
        return Tuning(device)
    return replace(cache().tuning(device), strict=how == "strict")


def check_allowed() -> None:
    """Raise SettingError where RAPYDLI_TUNING says that nothing is tuned."""
    how = settings().tuning
    if how != "on":
        raise SettingError(f"autotune: nothing is tuned with RAPYDLI_TUNING={how}. Set it to 'on', or leave it out.")
