"""The networks that are measured: those of `rapydli_flow.zoo`, in the order of their size."""

from __future__ import annotations

import argparse
import inspect
from functools import partial
from typing import Any

import numpy as np

import rapydli_flow as rf
from rapydli_flow.graph import Graph
from rapydli_flow.zoo import Network, find, networks

CASES = tuple(networks.values())
RATE, MOMENTUM = 0.001, 0.9  # of SGD, on every side


def chosen(names: str) -> tuple[Network, ...]:
    """The networks of names that are parted by commas; all of them for nothing."""
    return tuple(find(name.strip()) for name in names.split(",")) if names else CASES


def has_dropout(case: Network) -> bool:
    """Whether the network's function takes a share to drop."""
    return "dropout" in inspect.signature(case.function).parameters


def dropout_of(case: Network) -> float:
    """The share that is dropped while the network trains."""
    return float(inspect.signature(case.function).parameters["dropout"].default) if has_dropout(case) else 0.0


def traced(case: Network, batch: int, *, dropout: bool = True) -> Graph:
    """The network's graph; without its dropout where two sides are to compute the same."""
    leave_out = has_dropout(case) and not dropout
    function = partial(case.function, dropout=0.0) if leave_out else case.function
    return rf.trace(function, rf.Spec((batch, *case.record)))


def batches(case: Network, batch: int, *, count: int = 4) -> list[tuple[Any, Any]]:
    """Records from N(0, 1) and labels, the same for every side and in every process."""
    rng = np.random.default_rng(0)
    return [
        (rng.standard_normal((batch, *case.record), dtype=np.float32), rng.integers(0, case.classes, batch))
        for _ in range(count)
    ]


def options(parser: argparse.ArgumentParser, *, rounds: int) -> None:
    """What the benchmarks beside PyTorch have in common on their command lines."""
    parser.add_argument("--networks", default="", help="names, parted by commas (default: all)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=rounds, help="turns of each side, at most")
    parser.add_argument(
        "--seconds", type=float, default=60.0, help="about how long a network's turns may take together"
    )
    parser.add_argument("--tune", type=float, default=0.0, help="seconds of tuning for each network first")
    parser.add_argument("--compile", action="store_true", help="also measure torch.compile, on channels_last")
    parser.add_argument(
        "--compile-limit", type=float, default=180.0, help="seconds that torch.compile may take for a network"
    )
    parser.add_argument("--results", default="", help="folder of the JSON file (default: benchmarks/results)")
