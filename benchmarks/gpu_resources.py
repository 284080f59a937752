"""What kernels take of a multiprocessor, for each generation of cards: registers, shared memory, what is spilled.

    .venv-cuda/bin/python benchmarks/gpu_resources.py [--targets sm_80,sm_90a] [--only conv,matmul] [--results FOLDER]

Compiles the default config of each GPU template, in float32 and bfloat16, for the largest of the samples that
`gpu_check.py` compares with references, and reads back what the assembler says. Needs CUDA's compiler, no GPU. Exit
code 1 where anything is spilled, or the assembler complains.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from common import RESULTS, table, write
from gpu_cases import Case, to_check

from gpu_kernels.compile import Request, cubins, missing
from rapydli_flow.spec import HALVES
from rapydli_flow.template import Device
from rapydli_flow.testing.gpu import instructions
from rapydli_flow.tuner import compilers

CARDS = {  # of each generation one, and its multiprocessors
    "sm_80": ("A100", 108),
    "sm_86": ("GeForce RTX 3090", 82),
    "sm_89": ("L40S", 142),
    "sm_90a": ("H100", 132),
    "sm_100": ("B200", 148),
    "sm_120": ("GeForce RTX 5090", 170),
}
LOCAL = {0x983, 0x387}  # LDL, STL: loads and stores of local memory, where spilled registers are
TENSOR = {0x23C: "HMMA", 0xDF0: "HGMMA"}
_asked: list[tuple[str, str, Request, Path]] = []  # templates do not travel: processes are forked from this one


def chosen(card: Device) -> list[tuple[str, Request]]:
    """For each template, and float32 and bfloat16, its default config on the largest sample that it serves."""
    found: dict[tuple[str, str, str], list[Case]] = {}
    for case, _ in to_check():
        dtypes = {spec.dtype for spec in (*case.sample.ins, *case.outs)}
        if not case.fused and HALVES[1] not in dtypes:
            dtype = HALVES[0] if HALVES[0] in dtypes else "float32"
            found.setdefault((case.template.family, case.template.name, dtype), []).append(case)
    out = []
    for (family, name, dtype), cases in found.items():
        for case in sorted(cases, key=elements, reverse=True):
            if requests := case.requests(card, others=0):
                out.append((f"{family}/{name} {dtype}", requests[0]))
                break
    return out


def elements(case: Case) -> int:
    return sum(spec.size for spec in (*case.sample.ins, *case.outs))


def row(number: int) -> dict[str, Any]:
    """What the kernels of one call take, the most of each."""
    target, name, request, folder = _asked[number]
    made = cubins(request, folder)
    code = sum((instructions(each.code) for each in made), Counter[int]())
    least = {
        "spilled_bytes": max(each.spill_bytes for each in made),
        "stack_bytes": max(each.stack_bytes for each in made),
        "local_accesses": sum(code[number] for number in LOCAL),
        "tensor_core": sum(code[number] for number in TENSOR),
        "said": [text for each in made for text in each.warnings],
    }
    return {
        "target": target,
        "template": name,
        "config": " ".join(f"{key}={value}" for key, value in request.config.items()),
        "kernels": len(made),
        "registers": max(each.registers for each in made),
        "threads": max(each.block for each in made),
        "shared_bytes": max(each.shared_bytes + each.dynamic_bytes for each in made),
        "instructions": code.total(),
        **{key: value for key, value in least.items() if value},  # what most have none of
    }


def shown(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A line for each generation."""
    out = []
    for target in dict.fromkeys(each["target"] for each in rows):
        of = [each for each in rows if each["target"] == target]
        out.append(
            {
                "target": target,
                "card": CARDS[target][0],
                "kernels": sum(each["kernels"] for each in of),
                "most registers": max(each["registers"] for each in of),
                "most shared KB": round(max(each["shared_bytes"] for each in of) / 1024, 1),
                "with tensor cores": sum("tensor_core" in each for each in of),
                "spilled": sum("spilled_bytes" in each for each in of),
                "with a stack": sum("stack_bytes" in each for each in of),
            }
        )
    return out


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", default=",".join(CARDS))
    parser.add_argument("--only", default="", help="families of templates (default: all)")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    if (why := missing()) is not None:
        print(why)
        return 2
    wanted = set(filter(None, args.only.split(",")))
    with tempfile.TemporaryDirectory() as folder:
        for target in args.targets.split(","):
            name, cores = CARDS[target]
            card = Device("cuda", name, target=target, cores=cores, vector_bytes=16)
            each = [(title, request) for title, request in chosen(card) if not wanted or title.split("/")[0] in wanted]
            _asked.extend((target, title, request, Path(folder)) for title, request in each)
        with ProcessPoolExecutor(args.processes, get_context("fork")) as pool:
            rows = list(pool.map(row, range(len(_asked))))
    print(table(shown(rows)))
    bad = [each for each in rows if "spilled_bytes" in each or "said" in each]
    for each in bad:
        print(f"NOT CLEAN for {each['target']}: {each['template']} {each['config']} {each.get('said', '')}")
    write("gpu_resources", rows, folder=args.results, summary=shown(rows), compiler=compilers("cuda"))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
