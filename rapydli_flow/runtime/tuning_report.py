"""What a tuning run says of itself: as text, as JSON, in a notebook, and as a page of HTML."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import reduce
from html import escape
from operator import add
from pathlib import Path
from typing import Any

from .. import markup
from ..errors import SettingError
from ..tuner import Found, Funnel, Request, Trial, Tuning, time_text
from .session import Session, gflops

HEAD = ("kernel", "calls", "default", "best", "gain", "GFLOP/s", "of peak", "trials", "config")
SHOWN = 8  # configs that failed, in the text of a report
CURVES = 6  # kernels whose best time so far is drawn
PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>Tuning</title>
<style>body{{font-family:system-ui,sans-serif;max-width:1200px;margin:2em auto;padding:0 1em;color:#22303c}}
h2{{font-size:16px;margin-top:1.6em}}table{{width:100%}}</style>{body}</html>
"""


@dataclass(frozen=True)
class TuningReport:
    """What was found on each kind of device. ``lost``: those that went away while tuning."""

    sessions: tuple[Session, ...]
    tuning: Tuning
    lost: tuple[str, ...] = ()

    @property
    def found(self) -> tuple[Found, ...]:
        """What was found for each kernel that was reached, the largest share of the step first."""
        return tuple(found for session in self.sessions for found in session.found)

    @property
    def requests(self) -> int:
        """Distinct kernels of the step, over all kinds of device."""
        return sum(len(session.jobs) for session in self.sessions)

    @property
    def failed(self) -> tuple[tuple[Request, Trial], ...]:
        """The configs that could not be compiled, gave wrong numbers or had no time, each with its reason."""
        return tuple((found.request, trial) for found in self.found for trial in found.trials if trial.error)

    @property
    def interrupted(self) -> bool:
        return any(session.interrupted for session in self.sessions)

    @property
    def gain(self) -> float | None:
        """How many times as fast a whole step is as with the defaults; None where that was not measured."""
        step = self.sessions[0].step
        return step.gain if step is not None else None

    @property
    def funnel(self) -> Funnel:
        """Of all kernels together."""
        return reduce(add, (found.funnel for found in self.found), Funnel.empty())

    # forms ------------------------------------------------------------------------------------------

    def __str__(self) -> str:
        parts = []
        for session in self.sessions:
            rows = [HEAD, *_rows(session)]
            widths = [max(len(row[i]) for row in rows) for i in range(len(HEAD))]
            for row in rows:
                cells = [
                    cell.rjust(w) if 0 < i < 8 else cell.ljust(w)
                    for i, (cell, w) in enumerate(zip(row, widths, strict=True))
                ]
                parts.append("  ".join(cells).rstrip())
            parts.append(_words(session))
        parts += [f"lost while tuning: {name}" for name in self.lost]
        if self.failed:
            parts.append(f"{len(self.failed)} config{'s' if len(self.failed) > 1 else ''} failed:")
            parts += [f"  {request}, {trial.choice}: {trial.error}" for request, trial in self.failed[:SHOWN]]
            parts += [f"  and {len(self.failed) - SHOWN} more"] if len(self.failed) > SHOWN else []
        return "\n".join(parts)

    def to_json(self) -> dict[str, Any]:
        return {
            "sessions": [
                {
                    "device": session.device.key,
                    "threads": session.peak.threads if session.peak else None,
                    "peak_gflops": session.peak.flops_s / 1e9 if session.peak else None,
                    "elapsed_s": session.elapsed_s,
                    "interrupted": session.interrupted,
                    "step": {"default_s": session.step.default_s, "tuned_s": session.step.tuned_s}
                    if session.step
                    else None,
                    "kernels": [_kernel(found, _calls(session, found)) for found in session.found],
                }
                for session in self.sessions
            ],
            "funnel": self.funnel.to_json(),
            "lost": list(self.lost),
        }

    def _repr_html_(self) -> str:
        return self._body()

    def save(self, path: str | Path) -> Path:
        """Write it: as JSON or as a page of HTML, by the name's ending."""
        path = Path(path)
        if path.suffix == ".json":
            text = json.dumps(self.to_json(), indent=1)
        elif path.suffix in (".html", ".htm"):
            text = PAGE.format(body=self._body())
        else:
            raise SettingError(f"{path} is neither .html nor .json; name the report by one of them.")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    def _body(self) -> str:
        out = []
        for session in self.sessions:
            out.append(markup.title("Tuning", _words(session)))
            rows = [[re.sub(" (?=[mµ]s$)", "\N{NO-BREAK SPACE}", cell) for cell in row] for row in _rows(session)]
            right = [(row[0], row[-1], *row[1:-1]) for row in rows]
            out.append(markup.table((HEAD[0], HEAD[-1], *HEAD[1:-1]), right, right=len(HEAD) - 2))
        why = [(str(request)[:60], str(trial.choice), trial.error) for request, trial in self.failed]
        out += [markup.table(("kernel", "failed with", "because"), why)] if why else []
        out += [markup.small(f"lost while tuning: {name}") for name in self.lost]
        if self.found:
            out.append(f"<h2>From the Cartesian space to timed kernels</h2>{self.funnel.svg()}")
            drawn = "".join(filter(None, map(_curve, sorted(self.found, key=lambda f: -len(f.history))[:CURVES])))
            if drawn:
                box = "display:flex;flex-wrap:wrap;gap:6px 18px"
                out.append(f'<h2>Best time so far, ms, over seconds</h2><div style="{box}">{drawn}</div>')
        return "".join(out)


def _rows(session: Session) -> list[tuple[str, ...]]:
    peak = session.peak.flops_s if session.peak else None
    rows: list[tuple[str, ...]] = []
    for found in session.found:
        speed = gflops(found.request, found.best.time_s)
        rows.append(
            (
                str(found.request)[:60],
                f"{_calls(session, found)}",
                time_text(found.default.time_s),
                time_text(found.best.time_s),
                f"{found.gain:.2f}x",
                f"{speed:,.1f}" if speed else "",
                f"{speed * 1e9 / peak:.0%}" if speed and peak else "",
                f"{len(found.trials)}",
                str(found.best.choice),
            )
        )
    return rows


def _calls(session: Session, found: Found) -> int:
    key = found.request.key(session.device)
    return next((job.calls for job in session.jobs if job.request.key(session.device) == key), 1)


def _words(session: Session) -> str:
    tried = sum(len(found.trials) for found in session.found)
    words = f"{len(session.found)} of {len(session.jobs)} kernels, {tried:,} configs, {session.elapsed_s:.0f} s"
    words += f" on {session.device.key}"
    if session.peak is not None:
        words += f"; peak {session.peak}"
    if session.step is not None:
        step = session.step
        words += f"; a step takes {step.tuned_s * 1e3:.3g} ms, {step.default_s * 1e3:.3g} ms untuned: {step.gain:.2f}x"
    return words + ("; interrupted" if session.interrupted else "")


def _kernel(found: Found, calls: int) -> dict[str, Any]:
    return {
        "kernel": str(found.request),
        "calls": calls,
        "default": _trial(found.default),
        "best": _trial(found.best),
        "gain": found.gain,
        "gflops": gflops(found.request, found.best.time_s),
        "ties": [str(choice) for choice in found.ties],
        "trials": [_trial(trial) for trial in found.trials],
        "history": [{"trials": n, "elapsed_s": s, "best_s": best} for n, s, best in found.history],
        "ended": found.ended,
        "elapsed_s": found.elapsed_s,
        "strategy": found.strategy,
        "funnel": found.funnel.to_json(),
    }


def _trial(trial: Trial) -> dict[str, Any]:
    times = {"time_s": trial.time_s, "low_s": trial.low_s, "high_s": trial.high_s, "rounds": trial.rounds}
    failed = {"error": trial.error, "stage": trial.stage} if trial.error else {}
    return {"template": trial.choice.template, "config": dict(trial.choice.config), **times, **failed}


def _curve(found: Found) -> str:
    """The best time so far, as steps."""
    points: list[tuple[float, float]] = []
    for _, elapsed_s, best_s in found.history:
        if points:
            points.append((elapsed_s, points[-1][1]))
        points.append((elapsed_s, best_s * 1e3))
    if len(points) > 1:
        points.append((found.elapsed_s, points[-1][1]))
    picture = markup.curve("ms over seconds", points, labels=("", "")) if len(points) > 1 else ""
    return f'<div><div style="font-size:12px">{escape(str(found.request)[:60])}</div>{picture}</div>' if picture else ""
