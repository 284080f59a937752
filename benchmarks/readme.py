"""Write the measured tables of README.md and of the manual from benchmarks/results/*.json, between their markers."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

from common import geometric_mean

ROOT = Path(__file__).resolve().parent.parent
SIDES = {
    "ours": "rapydli_flow",
    "torch_nchw": "PyTorch NCHW",
    "torch_channels_last": "PyTorch channels_last",
    "torch_compile": "torch.compile",
}


def result(name: str) -> dict[str, Any]:
    """What a benchmark wrote."""
    loaded: dict[str, Any] = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
    return loaded


def beside_torch(name: str) -> str:
    """Ours beside PyTorch's: milliseconds, their ratio and its geometric mean, and memory where it was measured."""
    found = result(name)
    rows = found["rows"]
    sides = [side for side in SIDES if any(r.get(f"{side}_ms") for r in rows)]
    memory = any(r.get("ours_mb") for r in rows)
    head = ["network, batch", *(SIDES[side] for side in sides), "PyTorch's best / ours"]
    head += ["ours, MB", "PyTorch, MB"] if memory else []
    lines = [_line(head), "|---" * len(head) + "|"]
    for r in rows:
        cells = [f"{r['network']}, {r['batch']}"]
        cells += [f"{r[f'{side}_ms']:.1f} ms" if r.get(f"{side}_ms") else "" for side in sides]
        cells += [f"{r['speedup']:.2f}"]
        cells += [_mb(r["ours_mb"]), _mb(_least(r))] if memory else []
        lines.append(_line(cells))
    if len(rows) > 1:
        mean = geometric_mean([r["speedup"] for r in rows])
        cells = ["geometric mean", *("" for _ in sides), f"{mean:.2f}", *(("", "") if memory else ())]
        lines.append(_line(cells))
    where = found["hardware"]
    versions = where["packages"]
    lines.append("")
    peaks = (
        "MB: the most that a process with one side only has, PyTorch's on the side that takes least. " if memory else ""
    )
    lines.append(
        f"{rows[0]['threads']} threads of {where['cpu']}, "
        f"PyTorch {versions['torch']}, Numba {versions['numba']}, "
        f"medians of interleaved runs, {where['time'][:10]}. {peaks}A shared machine: read the ratio."
    )
    return "\n".join(lines)


def on_a_gpu() -> str:
    """Training steps, and convolutions in float32, on a GPU beside PyTorch's."""
    found, convolutions = result("train_cuda"), result("conv_cuda")
    words = {"fp32": "float32", "tf32": "TF32", "bf16": "bfloat16"}
    head = ["network, batch", "arithmetic", *(SIDES[s] for s in list(SIDES)[:3]), "PyTorch's best / ours"]
    lines = [_line(head), "|---" * len(head) + "|"]
    for r in found["rows"]:
        times = [f"{r[f'{side}_ms']:.2f} ms" for side in ("ours", "nchw", "channels_last")]
        name = f"{r['network']}, {r['batch']}"
        lines.append(_line([name, words[r["arithmetic"]], *times, f"{r['ratio']:.2f}"]))
    means = convolutions["summary"]
    rows = sum(r["direction"] != "fused" for r in convolutions["rows"])
    lines += [
        "",
        f"Convolutions in float32 beside cuDNN's: {means['fp32 all']:.2f} (geometric mean of {rows}; forward "
        f"{means['fp32 forward']:.2f}, gradients {means['fp32 input']:.2f} and {means['fp32 filter']:.2f}), with bias, "
        f"residual and ReLU in the same kernel {means['fp32 fused']:.2f}. {found['gpu']['device']}, "
        f"PyTorch {found['gpu']['torch']}, untuned, {found['hardware']['time'][:10]}.",
    ]
    return "\n".join(lines)


def resources() -> str:
    """What kernels take on each generation of cards, and the tensor-core kernels of one of them."""
    found = result("gpu_resources")
    head = list(found["summary"][0])
    lines = [_line(head), "|---" * len(head) + "|"]
    lines += [_line([str(value) for value in row.values()]) for row in found["summary"]]
    head = ["on an H100", "config", "registers", "threads", "shared KB", "tensor-core instructions"]
    lines += ["", _line(head), "|---" * len(head) + "|"]
    for row in found["rows"]:
        if row["target"] == "sm_90a" and "tensor_core" in row:
            shared = f"{row['shared_bytes'] / 1024:.0f}"
            sizes = [
                str(row["registers"]),
                str(row["threads"]),
                shared,
                f"{row['tensor_core']} of {row['instructions']}",
            ]
            lines.append(_line([row["template"], f"`{row['config']}`", *sizes]))
    lines += ["", f"Compiled by {found['compiler']}; every kernel, and its config, is in `gpu_resources.json`."]
    return "\n".join(lines)


def _line(cells: list[str]) -> str:
    return "|" + "".join(f" {cell} |" if cell else " |" for cell in cells)


def _least(row: dict[str, Any]) -> float | None:
    """MB of the side of PyTorch that takes least."""
    known = [row[f"{side}_mb"] for side in SIDES if side != "ours" and row.get(f"{side}_mb")]
    return min(known, default=None)


def _mb(value: float | None) -> str:
    return f"{value:,.0f}" if value else ""


def convolutions() -> str:
    """Geometric means of the convolution table, and what is slower than PyTorch."""
    found = result("conv")
    rows, means = found["rows"], found["summary"]
    names = {"geometric mean": f"all {len(rows)}", "forward": "forward", "input": "input gradient"}
    names |= {"filter": "filter gradient", "3x3, stride 1, 64 channels or more": "3 x 3, stride 1, 64 channels or more"}
    names |= {"exact": "all, without Winograd's algorithm", "least": "the slowest row"}
    lines = ["| convolutions | PyTorch's best / ours |", "|---|---|"]
    lines += [f"| {said} | {means[name]:.2f} |" for name, said in names.items() if name in means]
    below = [sum(r["ratio"] < limit for r in rows) for limit in (1.0, 0.9)]
    lines += ["", f"{below[0]} of {len(rows)} are slower than PyTorch's, {below[1]} of them by more than a tenth."]
    errors = [max(r[name] for r in rows) for name in ("error", "exact error", "torch error")]
    lines.append(
        f"Largest errors against float64, relative to the largest element: {errors[0]:.1e}, without Winograd's "
        f"algorithm {errors[1]:.1e}, PyTorch's {errors[2]:.1e}."
    )
    where = found["hardware"]
    torch = f"PyTorch {where['packages']['torch']} in the better of its layouts"
    lines.append(
        f"{found['threads']} threads of {where['cpu']}, {torch}, {where['time'][:10]}. "
        "A shared machine: read the ratio."
    )
    return "\n".join(lines)


def scaling() -> str:
    """How much faster two threads are than one."""
    found = result("conv_scaling")
    rows = sorted(found["rows"], key=lambda r: r["2 threads / 1"])
    worst = ", ".join(f"{r['shape']} {r['direction']} {r['2 threads / 1']:.2f}" for r in rows[:3])
    middle = rows[len(rows) // 2]["2 threads / 1"]
    return (
        f"Two threads compute these convolutions {found['mean']:.2f} times as fast as one (geometric mean of "
        f"{len(rows)} rows; median {middle:.2f}; the least: {worst}). Multiply-adds in registers, which wait for "
        f"nothing, gain {found['registers']:.2f} at the same time: a shared machine does not always give a second core."
    )


def products() -> str:
    """Products of dense layers beside NumPy's BLAS and PyTorch's."""
    found = result("dense")
    lines = [
        "| layer | direction | ours, GFLOP/s | NumPy | PyTorch | ours / NumPy | ours / PyTorch |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in found["rows"]:
        speeds = " | ".join(f"{r[side]:.0f}" for side in ("ours", "numpy", "torch"))
        ratios = " | ".join(f"{r[f'ours / {side}']:.2f}" for side in ("numpy", "torch"))
        lines.append(f"| {r['layer']} | {r['direction']} | {speeds} | {ratios} |")
    lines.append(f"| geometric mean | | | | | {found['means']['numpy']:.2f} | {found['means']['torch']:.2f} |")
    return "\n".join(lines)


def slower() -> str:
    """The convolutions that are slower than PyTorch's."""
    rows = [r for r in result("conv")["rows"] if r["ratio"] < 1]
    lines = [
        "| convolution | direction | PyTorch's best / ours | percent of peak | template |",
        "|---|---|---|---|---|",
    ]
    for r in sorted(rows, key=lambda r: r["ratio"]):
        name, direction = r["shape"], r["direction"]
        template = r["template"].partition(" ")[0]
        lines.append(f"| {name} | {direction} | {r['ratio']:.2f} | {r['peak %']:.0f} | {template} |")
    return "\n".join(lines)


def overheads() -> str:
    """Dask beside in process."""
    found = result("overhead")
    lines = ["| cifar10_quick, ms a step | | ratio |", "|---|---|---|"]
    lines += [f"| {r['what']} | {r['ms_a_step']:.1f} | {r['ratio']:.2f} |" for r in found["rows"] if r["ratio"]]
    first = next(r for r in found["rows"] if not r["ratio"])
    lines += ["", f"First step of LeNet, from `import`, with a warm kernel cache: {first['ms_a_step'] / 1e3:.1f} s."]
    step, call = found["step_us"], found["call_us"]
    lines += [
        f"Python takes {step:.1f} us of a step, and {call:.2f} us of each call of a kernel, a tiny kernel included."
    ]
    return "\n".join(lines)


def together() -> str:
    """Parallel training: a line for each figure, of the sections that were measured."""
    found = result("runtime")
    rows = {name: section["rows"] for name, section in found.items()}
    lines = ["Parallel training, on one host:", "", "| | |", "|---|---|"]
    for r in rows.get("allreduce", ()):
        lines.append(f"| all-reduce of {r['size']}, two processes: gloo / ours | {r['speedup']:.2f} |")
    for r in rows.get("ddp", ()):
        what = f"step of {r['network']}, {r['batch']}, two workers, strategy {r['strategy']}"
        lines.append(f"| {what}: PyTorch DDP / ours | {r['speedup']:.2f} |")
        lines.append(f"| {what}: one worker of two threads / ours | {r['of_alone']:.2f} |")
    for r in rows.get("links", ()):
        link = f"over a link of {r['link_gbit_s']} Gbit/s"
        if r["ranks"] == 2:
            shares = f"{r['of_link']:.0%} of it, {r['of_socket']:.0%} of a plain socket"
            lines.append(f"| all-reduce of 25 MB {link} | {shares} |")
        else:
            what = f"the same of two ranks on each end {link}: by pieces / by hosts"
            lines.append(f"| {what} | {1 / r['of_pieces']:.2f} |")
    for r in (r for r in rows.get("overlap", ()) if r["gradients"] != "after"):
        what = f"step of {r['network']} over a link of 1 Gbit/s: sums after the backward pass / {r['gradients']}"
        lines.append(f"| {what} | {1 / r['of_after']:.2f} |")
    parts = [r["of_unsplit"] for r in rows.get("spatial", ())[1:]]
    if parts:
        shares = ", ".join(f"{part:.0%}" for part in parts)
        lines.append(f"| memory where two ranks divide an image of 2048 x 2048, of one rank's | {shares} |")
    for r in rows.get("scheduler", ()):
        what = f"steps that Dask's scheduler does in a second of its core, {r['ranks']} ranks"
        lines.append(f"| {what} | {r['scheduler_steps_s']:.0f} |")
    for r in rows.get("dask", ()):
        what = f"one Dask worker beside in process: {r['network']}, {r['here_ms']:.1f} ms a step"
        lines.append(f"| {what} | {r['more_percent']:+.1f} %, {r['more_ms']:+.2f} ms |")
    where = next(iter(found.values()))["hardware"]
    date = max(section["hardware"]["time"] for section in found.values())[:10]
    lines += ["", f"{where['cores']} cores of {where['cpu']}, {date}. A shared machine: read ratios."]
    return "\n".join(lines)


def tuning() -> str:
    """Spaces beside Kernel Tuner, strategies, and what tuning a step is worth."""
    spaces, recorded, steps = (result(f"tuner_{name}") for name in ("spaces", "strategies", "step"))
    lines = ["| search space | valid of all points | construct | Kernel Tuner | count only |", "|---|---|---|---|---|"]
    for r in spaces["rows"]:
        lines.append(
            f"| {r['space']} | {r['valid']:,} of {r['cartesian']:,} | {r['ours_ms']:.0f} ms | "
            f"{r['kernel_tuner_ms']:.0f} ms | {r['count_ms']:.1f} ms |"
        )
    total = spaces["total"]
    lines += [
        f"| together | | {total['ours_ms']:.0f} ms | {total['kernel_tuner_ms']:.0f} ms | |",
        "",
        "| recorded space | configs | default | guided | random | guided, from chance | random, from chance |",
        "|---|---|---|---|---|---|---|",
    ]
    shares = {(r["space"], r["start"], r["strategy"]): r["share of evaluations to 98 %"] for r in recorded["rows"]}
    for name, r in {r["space"]: r for r in recorded["rows"]}.items():
        cells = [_share(shares[name, at, how]) for at in ("default", "chance") for how in ("guided", "random")]
        lines.append(f"| {name} | {r['points']} | {r['default']:.0%} | {' | '.join(cells)} |")
    lines.append("")
    for r in steps["rows"]:
        lines.append(
            f"Tuning a step of {r['network']} from nothing took {r['seconds']:.0f} s ({r['configs tried']} configs): "
            f"{r['default_ms']:.1f} ms became {r['tuned_ms']:.1f} ms, {r['gain']:.2f} times as fast."
        )
    lines += [
        "",
        "| tuned again and again, from nothing | seed | chose the same | slowest / best choice | slowest / default |",
        "|---|---|---|---|---|",
    ]
    for r in result("tuner_stability")["rows"]:
        lines.append(
            f"| {r['kernel']} | {r['chance']} | {r['chose the one most chosen']} of {r['repeats']} | "
            f"{r['slowest winner / best winner']:.3f} | {r['slowest winner / default']:.2f} |"
        )
    return "\n".join(lines)


def _share(value: float | None) -> str:
    return "over half" if value is None else f"{value:.1%}"


def main() -> None:
    """Replace what is between the markers."""
    parts = {
        "conv": (convolutions, "conv", "README.md"),
        "slower": (slower, "conv", "docs/speed.md"),
        "scaling": (scaling, "conv_scaling", "docs/speed.md"),
        "dense": (products, "dense", "docs/speed.md"),
        "train_step": (partial(beside_torch, "train_step"), "train_step", "README.md"),
        "gpu": (on_a_gpu, "train_cuda", "README.md"),
        "resources": (resources, "gpu_resources", "docs/gpu-speed.md"),
        "inference": (partial(beside_torch, "inference"), "inference", "README.md"),
        "overhead": (overheads, "overhead", "README.md"),
        "runtime": (together, "runtime", "README.md"),
        "tuning": (tuning, "tuner_spaces", "README.md"),
    }
    for name, (make, needed, page) in parts.items():
        if not (ROOT / "benchmarks" / "results" / f"{needed}.json").exists():
            print(f"{needed}.json is not there: make bench, or bench-tuner, makes it")
            continue
        made, path = make(), ROOT / page
        pattern = rf"(<!-- {name} -->\n).*?(\n<!-- end -->)"
        text, count = re.subn(pattern, lambda m, made=made: m[1] + made + m[2], path.read_text(), flags=re.DOTALL)
        if count != 1:
            raise SystemExit(f"{page} has no place for {name}")
        path.write_text(text)
    print(", ".join(sorted({page for _, _, page in parts.values()})))


if __name__ == "__main__":
    main()
