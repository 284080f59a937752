"""The tuning space of `tiles`: rules that every such kernel must keep, good defaults, and what they should take."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from itertools import product as every
from typing import Any

import numpy as np

from rapydli_flow.spec import Spec
from rapydli_flow.template import Config, Device, broken

from . import cost as guess
from .grid import INDEX_LIMIT, REGISTERS, STATIC_SHARED_BYTES
from .pair import held
from .tiles import Product, Tile

Make = Callable[[Any, Sequence[Spec], Sequence[Spec]], Product]
Rules = Mapping[str, str | Callable[..., bool]]

SPACE: Mapping[str, tuple[Any, ...]] = {
    "bm": (128, 64, 32, 16, 256),
    "bn": (128, 64, 32, 16, 256),
    "bk": (16, 8, 32),
    "tm": (8, 4),
    "tn": (8, 4),
    "stages": (2, 1),
    "vector_a": (4, 2, 1),
    "vector_b": (4, 2, 1),
    "pad": (4, 0),  # of the rows of a transposed operand in shared memory
    "order": ("columns", "rows"),  # which neighbour block comes next: the one that shares rows, or columns
    "splits": (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128),  # of the inner sum
    "resident": (1, 2, 4),
}
# bm, bn, bk, tm, tn of the defaults; 128 x 128 x 16 needs more than the 128 registers that two blocks leave
SHAPES: tuple[tuple[int, int, int, int, int], ...]
SHAPES = ((128, 128, 8, 8, 8), (128, 64, 16, 8, 8), (64, 128, 16, 8, 8), (64, 64, 16, 8, 4))
SHAPES += ((64, 32, 16, 4, 4), (32, 64, 16, 4, 4), (32, 32, 16, 4, 4), (128, 16, 16, 8, 4), (16, 128, 16, 4, 8))
STAGED_VALUES = 32  # the most elements that a thread may have under way
WORKSPACE_BYTES = 256 << 20  # the most that parts of sums may take


def floats(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device) -> bool:
    """Are these non-empty arrays that 32 bits can index, operands of one float dtype, results of that or of sums?"""
    dtype = ins[0].dtype
    alike = all(spec.dtype == dtype for spec in ins) and all(spec.dtype in (dtype, held(dtype)) for spec in outs)
    return alike and all(spec.floating and 0 < spec.size < INDEX_LIMIT for spec in (*ins, *outs))


def workspace(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], **config: Any) -> tuple[Spec, ...]:
    """Parts of sums, where they are split."""
    return (Spec((config["splits"] * outs[0].size,), held(outs[0].dtype)),) if config["splits"] > 1 else ()


def rules(product: Make) -> Rules:
    """The hard constraints of every such kernel. They come after rules on the op alone, so that there is a product."""

    def loads(
        op: Any,
        ins: Sequence[Spec],
        outs: Sequence[Spec],
        device: Device,
        *,
        bm: int,
        bn: int,
        bk: int,
        tm: int,
        tn: int,
        vector_a: int,
        vector_b: int,
    ) -> bool:
        return _staged(product(op, ins, outs), bm, bn, bk, tm, tn, vector_a, vector_b) is not None

    def registers(
        op: Any,
        ins: Sequence[Spec],
        outs: Sequence[Spec],
        device: Device,
        *,
        bm: int,
        bn: int,
        bk: int,
        tm: int,
        tn: int,
        vector_a: int,
        vector_b: int,
        splits: int,
        resident: int,
    ) -> bool:
        p = product(op, ins, outs)
        staged = _staged(p, bm, bn, bk, tm, tn, vector_a, vector_b) or 0
        threads = bm // tm * (bn // tn)
        own = 24 if splits == 1 else 42  # where things are; a part of a sum begins and ends somewhere
        used = (tm * tn + tm + tn) * (p.held_bytes // 4) + own + staged
        return used <= min(255, (device.registers or REGISTERS) // (threads * resident))

    def shared(
        op: Any,
        ins: Sequence[Spec],
        outs: Sequence[Spec],
        device: Device,
        *,
        bm: int,
        bn: int,
        bk: int,
        stages: int,
        pad: int,
    ) -> bool:
        p = product(op, ins, outs)
        size_bytes = p.held_bytes * stages * bk * (bm + bn + sum(p.pads(pad)))
        return size_bytes <= min(STATIC_SHARED_BYTES, device.shared_bytes or STATIC_SHARED_BYTES)

    def indices(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device, *, bm: int, bn: int) -> bool:
        p = product(op, ins, outs)
        return (p.m + bm) * p.row_pitch + (p.batch - 1) * p.base[2] + bn < INDEX_LIMIT

    def parts(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device, *, bk: int, splits: int) -> bool:
        p = product(op, ins, outs)
        if splits == 1:
            return True
        return splits * bk <= p.k and splits * outs[0].size * p.held_bytes <= WORKSPACE_BYTES

    def vectors(
        op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device, *, vector_a: int, vector_b: int
    ) -> bool:
        return max(vector_a, vector_b) * np.dtype(ins[0].dtype).itemsize <= 16

    return {
        "whole warps, few enough threads": (
            "bm % tm == 0 and bn % tn == 0 and bm // tm * (bn // tn) % 32 == 0 and bm // tm * (bn // tn) <= threads"
        ),
        "loads of at most 16 bytes": vectors,
        "loads shared out evenly": loads,
        "sums and loads in registers": registers,
        "tiles in shared memory": shared,
        "parts of the sum": parts,
        "results in 32-bit indices": indices,
    }


def _staged(p: Product, bm: int, bn: int, bk: int, tm: int, tn: int, vector_a: int, vector_b: int) -> int | None:
    """Registers of a thread for its loads and their state; None where they are not shared out evenly, or too many."""
    shares = p.shares(vector_a, vector_b, threads=bm // tm * (bn // tn), bm=bm, bn=bn, bk=bk)
    values = sum(s.each * s.vector for s in shares if s is not None)
    if None in shares or values > STAGED_VALUES:
        return None
    return values * (p.held_bytes // 4) + p.state * (shares[0].each if shares[0] is not None else 0)


def estimate(t: Tile, device: Device, size_bytes: float, out_bytes: float) -> float:
    """How long a tile's kernels should take."""
    p = t.p
    multiplied = t.blocks * t.bm * t.bn * (t.k / t.splits + 32)  # to start and to end takes as long as 32 steps
    if p.work:
        multiplied *= p.work / (p.batch * p.phases * p.m * p.n * p.k)
    multiplied *= (1 + 16 / t.bm + 16 / t.bn) / 1.3  # smaller tiles load more for each output
    flops = 2 * multiplied * (p.held_bytes // 4)
    together = max(1, min(t.resident, 256 // t.threads))
    blocks = -(-t.blocks // together)
    time_s = guess.seconds(device, flops=flops, size_bytes=size_bytes, unit="fp32", blocks=blocks)
    if t.splits == 1:
        return time_s
    parts_bytes = 1.5 * t.splits * out_bytes  # written beside the products, and read after them
    return time_s + guess.LAUNCH_S + guess.seconds(device, flops=0, size_bytes=parts_bytes, unit="fp32", blocks=132)


def cost(product: Make) -> Callable[..., float]:
    """A template's foretold time."""

    def foretell(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device, config: Config) -> float:
        t, _, _ = product(op, ins, outs).cut(config)
        return estimate(t, device, sum(s.size_bytes for s in (*ins, *outs)), outs[0].size * t.p.held_bytes)

    return foretell


def declared(own: Rules, product: Make, *, largest: int = 128 * 128) -> dict[str, Any]:
    """What a template of such kernels is registered with; ``own``: its rules on the op alone, and on loads."""
    fits = {"floats": floats, **own, **rules(product)}
    return {
        "space": SPACE,
        "fits": fits,
        "prefer": prefer(fits, product, largest=largest),
        "workspace": workspace,
        "cost": cost(product),
    }


def prefer(fits: Rules, product: Make, *, largest: int = 128 * 128) -> Callable[..., Config]:
    """A template's function that finds a good config: the tile and split that should take least.

    ``largest`` bounds bm * bn, for kernels that have other uses for the registers of a thread.
    """

    def best(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device) -> Config:
        none = {name: values[0] for name, values in SPACE.items()}
        on_op = {name: rule for name, rule in fits.items() if not isinstance(rule, str) and not _parameters(rule)}
        if broken(on_op, op, ins, outs, device, none):
            return none
        p = product(op, ins, outs)
        size_bytes, out_bytes = sum(s.size_bytes for s in (*ins, *outs)), outs[0].size * p.held_bytes

        def time(shape: tuple[int, ...], splits: int) -> float:
            bm, bn, bk, tm, tn = shape
            return estimate(Tile(p, bm, bn, bk, tm, tn, 2, "columns", splits, 2), device, size_bytes, out_bytes)

        ways: list[tuple[float, int, tuple[int, int, int, int, int], int]] = []
        for shape in SHAPES:
            if shape[0] * shape[1] <= largest:
                splits = min(_splits(p, out_bytes), key=lambda s: time(shape, s))
                ways.append((time(shape, splits), len(ways), shape, splits))
        for _, _, (bm, bn, bk_0, tm, tn), splits in sorted(ways):
            threads = bm * bn // (tm * tn)
            for bk, va, vb in every(dict.fromkeys((bk_0, 16, 8, 32)), (4, 2, 1), (4, 2, 1)):
                for resident in (r for r in (4, 2, 1) if r * threads <= 512 and r * bm * bn * bk <= 2**18):
                    config = {
                        **{"bm": bm, "bn": bn, "bk": bk, "tm": tm, "tn": tn, "stages": 2},
                        **{"vector_a": va, "vector_b": vb, "pad": 4, "order": "columns"},
                        **{"splits": splits, "resident": resident},
                    }
                    if broken(fits, op, ins, outs, device, config) is None:
                        return config
        return none

    return best


def _splits(p: Product, out_bytes: int) -> list[int]:
    return [s for s in SPACE["splits"] if s == 1 or (s * 64 <= p.k and s * out_bytes <= WORKSPACE_BYTES)]


def _parameters(rule: Callable[..., bool]) -> list[str]:
    """Those of a config that a rule names."""
    return list(inspect.signature(rule).parameters)[4:]
