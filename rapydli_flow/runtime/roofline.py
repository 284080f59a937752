"""The roofline of a step as inline SVG: operations a byte across, operations a second up, both logarithmic.

The roof is what was measured of this machine: bandwidth times intensity, up to the peak. A dot is a kernel, as large
as its share of the time; its title says what it is. Nothing is loaded from elsewhere.
(Williams, Waterman, Patterson: Roofline, CACM 2009.)
"""

from __future__ import annotations

from html import escape
from math import ceil, floor, log10, sqrt

from ..markup import HELD_OUT, SOFT, TRAIN
from ..tuner import time_text
from .attribution import BACKWARD, FORWARD, UPDATE
from .timing import Measured, Timed

COLORS = {FORWARD: TRAIN, BACKWARD: HELD_OUT, UPDATE: "#65a03c"}
WIDTH, HEIGHT, LEFT, RIGHT, TOP, FOOT = 900.0, 460.0, 64.0, 18.0, 30.0, 44.0
LARGEST, SMALLEST = 17.0, 3.0  # radii
SPAN = 4.0  # decades below the roof that are shown: what is slower lies on the edge


class _Axes:
    """Pixels of intensities and speeds."""

    def __init__(self, measured: Measured, dots: list[Timed]) -> None:
        peak = measured.peak
        ridge = peak.flops_s / peak.bytes_s
        across = [*(kernel.intensity for kernel in dots), ridge]
        self.x0, self.x1 = floor(log10(min(across)) - 0.1), ceil(log10(max(across) * 1.5))
        speeds = [kernel.flops / kernel.time_s for kernel in dots] + [peak.flops_s]
        top = max(speeds) * 1.4
        self.y1 = log10(top)
        self.y0 = max(floor(log10(min(speeds))), floor(self.y1 - SPAN))

    def x(self, intensity: float) -> float:
        share = (log10(intensity) - self.x0) / (self.x1 - self.x0)
        return LEFT + min(1.0, max(0.0, share)) * (WIDTH - LEFT - RIGHT)

    def y(self, speed: float) -> float:
        share = (log10(speed) - self.y0) / (self.y1 - self.y0)
        return HEIGHT - FOOT - min(1.0, max(0.0, share)) * (HEIGHT - TOP - FOOT)


def roofline(measured: Measured) -> str:
    """The picture; '' where no kernel computes anything."""
    dots = sorted((k for k in measured.kernels if k.flops and k.time_s > 0), key=lambda k: -k.time_s)
    if not dots:
        return ""
    axes = _Axes(measured, dots)
    inside = [*_grid(axes), *_roof(axes, measured), *(_dot(axes, kernel, measured) for kernel in dots), *_legend(dots)]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH:.0f} {HEIGHT:.0f}" width="{WIDTH:.0f}" '
        f'height="{HEIGHT:.0f}" style="max-width:100%;height:auto;font-family:system-ui,sans-serif">'
        f"{''.join(inside)}</svg>"
    )


def _grid(axes: _Axes) -> list[str]:
    parts = []
    line = f'stroke="{SOFT}" stroke-opacity=".25"'
    for power in range(axes.x0, axes.x1 + 1):
        x = axes.x(10.0**power)
        parts.append(f'<path d="M{x:.1f} {TOP}V{HEIGHT - FOOT}" {line}/>')
        parts.append(_text(x, HEIGHT - FOOT + 16, f"{10.0**power:g}"))
    for power in range(ceil(axes.y0), floor(axes.y1) + 1):
        y = axes.y(10.0**power)
        parts.append(f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" {line}/>')
        parts.append(_text(LEFT - 8, y + 4, f"{10.0 ** (power - 9):g}", anchor="end"))
    parts.append(_text((LEFT + WIDTH) / 2, HEIGHT - 8, "operations a byte", size=12))
    parts.append(_text(LEFT - 8, TOP - 14, "GFLOP/s", size=12))
    return parts


def _roof(axes: _Axes, measured: Measured) -> list[str]:
    peak = measured.peak
    ridge = peak.flops_s / peak.bytes_s
    first = max(10.0**axes.x0, 10.0**axes.y0 / peak.bytes_s)
    points = [(first, first * peak.bytes_s), (ridge, peak.flops_s), (10.0**axes.x1, peak.flops_s)]
    path = " ".join(f"{axes.x(a):.1f},{axes.y(b):.1f}" for a, b in points)
    flat, slope = f"{peak.flops_s / 1e9:,.0f} GFLOP/s", f"{peak.bytes_s / 1e9:,.1f} GB/s"
    (x0, y0), (x1, y1) = ((axes.x(a), axes.y(b)) for a, b in points[:2])
    x, y = x0 + 0.45 * (x1 - x0), y0 + 0.45 * (y1 - y0)
    return [
        f'<polyline points="{path}" fill="none" stroke="{SOFT}" stroke-width="2"/>',
        _text(WIDTH - RIGHT - 4, axes.y(peak.flops_s) - 7, flat, anchor="end", size=12),
        _text(x - 10, y - 6, slope, anchor="end", size=12),
    ]


def _dot(axes: _Axes, kernel: Timed, measured: Measured) -> str:
    speed = kernel.flops / kernel.time_s
    x, y = axes.x(kernel.intensity), axes.y(speed)
    radius = max(SMALLEST, LARGEST * sqrt(kernel.time_s / measured.kernels_s / 0.25))
    color = COLORS[kernel.place.phase]
    of_roof = kernel.least_s(measured.peak) / kernel.time_s
    words = (
        f"{kernel.name}: {kernel.title}, {kernel.place.phase}\n{time_text(kernel.time_s)}, {speed / 1e9:,.1f} GFLOP/s, "
        f"{kernel.size_bytes / kernel.time_s / 1e9:,.1f} GB/s, {of_roof:.0%} of attainable\n"
        f"{kernel.choice}, {kernel.state}"
    )
    return (
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{min(radius, LARGEST):.1f}" fill="{color}" fill-opacity=".55" '
        f'stroke="{color}"><title>{escape(words)}</title></circle>'
    )


def _legend(dots: list[Timed]) -> list[str]:
    parts, x = [], LEFT + 80.0
    for phase, color in COLORS.items():
        if any(kernel.place.phase == phase for kernel in dots):
            parts.append(f'<circle cx="{x:.1f}" cy="{TOP - 18}" r="5" fill="{color}" fill-opacity=".7"/>')
            parts.append(_text(x + 10, TOP - 14, phase, anchor="start", size=12))
            x += 90.0
    parts.append(_text(x, TOP - 14, "area: share of the time", anchor="start", size=12))
    return parts


def _text(x: float, y: float, text: str, *, anchor: str = "middle", size: int = 11) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" fill="{SOFT}">{escape(text)}</text>'
    )
