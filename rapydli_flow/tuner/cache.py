"""Tuning results on disk: JSON lines, one a result, appended under a lock; the newest line of a key counts.

A line carries the hash of its template's source: a template that changed loses its own results and
no others. A file that cannot be read is kept aside, never deleted.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..errors import SettingError
from ..template import Device, templates
from .choice import Choice, Request, Tuning

VERSION = 1
FIELDS = {"version", "device", "family", "key", "template", "source", "config"}


class TuningCache:
    """Results kept in ``path``; safe for several processes."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def tuning(self, device: Device) -> Tuning:
        """Everything known for a device whose template is still the same."""
        known: dict[str, Choice] = {}
        sources: dict[tuple[str, str], str] = {}
        for line in self._lines():
            if line["device"] != device.key:
                continue
            name = (line["family"], line["template"])
            if name not in sources:
                found = [t for t in templates(line["family"], device.kind) if t.name == line["template"]]
                sources[name] = source_hash(found[0].source()) if found else ""
            if sources[name] == line["source"]:
                known[line["key"]] = Choice(line["template"], tuple((k, _value(v)) for k, v in line["config"]))
        return Tuning(device, known)

    def add(self, device: Device, results: Iterable[tuple[Request, Choice, float]]) -> None:
        """Append results: request, choice, time in seconds."""
        text = "".join(
            json.dumps(
                {
                    "version": VERSION,
                    "device": device.key,
                    "family": request.op.family,
                    "key": request.key(device),
                    "request": str(request),
                    "template": choice.template,
                    "source": source_hash(choice.find(request, device).source()),
                    "config": [list(pair) for pair in choice.config],
                    "time_s": time_s,
                }
            )
            + "\n"
            for request, choice, time_s in results
        )
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                file.write(text)
        except OSError as error:
            raise SettingError(
                f"tuning results cannot be written to {self.path} ({error}). Set RAPYDLI_CACHE_DIR to another folder."
            ) from error

    def _lines(self) -> list[dict[str, Any]]:
        try:
            with self.path.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_SH)  # another process may be in the middle of a line
                data = file.read()
        except (FileNotFoundError, NotADirectoryError):
            return []
        try:
            lines = [json.loads(line) for line in data.decode().splitlines() if line.strip()]
            if all(_readable(line) for line in lines):
                return lines
        except ValueError:  # not JSON, or not text
            pass
        self._keep_aside()
        return []

    def _keep_aside(self) -> None:
        aside, n = self.path.with_suffix(".unreadable"), 1
        while aside.exists():
            aside, n = self.path.with_suffix(f".unreadable-{n + 1}"), n + 1
        os.replace(self.path, aside)


def _readable(line: Any) -> bool:
    return isinstance(line, dict) and set(line) >= FIELDS and line["version"] in range(VERSION + 1)


def _value(value: Any) -> Any:
    """A value of a config as it was before JSON made lists of tuples."""
    return tuple(map(_value, value)) if isinstance(value, list) else value


def source_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
