"""Draw what was measured on a GPU as docs/images/gpu.svg: products beside cuDNN and cuBLAS, memory-bound operators
beside the rate of a copy.

    python benchmarks/gpu_plots.py
"""

from __future__ import annotations

from math import log2
from pathlib import Path
from typing import Any

from plots import text
from readme import ROOT, result

COLORS = {"float32": "#3b6fb6", "tf32": "#d0702f", "bfloat16": "#65a03c"}
ORDER = ("forward", "fused", "input", "filter")
Bar = tuple[str, str, float, str]  # name, kind of numbers, ratio, what is said of it
TITLES = {"float32": "float32", "tf32": "TF32", "bfloat16": "bfloat16"}
ROW, LEFT, WIDTH, FOOT = 15.0, 220.0, 860.0, 34.0
LOWEST, HIGHEST = 0.2, 5.6


def across(ratio: float) -> float:
    """The place of a ratio."""
    share = (log2(min(HIGHEST, max(LOWEST, ratio))) - log2(LOWEST)) / (log2(HIGHEST) - log2(LOWEST))
    return LEFT + share * (WIDTH - LEFT - 150)


def rectangle(x: float, y: float, width: float, color: str) -> str:
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(0.5, width):.1f}" height="{ROW - 4:.1f}" fill="{color}"/>'


def convolutions() -> list[Bar]:
    """float32 beside cuDNN, shape by shape."""
    rows = result("conv_cuda")["rows"]
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    rows.sort(key=lambda row: (shapes.index(row["shape"]), ORDER.index(row["direction"])))
    return [
        (f"{row['shape']}, {row['direction']}", "float32", row["ratio"], f"{row['template']}, {row['ours_us']:.0f} us")
        for row in rows
    ]


def hopper() -> list[Bar]:
    """The first config of each case of `wgmma`, beside cuDNN and cuBLAS."""
    first: dict[str, dict[str, Any]] = {}
    for row in result("gpu_first_runs")["wgmma"]["rows"]:
        first.setdefault(row["case"], row)
    kinds = {"fp32": "float32", "tf32": "tf32"}
    return [
        (name, kinds.get(name.split()[0], "bfloat16"), row["ratio"], f"{row['ours_tflops']} TFLOP/s")
        for name, row in first.items()
        if not name.startswith("fp32")
    ]


def ratios(title: str, rows: list[Bar], top: float) -> tuple[list[str], float]:
    """Bars from the line of equal speed, and where they end."""
    out, first = [text(20, top, title, size=14)], top + 16
    end = first + len(rows) * ROW
    for ratio in (0.25, 0.5, 1, 2, 4):
        x = across(ratio)
        line = f'x1="{x:.1f}" x2="{x:.1f}" y1="{first - 4:.0f}" y2="{end:.0f}"'
        out.append(f'<line {line} stroke="{"#888" if ratio == 1 else "#ddd"}"/>')
        out.append(text(x, end + 12, f"{ratio:g}x", anchor="middle", color="#555"))
    for i, (name, dtype, ratio, said) in enumerate(rows):
        y, zero = first + i * ROW, across(1.0)
        low, high = sorted((zero, across(ratio)))
        out.append(text(LEFT - 8, y + 9, name, anchor="end", size=10) + rectangle(low, y, high - low, COLORS[dtype]))
        out.append(text(high + 5, y + 9, f"{ratio:.2f}  {said}", color="#555", size=9))
    return out, end + FOOT


def shares(top: float) -> tuple[list[str], float]:
    """Memory-bound operators, and where they end."""
    found = result("memory_cuda")
    rate = f"{found['peak']['copy_bytes_s'] / 1e12:.2f} TB/s"
    out = [text(20, top, f"Memory-bound operators: share of the rate of a copy ({rate})", size=14)]
    rows = sorted(found["rows"], key=lambda row: -row["of copy %"])
    for i, row in enumerate(rows):
        y, share = top + 16 + i * ROW, row["of copy %"] / 110
        out.append(text(LEFT - 8, y + 9, row["op"], anchor="end", size=10))
        out.append(rectangle(LEFT, y, share * (WIDTH - LEFT - 150), COLORS[row["dtype"]]))
        place = LEFT + share * (WIDTH - LEFT - 150) + 5
        out.append(text(place, y + 9, f"{row['of copy %']:.0f} %  {row['us']:.0f} us", color="#555", size=9))
    return out, top + 16 + len(rows) * ROW


def picture() -> str:
    """The whole picture."""
    out = []
    for i, (dtype, color) in enumerate(COLORS.items()):
        x = LEFT + 120 * i
        out.append(rectangle(x, 12, 12, color) + text(x + 17, 22, TITLES[dtype]))
    title = "NVIDIA H200, float32 convolutions: how many times as fast as cuDNN's float32, through PyTorch"
    made, end = ratios(title, convolutions(), 46)
    more, end = ratios("Products and convolutions by Hopper's wgmma, beside cuBLAS and cuDNN", hopper(), end + 16)
    last, end = shares(end + 16)
    height = end + FOOT / 2
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH:.0f} {height:.0f}" width="{WIDTH:.0f}" '
        f'height="{height:.0f}" font-family="system-ui,sans-serif"><rect width="100%" height="100%" fill="white"/>'
        f"{''.join((*out, *made, *more, *last))}</svg>\n"
    )


def main() -> None:
    """Write the picture."""
    path: Path = ROOT / "docs" / "images" / "gpu.svg"
    path.write_text(picture())
    print(path)


if __name__ == "__main__":
    main()
