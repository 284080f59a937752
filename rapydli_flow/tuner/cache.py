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
                known[line["key"]] = Choice(line["template"], tuple((k, v) for k, v in line["config"]))
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
            text = self.path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return []
        try:
            lines = [json.loads(line) for line in text.splitlines() if line.strip()]
            if all(isinstance(line, dict) and line.get("version", 0) <= VERSION for line in lines):
                return lines
        except json.JSONDecodeError:
            pass
        os.replace(self.path, self.path.with_suffix(".unreadable"))
        return []


def source_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
