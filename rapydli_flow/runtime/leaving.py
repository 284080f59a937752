"""When a run must leave before it is done: SIGTERM, as batch systems send it, or its time is up."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any


class Leaving:
    """Says why a run must leave, '' as long as it need not. While it is entered, SIGTERM is such a reason, and no end.

    ``walltime_s``: seconds from now until the time is up. Signals reach the main thread only; others have but the time.
    """

    def __init__(self, walltime_s: float | None = None) -> None:
        self.until = None if walltime_s is None else time.monotonic() + walltime_s
        self.asked = False
        self._before: Any = None

    def __call__(self) -> str:
        if self.asked:
            return "SIGTERM"
        return "its time is up" if self.until is not None and time.monotonic() >= self.until else ""

    def __enter__(self) -> Leaving:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._ask)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
