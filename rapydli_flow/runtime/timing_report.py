"""The time of a step as a table, as JSON, in a notebook, and as a page of HTML."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import Any

from .. import markup
from .attribution import BACKWARD, FORWARD, PHASES, SHARED, UPDATE
from .peak import Peak
from .roofline import roofline
from .timing import Layer, Measured, Timed

NOTES = (
    "Operations are those of the formula: a convolution counts as a direct one, so GFLOP/s are effective, and a "
    "template that needs fewer multiplications (Winograd) may come above 100 %.",
    "Bytes are those of inputs read and outputs written once each, without workspaces; what a cache still holds may "
    "come above 100 % too.",
    "Attainable is the roofline: the peak, or the bandwidth where a kernel moves too many bytes for it. A row says "
    "GFLOP/s where the peak is nearer, else GB/s.",
)
TINY = 0.002  # kernels below this share of the step are left out beside layers
PAGE = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<style>body{{font:14px/1.45 system-ui,sans-serif;max-width:1320px;margin:2em auto;padding:0 1em;color:#1d2733}}
h1{{font-size:24px;margin:0 0 4px}}h2{{font-size:16px;margin:1.8em 0 .4em}}table{{width:100%}}
.tiles{{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:12px;margin:16px 0}}
.tiles div{{border:1px solid #e3e8ed;border-radius:10px;padding:10px 14px}}.tiles b{{display:block;font-size:22px}}
.tiles i{{font-style:normal;font-size:12px;color:#6b7786}}
.wide{{overflow-x:auto}}</style></head><body>{body}</body></html>
"""


@dataclass(frozen=True, repr=False)
class Timing(Measured):
    """The time of a step, by layer and by kernel. Print it, or ``print(timing.table(kernels=True))``."""

    @classmethod
    def of(cls, measured: Measured) -> Timing:
        return cls(**{name: getattr(measured, name) for name in measured.__dataclass_fields__})

    # text -------------------------------------------------------------------------------------------

    def table(self, *, kernels: bool = False) -> str:
        """A row for each layer, or for each kernel; what it all comes to; what the numbers mean."""
        head, rows, right = self._kernel_rows() if kernels else self._layer_rows()
        rows = [head, *rows]
        widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
        lines = []
        for row in rows:
            cells = [c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
            lines.append("  ".join(cells).rstrip())
        rule = "-" * min(120, max(map(len, lines)))
        return "\n".join([self._words(), "", lines[0], rule, *lines[1:], rule, *self._totals(), "", *NOTES])

    def __str__(self) -> str:
        return self.table()

    def __repr__(self) -> str:
        return f"<Timing: {self.network}, batch {self.batch}, {_ms(self.step_s)} ms, {self.records_s:,.1f} records/s>"

    def _words(self) -> str:
        what = "training step" if self.training else "prediction"
        threads = f"{self.threads} thread{'s' * (self.threads > 1)}"
        return (
            f"{self.network}: {what}, batch {self.batch}, {threads} of {self.device}; medians of "
            f"{self.iterations} iterations; measured peak {_peak(self.peak)}"
        )

    def _totals(self) -> list[str]:
        phases = [f"{phase} {_ms(self.phase_s(phase))} ms" for phase in PHASES if self._has(phase)]
        return [
            f"{', '.join(phases)}: {_ms(self.kernels_s)} ms in {len(self.kernels)} kernel calls",
            f"whole step, without clocks: {_ms(self.step_s)} ms, {self.records_s:,.1f} records/s "
            f"({1e6 * self.overhead_s:+.2f} us a call beside the kernels)",
            f"arena: {markup.size(self.arena_bytes)}",
        ]

    def _has(self, phase: str) -> bool:
        return any(kernel.place.phase == phase for kernel in self.kernels)

    # rows -------------------------------------------------------------------------------------------

    def _layer_rows(self) -> tuple[tuple[str, ...], list[tuple[str, ...]], range]:
        """Header, rows, and which columns are numbers. Further lines of a layer name its kernels only."""
        phases = [phase for phase in PHASES if self._has(phase)]
        head = ("layer", *(f"{phase} ms" for phase in phases), "rate", "attainable", "kernels")
        rows = []
        for layer in self.layers:
            words = _kernel_words(layer, TINY * self.kernels_s) or [""]
            times = (_ms(layer.phase_s(p)) if layer.phase_s(p) else "" for p in phases)
            rows.append((layer.name, *times, self._rate(layer.kernels), self._share(layer.kernels), words[0]))
            rows += [("", *("" for _ in phases), "", "", line) for line in words[1:]]
        return head, rows, range(1, len(phases) + 3)

    def _kernel_rows(self) -> tuple[tuple[str, ...], list[tuple[str, ...]], range]:
        head = ("kernel", "layer", "phase", "op", "ms", "GFLOP", "MB", "FLOP/B", "rate", "attainable", "", "config")
        rows: list[tuple[str, ...]] = []
        for k in self.kernels:
            numbers = (_ms(k.time_s), f"{k.flops / 1e9:.3f}", f"{k.size_bytes / 1e6:,.2f}", f"{k.intensity:.2f}")
            where = (k.name, k.place.layer, k.place.phase, k.title)
            rows.append((*where, *numbers, self._rate([k]), self._share([k]), k.state, k.choice))
        return head, rows, range(4, 10)

    def _rate(self, kernels: Sequence[Timed]) -> str:
        """GFLOP/s or GB/s, whichever bounds more of the time that these kernels take at best."""
        time_s = sum(k.time_s for k in kernels)
        if not time_s:
            return ""
        least = {True: 0.0, False: 0.0}
        for k in kernels:
            least[k.computes(self.peak)] += k.least_s(self.peak)
        if least[True] > least[False]:
            return f"{sum(k.flops for k in kernels) / time_s / 1e9:,.1f} GFLOP/s"
        return f"{sum(k.size_bytes for k in kernels) / time_s / 1e9:,.1f} GB/s"

    def _share(self, kernels: Sequence[Timed]) -> str:
        time_s = sum(k.time_s for k in kernels)
        return f"{sum(k.least_s(self.peak) for k in kernels) / time_s:.0%}" if time_s else ""

    # other forms ------------------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        return {
            "network": self.network,
            "batch": self.batch,
            "threads": self.threads,
            "device": self.device,
            "training": self.training,
            "iterations": self.iterations,
            "peak": {"flops_s": self.peak.flops_s, "bytes_s": self.peak.bytes_s},
            "step_s": self.step_s,
            "kernels_s": self.kernels_s,
            **{f"{phase}_s": self.phase_s(phase) for phase in PHASES},
            "records_s": self.records_s,
            "overhead_s": self.overhead_s,
            "arena_bytes": self.arena_bytes,
            "layers": [
                {"name": layer.name, **{f"{phase}_s": layer.phase_s(phase) for phase in PHASES}}
                for layer in self.layers
            ],
            "kernels": [
                {**asdict(k), "place": None, "layer": k.place.layer, "phase": k.place.phase}
                | {"attainable": k.least_s(self.peak) / k.time_s if k.time_s else None}
                for k in self.kernels
            ],
        }

    def save_json(self, path: str | Path) -> Path:
        return _write(path, json.dumps(self.to_json(), indent=1))

    def save_html(self, path: str | Path) -> Path:
        """Write a page with totals, roofline and tables; it loads nothing from elsewhere."""
        return _write(path, PAGE.format(title=escape(f"Time of {self.network}"), body=self._body()))

    def save_svg(self, path: str | Path) -> Path:
        """Write the roofline alone."""
        return _write(path, roofline(self))

    def _repr_html_(self) -> str:
        head, rows, right = self._layer_rows()
        table = _numbers_last(head, [row for row in rows if row[0]], right)
        notes = "".join(markup.small(line) for line in self._totals())
        return markup.title("Timing", self._words()) + table + notes + roofline(self)

    def _body(self) -> str:
        tiles = [
            ("whole step", f"{_ms(self.step_s)} ms"),
            ("records a second", f"{self.records_s:,.1f}"),
            *((phase, f"{_ms(self.phase_s(phase))} ms") for phase in PHASES if self._has(phase)),
            ("overhead a call", f"{1e6 * self.overhead_s:+.2f} µs"),
            ("arena", markup.size(self.arena_bytes)),
        ]
        shown = "".join(f"<div><i>{escape(name)}</i><b>{escape(value)}</b></div>" for name, value in tiles)
        parts = [f"<h1>{escape(self.network)}</h1>", markup.small(self._words()), f'<div class="tiles">{shown}</div>']
        parts += ["<h2>Roofline</h2>", roofline(self), "<h2>Layers</h2>", _numbers_last(*self._layer_rows())]
        kernels = f'<div class="wide">{_numbers_last(*self._kernel_rows())}</div>'
        parts += ["<h2>Kernels</h2>", kernels, *map(markup.small, NOTES)]
        return "".join(parts)


def _numbers_last(head: Sequence[str], rows: Sequence[tuple[str, ...]], right: range) -> str:
    """An HTML table whose columns of numbers stand behind the others."""
    order = [*(i for i in range(len(head)) if i not in right), *right]
    unbroken = [
        [c.replace(" ", "\N{NO-BREAK SPACE}") if i in right else c for i, c in enumerate(r)] for r in (head, *rows)
    ]
    moved = [[row[i] for i in order] for row in unbroken]
    return markup.table(moved[0], moved[1:], right=len(right), most=len(rows))


def _kernel_words(layer: Layer, least_s: float) -> list[str]:
    """What runs for a layer: each op with its config, equal ones once, those that take no time left out."""
    if layer.name == SHARED:
        return []
    short = {FORWARD: "fwd", BACKWARD: "bwd", UPDATE: "upd"}
    counted: dict[str, int] = {}
    for k in layer.kernels:
        if k.time_s >= least_s or len(layer.kernels) == 1:
            words = f"{short[k.place.phase]} {k.title}: {k.choice} ({k.state})"
            counted[words] = counted.get(words, 0) + 1
    return [words + (f" x{n}" if n > 1 else "") for words, n in counted.items()]


def _ms(time_s: float) -> str:
    return f"{1e3 * time_s:,.3f}" if time_s < 0.1 else f"{1e3 * time_s:,.1f}"


def _peak(peak: Peak) -> str:
    return f"{peak.flops_s / 1e9:,.0f} GFLOP/s, {peak.bytes_s / 1e9:,.1f} GB/s"


def _write(path: str | Path, text: str) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path
