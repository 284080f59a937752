"""The Bokeh figures of a report: curves over steps, and test images with what was predicted."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from bokeh.models import ColumnDataSource, DataRange1d, FixedTicker, HoverTool, NumeralTickFormatter, Range1d
from bokeh.plotting import figure

from ..errors import ShapeError
from ..markup import spans
from ..spec import Array
from .numbers import Numbers, smooth

TRAIN, HELD_OUT, WRONG, RIGHT = "#4a83cf", "#dd7420", "#c8324f", "#7f9a86"
INK, PALE = "#5b6776", "#e6eaef"
WIDE, MOST_WRONG, LEAST_RIGHT = 1320, 240, 48


@dataclass(frozen=True)
class Predictions:
    """Test records: images ``N, H, W, C`` (or ``N, H, W``), labels, and the classes predicted.

    ``probabilities``, ``N, classes``, are shown where the pointer rests.
    """

    images: Array
    labels: Array
    predicted: Array
    probabilities: Array | None = None

    def __post_init__(self) -> None:
        n = len(self.images)
        given = {"labels": self.labels, "predicted": self.predicted}
        for name, values in given.items():
            if np.shape(values) != (n,):
                raise ShapeError(f"Predictions: {name} has shape {np.shape(values)} but there are {n} images.")
        if np.ndim(self.images) not in (3, 4):
            raise ShapeError(f"Predictions: images have shape {np.shape(self.images)}, not N,H,W,C or N,H,W.")
        if self.probabilities is not None and len(self.probabilities) != n:
            raise ShapeError(f"Predictions: {len(self.probabilities)} rows of probabilities for {n} images.")

    @property
    def wrong(self) -> Array:
        return np.flatnonzero(np.asarray(self.labels) != np.asarray(self.predicted))


def curves(numbers: Numbers) -> list[tuple[str, Any]]:
    """A title and a figure for loss, each metric, and the speed. Their sources are named as in `columns`."""
    out: list[tuple[str, Any]] = []
    shared: Any = None
    sources = {name: ColumnDataSource(data, name=name) for name, data in columns(numbers).items()}
    for name in numbers.names:
        plot = _metric(name, sources, _spread(numbers, name), shared)
        shared = shared or plot.x_range
        out.append((name, plot))
    if numbers.step_s is not None:
        out.append(("records a second" if numbers.batch else "steps a second", _speed(sources["speed"], shared)))
        if "time" in sources:
            out.append(("time of a step", _parts(sources["time"], shared)))
    return out


def columns(numbers: Numbers) -> dict[str, dict[str, Array]]:
    """What the sources of the figures hold, by their names; of a run that goes on, ever more of it."""
    out: dict[str, dict[str, Array]] = {}
    for name, series in numbers.train.items():
        raw = np.where(np.isfinite(series.value), series.value, np.nan)
        smoothed = smooth(raw, max(1, len(raw) // 40))
        out[f"training {name}"] = {"step": series.step, "raw": raw, "smooth": smoothed, "alone": _alone(raw)}
    for name, series in numbers.held_out.items():
        value = np.where(np.isfinite(series.value), series.value, np.nan)
        out[f"validation {name}"] = {"step": series.step, "value": value}
    if numbers.step_s is not None:
        step, step_s = numbers.step_s.step, numbers.step_s.value
        out["speed"] = {"step": step, "speed": (numbers.batch or 1) / step_s, "ms": 1e3 * step_s}
        if numbers.feed_s is not None and len(numbers.feed_s.step) == len(step):
            wait = 1e3 * numbers.feed_s.value
            out["time"] = {"step": step, "wait": wait, "work": 1e3 * step_s - wait, "all": 1e3 * step_s}
    return out


def form(numbers: Numbers) -> tuple[Any, ...]:
    """Equal for numbers that figures of the same form show: then their sources are all that changes."""
    return tuple(columns(numbers)), tuple(_spread(numbers, name) for name in numbers.names), numbers.batch is None


def _figure(shared: Any, **options: Any) -> Any:
    if shared is not None:
        options["x_range"] = shared
    plot = figure(
        height=290,
        sizing_mode="stretch_width",
        tools="xpan,xwheel_zoom,box_zoom,reset",
        toolbar_location="right",
        **options,
    )
    plain(plot)
    plot.xaxis.axis_label = "step"
    plot.xaxis.axis_label_text_color = INK
    plot.xaxis.axis_label_text_font_style = "normal"
    plot.xaxis.formatter = NumeralTickFormatter(format="0,0")
    return plot


def plain(plot: Any) -> None:
    """The look of all figures: pale grid, thin axes, tools that come when they are wanted."""
    plot.toolbar.logo = None
    plot.toolbar.autohide = True
    plot.outline_line_color = None
    plot.grid.grid_line_color = PALE
    plot.axis.axis_line_color = plot.axis.major_tick_line_color = "#b5bfca"
    plot.axis.minor_tick_line_color = None
    plot.axis.major_label_text_color = INK
    plot.axis.major_label_text_font_size = "11px"


def _spread(numbers: Numbers, name: str) -> float:
    """Decades that the values span if a logarithmic axis helps, in steps of 2; else 0."""
    series = [s.value for s in (numbers.train.get(name), numbers.held_out.get(name)) if s is not None]
    values = np.concatenate(series)
    known = values[np.isfinite(values)]
    if len(known) == 0 or not spans(name, known.min(), known.max()):
        return 0
    return 2 * math.ceil(math.log10(known.max() / known.min()) / 2)


def _metric(name: str, sources: Mapping[str, Any], decades: float, shared: Any) -> Any:
    plot = _figure(shared, y_axis_type="log" if decades else "linear")
    if decades:
        plot.yaxis.formatter = NumeralTickFormatter(format="0.[000000]")
    if 0 < decades <= 2:  # where Bokeh would put its ticks at equal distances
        plot.yaxis.ticker = FixedTicker(ticks=[m * 10.0**e for e in range(-9, 7) for m in (1, 2, 5)])
    source = sources.get(f"training {name}")
    if source is not None:
        plot.line("step", "raw", source=source, color=TRAIN, alpha=0.3, width=1)
        plot.scatter("step", "alone", source=source, color=TRAIN, size=6)
        line = plot.line("step", "smooth", source=source, color=TRAIN, width=2.2, legend_label="training")
        tips = [("step", "@step{0}"), (name, "@raw{0.0000}"), ("smoothed", "@smooth{0.0000}")]
        plot.add_tools(HoverTool(renderers=[line], tooltips=tips, mode="vline"))
    source = sources.get(f"validation {name}")
    if source is not None:
        plot.line("step", "value", source=source, color=HELD_OUT, width=1.6, legend_label="validation")
        marks = plot.scatter(
            "step", "value", source=source, size=7, color=HELD_OUT, line_color="white", legend_label="validation"
        )
        plot.add_tools(HoverTool(renderers=[marks], tooltips=[("step", "@step{0}"), ("validation", "@value{0.0000}")]))
    _legend(plot, "top_right" if name == "loss" else "bottom_right")
    return plot


def _legend(plot: Any, location: str) -> None:
    plot.legend.location = location
    plot.legend.border_line_color = None
    plot.legend.background_fill_alpha = 0.8
    plot.legend.label_text_font_size = "11px"
    plot.legend.label_text_color = INK


def _alone(values: Array) -> Array:
    """The values without a number before or after them, which no line shows."""
    known = np.concatenate([[False], np.isfinite(values), [False]])
    return np.where(known[:-2] | known[2:], np.nan, values)


def _speed(source: Any, shared: Any) -> Any:
    plot = _figure(shared, y_range=DataRange1d(start=0.0, range_padding=0.12))
    plot.varea("step", 0, "speed", source=source, color=RIGHT, alpha=0.15)
    plot.line("step", "speed", source=source, color=RIGHT, width=2)
    marks = plot.scatter("step", "speed", source=source, color=RIGHT, size=5)
    tips = [("step", "@step{0}"), ("a second", "@speed{0,0}"), ("ms a step", "@ms{0.00}")]
    plot.add_tools(HoverTool(renderers=[marks], tooltips=tips, mode="vline"))
    plot.yaxis.formatter = NumeralTickFormatter(format="0,0.[0]")
    return plot


def _parts(source: Any, shared: Any) -> Any:
    """Milliseconds of a step: working, and on top of that waiting for records."""
    plot = _figure(shared, y_range=DataRange1d(start=0.0, range_padding=0.12))
    plot.varea("step", 0, "work", source=source, color=TRAIN, alpha=0.25, legend_label="working")
    plot.varea("step", "work", "all", source=source, color=HELD_OUT, alpha=0.6, legend_label="waiting for data")
    plot.line("step", "work", source=source, color=TRAIN, width=1.5)
    line = plot.line("step", "all", source=source, color=HELD_OUT, width=1.5)
    tips = [("step", "@step{0}"), ("working", "@work{0.00} ms"), ("waiting", "@wait{0.00} ms")]
    plot.add_tools(HoverTool(renderers=[line], tooltips=tips, mode="vline"))
    plot.yaxis.formatter = NumeralTickFormatter(format="0.[00] ")
    plot.yaxis.axis_label = "ms"
    plot.yaxis.axis_label_text_color = INK
    plot.yaxis.axis_label_text_font_style = "normal"
    _legend(plot, "bottom_right")
    return plot


# images ------------------------------------------------------------------------------------------------


def gallery(predictions: Predictions, *, seed: int = 0) -> tuple[Any, int, int]:
    """All wrong images in one canvas (the first `MOST_WRONG`), then a sample of right ones; and how many of each."""
    images = _rgba(np.asarray(predictions.images))
    height, width = images.shape[1:3]
    size = max(height, width)
    tile = min(112, size * -(-52 // size))  # whole numbers of screen pixels for small images
    across = WIDE // (tile + 12)
    wrong = predictions.wrong[:MOST_WRONG]
    right = np.setdiff1d(np.arange(len(images)), predictions.wrong)
    wanted = max(LEAST_RIGHT, 2 * across) + (-len(wrong) - max(LEAST_RIGHT, 2 * across)) % across
    right = np.sort(np.random.default_rng(seed).permutation(right)[:wanted])
    chosen = np.concatenate([wrong, right]).astype(int)
    rows = max(1, -(-len(chosen) // across))
    high = tile + 30
    plot = figure(
        width=across * (tile + 12),
        height=rows * high,
        x_range=Range1d(start=0, end=across * (tile + 12)),
        y_range=Range1d(start=-rows * high, end=0),
        tools="",
        toolbar_location=None,
        min_border=0,
    )
    plot.axis.visible = plot.grid.visible = False
    plot.outline_line_color = None
    if len(chosen):
        _tiles(plot, predictions, images, chosen, tile=tile, across=across)
    return plot, len(wrong), len(right)


def _tiles(plot: Any, predictions: Predictions, images: Array, chosen: Array, *, tile: int, across: int) -> None:
    height, width = images.shape[1:3]
    w, h = tile * width / max(height, width), tile * height / max(height, width)
    labels, said = np.asarray(predictions.labels)[chosen], np.asarray(predictions.predicted)[chosen]
    bad = labels != said
    middle = (np.arange(len(chosen)) % across + 0.5) * (tile + 12)
    top = np.arange(len(chosen)) // across * (tile + 30) + 4.0
    source = ColumnDataSource(
        {
            "image": [images[i][::-1] for i in chosen],
            "left": middle - w / 2,
            "middle": middle,
            "bottom": -top - h,
            "centre": -top - h / 2,
            "foot": -top - tile - 5,
            "color": np.where(bad, WRONG, RIGHT).tolist(),
            "text": [f"{a} → {b}" if a != b else str(a) for a, b in zip(labels, said, strict=True)],
            "label": [str(a) for a in labels],
            "predicted": [str(b) for b in said],
            "number": chosen,
            "sure": _sure(predictions, chosen),
        }
    )
    plot.image_rgba("image", x="left", y="bottom", dw=w, dh=h, source=source)
    frames = plot.rect(
        "middle", "centre", w + 2, h + 2, source=source, fill_alpha=0.0, line_color="color", line_width=2
    )
    plot.text(
        "middle",
        "foot",
        text="text",
        source=source,
        text_color="color",
        text_align="center",
        text_baseline="top",
        text_font_size="13px",
        text_font_style="bold",
    )
    tips = [("record", "@number"), ("label", "@label"), ("predicted", "@predicted")]
    if predictions.probabilities is not None:
        tips.append(("probability", "@sure"))
    plot.add_tools(HoverTool(renderers=[frames], tooltips=tips))


def _sure(predictions: Predictions, chosen: Sequence[int] | Array) -> list[str]:
    """How sure the network was of what it predicted, and of the label."""
    if predictions.probabilities is None:
        return [""] * len(chosen)
    p, out = np.asarray(predictions.probabilities), []
    for i in chosen:
        said, label = int(predictions.predicted[i]), int(predictions.labels[i])
        out.append(f"{p[i, said]:.1%}" + (f" ({p[i, label]:.1%} for {label})" if said != label else ""))
    return out


def _rgba(images: Array) -> Array:
    """``N, H, W`` pixels of 32 bits, as Bokeh takes them; numbers are stretched from the least to the largest."""
    images = images[..., None] if images.ndim == 3 else images
    pixels = images.astype(np.float64)
    known = pixels[np.isfinite(pixels)]
    lo, hi = (float(known.min()), float(known.max())) if known.size else (0.0, 1.0)
    scaled = np.nan_to_num((pixels - lo) / (hi - lo if hi > lo else 1.0) * 255.0).clip(0, 255).astype(np.uint8)
    if scaled.shape[-1] != 3:
        scaled = np.repeat(scaled.mean(-1, keepdims=True).astype(np.uint8), 3, axis=-1)
    out = np.full((*scaled.shape[:3], 4), 255, np.uint8)
    out[..., :3] = scaled
    return out.view(np.uint32)[..., 0]
