"""Workers of benchmarks/links.py: sums over comms, or by hosts, and bytes through a socket of their own, in turns."""

from __future__ import annotations

import socket
import time
from dataclasses import dataclass
from threading import Thread
from typing import Any

import numpy as np
from distributed import get_worker
from distributed.comm.addressing import get_address_host

from rapydli_flow.runtime.hosts import Hosts
from rapydli_flow.runtime.peers import Peers
from rapydli_flow.runtime.shared import SharedMemory
from rapydli_flow.scheduler import AllReduce
from rapydli_flow.scheduler.collective import halves
from rapydli_flow.scheduler.topology import Topology

_open: dict[int, Any] = {}


@dataclass(frozen=True)
class Only(Topology):
    """One way for all sums."""

    way: str = ""

    def choose(self, ranks: tuple[int, ...], size_bytes: int) -> str:
        """The way, and any that there is for ranks of several hosts alone."""
        return self.way if len(ranks) == len(self.hosts) else super().choose(ranks, size_bytes)


def listen(rank: int) -> tuple[str, tuple[str, int]]:
    """Where the other one reaches this rank, and its socket."""
    worker = get_worker()
    peers = Peers(worker, rank, 2)
    plain = socket.create_server((get_address_host(worker.address), 0))
    _open[rank] = peers, plain
    return peers.open(), plain.getsockname()


def measure(rank: int, addresses: list[Any], size: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of each round: of a sum of ``size`` bytes, and of as many bytes from rank 0 to rank 1."""
    peers, server = _open.pop(rank)
    peers.connect([address for address, _ in addresses])
    plain = server.accept()[0] if rank == 0 else socket.create_connection(addresses[0][1])
    server.close()
    try:
        return _rounds(rank, peers, plain, size, rounds)
    finally:
        peers.close()
        plain.close()


def _rounds(rank: int, peers: Peers, plain: socket.socket, size: int, rounds: int) -> dict[str, list[float]]:
    drawn = [np.random.default_rng(r).standard_normal(size // 4, dtype=np.float32) for r in range(2)]
    mine, whole = drawn[rank], drawn[0] + drawn[1]
    out, found = np.empty_like(mine), np.empty_like(mine)
    times: dict[str, list[float]] = {"sum": [], "plain": []}
    for _ in range(1 + rounds):
        begin = time.perf_counter()
        peers.meet("the sum", AllReduce(ranks=(0, 1)), [mine], [out])
        between = time.perf_counter()
        _both_ways(plain, mine, found)
        times["sum"].append(between - begin)
        times["plain"].append(time.perf_counter() - between)
    if not np.array_equal(out, whole) or not np.array_equal(found, drawn[1 - rank]):
        raise ValueError(f"rank {rank} did not get what it should")
    return {name: each[1:] for name, each in times.items()}


def _both_ways(plain: socket.socket, data: Any, found: Any) -> None:
    """All of an array to the other one, and all of its array from it, at the same time."""
    sending = Thread(target=plain.sendall, args=(data,))
    sending.start()
    view, got = memoryview(found).cast("B"), 0
    while got < len(view):
        got += plain.recv_into(view[got:])
    sending.join()


# ranks that share hosts -------------------------------------------------------------------------------


def open_all(rank: int, ranks: int, run: str) -> str:
    """A rank of two hosts with equally many ranks: its end; the first ones of a host make its memory."""
    peers, topology = Peers(get_worker(), rank, ranks), Topology(tuple(r // (ranks // 2) for r in range(ranks)))
    peers.topology = topology
    _open[rank] = peers, _memory(rank, run, topology) if rank % (ranks // 2) == 0 else None
    return peers.open()


def measure_all(rank: int, addresses: list[str], run: str, size: int, rounds: int, ways: list[str]) -> list[Any]:
    """Seconds of each round of a sum, each way."""
    far, near = _open.pop(rank)
    far.connect(addresses)
    near = near or _memory(rank, run, far.topology)
    ends = Hosts(far, far.topology.beside(rank), near)
    drawn = [np.random.default_rng(r).standard_normal(size // 4, dtype=np.float32) for r in range(ends.ranks)]
    op, out = AllReduce(ranks=tuple(range(ends.ranks))), np.empty_like(drawn[rank])
    times: list[list[float]] = [[] for _ in ways]
    try:
        for _ in range(1 + rounds):
            for way, each in zip(ways, times, strict=True):
                ends.topology = Only(far.topology.hosts, way=way)
                begin = time.perf_counter()
                ends.meet("the sum", op, [drawn[rank]], [out])
                each.append(time.perf_counter() - begin)
                if not np.array_equal(out, halves(drawn)):
                    raise ValueError(f"rank {rank} did not get what it should")
    finally:
        ends.joined()
        ends.close()
    return [each[1:] for each in times]


def _memory(rank: int, run: str, topology: Topology) -> SharedMemory:
    here = topology.beside(rank)
    return SharedMemory(f"{run}-{topology.hosts[rank]}", here.index(rank), len(here), Hosts.chunk_bytes)
