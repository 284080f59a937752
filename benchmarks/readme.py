"""Write the measured tables of README.md from benchmarks/results/*.json, between their markers."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def result(name: str) -> dict[str, Any]:
    """What a benchmark wrote."""
    loaded: dict[str, Any] = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
    return loaded


def training_steps() -> str:
    """Our step beside PyTorch's."""
    found = result("train_step")
    lines = [
        "| network, batch | rapydli_flow | PyTorch NCHW | PyTorch channels_last | PyTorch's best / ours |",
        "|---|---|---|---|---|",
    ]
    for r in found["rows"]:
        lines.append(
            f"| {r['network']}, {r['batch']} | {r['ours_ms']:.1f} ms | {r['torch_nchw_ms']:.1f} ms | "
            f"{r['torch_channels_last_ms']:.1f} ms | {r['speedup']:.2f} |"
        )
    where = found["hardware"]
    versions = where["packages"]
    lines.append("")
    lines.append(
        f"{found['rows'][0]['threads']} threads of {where['cpu']}, "
        f"PyTorch {versions['torch']}, Numba {versions['numba']}, "
        f"medians of interleaved runs, {where['time'][:10]}. A shared machine: read the ratio."
    )
    return "\n".join(lines)


def overheads() -> str:
    """Dask beside in process."""
    found = result("overhead")
    lines = ["| cifar10_quick, ms a step | | ratio |", "|---|---|---|"]
    lines += [f"| {r['what']} | {r['ms_a_step']:.1f} | {r['ratio']:.2f} |" for r in found["rows"] if r["ratio"]]
    first = next(r for r in found["rows"] if not r["ratio"])
    lines += ["", f"First step of LeNet, from `import`, with a warm kernel cache: {first['ms_a_step'] / 1e3:.1f} s."]
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
    path = ROOT / "README.md"
    text = path.read_text()
    for name, made in (("train_step", training_steps()), ("overhead", overheads()), ("tuning", tuning())):
        pattern = rf"(<!-- {name} -->\n).*?(\n<!-- end -->)"
        text, count = re.subn(pattern, lambda m, made=made: m[1] + made + m[2], text, flags=re.DOTALL)
        if count != 1:
            raise SystemExit(f"README.md has no place for {name}")
    path.write_text(text)
    print(path)


if __name__ == "__main__":
    main()
