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


def main() -> None:
    """Replace what is between the markers."""
    path = ROOT / "README.md"
    text = path.read_text()
    for name, made in (("train_step", training_steps()), ("overhead", overheads())):
        pattern = rf"(<!-- {name} -->\n).*?(\n<!-- end -->)"
        text, count = re.subn(pattern, lambda m, made=made: m[1] + made + m[2], text, flags=re.DOTALL)
        if count != 1:
            raise SystemExit(f"README.md has no place for {name}")
    path.write_text(text)
    print(path)


if __name__ == "__main__":
    main()
