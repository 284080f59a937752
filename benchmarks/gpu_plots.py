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
TITLES = {"float32": "float32", "tf32": "TF32", "bfloat16": "bfloat16"}
ROW, LEFT, TOP, WIDTH, FOOT = 15.0, 250.0, 58.0, 860.0, 34.0
LOWEST, HIGHEST = 0.25, 4.0


def across(ratio: float) -> float:
    """The place of a ratio."""
    share = (log2(min(HIGHEST, max(LOWEST, ratio))) - log2(LOWEST)) / (log2(HIGHEST) - log2(LOWEST))
    return LEFT + share * (WIDTH - LEFT - 150)


def rectangle(x: float, y: float, width: float, color: str) -> str:
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(0.5, width):.1f}" height="{ROW - 4:.1f}" fill="{color}"/>'


def beside(found: dict[str, Any]) -> list[tuple[str, str, float, str]]:
    """Name, kind of arithmetic, ratio and what is said of it."""
    conv = [
        (f"{r['shape']}, {r['direction']}, multiply-adds", "float32", r["ratio"], "")
        for r in result("conv_cuda")["rows"]
        if r["direction"] == "forward"
    ]
    cores = [
        (f"{r['case']}, {'3 x TF32' if r['dtype'] == 'float32' else 'mma'}", r["dtype"], r["ratio"], r["ours_tflops"])
        for r in found["tensor_cores"]["rows"]
    ]
    best: dict[str, dict[str, Any]] = {}
    for r in found["wgmma"]["rows"]:
        best.setdefault(r["case"], r)
    hopper = [(f"{r['case']}, wgmma", "bfloat16", r["ratio"], r["ours_tflops"]) for r in best.values()]
    order = {dtype: i for i, dtype in enumerate(COLORS)}
    said = [(n, d, ratio, f"{rate} TFLOP/s" if rate else "") for n, d, ratio, rate in (*cores, *hopper)]
    return sorted((*conv, *said), key=lambda row: (order[row[1]], -row[2]))


def picture(found: dict[str, Any]) -> str:
    """The whole picture."""
    rows = beside(found)
    memory = sorted(found["memory_bound"]["rows"], key=lambda row: -row["of_copy_percent"])
    second = TOP + len(rows) * ROW + 70
    height = second + len(memory) * ROW + FOOT
    out = [text(20, 22, "NVIDIA H200: how many times as fast as cuDNN or cuBLAS through PyTorch", size=14)]
    for i, (dtype, color) in enumerate(COLORS.items()):
        x = LEFT + 120 * i
        out.append(rectangle(x, 32, 12, color) + text(x + 17, 42, TITLES[dtype]))
    for ratio in (0.25, 0.5, 1, 2, 4):
        x = across(ratio)
        line = f'x1="{x:.1f}" x2="{x:.1f}" y1="{TOP - 6:.0f}" y2="{TOP + len(rows) * ROW:.0f}"'
        out.append(f'<line {line} stroke="{"#888" if ratio == 1 else "#ddd"}"/>')
        out.append(text(x, TOP + len(rows) * ROW + 14, f"{ratio:g}x", anchor="middle", color="#555"))
    for i, (name, dtype, ratio, said) in enumerate(rows):
        y, zero = TOP + i * ROW, across(1.0)
        low, high = sorted((zero, across(ratio)))
        out.append(text(LEFT - 8, y + 9, name, anchor="end", size=10) + rectangle(low, y, high - low, COLORS[dtype]))
        out.append(text(high + 5, y + 9, f"{ratio:.2f}  {said}", color="#555", size=9))
    out.append(text(20, second - 18, "Memory-bound operators: share of the rate of a copy (4.15 TB/s)", size=14))
    for i, row in enumerate(memory):
        y, share = second + i * ROW, row["of_copy_percent"] / 110
        dtype = "bfloat16" if "b16" in row["case"] and "to f32" not in row["case"] else "float32"
        out.append(text(LEFT - 8, y + 9, row["case"], anchor="end", size=10))
        out.append(rectangle(LEFT, y, share * (WIDTH - LEFT - 150), COLORS[dtype]))
        place = LEFT + share * (WIDTH - LEFT - 150) + 5
        out.append(text(place, y + 9, f"{row['of_copy_percent']} %  {row['us']:.0f} us", color="#555", size=9))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH:.0f} {height:.0f}" width="{WIDTH:.0f}" '
        f'height="{height:.0f}" font-family="system-ui,sans-serif"><rect width="100%" height="100%" fill="white"/>'
        f"{''.join(out)}</svg>\n"
    )


def main() -> None:
    """Write the picture."""
    path: Path = ROOT / "docs" / "images" / "gpu.svg"
    path.write_text(picture(result("gpu_first_runs")))
    print(path)


if __name__ == "__main__":
    main()
