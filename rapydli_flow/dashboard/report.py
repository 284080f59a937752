"""The report of a run: one HTML file that needs no network, made from ``metrics.jsonl``.

It shows how the run went, its curves and its speed, where the time of a step goes, what the network gets
wrong, the plan, the graph and the events. It can be written while a run goes on, and after one that failed.
"""

from __future__ import annotations

import os
from html import escape
from pathlib import Path

from bokeh.embed import components
from bokeh.resources import Resources

from ..confusion import ConfusionMatrix
from ..data import latest, read_snapshot
from ..errors import RapydliError
from ..graph import Graph, from_json
from ..graph.draw import sheet, svg
from ..version import __version__
from .curves import Predictions, curves, gallery
from .numbers import read_numbers
from .parts import STYLE, card, events, header, plan, tiles, time

__all__ = ["Predictions", "report"]


def report(
    run_dir: str | os.PathLike[str],
    *,
    predictions: Predictions | None = None,
    confusion: ConfusionMatrix | None = None,
    title: str | None = None,
) -> Path:
    """Write ``report.html`` into the folder of a run; where it is.

    ``predictions``: test images with what the network said of them; ``confusion``: how often it took which class for
    which. SettingError where nothing was logged.
    """
    folder = Path(run_dir)
    numbers = read_numbers(folder)
    figures = dict(curves(numbers))
    drawn = dict(figures)
    shown = gallery(predictions) if predictions is not None else None
    if shown is not None:
        drawn["test images"] = shown[0]
    script, boxes = components(drawn) if drawn else ("", {})
    name = title or folder.absolute().name
    body = [
        header(numbers, name),
        tiles(numbers),
        f'<div class="grid">{"".join(card(key, boxes[key]) for key in figures)}'
        f"{time(numbers, across=len(figures) % 2 == 0)}</div>",
    ]
    if predictions is not None and shown is not None:
        body.append(_images(predictions, boxes["test images"], shown[1], shown[2]))
    if confusion is not None:
        body.append(card("confusion", f'<div class="scroll">{confusion.table()}</div>', confusion.words, wide=True))
    body += [plan(numbers), _graph(folder), events(numbers)]
    scripts = Resources(mode="inline", components=["bokeh"]).render() if drawn else ""
    page = (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(name)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE.read_text(encoding="utf-8")}</style>\n'
        f"{scripts}"
        f"</head><body><main>{''.join(body)}<footer>rapydli_flow {__version__}</footer></main>{script}</body></html>\n"
    )
    path = folder / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


# parts of the page -------------------------------------------------------------------------------------


def _images(predictions: Predictions, box: str, wrong: int, right: int) -> str:
    count, all_wrong = len(predictions.images), len(predictions.wrong)
    words = f"{count - all_wrong:,} of {count:,} right ({1 - all_wrong / max(1, count):.2%}). "
    words += f"{'The first' if wrong < all_wrong else 'All'} {wrong:,}" + (
        f" of {all_wrong:,}" if wrong < all_wrong else ""
    )
    words += f" wrong ones as label → predicted, then {right:,} of the right ones."
    return card("test images", box, words, wide=True)


def _graph(folder: Path) -> str:
    """The table and picture of the network, from graph.json or the newest snapshot."""
    graph = _network(folder)
    if graph is None:
        return ""
    words = f"{graph.parameters:,} parameters, {graph.flops / 1e9:.3g} GFLOP a batch"
    parts = "".join(f'<div class="scroll">{part}</div>' for part in (sheet(graph), svg(graph)))
    return card("network", f'<div class="network">{parts}</div>', words, wide=True)


def _network(folder: Path) -> Graph | None:
    try:
        if (folder / "graph.json").exists():
            return from_json((folder / "graph.json").read_text(encoding="utf-8"))
        newest = latest(folder / "snapshots")
        network = read_snapshot(newest).meta.get("network") if newest is not None else None
        return from_json(network) if network else None
    except RapydliError:  # a report of the numbers is worth having without the picture
        return None
