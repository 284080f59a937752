"""Grid: what a GPU template returns, and the few sums that every template does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

INDEX_LIMIT = 2**31  # kernels count elements in 32 bits
STATIC_SHARED_BYTES = 48 * 1024  # what every card gives without opting in
REGISTERS = 65536  # of one multiprocessor, every card since sm_50
WARPGROUP = 128  # threads


@dataclass(frozen=True)
class TensorMap:
    """How the copy engine of a card (TMA, sm_90 on) sees an array: its boxes go to shared memory as lines of 128 bytes.

    Dimensions are innermost first, their pitches in elements. A box of pixels (im2col mode; ``lower`` is given) is of
    ``box = (channels, pixels)``: its pixels follow each other along all dimensions but the first, ``steps`` apart, from
    ``lower`` up to size + ``upper`` in the spatial ones. What lies outside is zero.
    """

    array: int  # of the kernel's inputs, outputs, workspaces and extras, in this order
    dtype: str
    dims: tuple[int, ...]
    pitches: tuple[int, ...]  # of dims[1:]
    box: tuple[int, ...]
    lower: tuple[int, ...] = ()
    upper: tuple[int, ...] = ()
    steps: tuple[int, ...] = ()

    @classmethod
    def read(cls, fields: Mapping[str, Any]) -> TensorMap:
        """From JSON."""
        known: dict[str, Any] = {n: tuple(value) if isinstance(value, list) else value for n, value in fields.items()}
        return cls(**known)


@dataclass(frozen=True)
class Grid:
    """A kernel: ``kernel(ins, outs, work, extras, at)`` for each of ``grid`` blocks of ``block`` threads.

    ``ins``, ``outs``, ``work`` and ``extras`` are tuples of flat arrays, each aligned to 16 bytes; ``work`` are
    the buffers that the template's `workspace` asks for; ``at`` holds lo and whole of the output's block (int64),
    for formulas that use indices. Every output element is written once, by one thread, in an order that the
    config fixes. A template returns one grid, or several, which run one after the other on the same buffers.

    With ``maps`` the kernel takes a sixth argument, their descriptors. With ``roles`` each warpgroup (128 threads) may
    go its own way: control flow is the same for all threads of a warpgroup instead of a block.
    """

    kernel: Callable[..., None]
    grid: int
    block: int
    shared_bytes: int = 0  # dynamic; arrays of a size known to the compiler are not counted
    resident: int = 1  # blocks that a multiprocessor should hold at once: bounds the registers of a thread
    maps: tuple[TensorMap, ...] = ()
    roles: bool = False


def grids_of(built: Grid | tuple[Grid, ...]) -> tuple[Grid, ...]:
    """What a template returned, as a sequence."""
    return (built,) if isinstance(built, Grid) else built


def blocks_of(size: int, part: int) -> int:
    """How many parts cover ``size``."""
    return -(-size // part)


def widest(*extents: int, itemsize: int = 4) -> int:
    """The widest load (8, 4, 2 or 1 elements, at most 16 bytes) that divides every extent."""
    return next(v for v in (8, 4, 2, 1) if v * itemsize <= 16 and all(extent % v == 0 for extent in extents))
