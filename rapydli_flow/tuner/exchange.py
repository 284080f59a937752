"""Tuning results in files for people and other machines: JSON lines, one a result, or another cache's SQLite file.

A line of version 1 has ``kind`` ('choice', 'trial' or 'pin') and the columns of that table (`rows`), a choice or
trial with those of its request. Reading checks every line before anything is used.
"""

from __future__ import annotations

import json
import math
import sqlite3
from collections.abc import Iterable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import SettingError
from .choice import Choice
from .rows import ENCODED, TABLES, Row, choice_of, shapes_of, ties_of, trial_of, untuned_of
from .store import check_version, is_ours

VERSION = 1
MAGIC = b"SQLite format 3\0"
NUMBERS = ("time_s", "low_s", "high_s", "rounds", "threads", "at")
MAY_BE_NONE = ("time_s", "low_s", "high_s")
Rows = list[tuple[str, Row]]


class Difference(NamedTuple):
    """A kernel for which two sets of results have other choices. None: nothing is known there."""

    key: str
    request: str
    here: Choice | None
    here_s: float | None
    there: Choice | None
    there_s: float | None


def write_lines(path: Path, rows: Rows) -> int:
    """Write results as JSON lines; their number."""
    requests = _requests(rows)
    lines = []
    for kind, row in rows:
        if kind != "request":
            told = requests.get((row["device"], row["key"]), {}) | row
            decoded = {k: json.loads(v) if k in ENCODED else v for k, v in told.items()}
            lines.append(json.dumps({"version": VERSION, "kind": kind, **decoded}, allow_nan=False))
    try:
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    except OSError as error:
        raise SettingError(f"{path} cannot be written ({error.strerror or error}). Give another path.") from error
    return len(lines)


def read_rows(path: Path) -> Rows:
    """The rows of a file of `write_lines`, or of another cache. Raises SettingError for what is neither."""
    try:
        with path.open("rb") as file:
            begin = file.read(len(MAGIC))
        if begin == MAGIC:
            return _of_database(path)
        return _of_lines(path, path.read_text(encoding="utf-8").splitlines())
    except (OSError, UnicodeDecodeError, sqlite3.Error) as error:
        raise SettingError(
            f"{path} cannot be read ({error}). Give a file of `rapydli tune export`, or a tuning.sqlite."
        ) from error


def differences(here: Rows, there: Rows) -> list[Difference]:
    """The kernels for which the newest choices, or pins, are others."""
    mine, yours = _effective(here), _effective(there)
    out = []
    for at in sorted(mine.keys() | yours.keys()):
        told, a, a_s = mine.get(at, ("", None, None))
        also, b, b_s = yours.get(at, ("", None, None))
        if a != b:
            out.append(Difference(at[1], told or also or at[1], a, a_s, b, b_s))
    return out


def _effective(rows: Rows) -> dict[tuple[str, str], tuple[str, Choice | None, float | None]]:
    requests = _requests(rows)
    out: dict[tuple[str, str], tuple[str, Choice | None, float | None]] = {}
    for wanted in ("choice", "pin"):  # pins last: they count more
        for row in sorted((row for kind, row in rows if kind == wanted), key=lambda row: row["at"]):
            at = row["device"], row["key"]
            out[at] = (requests.get(at, {}).get("request", ""), choice_of(row), row.get("time_s"))
    return out


def _requests(rows: Rows) -> dict[tuple[str, str], Row]:
    return {(row["device"], row["key"]): row for kind, row in rows if kind == "request"}


def _of_database(path: Path) -> Rows:
    with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as db:
        check_version(db)
        if not is_ours(db):
            raise SettingError(f"{path} is a database of something else, not a tuning.sqlite.")
        out = []
        for table, columns in TABLES.items():
            for values in db.execute(f"SELECT {', '.join(columns)} FROM {table}"):
                out.append((table, dict(zip(columns, values, strict=True))))
        return out


def _of_lines(path: Path, lines: Iterable[str]) -> Rows:
    out: Rows = []
    for n, line in enumerate(lines, 1):
        if line.strip():
            try:
                out += _of_line(json.loads(line))
            except (ValueError, TypeError, KeyError) as error:
                raise SettingError(
                    f"{path}, line {n}: {error}. Give a file of `rapydli tune export`; nothing was read from this one."
                ) from error
    return out


def _of_line(told: Any) -> Rows:
    """The rows of a line: what was measured, and what for."""
    if not isinstance(told, dict) or not isinstance(told.get("version"), int):
        raise ValueError("this is no tuning result")
    if told["version"] > VERSION:
        raise ValueError(f"it has version {told['version']}, this package reads up to version {VERSION}")
    kind = told.get("kind")
    if kind not in TABLES or kind == "request":
        raise ValueError(f"kind {kind!r} is not choice, trial or pin")
    rows = [(kind, _row(kind, told))]
    if "family" in told or kind != "pin":
        rows.insert(0, ("request", _row("request", told)))
    _check(kind, rows[-1][1], rows[0][1])
    return rows


def _row(table: str, told: Mapping[str, Any]) -> Row:
    row = {}
    for column in TABLES[table]:
        if column not in told:
            raise ValueError(f"a {table} without {column!r}")
        value = told[column]
        if column == "config" and not isinstance(value, dict):
            raise ValueError(f"config is {value!r}, no parameters by name")
        if column in ENCODED:
            value = json.dumps(value, sort_keys=True)
        elif column in NUMBERS:
            missing = value is None and column in MAY_BE_NONE
            if not missing and (isinstance(value, bool) or not isinstance(value, (int, float))):
                raise ValueError(f"{column} is {value!r}, no number")
        elif not isinstance(value, str):
            raise ValueError(f"{column} is {value!r}, no text")
        row[column] = value
    return row


def _check(kind: str, row: Row, request: Row) -> None:
    """Raise ValueError for what cannot be understood later, and for a choice whose time is none."""
    choice_of(row)
    if not math.isfinite(row["at"]):
        raise ValueError(f"at is {row['at']}, no time of day")
    if kind != "pin":
        shapes_of(request["inputs"])
        trial = trial_of(row)
        if kind == "trial" and trial.error != row["error"]:
            row |= {"time_s": None, "low_s": None, "high_s": None, "error": trial.error, "stage": trial.stage}
        elif kind == "choice":
            untuned_of(row["untuned"])
            ties_of(row["ties"])
            if trial.time_s is None:
                raise ValueError(trial.error or "a choice without a time")
