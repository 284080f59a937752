"""SnapshotWriter: snapshots written behind the training's back, the newest few kept."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from ..errors import SettingError, SnapshotError
from ..spec import Array, Block
from .snapshot import array_spec, begin, commit, meta_text, prune, take_place, write_block

UNFINISHED = ".unfinished"


class SnapshotWriter:
    """Writes snapshots to a folder that is its own, one at a time, in one background thread.

    The newest ``keep`` complete snapshots stay; older ones, and what a killed process left half written, are
    removed after each write. The newest complete one is never removed. With ``only`` the last one written is
    kept, whatever its step.
    """

    def __init__(self, folder: str | os.PathLike[str], *, keep: int = 3, only: bool = False) -> None:
        if keep < 1:
            raise SettingError(f"SnapshotWriter: keep={keep} must be 1 or more.")
        self.folder, self.keep, self.only = Path(folder), keep, only
        self._thread: ThreadPoolExecutor | None = ThreadPoolExecutor(1, thread_name_prefix="rapydli-snapshot")
        self._writing: Future[None] | None = None

    def write(self, step: int, arrays: Mapping[str, Array], meta: Mapping[str, Any]) -> None:
        """Copy the arrays and return; they are written in the background.

        Waits for the write before, and raises what that one raised. Raises DTypeError or SnapshotError at
        once for arrays or ``meta`` (JSON) that cannot be stored.
        """
        for name, array in arrays.items():
            array_spec(name, array)
        meta_text(meta)
        self.wait()
        copies = {name: np.array(array, order="C") for name, array in arrays.items()}
        self.write_later(step, lambda: copies, meta)

    def write_later(self, step: int, arrays: Callable[[], Mapping[str, Array]], meta: Mapping[str, Any]) -> None:
        """As `write`, of arrays that are asked for in the background, and must stay as they are then."""
        if self._thread is None:
            raise SnapshotError(f"{self.folder}: this writer is closed. Make another one.")
        meta_text(meta)
        self.wait()
        self._writing = self._thread.submit(self._write, step, arrays, dict(meta))

    def wait(self) -> None:
        """Return when nothing is being written; raises what the last write raised (once)."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def close(self) -> None:
        """Finish the write in flight, raising its error, and stop the thread."""
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.shutdown(wait=True)
        self.wait()

    def __enter__(self) -> SnapshotWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _write(self, step: int, later: Callable[[], Mapping[str, Array]], meta: dict[str, Any]) -> None:
        arrays = later()
        specs = {name: array_spec(name, array) for name, array in arrays.items()}
        folder = self.folder / UNFINISHED if self.only else self.folder
        if self.only:
            shutil.rmtree(folder, ignore_errors=True)  # what a killed process left, complete or not
        begin(folder, step, specs)
        for name, array in arrays.items():
            write_block(folder, step, name, Block.all(array.shape), array)
        made = commit(folder, step, meta)
        if self.only:
            take_place(made, self.folder)
        else:
            prune(folder, self.keep)
