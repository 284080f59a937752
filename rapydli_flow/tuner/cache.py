"""Tuning results on disk: every trial, what was chosen, and what the user has pinned.

A result holds for one request (op, specs and tail), kind of processor, template code and compilers: see `source`. One
whose template changed is not used, and not deleted either: it holds again when the template is again what it was.
What ships with the package counts least, then what was tuned here, then pins.
"""

from __future__ import annotations

import sqlite3
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import TemplateError
from ..template import Device, Template, templates
from .choice import Choice, Request, Tuning
from .exchange import Difference, Rows, differences, read_rows, write_lines
from .rows import (
    TABLES,
    Row,
    choice_of,
    choice_row,
    put,
    request_row,
    shapes_of,
    ties_of,
    ties_text,
    trial_of,
    trial_row,
    untuned_of,
    untuned_text,
)
from .source import compilers, source_key
from .store import Store
from .trial import Trial


@dataclass(frozen=True)
class Known:
    """What is known for a kernel. ``state``: 'tuned', 'pinned' or 'shipped'; ``best`` of a pin may have no time.

    ``request``: what the kernel does, in words. ``default``: the trial of the config that is used untuned.
    ``ties``: choices that measured equally fast. ``at``: when, in seconds since 1970.
    """

    key: str
    family: str
    request: str
    state: str
    best: Trial
    default: Trial | None = None
    ties: tuple[Choice, ...] = ()
    at: float = 0.0

    @property
    def gain(self) -> float | None:
        """How much faster than the default."""
        if self.default is None or self.default.time_s is None or self.best.time_s is None:
            return None
        return self.default.time_s / self.best.time_s


class Winner(NamedTuple):
    """What was chosen for another request of a family: its inputs' shapes, its op, the choice, seconds of a call."""

    shapes: list[tuple[int, ...]]
    op: str
    choice: Choice
    time_s: float


class Merged(NamedTuple):
    """How many results of a file were new, newer than those here, or older."""

    new: int
    replaced: int
    kept: int


class TuningCache:
    """Results kept in ``path``, an SQLite file; safe for several processes and threads.

    A file that cannot be used is renamed, never deleted, with a RuntimeWarning. Writing raises SettingError where
    the folder cannot be written to; reading finds nothing there. ``shipped``: a folder of exported results.
    """

    def __init__(self, path: Path, shipped: Path | None = None) -> None:
        self.path, self.shipped = path, shipped
        self._store = Store(path)

    # what is known ---------------------------------------------------------------------------------------

    def tuning(self, device: Device) -> Tuning:
        """Everything that holds now for a device."""
        known = self.known(device)
        pinned = frozenset(k.key for k in known if k.state == "pinned")
        return Tuning(device, {k.key: k.best.choice for k in known}, pinned)

    def known(self, device: Device) -> list[Known]:
        """What holds now for a device, by key: one for each kernel."""
        found: dict[str, Known] = {}
        for state, rows in (("shipped", _shipped(self.shipped)), ("tuned", self._rows("choice", device))):
            for row in self._holding(rows, device, ""):
                told = (row["key"], row["family"], row["request"], state, trial_of(row))
                found[row["key"]] = Known(*told, untuned_of(row["untuned"]), ties_of(row["ties"]), row["at"])
        for row in self._rows("pin", device):
            key, choice, before = row["key"], choice_of(row), found.get(row["key"])
            measured = [t for t in self.top(device, key, None) if t.choice == choice] or [Trial(choice)]
            told = (key, _family(key), row["request"] or key, "pinned", measured[0])
            found[key] = Known(*told, before.default if before else None, (), row["at"])
        return sorted(found.values(), key=lambda known: known.key)

    def trials(self, device: Device, request: Request) -> list[Trial]:
        """The trials of a request that hold now, the fastest first, failures last."""
        return self._trials(device, request.key(device))

    def top(self, device: Device, key: str, n: int | None) -> list[Trial]:
        """The ``n`` fastest trials of a request key that hold now; None for all that did not fail."""
        return [trial for trial in self._trials(device, key) if trial.time_s is not None][:n]

    def winners(self, device: Device, family: str) -> list[Winner]:
        """What was chosen, and holds now, for all requests of a family."""
        found: dict[str, Winner] = {}
        for rows in (_shipped(self.shipped), self._rows("choice", device)):
            for row in self._holding(rows, device, family):
                time_s = trial_of(row).time_s
                if time_s is not None:
                    found[row["key"]] = Winner(shapes_of(row["inputs"]), row["op"], choice_of(row), time_s)
        return [found[key] for key in sorted(found)]

    def requests(self, device: Device) -> dict[str, str]:
        """Every kernel that something was measured or pinned for: what it does, by key."""
        rows = self._store.read("SELECT key, request FROM request WHERE device = ?", device.key)
        return dict(rows) | {known.key: known.request for known in self.known(device)}

    # what is kept ----------------------------------------------------------------------------------------

    def record(self, device: Device, request: Request, trials: Sequence[Trial]) -> None:
        """Keep measurements; the newest of a config counts. What measured no time is kept as a failure."""
        at = _measured(request, device)
        rows = [at(t.choice) | trial_row(t.checked()) | {"at": time.time()} for t in trials]
        self._put([("request", request_row(request, device)), *(("trial", row) for row in rows)])

    def add(self, device: Device, request: Request, best: Trial, default: Trial, ties: Sequence[Choice] = ()) -> None:
        """Keep what was chosen for a request. Raises TemplateError for a ``best`` that failed."""
        best = best.checked()
        if best.time_s is None:
            raise TemplateError(f"{request}: {best.choice} {best.error or 'has no time'}. Choose what has a time.")
        row = _measured(request, device)(best.choice) | trial_row(best)
        row |= {"untuned": untuned_text(default.checked()), "ties": ties_text(ties), "at": time.time()}
        self._put([("request", request_row(request, device)), ("choice", row)])

    def pin(self, device: Device, key: str, choice: Choice) -> None:
        """Use a choice for a request key whatever is measured, until `unpin`.

        Raises TemplateError for a template that does not exist, and for parameters that are not its own.
        """
        family = _family(key)
        found = {t.name: t for t in templates(family, device.kind)}
        if choice.template not in found:
            raise TemplateError(
                f"{family} has no template {choice.template!r} for {device.kind} devices; it has {', '.join(found)}."
            )
        wanted, given = set(found[choice.template].space), {name for name, _ in choice.config}
        if wanted != given:
            raise TemplateError(
                f"template {family}/{choice.template} has parameters {sorted(wanted)} but the config names "
                f"{sorted(given)}. Give every parameter once."
            )
        self._put([("pin", {"device": device.key, "key": key, **choice_row(choice), "at": time.time()})])

    def unpin(self, device: Device, key: str) -> bool:
        """Use what was tuned again. Was it pinned?"""
        sql = "DELETE FROM pin WHERE device = ? AND key = ?"
        return self._store.write(lambda db: db.execute(sql, (device.key, key)).rowcount > 0)

    def forget(self, device: Device | str | None = None, family: str | None = None) -> int:
        """Delete trials and choices, of one device or family only where it is given; how many. Pins stay."""
        where, values = _where(_name(device), family)

        def delete(db: sqlite3.Connection) -> int:
            count = sum(db.execute(f"DELETE FROM {t}{where}", values).rowcount for t in ("trial", "choice"))
            left = " UNION ".join(f"SELECT device, key FROM {table}" for table in ("trial", "choice", "pin"))
            db.execute(f"DELETE FROM request WHERE (device, key) NOT IN ({left})")
            return count

        return self._store.write(delete)

    # between machines ------------------------------------------------------------------------------------

    def export(self, path: Path, device: Device | str | None = None, *, trials: bool = False) -> int:
        """Write choices and pins, and trials where asked for, as JSON lines; their number."""
        return write_lines(path, self._all(_name(device), ("choice", "pin", *(["trial"] if trials else []))))

    def merge(self, path: Path) -> Merged:
        """Take in a file of `export`, or another tuning.sqlite; of two results for the same the newer counts."""
        rows = read_rows(path)

        def take(db: sqlite3.Connection) -> Counter[str]:
            done = [put(db, table, row, older=False) for table, row in rows if table != "request"]
            for table, row in rows:
                if table == "request":
                    put(db, table, row)
            return Counter(done)

        counts = self._store.write(take)
        return Merged(counts["new"], counts["replaced"], counts["kept"])

    def diff(self, path: Path) -> list[Difference]:
        """The kernels for which such a file has other choices than this one, whether they hold now or not."""
        return differences(self._all(None, ("choice", "pin")), read_rows(path))

    # rows ------------------------------------------------------------------------------------------------

    def _put(self, rows: Rows) -> None:
        self._store.write(lambda db: [put(db, table, row) for table, row in rows])

    def _all(self, device: str | None, tables: Sequence[str]) -> Rows:
        where, values = _where(device, None)
        out: Rows = []
        for table in ("request", *tables):
            rows = self._store.read(f"SELECT {', '.join(TABLES[table])} FROM {table}{where}", *values)
            out += [(table, dict(zip(TABLES[table], row, strict=True))) for row in rows]
        return out

    def _rows(self, table: str, device: Device, key: str = "") -> list[Row]:
        """The rows of a device with their requests, the oldest first."""
        columns = [*TABLES[table], "family", "request", "op", "inputs"]
        sql = f"SELECT {', '.join(columns)} FROM {table} LEFT JOIN request USING (device, key) WHERE device = ?"
        rows = self._store.read(
            f"{sql}{' AND key = ?' if key else ''} ORDER BY at", device.key, *([key] if key else [])
        )
        return [dict(zip(columns, row, strict=True)) for row in rows]

    def _trials(self, device: Device, key: str) -> list[Trial]:
        found = [trial_of(row) for row in self._holding(self._rows("trial", device, key), device, "")]
        return sorted(found, key=lambda trial: trial.seconds)

    def _holding(self, rows: Sequence[Row], device: Device, family: str) -> list[Row]:
        """Those of a device (and family) that were measured with its templates as they are now, and compilers."""
        sources: dict[tuple[str, str], str] = {}
        versions, out = compilers(device.kind), []
        for row in rows:
            if row["device"] != device.key or row["compilers"] != versions or (family and row["family"] != family):
                continue
            name = (_family(row["key"]), row["template"])
            if name not in sources:
                sources[name] = next((source_key(t) for t in templates(name[0], device.kind) if t.name == name[1]), "")
            if sources[name] == row["source"]:
                out.append(row)
        return out


def _measured(request: Request, device: Device) -> Any:
    """A function from choices to the first columns of their rows."""

    def at(choice: Choice) -> Row:
        template: Template = choice.find(request, device)
        key = {"device": device.key, "key": request.key(device), **choice_row(choice)}
        return key | {"source": source_key(template), "compilers": compilers(device.kind)}

    return at


@cache
def _shipped(folder: Path | None) -> tuple[Row, ...]:
    """The choices of a folder of exported results, each with its request, the oldest first."""
    rows: list[Row] = []
    for path in sorted(folder.glob("*.jsonl")) if folder else ():
        told = read_rows(path)
        requests = {(row["device"], row["key"]): row for kind, row in told if kind == "request"}
        rows += [requests[row["device"], row["key"]] | row for kind, row in told if kind == "choice"]
    return tuple(sorted(rows, key=lambda row: row["at"]))


def _family(key: str) -> str:
    return key.rpartition("-")[0]


def _name(device: Device | str | None) -> str | None:
    return device.key if isinstance(device, Device) else device


def _where(device: str | None, family: str | None) -> tuple[str, list[str]]:
    """The WHERE clause of a device and family, and its values."""
    parts: Mapping[str, str | None] = {
        "device = ?": device,
        "key IN (SELECT key FROM request WHERE family = ?)": family,
    }
    given = {sql: value for sql, value in parts.items() if value is not None}
    return (" WHERE " + " AND ".join(given) if given else ""), list(given.values())
