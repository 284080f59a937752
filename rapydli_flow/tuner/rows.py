"""The tables of tuning results, and how choices, configs and trials are written in their rows.

    request   what a kernel is for: its op and inputs            one for each device and key
    trial     every measurement                                  one for each config, source and compilers
    choice    what was chosen, with the trial of the default     one for each config, source and compilers
    pin       what the user wants, whatever is measured          one for each device and key

A row is a dict by column. The first columns are a row's key; ``at`` is when it was made, in seconds since 1970.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from ..spec import Spec
from ..template import Device
from .choice import Choice, Request
from .trial import Trial

Row = dict[str, Any]
Outcome = Literal["new", "replaced", "kept"]

MEASURED = ("device", "key", "template", "config", "source", "compilers")
TIMES = ("time_s", "low_s", "high_s", "rounds", "threads")
TABLES: dict[str, tuple[str, ...]] = {
    "request": ("device", "key", "family", "request", "op", "inputs"),
    "trial": (*MEASURED, *TIMES, "error", "stage", "at"),
    "choice": (*MEASURED, *TIMES, "untuned", "ties", "at"),
    "pin": ("device", "key", "template", "config", "at"),
}
KEYS = {"request": 2, "trial": len(MEASURED), "choice": len(MEASURED), "pin": 2}
ENCODED = ("config", "inputs", "untuned", "ties")  # columns that hold JSON


def schema() -> list[str]:
    """The statements that make the tables."""
    return [
        f"CREATE TABLE {table} ({', '.join(columns)}, PRIMARY KEY ({', '.join(columns[: KEYS[table]])})) WITHOUT ROWID"
        for table, columns in TABLES.items()
    ]


def put(db: sqlite3.Connection, table: str, row: Mapping[str, Any], *, older: bool = True) -> Outcome:
    """Insert a row, or replace the one with its key; without ``older`` only one that was made before it."""
    columns = TABLES[table]
    match = " AND ".join(f"{column} = ?" for column in columns[: KEYS[table]])
    at = "at" if "at" in columns else "0"
    found = db.execute(f"SELECT {at} FROM {table} WHERE {match}", [row[c] for c in columns[: KEYS[table]]]).fetchone()
    if found is not None and not older and found[0] >= row.get("at", 0):
        return "kept"
    marks = ", ".join("?" * len(columns))
    db.execute(f"INSERT OR REPLACE INTO {table} VALUES ({marks})", [row[column] for column in columns])
    return "new" if found is None else "replaced"


def request_row(request: Request, device: Device) -> Row:
    inputs = [[spec.dtype, list(spec.shape)] for spec in request.ins]
    return {
        "device": device.key,
        "key": request.key(device),
        "family": request.op.family,
        "request": str(request),
        "op": str(request.op),
        "inputs": json.dumps(inputs),
    }


def shapes_of(inputs: str) -> list[tuple[int, ...]]:
    """The shapes of a request's inputs."""
    return [Spec(tuple(shape), dtype).shape for dtype, shape in json.loads(inputs)]


def choice_row(choice: Choice) -> Row:
    return {"template": choice.template, "config": config_text(choice.config)}


def choice_of(row: Mapping[str, Any]) -> Choice:
    config = json.loads(row["config"])
    return Choice(row["template"], tuple((name, _value(config[name])) for name in sorted(config)))


def config_text(config: Sequence[tuple[str, Any]]) -> str:
    """Equal configs have equal texts."""
    return json.dumps(dict(config), sort_keys=True)


def _value(value: Any) -> Any:
    """A value of a config as it was before JSON made lists of tuples."""
    return tuple(map(_value, value)) if isinstance(value, list) else value


def trial_row(trial: Trial) -> Row:
    return {
        **choice_row(trial.choice),
        **{column: getattr(trial, column) for column in TIMES},
        "error": trial.error,
        "stage": trial.stage,
    }


def trial_of(row: Mapping[str, Any]) -> Trial:
    times = {column: row[column] for column in TIMES}
    return Trial(choice_of(row), **times, error=row.get("error", ""), stage=row.get("stage", "")).checked()


def untuned_text(default: Trial) -> str:
    """The trial of a default, as a choice keeps it."""
    return json.dumps(
        {"template": default.choice.template, "config": dict(default.choice.config)}
        | {"time_s": default.time_s, "error": default.error}
    )


def untuned_of(text: str) -> Trial:
    told = json.loads(text)
    choice = choice_of({"template": told["template"], "config": json.dumps(told["config"])})
    return Trial(choice, told["time_s"], error=told["error"]).checked()


def ties_text(ties: Sequence[Choice]) -> str:
    return json.dumps([[choice.template, dict(choice.config)] for choice in ties])


def ties_of(text: str) -> tuple[Choice, ...]:
    return tuple(choice_of({"template": name, "config": json.dumps(config)}) for name, config in json.loads(text))
