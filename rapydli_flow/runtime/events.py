"""What happens in a run, as small values; callbacks that watch it, and the actions they may ask for."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any, TextIO

from ..errors import SettingError
from .process import this_process
from .timeline import Span

SNAPSHOTS = "snapshots"  # the folder of those that a run goes on from
RATE_FACTOR = "rate_factor"
PLACE = ("kind", "step", "epoch")  # of a line of the log; all else in it is numbers


@dataclass(frozen=True)
class Started:
    """A run begins at ``step`` of ``steps``; a resumed one not at 0.

    ``metrics``: what is validated, if anything. ``clocks``: the run-time values that actions may change.
    ``settings``: what else makes the run what it is.
    """

    step: int
    steps: int
    steps_per_epoch: int
    batch: int
    ranks: int
    threads: int
    granularity: str
    explanation: str = ""
    seed: int = 0
    metrics: tuple[str, ...] = ()
    clocks: Mapping[str, float] = field(default_factory=dict)
    run_dir: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Stepped:
    """Steps ``first`` to ``first + steps - 1`` are done: their scalars, and where the time went.

    Of the last one, ``ops``: seconds by op, the mean over ranks; ``ranks``: seconds of every rank by kind, as in
    `KINDS`; ``timeline``: what every rank did from when to when.
    """

    first: int
    steps: int
    scalars: Mapping[str, tuple[float, ...]]
    time_s: float
    feed_s: float
    ops: Mapping[str, float] = field(default_factory=dict)
    ranks: tuple[tuple[float, ...], ...] = ()
    timeline: tuple[tuple[Span, ...], ...] = ()


@dataclass(frozen=True)
class Validated:
    """Metrics over the validation set after ``step`` steps."""

    step: int
    epoch: int
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class Saved:
    """A snapshot of the state after ``step`` steps is being written, into the folder ``name`` of run_dir."""

    step: int
    name: str = SNAPSHOTS


@dataclass(frozen=True)
class Recovered:
    """Workers were lost, or came: the run goes on from ``step`` with so many ranks, ``seconds`` later.

    ``explanation``: where they are placed now; ``sent_bytes``: what each rank sends to each in a step.
    """

    step: int
    ranks: int
    seconds: float
    reason: str
    addresses: tuple[str, ...] = ()
    arena_bytes: tuple[int, ...] = ()
    explanation: str = ""
    sent_bytes: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True)
class Ended:
    """The run is over: 'done', 'stopped: <why a callback stopped it>', 'interrupted', or the error that ended it."""

    step: int
    time_s: float
    outcome: str = "done"


Event = Started | Stepped | Validated | Saved | Recovered | Ended


@dataclass(frozen=True)
class Stop:
    """Action: train no further. The run ends in good order, with a last validation and snapshot."""

    reason: str = "a callback asked for it"


@dataclass(frozen=True)
class Save:
    """Action: a snapshot of this moment into ``run_dir/<name>``; once complete it takes the place of the one there.

    ``rf.load_model(run_dir / name)`` reads it.
    """

    name: str

    def __post_init__(self) -> None:
        if not re.fullmatch(r"\w[\w.-]*", self.name) or self.name == SNAPSHOTS:
            raise SettingError(
                f"Save: {self.name!r} is not the name of a folder for one snapshot, such as 'best'; "
                f"{SNAPSHOTS!r} is that of the run's own."
            )


@dataclass(frozen=True)
class SetFactor:
    """Action: multiply the learning rate by ``value`` from now on (not by value times the factor before).

    For training steps whose rate is adjustable: they have a clock leaf 'rate_factor', 1.0 until it is set.
    """

    value: float

    def __post_init__(self) -> None:
        if not (isfinite(self.value) and self.value >= 0.0):
            raise SettingError(f"SetFactor: {self.value} is not a finite factor of 0 or more.")


Action = Stop | Save | SetFactor


class Callback:
    """Something that watches a run, or decides how it goes on.

    Override `on_event`. An exception in it stops the run cleanly: what was ordered is finished, the other
    callbacks are told, a last snapshot is written where the run writes snapshots, and the exception comes
    out of fit with a note of the callback that raised it.

    A callback that ``decides`` may return actions. The run then waits at each pause (a validation, a
    snapshot, the last step) until all callbacks have been told everything up to it, and carries out what
    they returned since the pause before: so an action on `Validated` acts on exactly the state that was
    validated, wherever the run happens, and an action on `Stepped` takes effect at the next pause. How
    steps are grouped into `Stepped` events depends on time; look at their scalars step by step. Of several
    factors, the last one returned counts. `Stop` at the last step changes nothing.

    When a run is resumed, callbacks that decide are told `Started`, then every `Validated` of the log up to
    the snapshot, as if they had been there; actions on those are not carried out again.
    """

    #: May `on_event` return actions?
    decides: bool = False

    def check(self, started: Started) -> None:
        """Raise SettingError if such a run cannot give what is needed. Called before anything is written."""

    def on_event(self, event: Event) -> Action | Sequence[Action] | None:
        """Called for every event, in order, in the process that called fit."""
        return None


def actions_of(callback: Callback, event: Event, started: Started) -> tuple[Action, ...]:
    """What a callback answers to an event; SettingError for what this run cannot carry out."""
    answer: Any = callback.on_event(event)
    if answer is None:
        return ()
    name = type(callback).__name__
    actions = tuple(answer) if isinstance(answer, list | tuple) else (answer,)
    for action in actions:
        if not isinstance(action, Action):
            raise SettingError(
                f"{name} answered {type(event).__name__} with {action!r}, which is not an action: Stop, Save, "
                "SetFactor, a list of them, or None."
            )
        if not callback.decides:
            raise SettingError(
                f"{name} answered with {action} but does not say that it decides, so the run did not wait for it. "
                "Write decides = True in its class."
            )
        if isinstance(event, Ended):
            raise SettingError(f"{name} answered Ended with {action}, but the run is over.")
        if isinstance(action, Save):
            needs_folder(name, started)
        if isinstance(action, SetFactor):
            needs_factor(name, started)
    return actions


def needs_folder(name: str, started: Started) -> None:
    """SettingError unless the run has a folder to save to."""
    if started.run_dir is None:
        raise SettingError(f"{name}: a snapshot needs a folder, and this run has none. Give fit a run_dir.")


def needs_factor(name: str, started: Started) -> None:
    """SettingError unless the run's learning rate has a factor."""
    if RATE_FACTOR not in started.clocks:
        raise SettingError(
            f"{name}: the learning rate of this training step has no factor (a clock leaf {RATE_FACTOR!r}). Make it "
            "adjustable: optim.sgd(optim.adjustable(0.1))."
        )


def needs_metric(name: str, metric: str, started: Started) -> None:
    """SettingError unless the run validates this metric."""
    if not started.metrics:
        raise SettingError(f"{name}: it acts on validation metrics, and nothing is validated. Give fit validation=...")
    if metric not in started.metrics:
        raise SettingError(f"{name}: {metric!r} is not validated; this run has {', '.join(started.metrics)}.")


SMALLER = ("loss", "error", "entropy", "perplexity", "distance", "divergence", "mse", "mae", "rmse", "nll", "wer")
LARGER = ("acc", "auc", "precision", "recall", "f1", "iou", "dice", "score", "r2", "psnr", "ssim", "correlation", "top")


def direction(metric: str) -> str | None:
    """'min' or 'max', whichever is better, by the words of a metric's name; None where they do not say."""
    for way, words in (("min", SMALLER), ("max", LARGER)):
        if any(word in metric.lower() for word in words):
            return way
    return None


class MetricsLog(Callback):
    """``metrics.jsonl``: one line a step and one for each other event, readable while the run goes on."""

    def __init__(self, folder: Path, *, first_step: int = 0) -> None:
        self.path = folder / "metrics.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        kept = [line for line in read_log(self.path) if line.get("step", 0) < first_step] if first_step else []
        partial = self.path.with_suffix(".partial")  # a kill here must not cost the lines of an earlier run
        partial.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        partial.replace(self.path)
        self._file: TextIO = self.path.open("a", encoding="utf-8")

    def on_event(self, event: Event) -> None:
        kind = type(event).__name__.lower()
        if isinstance(event, Stepped):
            for i in range(event.steps):
                values = {name: series[i] for name, series in event.scalars.items()}
                self._write({"kind": "step", "step": event.first + i, **values})
            times = {"time_s": event.time_s, "feed_s": event.feed_s, "ops": dict(event.ops)}
            self._write({"kind": "segment", "step": event.first, "steps": event.steps, **times})
        elif isinstance(event, Validated):
            self._write({"kind": kind, "step": event.step - 1, "epoch": event.epoch, **event.metrics})
        elif isinstance(event, Saved):
            self._write({"kind": kind, "step": event.step - 1, "name": event.name})
        elif isinstance(event, Started):
            self._write({"kind": kind, **asdict(event), **this_process()})
        else:
            self._write({"kind": kind, **asdict(event)})
        self._file.flush()

    def _write(self, line: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(line) + "\n")

    def close(self) -> None:
        self._file.close()


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a ``metrics.jsonl``; a last line that a killed process left half written is dropped."""
    out: list[dict[str, Any]] = []
    if not path.exists():
        return out
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            out.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return out


def session(lines: Sequence[Mapping[str, Any]]) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """The last 'started' line of a log, and the 'ended' line after it; empty where there is none."""
    starts = [i for i, line in enumerate(lines) if line.get("kind") == "started"]
    ends = [line for line in lines[starts[-1] if starts else 0 :] if line.get("kind") == "ended"]
    return (lines[starts[-1]] if starts else {}), (ends[-1] if ends else {})


def validations(lines: Iterable[Mapping[str, Any]]) -> list[Validated]:
    """The validations that are in a log."""
    return [
        Validated(line["step"] + 1, line["epoch"], {k: v for k, v in line.items() if k not in PLACE})
        for line in lines
        if line.get("kind") == "validated"
    ]
