"""Ranks of several hosts meet over `distributed.comm`: listeners of their own, on the cluster's protocol.

Every rank listens and connects to every other; a gather sends this rank's bytes to all and waits for
theirs. TLS and its certificates are the worker's own.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np
from distributed.comm import CommClosedError, connect, listen
from distributed.comm.addressing import get_address_host, parse_address
from distributed.protocol import to_serialize
from distributed.utils import sync

from ..errors import RunLost
from ..spec import Array
from .transport import TIMEOUT_S, Transport


class Peers(Transport):
    """Rank ``rank`` of ``ranks``, on a Dask worker. `open` first, then `connect` with everyone's addresses."""

    def __init__(self, worker: Any, rank: int, ranks: int, *, timeout_s: float = TIMEOUT_S) -> None:
        self.rank, self.ranks, self.timeout_s = rank, ranks, timeout_s
        self._worker, self._loop = worker, worker.loop
        self._comms: dict[int, Any] = {}
        self._inbox: dict[tuple[int, int], asyncio.Future[Array]] = {}
        self._count = 0
        self._error: Exception | None = None
        self._listener: Any = None

    def open(self) -> str:
        """Listen; the address that others connect to."""
        return str(sync(self._loop, self._listen))

    def connect(self, addresses: Sequence[str]) -> None:
        """Connect to the other ranks."""
        sync(self._loop, self._connect, list(addresses))

    def gather(self, parts: Sequence[Array]) -> list[Array]:
        self._count += 1
        mine = np.concatenate([p.reshape(-1).view(np.uint8) for p in parts])
        try:
            return list(sync(self._loop, self._gather, self._count, mine))
        except TimeoutError:
            missing = [r for r in range(self.ranks) if (r, self._count) in self._inbox]
            raise RunLost(
                f"rank {self.rank}: rank {missing[0] if missing else '?'} did not come to collective {self._count} "
                f"in {self.timeout_s:g} s. Its worker may be dead or stopped; resume from the last snapshot."
            ) from None
        except (CommClosedError, OSError) as error:
            raise RunLost(f"rank {self.rank}: the connection to another rank broke ({error}).") from error

    def close(self) -> None:
        self._loop.add_callback(self._close)  # not awaited: this may be the loop's own thread

    async def _listen(self) -> str:
        protocol, _ = parse_address(self._worker.address)
        host = get_address_host(self._worker.address)
        arguments = self._worker.security.get_listen_args("worker")
        self._listener = await listen(f"{protocol}://{host}:0", self._accept, **arguments)
        return str(self._listener.contact_address)

    async def _connect(self, addresses: list[str]) -> None:
        arguments = self._worker.security.get_connection_args("worker")
        for rank, address in enumerate(addresses):
            if rank != self.rank:
                self._comms[rank] = await connect(address, timeout=self.timeout_s, **arguments)

    async def _accept(self, comm: Any) -> None:
        """Read what one other rank sends, until it leaves."""
        try:
            while True:
                message = await comm.read()
                data = np.frombuffer(message["data"], np.uint8)
                future = self._expect(message["rank"], message["count"])
                if not future.done():
                    future.set_result(data)
        except (CommClosedError, OSError) as error:
            self._fail(RunLost(f"rank {self.rank}: another rank closed its connection ({error})."))

    def _expect(self, rank: int, count: int) -> asyncio.Future[Array]:
        if (rank, count) not in self._inbox:
            self._inbox[rank, count] = asyncio.get_running_loop().create_future()
            if self._error is not None:
                self._inbox[rank, count].set_exception(self._error)
        return self._inbox[rank, count]

    async def _gather(self, count: int, mine: Array) -> list[Array]:
        others = [rank for rank in range(self.ranks) if rank != self.rank]
        expected = {rank: self._expect(rank, count) for rank in others}
        message = {"rank": self.rank, "count": count, "data": to_serialize(mine.data)}
        await asyncio.gather(*(self._comms[rank].write(message) for rank in others))
        async with asyncio.timeout(self.timeout_s):
            got = {rank: await future for rank, future in expected.items()}
        for rank in others:
            del self._inbox[rank, count]
        return [mine if rank == self.rank else got[rank] for rank in range(self.ranks)]

    def _fail(self, error: Exception) -> None:
        self._error = self._error or error
        for future in self._inbox.values():
            if not future.done():
                future.set_exception(error)
                future.exception()  # seen: no warning where nobody waits

    async def _close(self) -> None:
        self._fail(RunLost(f"rank {self.rank}: the run was given up."))
        for comm in self._comms.values():
            await comm.close()
        if self._listener is not None:
            self._listener.stop()
