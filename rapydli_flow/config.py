"""Typed settings, read once from the environment.

RAPYDLI_CACHE_DIR   where compiled kernels and tuning results are kept
RAPYDLI_KNOWN_DIR   a folder of exported tuning results that count where nothing was tuned here (default: those that
                    ship with the package)
RAPYDLI_DEVICE      what runs use that name no device, and what a Dask worker is: cpu (default), cuda, cuda:1 (the
                    second GPU), emulated (a GPU that NumPy plays, for tests)
RAPYDLI_CUDA_WAIT   1: wait for each GPU kernel, so that an error names the kernel that failed; slow
RAPYDLI_THREADS     threads of a rank in this process (default: the cores this process may use)
RAPYDLI_COMPILERS   processes that compile kernels at once where several are missing when a run begins (default: the
                    cores this process may use); 1: this process alone, no others are started
RAPYDLI_PEER_PORTS  the ports on which ranks listen for those of other hosts, such as 40000:40063, where a firewall lets
                    only some through; every rank of a host takes one (default: any that are free)
RAPYDLI_LANES       force the number of float32 lanes of CPU kernels (4, 8 or 16)
RAPYDLI_VERIFY      1: verify every graph after every pass
RAPYDLI_TUNING      on: use what tuning found; off: defaults only; offline: use it, but do not tune;
                    strict: as offline, and a kernel for which nothing is known is an error
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from .errors import SettingError

SHIPPED = Path(__file__).parent / "tuner" / "known"
TUNINGS = ("on", "off", "offline", "strict")


@dataclass(frozen=True)
class Settings:
    """What the environment says."""

    cache_dir: Path
    threads: int
    lanes: int | None
    verify: bool
    tuning: str = "on"
    known_dir: Path = SHIPPED
    compilers: int = 1
    peer_ports: range = range(1)  # 0: the system chooses
    device: str = "cpu"
    cuda_wait: bool = False

    @classmethod
    def read(cls, environ: Mapping[str, str]) -> Settings:
        home = environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
        folder = environ.get("RAPYDLI_CACHE_DIR") or os.path.join(home, "rapydli_flow")
        lanes = _integer(environ, "RAPYDLI_LANES", 0)
        if lanes not in (0, 4, 8, 16):
            raise SettingError(f"RAPYDLI_LANES={lanes}: lanes are 4, 8 or 16 (float32 values in a vector).")
        threads = _integer(environ, "RAPYDLI_THREADS", len(os.sched_getaffinity(0)))
        if threads < 1:
            raise SettingError(f"RAPYDLI_THREADS={threads}: a rank has 1 thread or more.")
        compilers = _integer(environ, "RAPYDLI_COMPILERS", len(os.sched_getaffinity(0)))
        if compilers < 1:
            raise SettingError(f"RAPYDLI_COMPILERS={compilers}: 1 process or more compiles; 1 starts no others.")
        tuning = environ.get("RAPYDLI_TUNING") or "on"
        if tuning not in TUNINGS:
            raise SettingError(f"RAPYDLI_TUNING={tuning!r} is not one of {', '.join(TUNINGS)}.")
        verify = environ.get("RAPYDLI_VERIFY", "0") != "0"
        known = Path(environ.get("RAPYDLI_KNOWN_DIR") or SHIPPED)
        if not known.is_dir():
            raise SettingError(f"RAPYDLI_KNOWN_DIR={str(known)!r} is not a folder.")
        ports = _ports(environ.get("RAPYDLI_PEER_PORTS") or "0")
        device = checked_device(environ.get("RAPYDLI_DEVICE") or "cpu", "RAPYDLI_DEVICE=")
        wait = environ.get("RAPYDLI_CUDA_WAIT", "0") != "0"
        return cls(Path(folder), threads, lanes or None, verify, tuning, known, compilers, ports, device, wait)


def checked_device(name: str, where: str) -> str:
    """The name of a device, the first GPU as 'cuda:0'; SettingError for what is none."""
    found = re.fullmatch(r"cpu|emulated|cuda(:\d+)?", str(name))
    if found is None:
        raise SettingError(f"{where}{name!r} is not 'cpu', 'cuda', 'cuda:1' and so on, or 'emulated'.")
    return "cuda:0" if name == "cuda" else name


def _integer(environ: Mapping[str, str], name: str, default: int) -> int:
    text = environ.get(name, "")
    try:
        return int(text) if text else default
    except ValueError:
        raise SettingError(f"{name}={text!r} is not a whole number.") from None


def _ports(text: str) -> range:
    """A port, or the first and the last of several."""
    first, _, last = text.partition(":")
    if first.isdecimal() and (last or first).isdecimal() and int(first) <= int(last or first) < 1 << 16:
        return range(int(first), int(last or first) + 1)
    raise SettingError(f"RAPYDLI_PEER_PORTS={text!r} is not a port or a range of them such as 40000:40063.")


@cache
def settings() -> Settings:
    """The settings of this process."""
    return Settings.read(os.environ)
