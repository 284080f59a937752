"""What ranks tell each other, over any transport: all-reduce and exchange on top of an all-gather.

A transport gathers flat bytes from all ranks. Sums are taken in rank order, so every rank gets the
same bits, and a run gives the same bits whatever the transport.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np

from ..errors import RunLost
from ..scheduler import AllReduce, Exchange
from ..spec import Array

TIMEOUT_S = 120.0


class Transport(ABC):
    """The way between ``ranks`` participants, seen by one of them."""

    rank: int
    ranks: int

    @abstractmethod
    def gather(self, parts: Sequence[Array]) -> list[Array]:
        """The bytes of all ranks' ``parts`` (contiguous arrays, concatenated), one flat uint8 array a rank, or longer.

        What is returned may be overwritten by the gather after the next. Ranks may give different
        amounts. Raises RunLost when a rank does not come in time, or the run was given up.
        """

    @abstractmethod
    def close(self) -> None:
        """Leave; a gather that waits raises RunLost."""

    def meet(self, op: Any, ins: Sequence[Array], outs: Sequence[Array]) -> None:
        """Carry out a collective of a program on this rank's buffers."""
        everyone = self.gather(ins)
        if isinstance(op, AllReduce):
            begin = 0
            for x, out in zip(ins, outs, strict=True):
                flat = out.reshape(-1)
                parts = [e[begin : begin + x.nbytes].view(x.dtype) for e in everyone]
                begin += x.nbytes
                np.copyto(flat, parts[0])
                for part in parts[1:]:
                    np.add(flat, part, out=flat)
        elif isinstance(op, Exchange):
            for source, data in enumerate(everyone):
                both = op.overlap(source)
                if both:
                    shape, dtype = op.have[source].shape, outs[0].dtype
                    block = data[: prod(shape) * dtype.itemsize].view(dtype).reshape(shape)
                    outs[0][both[1]] = block[both[0]]
        else:
            raise TypeError(f"not a collective: {op!r}")


class Alone(Transport):
    """The transport of a plan with one rank."""

    rank, ranks = 0, 1

    def gather(self, parts: Sequence[Array]) -> list[Array]:
        return [np.concatenate([p.reshape(-1).view(np.uint8) for p in parts])]

    def close(self) -> None:
        """Nothing to leave."""


class Threads(Transport):
    """Ranks that are threads of one process; make all of them with `Threads.of`."""

    def __init__(self, rank: int, parts: list[Array | None], barrier: threading.Barrier) -> None:
        self.rank, self.ranks = rank, len(parts)
        self._parts, self._barrier = parts, barrier

    @classmethod
    def of(cls, ranks: int, *, timeout_s: float = TIMEOUT_S) -> tuple[Threads, ...]:
        """One transport a rank."""
        parts: list[Array | None] = [None] * ranks
        barrier = threading.Barrier(ranks, timeout=timeout_s)
        return tuple(cls(rank, parts, barrier) for rank in range(ranks))

    def gather(self, parts: Sequence[Array]) -> list[Array]:
        self._parts[self.rank] = np.concatenate([p.reshape(-1).view(np.uint8) for p in parts])
        try:
            self._barrier.wait()
            everyone = [part for part in self._parts if part is not None]
            self._barrier.wait()
        except threading.BrokenBarrierError:
            raise RunLost(f"rank {self.rank}: another rank of this process stopped, or did not come in time.") from None
        return everyone

    def close(self) -> None:
        self._barrier.abort()
