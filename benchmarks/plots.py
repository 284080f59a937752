"""Draw the results of benchmarks/conv.py as docs/images/conv.svg: a bar for each convolution and direction.

    python benchmarks/plots.py

A bar is as long as ours is faster than PyTorch, on a logarithmic scale from the line of equal speed; where Winograd's
algorithm won, the end of the paler bar is what exact templates reach.
"""

from __future__ import annotations

from html import escape
from math import log2
from pathlib import Path
from typing import Any

from readme import ROOT, result

COLORS = {"forward": "#3b6fb6", "input": "#d0702f", "filter": "#65a03c"}
TITLES = {"forward": "forward", "input": "input gradient", "filter": "filter gradient"}
BAR, GAP, LEFT, TOP, WIDTH, FOOT = 7.0, 8.0, 150.0, 46.0, 860.0, 26.0
LOWEST, HIGHEST = 0.5, 8.0


def across(ratio: float) -> float:
    """The place of a ratio."""
    share = (log2(min(HIGHEST, max(LOWEST, ratio))) - log2(LOWEST)) / (log2(HIGHEST) - log2(LOWEST))
    return LEFT + share * (WIDTH - LEFT - 60)


def text(x: float, y: float, words: str, *, anchor: str = "start", color: str = "#333", size: int = 11) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" fill="{color}">{escape(words)}</text>'
    )


def bar(row: dict[str, Any], y: float) -> str:
    """One bar, and its ratio."""
    color, zero = COLORS[row["direction"]], across(1.0)
    pieces = [(row["ratio"], 0.45 if row["exact template"] != row["template"] else 1.0)]
    if pieces[0][1] < 1:
        pieces.append((row["exact ratio"], 1.0))
    out = []
    for ratio, opacity in pieces:
        low, high = sorted((zero, across(ratio)))
        out.append(
            f'<rect x="{low:.1f}" y="{y:.1f}" width="{max(0.5, high - low):.1f}" height="{BAR - 1:.1f}" '
            f'fill="{color}" fill-opacity="{opacity}"/>'
        )
    said = f"{row['ratio']:.2f}"
    out.append(text(max(zero, across(row["ratio"])) + 4, y + BAR - 1, said, color="#555", size=8))
    return "".join(out)


def picture(found: dict[str, Any]) -> str:
    """The whole picture."""
    rows = found["rows"]
    names = list(dict.fromkeys(row["shape"] for row in rows))
    height = TOP + len(names) * (3 * BAR + GAP) + FOOT
    out = []
    for ratio in (0.5, 1, 2, 4, 8):
        x, heavy = across(ratio), ratio == 1
        line = f'x1="{x:.1f}" x2="{x:.1f}" y1="{TOP - 6:.0f}" y2="{height - FOOT:.0f}"'
        out.append(f'<line {line} stroke="{"#888" if heavy else "#ddd"}" stroke-width="{1.5 if heavy else 1}"/>')
        out.append(text(x, height - 10, f"{ratio:g}x" if ratio != 1 else "PyTorch", anchor="middle", color="#555"))
    for i, name in enumerate(names):
        y = TOP + i * (3 * BAR + GAP)
        out.append(text(LEFT - 8, y + 2 * BAR, name, anchor="end"))
        for j, direction in enumerate(COLORS):
            out += [bar(row, y + j * BAR) for row in rows if (row["shape"], row["direction"]) == (name, direction)]
    for i, (direction, color) in enumerate(COLORS.items()):
        x = LEFT + 150 * i
        out.append(
            f'<rect x="{x}" y="12" width="12" height="10" fill="{color}"/>' + text(x + 17, 21, TITLES[direction])
        )
    out.append(text(LEFT + 450, 21, "pale: gained by Winograd's algorithm", color="#555"))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH:.0f} {height:.0f}" width="{WIDTH:.0f}" '
        f'height="{height:.0f}" font-family="system-ui,sans-serif"><rect width="100%" height="100%" fill="white"/>'
        f"{''.join(out)}</svg>\n"
    )


def main() -> None:
    """Write the picture."""
    path: Path = ROOT / "docs" / "images" / "conv.svg"
    path.write_text(picture(result("conv")))
    print(path)


if __name__ == "__main__":
    main()
