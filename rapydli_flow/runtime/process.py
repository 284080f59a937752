"""Which process a run belongs to, in words that another process can check later."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import psutil

from ..version import __version__

SAME_S = 2.0  # when a process was born is counted from the boot, which may move a little when clocks are set


def this_process() -> dict[str, Any]:
    """This moment (``began``, ISO 8601 in UTC), host, process id and when the process was born, and the version."""
    return {
        "began": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "born_s": psutil.Process().create_time(),
        "version": __version__,
    }


def is_alive(known: Mapping[str, Any]) -> bool | None:
    """Does the process that wrote these words still run? None: it is on another host, or they do not say."""
    if known.get("host") != socket.gethostname() or not known.get("pid"):
        return None
    try:
        process = psutil.Process(known["pid"])
        same = abs(process.create_time() - known.get("born_s", 0.0)) < SAME_S
        return bool(same and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
