"""Cards that NumPy plays hand each other memory: over sockets of this host, so that they may be in one process or in
several. As NCCL's, sums have an order of their own: that of the ranks.
"""

from __future__ import annotations

import ctypes
import json
import socket
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

import numpy as np

from rapydli_flow.errors import RunLost
from rapydli_flow.spec import Array

from .card import Alive, Communicator

if TYPE_CHECKING:
    from .card import Accelerator

POLL_S = 0.02
HERE = "127.0.0.1"
_waiting: dict[bytes, socket.socket] = {}  # of the first rank of meetings to come


def new_meeting() -> bytes:
    """What cards find each other by: where the first one listens."""
    listener = _listener()
    meeting = str(listener.getsockname()[1]).encode()
    _waiting[meeting] = listener
    return meeting


def _listener() -> socket.socket:
    listener = socket.create_server((HERE, 0))
    listener.settimeout(POLL_S)
    return listener


class Meeting(Communicator):
    """One rank's connections to all others. The first one tells the rest where each of them listens."""

    def __init__(self, meeting: bytes, rank: int, ranks: int, alive: Alive) -> None:
        self.rank, self.ranks, self._alive, self._aborted = rank, ranks, alive, False
        self._others: dict[int, Connection] = {}
        self._sending = ThreadPoolExecutor(1, thread_name_prefix="rapydli-emulated-nccl")
        with _waiting.pop(meeting) if rank == 0 else _listener() as listener:
            if rank == 0:
                ports = {"0": 0}
                for _ in range(1, ranks):
                    other = self._accepted(listener)
                    number, port = json.loads(self._taken(other))
                    self._others[number], ports[str(number)] = other, port
                for other in self._others.values():
                    other.send_bytes(json.dumps(ports).encode())
                return
            first = self._others[0] = _connected(int(meeting))
            first.send_bytes(json.dumps((rank, listener.getsockname()[1])).encode())
            ports = json.loads(self._taken(first))
            for number in range(1, rank):
                self._others[number] = _connected(ports[str(number)])
                self._others[number].send_bytes(str(rank).encode())
            for _ in range(rank + 1, ranks):
                other = self._accepted(listener)
                self._others[int(self._taken(other))] = other

    def all_reduce(self, queue: Accelerator, sums: Sequence[tuple[int, int, int]], dtype: str) -> None:
        item = np.dtype(dtype).itemsize
        mine = b"".join(ctypes.string_at(source, elements * item) for source, _, elements in sums)
        others = [r for r in range(self.ranks) if r != self.rank]
        got = self._swapped(dict.fromkeys(others, mine), others) | {self.rank: mine}
        total = np.frombuffer(got[0], dtype).copy()
        for rank in range(1, self.ranks):
            total += np.frombuffer(got[rank], dtype)
        first = 0
        for _, target, elements in sums:
            _write(target, total[first : first + elements])
            first += elements

    def swap(
        self, queue: Accelerator, sends: Sequence[tuple[int, int, int]], gets: Sequence[tuple[int, int, int]]
    ) -> None:
        outgoing = {rank: ctypes.string_at(address, size) for rank, address, size in sends}
        got = self._swapped(outgoing, [rank for rank, _, _ in gets])
        for rank, address, size_bytes in gets:
            if len(got[rank]) != size_bytes:
                raise AssertionError(f"rank {rank} sent {len(got[rank])} bytes, not {size_bytes}")
            _write(address, np.frombuffer(got[rank], np.uint8))

    def check(self) -> None:
        if self._aborted:
            raise RunLost("the cards do not meet any more: the run was given up.")

    def abort(self) -> None:
        self._aborted = True
        self._sending.shutdown(wait=False, cancel_futures=True)
        for other in self._others.values():
            other.close()

    def _swapped(self, sends: Mapping[int, bytes], sources: Sequence[int]) -> dict[int, bytes]:
        """What each of some ranks sends, while this one sends."""

        def send() -> None:
            for rank, data in sends.items():
                self._others[rank].send_bytes(data)

        self.check()
        sent = self._sending.submit(send)
        got = {rank: self._taken(self._others[rank]) for rank in sources}
        try:
            sent.result()
        except OSError as error:
            raise RunLost(f"another card is gone ({error}).") from error
        return got

    def _taken(self, other: Connection) -> bytes:
        """The next message of a rank."""
        try:
            self._until(lambda: other.poll(POLL_S))
            return other.recv_bytes()
        except (EOFError, OSError) as error:
            raise RunLost(f"another card is gone ({error or 'it closed its connection'}).") from error

    def _accepted(self, listener: socket.socket) -> Connection:
        found: list[socket.socket] = []

        def comes() -> bool:
            try:
                found.append(listener.accept()[0])
            except TimeoutError:
                return False
            return True

        self._until(comes)
        return _connection(found[0])

    def _until(self, done: Callable[[], bool]) -> None:
        waited_s = 0.0
        while not done():
            waited_s += POLL_S
            self._alive(waited_s)


def _connected(port: int) -> Connection:
    try:
        return _connection(socket.create_connection((HERE, port)))
    except OSError as error:
        raise RunLost(f"another card is gone ({error}).") from error


def _connection(end: socket.socket) -> Connection:
    end.settimeout(None)
    return Connection(end.detach())


def _write(address: int, data: Array) -> None:
    ctypes.memmove(address, data.ctypes.data, data.nbytes)
