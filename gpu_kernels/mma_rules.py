"""Which tiles of tensor-core products fit, which are good untuned, and how long they take: for every such template."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import product as every
from typing import Any

import numpy as np

from rapydli_flow.spec import HALVES, Spec
from rapydli_flow.template import Config, Device, broken

from . import cost as costs
from .grid import INDEX_LIMIT, REGISTERS, blocks_of
from .mma import Problem, Tile, cut

SPACE: Mapping[str, tuple[Any, ...]] = {
    "bm": (128, 64, 256),
    "bn": (128, 64, 32, 256),
    "bk": (32, 16, 64),
    "wm": (64, 32),
    "wn": (64, 32),
    "stages": (3, 2, 4, 6),
    "group": (8, 1),  # blocks of rows that follow each other before the next column: they share b in the second cache
    "splits": (1, 2, 4, 8),
    "resident": (2, 1, 3, 4),
    "exchange": (True, False),  # threads exchange sums of halves, so that each stores 16 bytes instead of four
}
SHARED_KB = {
    "sm_80": 163,
    "sm_86": 99,
    "sm_87": 163,
    "sm_89": 99,
    "sm_90a": 227,
    "sm_90": 227,
    "sm_100": 227,
    "sm_103": 227,
    "sm_110": 227,
}  # of a block


Make = Callable[[Any, Sequence[Spec], Sequence[Spec]], Sequence[Problem]]


def shared_limit(device: Device) -> int:
    """Bytes of shared memory that a block may have."""
    return SHARED_KB.get(device.target, 99) * 1024


def target_number(device: Device) -> int:
    """'sm_90a' -> 90"""
    return int("".join(c for c in device.target if c.isdigit()) or 80)


def operands(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device) -> bool:
    """Is this a card with such tensor cores, and are the arrays float32 or halves, none empty, that 32 bits index?"""
    known = all(spec.dtype in ("float32", *HALVES) and 0 < spec.size < INDEX_LIMIT for spec in (*ins, *outs))
    return known and not op.exact and target_number(device) >= 80


def rules(problems: Make) -> dict[str, str | Callable[..., bool]]:
    """The hard constraints. They come after rules on the op alone, so that there are problems."""

    def vectors(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device) -> bool:
        found = problems(op, ins, outs)
        return all(min(p.vector_a, p.vector_b) * np.dtype(p.dtype).itemsize >= 4 for p in found)

    def indices(
        op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device, *, bm: int, bn: int, splits: int
    ) -> bool:
        return all((p.m + bm) * (p.n + bn) * p.batch * splits < INDEX_LIMIT for p in problems(op, ins, outs))

    def tiles(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device, **config: Any) -> bool:
        return all(_whole(cut(p, config), device) for p in problems(op, ins, outs))

    def exchanges(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device, *, exchange: bool) -> bool:
        return not exchange or all(p.kind == "half" and not p.rows_b for p in problems(op, ins, outs))

    def deep(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device, *, bk: int, splits: int) -> bool:
        return splits == 1 or all(p.k >= 2 * bk * splits for p in problems(op, ins, outs))

    return {
        "whole warps, few enough threads": (
            "bm % wm == 0 and bn % wn == 0 and bm // wm * (bn // wn) >= 2 and bm // wm * (bn // wn) <= 8"
        ),
        "copies of 4 bytes or more": vectors,
        "splits have steps": deep,
        "fragments of lines of halves are exchanged": exchanges,
        "results in 32-bit indices": indices,
        "tiles in shared memory and registers, copies shared out evenly": tiles,
    }


def _whole(t: Tile, device: Device) -> bool:
    limit = shared_limit(device)
    together = t.resident * (t.shared_bytes + 1024)
    if t.shared_bytes > limit or together > limit + 1024 or None in t.shares():
        return False
    if (
        t.bk < t.a.depth
        or t.bk > (64 if t.p.kind == "half" else 32)
        or t.a.layout.size * t.itemsize % 1024
        or t.b.layout.size * t.itemsize % 1024
    ):
        return False
    return t.registers <= min(255, (device.registers or REGISTERS) // (t.threads * t.resident))


# bm, bn, wm, wn, resident: the first are the best where there is work enough
SHAPES: tuple[tuple[int, int, int, int, int], ...]
SHAPES = ((128, 64, 64, 32, 2), (64, 128, 32, 64, 2), (128, 128, 64, 64, 2), (128, 256, 64, 64, 1))
SHAPES += ((256, 128, 64, 64, 1), (128, 128, 64, 32, 1), (256, 64, 64, 32, 1), (64, 64, 32, 32, 4), (64, 64, 32, 32, 3))
SHAPES += ((64, 64, 32, 32, 2), (128, 32, 32, 32, 3), (128, 32, 32, 32, 2), (64, 32, 32, 32, 3))
LOST = 0.47  # of the first of these, which rates of `cost` are of
WARPS = 8  # of a multiprocessor, that hide what each of them waits for


def estimate(t: Tile, device: Device, size_bytes: float) -> float:
    """A guess of the time of a tile's kernels."""
    p, cores = t.p, device.cores if device.cores > 1 else 132
    warps = min(t.resident, blocks_of(t.blocks, cores)) * t.threads / 32
    lost = 12 / t.bm + 12 / t.bn + 4 / t.wm + 4 / t.wn  # smaller tiles load more for each product
    lost += 0.1 if t.resident == 1 else 0  # all warps wait at one barrier
    lost += max(0.0, WARPS / warps - 1)
    relative = (1 + lost) / (1 + LOST)
    flops = 2 * t.blocks * t.bm * t.bn * (t.steps + 1) * t.bk * relative  # a pipeline has to fill
    seconds = costs.seconds(device, flops=flops, size_bytes=size_bytes, unit=p.kind, blocks=t.blocks)
    seconds += size_bytes / (2 * costs.COPY_BYTES_S * cores)  # blocks start and end together: copies wait for products
    if t.splits > 1:
        seconds += costs.LAUNCH_S + 8 * t.splits * p.batch * p.m * p.n / (costs.COPY_BYTES_S * cores)
    return seconds


def prefer(
    fits: Mapping[str, str | Callable[..., bool]], problems: Make, space: Mapping[str, tuple[Any, ...]] = SPACE
) -> Callable[..., Config]:
    """A template's function that finds a good config by `estimate`."""

    def best(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device) -> Config:
        first = {name: values[0] for name, values in space.items()}
        if broken({"operands": operands}, op, ins, outs, device, first):
            return first
        found = list(problems(op, ins, outs))
        half = bool(found) and found[0].kind == "half"
        tried: list[tuple[float, int, Config]] = []
        for (bm, bn, wm, wn, resident), splits in every(SHAPES, space["splits"]):
            for bk, stages in every((64, 32, 16) if half else (32, 16), (4, 3, 2)):
                config = {"bm": bm, "bn": bn, "bk": bk, "wm": wm, "wn": wn, "stages": stages}
                config |= {"group": 8, "splits": splits, "resident": resident, "exchange": half and not found[0].rows_b}
                if all(_whole(cut(p, config), device) for p in found):
                    time_s = sum(estimate(cut(p, config), device, 0) for p in found)
                    tried.append((time_s, len(tried), config))
                    break
        kept = (config for _, _, config in sorted(tried) if broken(fits, op, ins, outs, device, config) is None)
        return next(kept, first)

    return best


def cost(problems: Make) -> Callable[..., float]:
    """A template's foretold time."""

    def foretell(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device, config: Config) -> float:
        size_bytes = sum(spec.size_bytes for spec in (*ins, *outs))
        found = problems(op, ins, outs)
        return sum(estimate(cut(p, config), device, size_bytes / len(found)) for p in found)

    return foretell


def workspace(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], **config: Any) -> tuple[Spec, ...]:
    """The outputs of every split."""
    return () if config["splits"] == 1 else (Spec((config["splits"] * outs[0].size,)),)


def settings(
    problems: Make,
    own: Mapping[str, str | Callable[..., bool]] | None = None,
    space: Mapping[str, tuple[Any, ...]] = SPACE,
) -> dict[str, Any]:
    """What a template is registered with; ``own``: rules of its own, on the op alone."""
    fits = {"operands": operands, **(own or {}), **rules(problems)}
    best, foretell = prefer(fits, problems, space), cost(problems)
    return {"space": space, "fits": fits, "prefer": best, "workspace": workspace, "cost": foretell}
