"""What GPUs tell each other by NCCL: is it right, and how fast beside the way through the host?

    python benchmarks/meetings_cuda.py [--device emulated]

With one GPU: strided copies within the card beside NumPy's, and NCCL with one rank, which sums and swaps with itself.
With several, also: runs of plans of each kind on two of them, by NCCL and through the host, whose parameters must have
the same bits; and how long a sum takes either way. ``--device emulated`` goes through all of it without a GPU, for
what is right. Exit code 0: all right; 1: wrong numbers; 2: no GPU.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from common import RESULTS, table, write

import rapydli_flow as rf
from gpu_kernels.card import Accelerator, Box
from gpu_kernels.driver import Driver
from rapydli_flow import nn, optim
from rapydli_flow.errors import MissingDependency
from rapydli_flow.runtime.card_rank import CardRank
from rapydli_flow.runtime.devices import card_of, device_of
from rapydli_flow.runtime.transport import Threads
from rapydli_flow.scheduler import AllReduce, Buffer, Collective, Program
from rapydli_flow.spec import Array, Spec

SIZES_MB = (1, 25, 250)
PLANS: tuple[dict[str, Any], ...] = (
    {},
    {"overlap": True},
    {"shard": "parameters"},
    {"strategy": "spatial"},
    {"strategy": "hybrid"},
    {"strategy": "pipeline", "micro_batches": 2},
)


def on_card(card: Accelerator, data: Array) -> int:
    address = card.reserve(data.nbytes)
    card.upload(address, data)
    card.wait()
    return address


def back(card: Accelerator, address: int, like: Array) -> Array:
    found = np.empty_like(like)
    card.download(found, address)
    card.wait()
    return found


def copies(card: Accelerator) -> bool:
    """Regions of three axes, from place to place."""
    rng, right = np.random.default_rng(0), True
    for _ in range(50):
        width, rows, planes = (int(n) for n in rng.integers(1, (200, 9, 9)))
        more = rng.integers(0, 5, 6)
        shapes = [(planes + int(more[k]), rows + int(more[k + 1]), width + int(more[k + 2])) for k in (0, 3)]
        target, source = (rng.integers(0, 255, shape).astype(np.uint8) for shape in shapes)
        pitches = [number for shape in shapes for number in (shape[2], shape[1])]
        places = [on_card(card, array) for array in (target, source)]
        card.copy_box(*places, Box(width, rows, planes, *pitches))
        target[:planes, :rows, :width] = source[:planes, :rows, :width]
        right &= bool(np.array_equal(back(card, places[0], target), target))
        for place in places:
            card.free(place)
    return right


def alone(card: Accelerator) -> bool:
    """A communicator of one rank."""
    way = card.meet(card.meeting(), 0, 1, lambda waited_s: None)
    right = True
    for dtype in ("float32", "bfloat16", "float16", "float64", "int32"):
        data = (100 * np.random.default_rng(0).normal(size=1000)).astype(Spec((), dtype).dtype)
        source, target = on_card(card, data), on_card(card, np.zeros_like(data))
        way.all_reduce(card, [(source, target, data.size)], dtype)
        right &= back(card, target, data).tobytes() == data.tobytes()
    if "emulated" not in card.name:  # one that NumPy plays has nothing to say to itself
        card.upload(target, np.zeros_like(data))
        way.swap(card, [(0, source, data.nbytes)], [(0, target, data.nbytes)])
        right &= back(card, target, data).tobytes() == data.tobytes()
    way.check()
    way.abort()
    return right


def small_step(size: int, width: int) -> Any:
    def network(x: Any) -> Any:
        x = nn.relu(nn.conv(x, width, 3, padding=1))
        x = nn.max_pool(nn.relu(nn.conv(x, 2 * width, 3, padding=1)), 2)
        return nn.dense(nn.relu(nn.dense(x, 4 * width)), 10)

    graph = rf.trace(network, rf.Spec((16, size, size, 4)))
    return rf.train_step(graph, loss=nn.cross_entropy, optimizer=optim.sgd(0.05, momentum=0.9))


def runs(devices: Sequence[str]) -> list[dict[str, Any]]:
    """Runs on two cards, either way: of two ranks a sum has one order only, so the bits are the same."""
    size, width = (4, 4) if "emulated" in devices else (8, 16)
    step, rng = small_step(size, width), np.random.default_rng(0)
    data = {"x": rng.normal(size=(64, size, size, 4)).astype(np.float32), "label": rng.integers(0, 10, 64)}
    rows = []
    for how in PLANS:
        host, direct = (
            rf.fit(step, data, steps=6, plan=rf.plan(step, device=devices, threads=1, nccl=nccl, **how))
            for nccl in (False, True)
        )
        same = all(host.state[name].tobytes() == value.tobytes() for name, value in direct.state.items())
        rows.append({"plan": ", ".join(f"{k}={v}" for k, v in how.items()) or "data", "same bits": same})
    return rows


def sums(devices: Sequence[str], sizes_mb: Sequence[int]) -> list[dict[str, Any]]:
    """How long a sum of two cards takes, either way."""
    rows = []
    for size_mb in sizes_mb:
        times = {nccl: sum_s(devices, size_mb * 250_000, nccl=nccl) for nccl in (True, False)}
        rate = size_mb / 1000 / times[True]
        rows.append(
            {
                "MB": size_mb,
                "NCCL ms": round(1e3 * times[True], 3),
                "host ms": round(1e3 * times[False], 3),
                "times as fast": round(times[False] / times[True], 1),
                "GB/s by NCCL": round(rate, 1),
            }
        )
    return rows


def sum_s(devices: Sequence[str], elements: int, *, nccl: bool, rounds: int = 7) -> float:
    """Seconds of a program that is one sum."""
    x = Buffer(0, Spec((elements,), "float32"))
    part = Collective("sum", AllReduce(ranks=(0, 1)), (x,), (x,))
    held = [device_of(name) for name in devices]
    empty: dict[str, Any] = {"leaves": {}, "layout": {}, "starts": {}, "outputs": {}, "updates": ()}
    empty |= {"arena_bytes": x.spec.size_bytes, "donated": 0, "copied": 0, "nccl": nccl}
    ends = Threads.of(2)

    ranks = [
        CardRank(Program(steps=(part,), device=device, **empty), device, transport=end)
        for device, end in zip(held, ends, strict=True)
    ]

    def run(rank: CardRank) -> float:
        times = []
        for step in range(rounds + 2):
            begin = time.perf_counter()
            rank.advance(0, step)
            rank.taken()
            times.append(time.perf_counter() - begin)
        return statistics.median(times[2:])

    with ThreadPoolExecutor(2) as pool:
        slowest = max(pool.map(run, ranks))
    for rank in ranks:
        rank.close()
    return slowest


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "emulated"), default="cuda")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    try:
        card = card_of(device_of(args.device))
    except MissingDependency as problem:
        print(problem)
        return 2
    card.use()
    right = {"copies": copies(card)}
    try:
        right["NCCL with one rank"] = alone(card)
    except MissingDependency as problem:
        print(f"NCCL was not tried: {problem}")
    for name, good in right.items():
        print(f"{name}: {'right' if good else 'WRONG'}")
    made: list[dict[str, Any]] = []
    timed: list[dict[str, Any]] = []
    gpus = Driver().count() if args.device == "cuda" else 2
    if gpus > 1 and len(right) > 1:
        devices = ("cuda:0", "cuda:1") if args.device == "cuda" else ("emulated", "emulated")
        made = runs(devices)
        print(table(made))
        timed = sums(devices, SIZES_MB if args.device == "cuda" else SIZES_MB[:1])
        print(table(timed))
    else:
        print("nothing of what several GPUs tell each other was tried")
    write("meetings_cuda", made, folder=args.results, right=right, sums=timed, device=args.device, gpus=gpus)
    return 0 if all(right.values()) and all(row["same bits"] for row in made) else 1


if __name__ == "__main__":
    sys.exit(main())
