"""The two workers of benchmarks/links.py: a sum over `Peers`, and bytes through a socket of their own, in turns."""

from __future__ import annotations

import socket
import time
from typing import Any

import numpy as np
from distributed import get_worker
from distributed.comm.addressing import get_address_host

from rapydli_flow.runtime.peers import Peers
from rapydli_flow.scheduler import AllReduce

OP = AllReduce(ranks=(0, 1))
_open: dict[int, tuple[Peers, socket.socket]] = {}


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
        peers.meet("the sum", OP, [mine], [out])
        between = time.perf_counter()
        _one_way(rank, plain, mine if rank == 0 else found)
        times["sum"].append(between - begin)
        times["plain"].append(time.perf_counter() - between)
    if not np.array_equal(out, whole) or (rank == 1 and not np.array_equal(found, drawn[0])):
        raise ValueError(f"rank {rank} did not get what it should")
    return {name: each[1:] for name, each in times.items()}


def _one_way(rank: int, plain: socket.socket, data: Any) -> None:
    """All of an array from rank 0 to rank 1, until rank 1 says that it is there."""
    if rank == 0:
        plain.sendall(data)
        plain.recv(1)
        return
    view, got = memoryview(data).cast("B"), 0
    while got < len(view):
        got += plain.recv_into(view[got:])
    plain.sendall(b"!")
